"""Gated activation in one pass each way; `swiglu.cpp` has the passes and their cost. fp32 inside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_kernels.cpu.operators import FLOATS, operator
from moe_kernels.reference import swiglu as reference


def swiglu(gate_up_N2F: Tensor, limit: float | None = None) -> Tensor:
    """silu(gate) * up; `limit` clamps the gate from above and up from both sides first."""
    if gate_up_N2F.dtype not in FLOATS:
        return reference.swiglu(gate_up_N2F, limit)
    *outer, width = gate_up_N2F.shape
    rows_N2F = gate_up_N2F.contiguous().view(-1, width)
    return torch.ops.moe_kernels_cpu.swiglu(rows_N2F, limit).view(*outer, width // 2)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.limit = inputs[1]


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return torch.ops.moe_kernels_cpu.swiglu_backward(grad.contiguous(), *ctx.saved_tensors, ctx.limit), None


operator(
    "swiglu(Tensor gate_up, float? limit) -> Tensor",
    lambda gate_up, limit: gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2),
    (_keep, _gradients),
)
operator(
    "swiglu_backward(Tensor grad, Tensor gate_up, float? limit) -> Tensor",
    lambda grad, gate_up, limit: torch.empty_like(gate_up),
)
