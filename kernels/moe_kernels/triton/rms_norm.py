"""Root-mean-square normalisation, a few rows at a time in one pass each way. fp32 inside.

Shapes: N rows, D channels, P programs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.reference import rms_norm as reference
from moe_kernels.triton.tiles import ELEMENTS, fit, grid, spot

WIDEST = 16384  # a row is one tile


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last axis."""
    if not fit(x) or not 0 < x.shape[-1] <= WIDEST:
        return reference.rms_norm(x, weight, eps)
    factors = None if weight is None else weight.float().contiguous()
    return _RmsNorm.apply(x.contiguous().view(-1, x.shape[-1]), factors, eps).view(x.shape)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_D: Tensor | None, eps: float) -> Tensor:
        y_ND, inverse_N = torch.empty_like(x_ND), x_ND.new_empty(len(x_ND), dtype=torch.float32)
        rows, sizes = _sizes(x_ND)
        weighted = weight_D is not None
        tasks = triton.cdiv(len(x_ND), rows)
        factors_D = weight_D if weighted else inverse_N
        _forward[grid(tasks, x_ND)](x_ND, factors_D, y_ND, inverse_N, len(x_ND), eps, *sizes, weighted)
        ctx.save_for_backward(x_ND, weight_D, inverse_N)
        return y_ND

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weight_D, inverse_N = ctx.saved_tensors
        rows, sizes = _sizes(x_ND)
        weighted = weight_D is not None
        programs = grid(triton.cdiv(len(x_ND), rows), x_ND)
        d_x_ND, parts_PD = torch.empty_like(x_ND), inverse_N.new_empty(*programs, x_ND.shape[1] if weighted else 0)
        factors_D = weight_D if weighted else inverse_N
        tensors = (grad_ND.contiguous(), x_ND, factors_D, inverse_N, d_x_ND, parts_PD)
        _backward[programs](*tensors, len(x_ND), *sizes, weighted)
        return d_x_ND, parts_PD.sum(dim=0) if weighted else None, None


def _sizes(x_ND: Tensor) -> tuple[int, tuple[int, int, int]]:
    """(rows of a tile, width, rows and columns of a tile)."""
    columns = triton.next_power_of_2(x_ND.shape[1])
    rows = max(1, min(ELEMENTS // columns, triton.next_power_of_2(max(1, len(x_ND)))))
    return rows, (x_ND.shape[1], rows, columns)


@triton.jit
def _forward(
    x, weight, y, inverse, rows, eps,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WEIGHTED: tl.constexpr,
) -> None:  # fmt: skip
    column = tl.arange(0, COLUMNS)
    if WEIGHTED:
        factors = tl.load(weight + column, mask=column < WIDTH, other=0.0)
    for task in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        first, row, columns, inside = spot(task, rows, WIDTH, ROWS, COLUMNS)
        at = row * WIDTH + columns
        tile = tl.load(x + first * WIDTH + at, mask=inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(tile * tile, axis=1) / WIDTH + eps)
        place = tl.arange(0, ROWS)
        tl.store(inverse + first + place, scale, mask=place < rows - task * ROWS)
        tile = tile * scale[:, None]
        if WEIGHTED:
            tile = tile * factors[None, :]
        tl.store(y + first * WIDTH + at, tile.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    grad, x, weight, inverse, d_x, parts, rows,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WEIGHTED: tl.constexpr,
) -> None:  # fmt: skip
    """d_x = r (g w - n mean(g w n)) with n = r x; the gradient of the weight is summed by program."""
    column = tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    if WEIGHTED:
        factors = tl.load(weight + column, mask=column < WIDTH, other=0.0)
    for task in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        first, row, columns, inside = spot(task, rows, WIDTH, ROWS, COLUMNS)
        at = row * WIDTH + columns
        place = tl.arange(0, ROWS)
        scale = tl.load(inverse + first + place, mask=place < rows - task * ROWS, other=0.0)[:, None]
        normal = tl.load(x + first * WIDTH + at, mask=inside, other=0.0).to(tl.float32) * scale
        slope = tl.load(grad + first * WIDTH + at, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(slope * normal, axis=0)
        if WEIGHTED:
            slope = slope * factors[None, :]
        slope = scale * (slope - normal * (tl.sum(slope * normal, axis=1) / WIDTH)[:, None])
        tl.store(d_x + first * WIDTH + at, slope.to(d_x.dtype.element_ty), mask=inside)
    if WEIGHTED:
        tl.store(parts + tl.program_id(0) * WIDTH + column, total, mask=column < WIDTH)
