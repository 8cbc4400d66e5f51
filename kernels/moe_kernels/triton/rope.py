"""Rotary position embedding of the last channels in one pass. fp32 inside.

Shapes: B batch, S tokens, H heads, R rotary channels, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.reference import rope as reference
from moe_kernels.triton.tiles import fit, grid, spot, tile


def rotate(x_BSHR: Tensor, cos_BS1R: Tensor, sin_BS1R: Tensor, inverse: bool = False) -> Tensor:
    """Rotate each pair (2i, 2i + 1) of the last channels; the dtype of `x_BSHR` is kept."""
    if not fit(x_BSHR, cos_BS1R, sin_BS1R):
        return reference.rotate(x_BSHR, cos_BS1R, sin_BS1R, inverse)
    return _Rotate.apply(*(tensor.contiguous() for tensor in (x_BSHR, cos_BS1R, sin_BS1R)), inverse)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BSHC: Tensor, cos_BS1R: Tensor, sin_BS1R: Tensor, inverse: bool) -> Tensor:
        ctx.save_for_backward(cos_BS1R, sin_BS1R)
        ctx.inverse = inverse
        return _rotated(x_BSHC, cos_BS1R, sin_BS1R, inverse)

    @staticmethod
    def backward(ctx: Any, grad_BSHC: Tensor) -> tuple[Tensor | None, ...]:
        return _rotated(grad_BSHC.contiguous(), *ctx.saved_tensors, not ctx.inverse), None, None, None


def _rotated(x_BSHC: Tensor, cos_BS1R: Tensor, sin_BS1R: Tensor, inverse: bool) -> Tensor:
    *outer, heads, channels = x_BSHC.shape
    out_BSHC, tokens, pairs = torch.empty_like(x_BSHC), x_BSHC.numel() // max(1, heads * channels), cos_BS1R.shape[-1]
    kept = channels - 2 * pairs
    if kept:
        out_BSHC[..., :kept] = x_BSHC[..., :kept]
    rows, columns = tile(pairs, heads)
    tasks = tokens * triton.cdiv(heads, rows) * triton.cdiv(pairs, columns)
    angles = cos_BS1R.numel() // max(1, pairs)  # tokens that have one; the table repeats for every row of the batch
    _turn[grid(tasks, x_BSHC)](
        x_BSHC, cos_BS1R, sin_BS1R, out_BSHC, tokens, max(1, angles), -1.0 if inverse else 1.0,
        heads, channels, pairs, rows, columns,
    )  # fmt: skip
    return out_BSHC


@triton.jit
def _turn(
    x, cosine, sine, out, tokens, angles, direction,
    HEADS: tl.constexpr, CHANNELS: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    """A task is some heads of a token."""
    each = tl.cdiv(HEADS, ROWS) * tl.cdiv(PAIRS, COLUMNS)
    for task in range(tl.program_id(0), tokens * each, tl.num_programs(0)):
        token = task // each
        first, row, column, inside = spot(task % each, HEADS, PAIRS, ROWS, COLUMNS)
        table = tl.cast(token % angles, tl.int64) * PAIRS
        c = tl.load(cosine + table + column, mask=column < PAIRS, other=0.0).to(tl.float32)
        s = tl.load(sine + table + column, mask=column < PAIRS, other=0.0).to(tl.float32) * direction
        start = (tl.cast(token, tl.int64) * HEADS + first) * CHANNELS + (CHANNELS - 2 * PAIRS)
        at = row * CHANNELS + 2 * column
        even = tl.load(x + start + at, mask=inside, other=0.0).to(tl.float32)
        odd = tl.load(x + start + at + 1, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + start + at, (even * c - odd * s).to(out.dtype.element_ty), mask=inside)
        tl.store(out + start + at + 1, (odd * c + even * s).to(out.dtype.element_ty), mask=inside)
