"""The routed experts of one layer: sort by counting, both products of the gate with the activation in one launch, the
product back, the sum of each token's rows. The mixing weight is folded into the hidden activation.

Shapes: T tokens, D hidden size, F expert width, E experts, K experts per token, N = T * K rows sorted by expert.
Kept for the backward pass are the sorted rows, gate and up before the clamp, and the hidden activation.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.autocast import in_autocast_dtype
from moe_kernels.reference import experts as reference
from moe_kernels.triton.grouped_matmul import (
    COLUMNS,
    INNER,
    ROWS,
    find,
    most_tiles,
    outer_products,
    products,
    rows_of_experts,
    weight_tile,
)
from moe_kernels.triton.permute import combine, gather, sorted_places
from moe_kernels.triton.swiglu import gated, slopes
from moe_kernels.triton.tiles import fit, grid, multiply, side

BLOCK = 1024  # hidden channels of a row at a time


def experts(
    x_TD: Tensor,
    indices_TK: Tensor,
    weights_TK: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    limit: float | None = None,
) -> Tensor:
    """Mixture of SwiGLU experts, [T, D] -> [T, D], in the dtype of autocast where that is on, else of `x_TD`."""
    x, gate_up, down = in_autocast_dtype(x_TD, gate_up_E2FD, down_EDF)
    if not fit(x, weights_TK) or not x.dtype == gate_up.dtype == down.dtype:
        return reference.experts(x_TD, indices_TK, weights_TK, gate_up_E2FD, down_EDF, limit)
    tensors = (x.contiguous(), indices_TK, weights_TK.contiguous(), gate_up.contiguous(), down.contiguous())
    return _Experts.apply(*tensors, limit)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor, gate_up: Tensor, down: Tensor, limit: Any
    ) -> Tensor:
        places_TK, counts_E = sorted_places(indices_TK, len(gate_up))
        x_ND, scale_N = gather(x_TD, places_TK), gather(weights_TK.view(-1, 1), places_TK.view(-1, 1)).view(-1)
        gate_up_N2F, hidden_NF = _hidden(x_ND, gate_up, counts_E, scale_N, limit)
        ctx.save_for_backward(x_ND, gate_up_N2F, hidden_NF, scale_N, places_TK, counts_E, gate_up, down)
        ctx.limit = limit
        return combine(products(hidden_NF, down, counts_E, transposed=True), places_TK)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, gate_up_N2F, hidden_NF, scale_N, places_TK, counts_E, gate_up, down = ctx.saved_tensors
        grad_ND = gather(grad_TD.contiguous(), places_TK)
        d_hidden_NF = products(grad_ND, down, counts_E, transposed=False)
        d_gate_up_N2F, d_scale_N = torch.empty_like(gate_up_N2F), torch.empty_like(scale_N)
        rows, width = hidden_NF.shape
        _activation[grid(rows, x_ND)](
            d_hidden_NF, gate_up_N2F, scale_N, d_gate_up_N2F, d_scale_N, rows, ctx.limit or 0.0,
            width, min(BLOCK, triton.next_power_of_2(width)), ctx.limit is not None,
        )  # fmt: skip
        d_x_TD = combine(products(d_gate_up_N2F, gate_up, counts_E, transposed=False), places_TK)
        d_weights_TK = d_scale_N[places_TK.flatten()].view_as(places_TK)
        d_gate_up, d_down = outer_products(d_gate_up_N2F, x_ND, counts_E), outer_products(grad_ND, hidden_NF, counts_E)
        return d_x_TD, None, d_weights_TK, d_gate_up, d_down, None


def _hidden(
    x_ND: Tensor, gate_up: Tensor, counts_E: Tensor, scale_N: Tensor, limit: float | None
) -> tuple[Tensor, Tensor]:
    """(gate and up [N, 2F], silu(gate) * up * scale [N, F])."""
    (rows, inner), width = x_ND.shape, gate_up.shape[1] // 2
    gate_up_N2F, hidden_NF = x_ND.new_empty(rows, 2 * width), x_ND.new_empty(rows, width)
    sizes = (side(rows, ROWS), side(width, COLUMNS), side(inner, INNER))
    tasks = most_tiles(rows, len(gate_up), sizes[0]) * triton.cdiv(width, sizes[1])
    tensors = (x_ND, gate_up, counts_E, scale_N, gate_up_N2F, hidden_NF)
    numbers = (len(gate_up), triton.next_power_of_2(len(gate_up)), inner, width, *sizes, limit is not None)
    _gate_up[grid(tasks, x_ND)](*tensors, limit or 0.0, *numbers)
    return gate_up_N2F, hidden_NF


@triton.jit
def _gate_up(
    x, weight, counts, scales, gate_up, hidden, limit,
    EXPERTS: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr, OUTER: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, LIMITED: tl.constexpr,
) -> None:  # fmt: skip
    """A task is a tile of the hidden activation: its rows meet the tile's columns of the gate and those of up."""
    counts_E = rows_of_experts(counts, EXPERTS, PADDED)
    across = tl.cdiv(OUTER, COLUMNS)
    tiles = tl.sum((counts_E + (ROWS - 1)) // ROWS, axis=0)
    row = tl.arange(0, ROWS)
    for task in range(tl.program_id(0), tiles * across, tl.num_programs(0)):
        expert, start, left = find(task // across, counts_E, PADDED, ROWS)
        column = (task % across) * COLUMNS + tl.arange(0, COLUMNS)
        matrix = weight + expert.to(tl.int64) * (2 * OUTER * WIDTH)
        source = x + start * WIDTH
        gate = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        up = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for at in range(0, WIDTH, INNER):
            inner = at + tl.arange(0, INNER)
            mask = (row[:, None] < left) & (inner[None, :] < WIDTH)
            part = tl.load(source + row[:, None] * WIDTH + inner[None, :], mask=mask, other=0.0)
            gate += multiply(part, weight_tile(matrix, inner, column, WIDTH, OUTER, True))
            up += multiply(part, weight_tile(matrix + OUTER * WIDTH, inner, column, WIDTH, OUTER, True))
        mask = (row[:, None] < left) & (column[None, :] < OUTER)
        kept = gate_up + start * (2 * OUTER) + (row[:, None] * (2 * OUTER) + column[None, :])
        tl.store(kept, gate.to(gate_up.dtype.element_ty), mask=mask)
        tl.store(kept + OUTER, up.to(gate_up.dtype.element_ty), mask=mask)
        scale = tl.load(scales + start + row, mask=row < left, other=0.0).to(tl.float32)
        share, gate, up = gated(gate, up, limit, LIMITED)
        value = gate * share * up * scale[:, None]
        target = hidden + start * OUTER + (row[:, None] * OUTER + column[None, :])
        tl.store(target, value.to(hidden.dtype.element_ty), mask=mask)


@triton.jit
def _activation(
    d_hidden, gate_up, scales, d_gate_up, d_scale, rows, limit,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, LIMITED: tl.constexpr,
) -> None:  # fmt: skip
    """A task is a row: gradients of gate and up, and of the mixing weight, d_hidden . silu(gate) * up."""
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        first = tl.cast(row, tl.int64) * WIDTH
        scale = tl.load(scales + row).to(tl.float32)
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, WIDTH, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < WIDTH
            slope = tl.load(d_hidden + first + column, mask=inside, other=0.0).to(tl.float32)
            raw_gate = tl.load(gate_up + 2 * first + column, mask=inside, other=0.0).to(tl.float32)
            raw_up = tl.load(gate_up + 2 * first + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
            share, gate, up = gated(raw_gate, raw_up, limit, LIMITED)
            total += slope * gate * share * up
            d_gate, d_up = slopes(slope * scale, raw_gate, raw_up, limit, LIMITED)
            tl.store(d_gate_up + 2 * first + column, d_gate.to(d_gate_up.dtype.element_ty), mask=inside)
            tl.store(d_gate_up + 2 * first + WIDTH + column, d_up.to(d_gate_up.dtype.element_ty), mask=inside)
        tl.store(d_scale + row, tl.sum(total, axis=0).to(d_scale.dtype.element_ty))
