"""Root-mean-square normalisation in one pass each way; `rms_norm.cpp` has the passes and their cost. fp32 inside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_kernels.cpu.operators import FLOATS, operator
from moe_kernels.reference import rms_norm as reference


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last axis."""
    if x.dtype not in FLOATS or not x.shape[-1]:
        return reference.rms_norm(x, weight, eps)
    rows_ND = x.contiguous().view(-1, x.shape[-1])
    factors = None if weight is None else weight.float().contiguous()
    return torch.ops.moe_kernels_cpu.rms_norm(rows_ND, factors, eps)[0].view(x.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, output[1])


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, inverse = ctx.saved_tensors
    d_x, d_weight = torch.ops.moe_kernels_cpu.rms_norm_backward(grad.contiguous(), x, weight, inverse)
    return d_x, None if weight is None else d_weight, None


operator(
    "rms_norm(Tensor x, Tensor? weight, float eps) -> (Tensor, Tensor)",
    lambda x, weight, eps: (torch.empty_like(x), x.new_empty(x.shape[0], dtype=torch.float32)),
    (_keep, _gradients),
)
operator(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor inverse) -> (Tensor, Tensor)",
    lambda grad, x, weight, inverse: (
        torch.empty_like(x),
        inverse.new_empty(0 if weight is None else x.shape[1]),
    ),
)
