"""Gated activation in one pass each way, clamped on request. fp32 inside. Shapes: N rows, F width."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.reference import swiglu as reference
from moe_kernels.triton.tiles import fit, grid, spot, tile


def swiglu(gate_up_N2F: Tensor, limit: float | None = None) -> Tensor:
    """silu(gate) * up; `limit` clamps the gate from above and up from both sides first."""
    if not fit(gate_up_N2F):
        return reference.swiglu(gate_up_N2F, limit)
    *outer, width = gate_up_N2F.shape
    return _SwiGlu.apply(gate_up_N2F.contiguous().view(-1, width), limit).view(*outer, width // 2)


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_N2F: Tensor, limit: float | None) -> Tensor:
        ctx.save_for_backward(gate_up_N2F)
        ctx.limit = limit
        rows, width = gate_up_N2F.shape[0], gate_up_N2F.shape[1] // 2
        out_NF = gate_up_N2F.new_empty(rows, width)
        _forward[_grid(out_NF)](gate_up_N2F, out_NF, rows, limit or 0.0, width, *tile(width), limit is not None)
        return out_NF

    @staticmethod
    def backward(ctx: Any, grad_NF: Tensor) -> tuple[Tensor, None]:
        (gate_up_N2F,), limit = ctx.saved_tensors, ctx.limit
        d_gate_up_N2F, (rows, width) = torch.empty_like(gate_up_N2F), grad_NF.shape
        tensors = (grad_NF.contiguous(), gate_up_N2F, d_gate_up_N2F)
        _backward[_grid(grad_NF)](*tensors, rows, limit or 0.0, width, *tile(width), limit is not None)
        return d_gate_up_N2F, None


def _grid(out_NF: Tensor) -> tuple[int]:
    rows, columns = tile(out_NF.shape[1])
    return grid(triton.cdiv(len(out_NF), rows) * triton.cdiv(out_NF.shape[1], columns), out_NF)


@triton.jit
def gated(gate, up, limit, LIMITED: tl.constexpr) -> tl.tensor:
    """(sigmoid of the gate, gate, up), clamped."""
    if LIMITED:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
    return tl.sigmoid(gate), gate, up


@triton.jit
def slopes(grad, raw_gate, raw_up, limit, LIMITED: tl.constexpr) -> tl.tensor:
    """Gradients of gate and up; none for what was cut."""
    share, gate, up = gated(raw_gate, raw_up, limit, LIMITED)
    d_gate = grad * up * share * (1.0 + gate * (1.0 - share))
    d_up = grad * gate * share
    if LIMITED:
        d_gate = tl.where(raw_gate > limit, 0.0, d_gate)
        d_up = tl.where(tl.abs(raw_up) > limit, 0.0, d_up)
    return d_gate, d_up


@triton.jit
def _forward(
    gate_up, out, rows, limit,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LIMITED: tl.constexpr,
) -> None:  # fmt: skip
    tasks = tl.cdiv(rows, ROWS) * tl.cdiv(WIDTH, COLUMNS)
    for task in range(tl.program_id(0), tasks, tl.num_programs(0)):
        first, row, column, inside = spot(task, rows, WIDTH, ROWS, COLUMNS)
        source = gate_up + first * (2 * WIDTH)
        at = row * (2 * WIDTH) + column
        raw_gate = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
        raw_up = tl.load(source + at + WIDTH, mask=inside, other=0.0).to(tl.float32)
        share, gate, up = gated(raw_gate, raw_up, limit, LIMITED)
        value = gate * share * up
        tl.store(out + first * WIDTH + row * WIDTH + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    grad, gate_up, d_gate_up, rows, limit,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LIMITED: tl.constexpr,
) -> None:  # fmt: skip
    tasks = tl.cdiv(rows, ROWS) * tl.cdiv(WIDTH, COLUMNS)
    for task in range(tl.program_id(0), tasks, tl.num_programs(0)):
        first, row, column, inside = spot(task, rows, WIDTH, ROWS, COLUMNS)
        source = gate_up + first * (2 * WIDTH)
        target = d_gate_up + first * (2 * WIDTH)
        at = row * (2 * WIDTH) + column
        raw_gate = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
        raw_up = tl.load(source + at + WIDTH, mask=inside, other=0.0).to(tl.float32)
        slope = tl.load(grad + first * WIDTH + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
        d_gate, d_up = slopes(slope, raw_gate, raw_up, limit, LIMITED)
        tl.store(target + at, d_gate.to(d_gate_up.dtype.element_ty), mask=inside)
        tl.store(target + at + WIDTH, d_up.to(d_gate_up.dtype.element_ty), mask=inside)
