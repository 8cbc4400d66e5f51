"""Rotary position embedding of adjacent channel pairs, arXiv 2104.09864, equation 34, in fp32.

Shapes: B batch, S tokens, H heads, R rotary channels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x_BSHR: Tensor, cos_BS1R: Tensor, sin_BS1R: Tensor, inverse: bool = False) -> Tensor:
    """Rotate each pair (2i, 2i + 1) of the last channels; the dtype of `x_BSHR` is kept."""
    kept, turned = split_last(x_BSHR, 2 * cos_BS1R.shape[-1])
    sin_BS1R = -sin_BS1R if inverse else sin_BS1R
    even, odd = turned.float().unflatten(-1, (-1, 2)).unbind(-1)
    pairs = torch.stack([even * cos_BS1R - odd * sin_BS1R, odd * cos_BS1R + even * sin_BS1R], dim=-1)
    return join_last(kept, pairs.flatten(-2).to(x_BSHR.dtype))


def split_last(x: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """(the channels before, the last `channels`)."""
    return x[..., : x.shape[-1] - channels], x[..., x.shape[-1] - channels :]


def join_last(kept: Tensor, turned: Tensor) -> Tensor:
    """Both parts of `split_last` in one tensor."""
    return torch.cat([kept, turned], dim=-1) if kept.shape[-1] else turned
