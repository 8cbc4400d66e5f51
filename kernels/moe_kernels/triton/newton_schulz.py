"""Newton-Schulz orthogonalisation of a batch of matrices; each product adds its other summand before it is stored.

Shapes: N matrices, r rows, c columns; m = min(r, c), k = max(r, c).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.reference import newton_schulz as reference
from moe_kernels.reference.newton_schulz import COEFFICIENTS, SMALLEST_NORM, Coefficients
from moe_kernels.triton.grouped_matmul import weight_tile
from moe_kernels.triton.tiles import FLOATS, fit, grid, multiply, side

ROWS, COLUMNS, INNER = 64, 64, 32  # most of a tile


@torch.no_grad()
def newton_schulz(x_Nrc: Tensor, coefficients: Coefficients = COEFFICIENTS, dtype: torch.dtype | None = None) -> Tensor:
    """U V^T of each X = U S V^T, nearly: [N, r, c] -> [N, r, c] in the dtype of `x_Nrc`."""
    if not fit(x_Nrc) or (dtype or x_Nrc.dtype) not in FLOATS:
        return reference.newton_schulz(x_Nrc, coefficients, dtype)
    tall = x_Nrc.shape[1] > x_Nrc.shape[2]
    norm_N11 = torch.linalg.vector_norm(x_Nrc, dim=(1, 2), keepdim=True).clamp_(min=SMALLEST_NORM)
    x_Nmk = (x_Nrc / norm_N11).to(dtype or x_Nrc.dtype)
    x_Nmk = (x_Nmk.mT if tall else x_Nmk).contiguous()
    for a, b, c in coefficients:
        gram_Nmm = _product(x_Nmk, x_Nmk, x_Nmk, 0.0, 1.0, transposed=True)
        factor_Nmm = _product(gram_Nmm, gram_Nmm, gram_Nmm, b, c)
        x_Nmk = _product(factor_Nmm, x_Nmk, x_Nmk, a, 1.0)
    return (x_Nmk.mT if tall else x_Nmk).to(x_Nrc.dtype)


def _product(a: Tensor, b: Tensor, c: Tensor, beta: float, alpha: float, transposed: bool = False) -> Tensor:
    """beta c + alpha a b, or b^T where transposed; without c where beta is 0."""
    (count, height, inner), width = a.shape, b.shape[1 if transposed else 2]
    out, sizes = a.new_empty(count, height, width), (side(height, ROWS), side(width, COLUMNS), side(inner, INNER))
    tasks = count * triton.cdiv(height, sizes[0]) * triton.cdiv(width, sizes[1])
    numbers = (height, width, inner, *sizes, transposed, beta != 0)
    _product_kernel[grid(tasks, a)](a, b, c, out, tasks, beta, alpha, *numbers)
    return out


@triton.jit
def _product_kernel(
    a, b, c, out, tasks, beta, alpha,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, TRANSPOSED: tl.constexpr, ADDED: tl.constexpr,
) -> None:  # fmt: skip
    """A task is a tile of a result."""
    across = tl.cdiv(WIDTH, COLUMNS)
    each = tl.cdiv(HEIGHT, ROWS) * across
    for task in range(tl.program_id(0), tasks, tl.num_programs(0)):
        matrix = tl.cast(task // each, tl.int64)
        row = ((task % each) // across * ROWS + tl.arange(0, ROWS))[:, None]
        column = (task % across) * COLUMNS + tl.arange(0, COLUMNS)
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        left = a + matrix * (HEIGHT * DEPTH)
        right = b + matrix * (DEPTH * WIDTH)
        for at in range(0, DEPTH, INNER):
            inner = at + tl.arange(0, INNER)
            mask = (row < HEIGHT) & (inner[None, :] < DEPTH)
            first = tl.load(left + row * DEPTH + inner[None, :], mask=mask, other=0.0)
            total += multiply(first, weight_tile(right, inner, column, DEPTH, WIDTH, TRANSPOSED))
        mask = (row < HEIGHT) & (column[None, :] < WIDTH)
        at = row * WIDTH + column[None, :]
        total = total * alpha
        if ADDED:
            total += beta * tl.load(c + matrix * (HEIGHT * WIDTH) + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + matrix * (HEIGHT * WIDTH) + at, total.to(out.dtype.element_ty), mask=mask)
