"""Sorting tokens by expert and bringing them back, by counting: no sort, no atomics, nothing on the host.

Shapes: T tokens, D hidden size, E experts, K experts per token, N = T * K rows, P chunks of N.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.reference import permute as reference
from moe_kernels.triton.tiles import fit, grid

CHUNK, WIDEST = 64, 1024  # choices that are counted at a time; channels that are copied at a time


def permute(x_TD: Tensor, indices_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(rows [N, D], place [T, K] int32 of each choice, rows of each expert [E] int64); tokens keep their order."""
    if not fit(x_TD):
        return reference.permute(x_TD, indices_TK, num_experts)
    places_TK, counts_E = sorted_places(indices_TK, num_experts)
    return _Permute.apply(x_TD.contiguous(), places_TK), places_TK, counts_E


def expert_load(indices_TK: Tensor, num_experts: int) -> Tensor:
    """Rows that each expert gets, [E] int64."""
    return _counts(indices_TK.contiguous(), num_experts).sum(dim=0)


def unpermute(y_ND: Tensor, places_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Weighted sum of each token's rows, accumulated in fp32."""
    if not fit(y_ND, weights_TK):
        return reference.unpermute(y_ND, places_TK, weights_TK)
    return _Unpermute.apply(*(tensor.contiguous() for tensor in (y_ND, places_TK, weights_TK)))


def sorted_places(indices_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """(the row of each choice among those sorted by expert [T, K] int32, rows of each expert [E] int64)."""
    indices_TK = indices_TK.contiguous()
    counts_PE, places_TK = _counts(indices_TK, num_experts), torch.empty_like(indices_TK, dtype=torch.int32)
    flat_N = counts_PE.t().flatten()
    starts_EP = (flat_N.cumsum(dim=0) - flat_N).to(torch.int32)
    chunks = len(counts_PE)
    _place[grid(chunks, places_TK)](indices_TK, starts_EP, places_TK, places_TK.numel(), chunks, CHUNK)
    return places_TK, counts_PE.sum(dim=0)


def gather(x_TD: Tensor, places_TK: Tensor) -> Tensor:
    """Each token's row at all of its K places, [N, D]."""
    (tokens, top_k), width = places_TK.shape, x_TD.shape[1]
    rows_ND, block = x_TD.new_empty(tokens * top_k, width), _block(width)
    tasks = tokens * triton.cdiv(width, block)
    _gather[grid(tasks, x_TD)](x_TD, places_TK, rows_ND, tokens, top_k, width, block)
    return rows_ND


def combine(rows_ND: Tensor, places_TK: Tensor, weights_TK: Tensor | None = None) -> Tensor:
    """The sum over each token's K rows, [T, D], times their weights where there are some."""
    (tokens, top_k), width = places_TK.shape, rows_ND.shape[1]
    out_TD, block, weighted = rows_ND.new_empty(tokens, width), _block(width), weights_TK is not None
    tasks = tokens * triton.cdiv(width, block)
    tensors = (rows_ND, places_TK, weights_TK if weighted else places_TK, out_TD)
    _combine[grid(tasks, rows_ND)](*tensors, tokens, top_k, width, block, weighted)
    return out_TD


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, places_TK: Tensor) -> Tensor:
        ctx.save_for_backward(places_TK)
        return gather(x_TD, places_TK)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None]:
        return combine(grad_ND.contiguous(), *ctx.saved_tensors), None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, places_TK: Tensor, weights_TK: Tensor) -> Tensor:
        ctx.save_for_backward(y_ND, places_TK, weights_TK)
        return combine(y_ND, places_TK, weights_TK)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, Tensor]:
        y_ND, places_TK, weights_TK = ctx.saved_tensors
        (tokens, top_k), width = places_TK.shape, y_ND.shape[1]
        d_y_ND, d_weights_TK = torch.empty_like(y_ND), torch.empty_like(weights_TK)
        tensors = (grad_TD.contiguous(), y_ND, places_TK, weights_TK, d_y_ND, d_weights_TK)
        _spread[grid(tokens, y_ND)](*tensors, tokens, top_k, width, _block(width))
        return d_y_ND, None, d_weights_TK


def _counts(indices_TK: Tensor, num_experts: int) -> Tensor:
    """Choices of each expert in each chunk, [P, E] int64."""
    chunks = max(1, triton.cdiv(indices_TK.numel(), CHUNK))
    counts_PE = torch.empty(chunks, num_experts, dtype=torch.int64, device=indices_TK.device)
    sizes = (num_experts, triton.next_power_of_2(num_experts), CHUNK)
    _count[grid(chunks, counts_PE)](indices_TK, counts_PE, indices_TK.numel(), chunks, *sizes)
    return counts_PE


