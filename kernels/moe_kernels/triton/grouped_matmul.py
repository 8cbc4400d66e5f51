"""All experts in one launch, forwards and backwards; how many rows an expert has is read on the device alone.

Shapes: N rows, D inputs, F outputs, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.reference import grouped_matmul as reference
from moe_kernels.triton.tiles import fit, grid, multiply, side

ROWS, COLUMNS, INNER = 64, 64, 32  # most of a tile


def grouped_matmul(x_ND: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
    """x @ weight[e]^T for the rows of each expert."""
    if not fit(x_ND, weight_EFD) or x_ND.dtype is not weight_EFD.dtype:
        return reference.grouped_matmul(x_ND, weight_EFD, counts_E)
    return _GroupedMatmul.apply(*(tensor.contiguous() for tensor in (x_ND, weight_EFD, counts_E)))


class _GroupedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_ND, weight_EFD, counts_E)
        return products(x_ND, weight_EFD, counts_E, transposed=True)

    @staticmethod
    def backward(ctx: Any, grad_NF: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x_ND, weight_EFD, counts_E), grad_NF = ctx.saved_tensors, grad_NF.contiguous()
        d_x_ND = products(grad_NF, weight_EFD, counts_E, transposed=False) if ctx.needs_input_grad[0] else None
        d_weight_EFD = outer_products(grad_NF, x_ND, counts_E) if ctx.needs_input_grad[1] else None
        return d_x_ND, d_weight_EFD, None


def products(x: Tensor, weight: Tensor, counts_E: Tensor, transposed: bool) -> Tensor:
    """x [N, D] @ weight[e] for the rows of each expert; weights are [E, D, F], or [E, F, D] where transposed."""
    rows, inner = x.shape
    outer = weight.shape[1 if transposed else 2]
    out, sizes = x.new_empty(rows, outer), (side(rows, ROWS), side(outer, COLUMNS), side(inner, INNER))
    tasks = most_tiles(rows, len(weight), sizes[0]) * triton.cdiv(outer, sizes[1])
    numbers = (len(weight), triton.next_power_of_2(len(weight)), inner, outer, *sizes, transposed)
    _rows[grid(tasks, x)](x, weight, counts_E, out, *numbers)
    return out


def outer_products(left: Tensor, right: Tensor, counts_E: Tensor) -> Tensor:
    """left^T [F, N] @ right [N, D] over the rows of each expert, [E, F, D]; zeros for one that has none."""
    rows, width, depth, experts = *left.shape, right.shape[1], len(counts_E)
    out, sizes = left.new_empty(experts, width, depth), (side(width, ROWS), side(depth, COLUMNS), side(rows, INNER))
    tasks = experts * triton.cdiv(width, sizes[0]) * triton.cdiv(depth, sizes[1])
    _inner[grid(tasks, left)](
        left, right, counts_E, out, experts, triton.next_power_of_2(experts), width, depth, *sizes
    )
    return out


def most_tiles(rows: int, experts: int, height: int) -> int:
    """Tiles of `height` rows that experts can have together, however the rows are spread."""
    return triton.cdiv(rows, height) + min(rows, experts)


@triton.jit
def rows_of_experts(counts, EXPERTS: tl.constexpr, PADDED: tl.constexpr) -> tl.tensor:
    """Rows of each expert, int32."""
    expert = tl.arange(0, PADDED)
    return tl.load(counts + expert, mask=expert < EXPERTS, other=0).to(tl.int32)


@triton.jit
def find(tile, counts_E, PADDED: tl.constexpr, ROWS: tl.constexpr) -> tl.tensor:
    """(the expert of a tile, its first row as int64, how many rows the expert has from there on)."""
    tiles_E = (counts_E + (ROWS - 1)) // ROWS
    before = tl.cumsum(tiles_E, 0) <= tile
    expert = tl.sum(before.to(tl.int32), axis=0)
    skipped = (tile - tl.sum(tl.where(before, tiles_E, 0), axis=0)) * ROWS
    left = tl.sum(tl.where(tl.arange(0, PADDED) == expert, counts_E, 0), axis=0) - skipped
    start = tl.sum(tl.where(before, counts_E, 0), axis=0) + skipped
    return expert, start.to(tl.int64), left


@triton.jit
def weight_tile(start, inner, column, INNER: tl.constexpr, OUTER: tl.constexpr, TRANSPOSED: tl.constexpr) -> tl.tensor:
    """[inner, column] of a matrix [INNER, OUTER], or of one that is kept transposed."""
    if TRANSPOSED:
        mask = (column[:, None] < OUTER) & (inner[None, :] < INNER)
        return tl.trans(tl.load(start + column[:, None] * INNER + inner[None, :], mask=mask, other=0.0))
    mask = (inner[:, None] < INNER) & (column[None, :] < OUTER)
    return tl.load(start + inner[:, None] * OUTER + column[None, :], mask=mask, other=0.0)


@triton.jit
def _rows(
    x, weight, counts, out,
    EXPERTS: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr, OUTER: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, TRANSPOSED: tl.constexpr,
) -> None:  # fmt: skip
    """A task is a tile of the result."""
    counts_E = rows_of_experts(counts, EXPERTS, PADDED)
    across = tl.cdiv(OUTER, COLUMNS)
    tiles = tl.sum((counts_E + (ROWS - 1)) // ROWS, axis=0)
    row = tl.arange(0, ROWS)
    for task in range(tl.program_id(0), tiles * across, tl.num_programs(0)):
        expert, start, left = find(task // across, counts_E, PADDED, ROWS)
        column = (task % across) * COLUMNS + tl.arange(0, COLUMNS)
        matrix = weight + expert.to(tl.int64) * (WIDTH * OUTER)
        source = x + start * WIDTH
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for at in range(0, WIDTH, INNER):
            inner = at + tl.arange(0, INNER)
            mask = (row[:, None] < left) & (inner[None, :] < WIDTH)
            part = tl.load(source + row[:, None] * WIDTH + inner[None, :], mask=mask, other=0.0)
            total += multiply(part, weight_tile(matrix, inner, column, WIDTH, OUTER, TRANSPOSED))
        mask = (row[:, None] < left) & (column[None, :] < OUTER)
        target = out + start * OUTER + (row[:, None] * OUTER + column[None, :])
        tl.store(target, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _inner(
    left, right, counts, out,
    EXPERTS: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
) -> None:  # fmt: skip
    """A task is a tile of the gradient of an expert's weight."""
    counts_E = rows_of_experts(counts, EXPERTS, PADDED)
    across = tl.cdiv(DEPTH, COLUMNS)
    each = tl.cdiv(WIDTH, ROWS) * across
    for task in range(tl.program_id(0), EXPERTS * each, tl.num_programs(0)):
        expert = task // each
        start = tl.sum(tl.where(tl.arange(0, PADDED) < expert, counts_E, 0), axis=0).to(tl.int64)
        count = tl.sum(tl.where(tl.arange(0, PADDED) == expert, counts_E, 0), axis=0)
        row = (task % each) // across * ROWS + tl.arange(0, ROWS)
        column = (task % across) * COLUMNS + tl.arange(0, COLUMNS)
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for at in range(0, count, INNER):
            inner = tl.arange(0, INNER)
            inside = inner[:, None] < count - at
            first = left + (start + at) * WIDTH + (inner[:, None] * WIDTH + row[None, :])
            second = right + (start + at) * DEPTH + (inner[:, None] * DEPTH + column[None, :])
            a = tl.load(first, mask=inside & (row[None, :] < WIDTH), other=0.0)
            b = tl.load(second, mask=inside & (column[None, :] < DEPTH), other=0.0)
            total += multiply(tl.trans(a), b)
        mask = (row[:, None] < WIDTH) & (column[None, :] < DEPTH)
        target = out + tl.cast(expert, tl.int64) * (WIDTH * DEPTH) + (row[:, None] * DEPTH + column[None, :])
        tl.store(target, total.to(out.dtype.element_ty), mask=mask)
