"""Rotary position embedding of the last channels in one pass; `rope.cpp` has it and its cost. fp32 inside.

Shapes: B batch, S tokens, H heads, R rotary channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_kernels.cpu.operators import FLOATS, all_are, operator
from moe_kernels.reference import rope as reference


def rotate(x_BSHR: Tensor, cos_BS1R: Tensor, sin_BS1R: Tensor, inverse: bool = False) -> Tensor:
    """Rotate each pair (2i, 2i + 1) of the last channels; the dtype of `x_BSHR` is kept."""
    if x_BSHR.dtype not in FLOATS or not all_are(torch.float32, cos_BS1R, sin_BS1R):
        return reference.rotate(x_BSHR, cos_BS1R, sin_BS1R, inverse)
    tensors = (tensor.contiguous() for tensor in (x_BSHR, cos_BS1R, sin_BS1R))
    return torch.ops.moe_kernels_cpu.rotate(*tensors, inverse)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:3])
    ctx.inverse = inputs[3]


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.moe_kernels_cpu.rotate(grad.contiguous(), *ctx.saved_tensors, not ctx.inverse), None, None, None


operator(
    "rotate(Tensor x, Tensor cosine, Tensor sine, bool inverse) -> Tensor",
    lambda x, cosine, sine, inverse: torch.empty_like(x),
    (_keep, _gradients),
)