def _block(width: int) -> int:
    return min(WIDEST, triton.next_power_of_2(max(1, width)))


@triton.jit
def _count(indices, counts, total, chunks, EXPERTS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr) -> None:
    expert = tl.arange(0, COLUMNS)
    for chunk in range(tl.program_id(0), chunks, tl.num_programs(0)):
        choice = chunk * CHUNK + tl.arange(0, CHUNK)
        owner = tl.load(indices + choice, mask=choice < total, other=-1).to(tl.int32)
        found = tl.sum((owner[:, None] == expert[None, :]).to(tl.int32), axis=0)
        tl.store(counts + chunk * EXPERTS + expert, found.to(tl.int64), mask=expert < EXPERTS)


@triton.jit
def _place(indices, starts, places, total, chunks, CHUNK: tl.constexpr) -> None:
    """After the chunks before, after the experts before, after the choices before in this chunk."""
    mine = tl.arange(0, CHUNK)
    for chunk in range(tl.program_id(0), chunks, tl.num_programs(0)):
        inside = mine < total - chunk * CHUNK
        owner = tl.load(indices + chunk * CHUNK + mine, mask=inside, other=0).to(tl.int32)
        before = (owner[:, None] == owner[None, :]) & (mine[None, :] < mine[:, None])
        rank = tl.sum(before.to(tl.float32), axis=1).to(tl.int32)
        start = tl.load(starts + owner * chunks + chunk, mask=inside, other=0)
        tl.store(places + chunk * CHUNK + mine, start + rank, mask=inside)


@triton.jit
def _gather(x, places, rows, tokens, TOP: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr) -> None:
    """A task is a block of a token, read once."""
    blocks = tl.cdiv(WIDTH, BLOCK)
    for task in range(tl.program_id(0), tokens * blocks, tl.num_programs(0)):
        token = task // blocks
        column = (task % blocks) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + tl.cast(token, tl.int64) * WIDTH + column, mask=column < WIDTH)
        for choice in range(TOP):
            place = tl.load(places + token * TOP + choice).to(tl.int64)
            tl.store(rows + place * WIDTH + column, value, mask=column < WIDTH)


@triton.jit
def _combine(
    rows, places, weights, out, tokens,
    TOP: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, WEIGHTED: tl.constexpr,
) -> None:  # fmt: skip
    """A task is a block of a token."""
    blocks = tl.cdiv(WIDTH, BLOCK)
    for task in range(tl.program_id(0), tokens * blocks, tl.num_programs(0)):
        token = task // blocks
        column = (task % blocks) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for choice in range(TOP):
            place = tl.load(places + token * TOP + choice).to(tl.int64)
            value = tl.load(rows + place * WIDTH + column, mask=column < WIDTH, other=0.0).to(tl.float32)
            if WEIGHTED:
                value = value * tl.load(weights + token * TOP + choice).to(tl.float32)
            total += value
        at = tl.cast(token, tl.int64) * WIDTH + column
        tl.store(out + at, total.to(out.dtype.element_ty), mask=column < WIDTH)


@triton.jit
def _spread(
    grad, rows, places, weights, d_rows, d_weights, tokens,
    TOP: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """A task is a token: d_row = weight * grad, d_weight = row . grad."""
    for token in range(tl.program_id(0), tokens, tl.num_programs(0)):
        for choice in range(TOP):
            place = tl.load(places + token * TOP + choice).to(tl.int64)
            weight = tl.load(weights + token * TOP + choice).to(tl.float32)
            total = tl.zeros((BLOCK,), dtype=tl.float32)
            for start in range(0, WIDTH, BLOCK):
                column = start + tl.arange(0, BLOCK)
                slope = tl.load(grad + tl.cast(token, tl.int64) * WIDTH + column, mask=column < WIDTH, other=0.0)
                value = tl.load(rows + place * WIDTH + column, mask=column < WIDTH, other=0.0).to(tl.float32)
                total += slope.to(tl.float32) * value
                part = (slope.to(tl.float32) * weight).to(d_rows.dtype.element_ty)
                tl.store(d_rows + place * WIDTH + column, part, mask=column < WIDTH)
            found = tl.sum(total, axis=0)
            tl.store(d_weights + token * TOP + choice, found.to(d_weights.dtype.element_ty))
