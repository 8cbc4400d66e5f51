"""Rotary position embedding in one operator.

The interleaved mode takes one table of angles for the whole batch, [1, S, 1, R]. Packed documents have a table per row,
so batch and tokens become one axis first. As in the reference the rotation is in fp32.

Shapes: B batch, S tokens, H heads, R rotary channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_kernels.reference.rope import join_last, split_last

NEEDS = {"npu_rotary_mul": ("r1", "r2", "rotary_mode")}


def rotate(x_BSHR: Tensor, cos_BS1R: Tensor, sin_BS1R: Tensor, inverse: bool = False) -> Tensor:
    """Rotate each pair (2i, 2i + 1) of the last channels; the dtype of `x_BSHR` is kept."""
    kept, turned = split_last(x_BSHR, 2 * cos_BS1R.shape[-1])
    batch, tokens = turned.shape[:2]
    tables = (_table(cos_BS1R, batch), _table(-sin_BS1R if inverse else sin_BS1R, batch))
    rows_1THR = turned.float().flatten(0, 1).unsqueeze(0)
    out_1THR = torch.ops.npu.npu_rotary_mul(rows_1THR, *tables, rotary_mode="interleave")
    return join_last(kept, out_1THR.squeeze(0).unflatten(0, (batch, tokens)).to(x_BSHR.dtype))


def _table(angles_BS1R: Tensor, batch: int) -> Tensor:
    """Each angle twice, for both channels of its pair, and all rows of the batch on one axis: [1, B * S, 1, R]."""
    twice = torch.stack([angles_BS1R, angles_BS1R], dim=-1).flatten(-2)
    return twice.expand(batch, -1, -1, -1).flatten(0, 1).unsqueeze(0)
