"""Causal attention within documents by tiles; what no document and no causality lets meet is skipped. fp32 inside.

Forwards a task is some queries of a head, which meet the keys in turn, with the softmax carried along; its maximum and
sum are kept as one logarithm. Backwards the probabilities are made again: one launch by queries, one by keys.

Shapes: B batch, S queries, T keys, H heads, D query and key channels, V value channels, Q and K tiles of both.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.reference import attention as reference
from moe_kernels.triton.tiles import ELEMENTS, fit, grid, multiply, side, spot

WIDEST = 256  # channels of a head; more go to the reference
LOWEST = tl.constexpr(-1e30)  # a maximum of nothing


def attention(
    q_BSHD: Tensor, k_BTHD: Tensor, v_BTHV: Tensor, scale: float, document_ids_BT: Tensor | None = None
) -> Tensor:
    """[B, S, H, V]; the queries are the last S of the T tokens."""
    tensors = (q_BSHD, k_BTHD, v_BTHV)
    alike = fit(*tensors) and q_BSHD.dtype == k_BTHD.dtype == v_BTHV.dtype
    if not alike or q_BSHD.shape[-1] > WIDEST or not q_BSHD.numel():
        return reference.attention(q_BSHD, k_BTHD, v_BTHV, scale, document_ids_BT)
    documents = None if document_ids_BT is None else document_ids_BT.to(torch.int32).contiguous()
    return _Attention.apply(*(tensor.contiguous() for tensor in tensors), scale, documents)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, documents_BT: Tensor | None) -> Tensor:
        out, log_sums = q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)
        tile, *_ = sizes = _sizes(q, v)
        first_BQ, last_BK = _reach(q.shape[1], k.shape[1], tile, documents_BT, q)
        documents = first_BQ if documents_BT is None else documents_BT
        tasks = q.shape[0] * q.shape[2] * triton.cdiv(q.shape[1], tile)
        numbers = (tasks, q.shape[1], k.shape[1], scale, q.shape[2], q.shape[3], v.shape[3], *sizes)
        _forward[grid(tasks, q)](q, k, v, documents, first_BQ, out, log_sums, *numbers, documents_BT is not None)
        ctx.save_for_backward(q, k, v, out, log_sums, documents_BT, first_BQ, last_BK)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sums, documents_BT, first_BQ, last_BK = ctx.saved_tensors
        grad, (tile, *_) = grad.contiguous(), (sizes := _sizes(q, v))
        d_q, d_k, d_v, shares = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), row_products(grad, out)
        documents, many = (first_BQ, False) if documents_BT is None else (documents_BT, True)
        numbers = (q.shape[1], k.shape[1], ctx.scale, q.shape[2], q.shape[3], v.shape[3], *sizes, many)
        tasks = q.shape[0] * q.shape[2] * triton.cdiv(q.shape[1], tile)
        _by_queries[grid(tasks, q)](q, k, v, documents, first_BQ, grad, log_sums, shares, d_q, tasks, *numbers)
        tasks = q.shape[0] * q.shape[2] * triton.cdiv(k.shape[1], tile)
        _by_keys[grid(tasks, q)](q, k, v, documents, last_BK, grad, log_sums, shares, d_k, d_v, tasks, *numbers)
        return d_q, d_k, d_v, None, None


def row_products(left: Tensor, right: Tensor) -> Tensor:
    """Scalar product of each pair of rows, fp32, without the last axis."""
    width, out = left.shape[-1], left.new_empty(left.shape[:-1], dtype=torch.float32)
    columns = triton.next_power_of_2(width)
    rows = max(1, min(ELEMENTS // columns, triton.next_power_of_2(max(1, out.numel()))))
    tasks = triton.cdiv(out.numel(), rows)
    _row_products[grid(tasks, left)](left, right, out, out.numel(), width, rows, columns)
    return out


def _sizes(q: Tensor, v: Tensor) -> tuple[int, int, int]:
    """(queries and keys of a tile, channels and value channels of it)."""
    width = side(q.shape[3], WIDEST)
    return side(q.shape[1], 64 if width <= 128 else 32), width, side(v.shape[3], WIDEST)


def _reach(queries: int, keys: int, tile: int, documents_BT: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """(the first tile of keys that a tile of queries may see [B, Q], the end of the queries' tiles for keys [B, K])."""
    count_Q, count_K = triton.cdiv(queries, tile), triton.cdiv(keys, tile)
    if documents_BT is None:
        first_BQ = torch.zeros(1, dtype=torch.int32, device=like.device)
        return first_BQ, first_BQ
    low, high = torch.iinfo(torch.int32).min, torch.iinfo(torch.int32).max
    least_BQ, most_BQ = (_by_tile(documents_BT[:, keys - queries :], tile, fill) for fill in (high, low))
    least_BK, most_BK = (_by_tile(documents_BT, tile, fill) for fill in (high, low))
    meet_BQK = (least_BQ.unsqueeze(2) <= most_BK.unsqueeze(1)) & (least_BK.unsqueeze(1) <= most_BQ.unsqueeze(2))
    number_K, number_Q1 = (torch.arange(n, device=like.device) for n in (count_K, count_Q))
    first_BQ = torch.where(meet_BQK, number_K, count_K).amin(dim=2)
    last_BK = torch.where(meet_BQK, number_Q1.unsqueeze(1) + 1, 0).amax(dim=1)
    return first_BQ.to(torch.int32).contiguous(), last_BK.to(torch.int32).contiguous()


def _by_tile(ids_BX: Tensor, tile: int, fill: int) -> Tensor:
    """The least document of each tile where `fill` is high, the highest where it is low."""
    padded = torch.nn.functional.pad(ids_BX, (0, -ids_BX.shape[1] % tile), value=fill).unflatten(1, (-1, tile))
    return padded.amin(dim=2) if fill > 0 else padded.amax(dim=2)


@triton.jit
def _row_products(left, right, out, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr) -> None:
    for task in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        first, row, column, inside = spot(task, rows, WIDTH, ROWS, COLUMNS)
        at = row * WIDTH + column
        a = tl.load(left + first * WIDTH + at, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(right + first * WIDTH + at, mask=inside, other=0.0).to(tl.float32)
        place = tl.arange(0, ROWS)
        tl.store(out + first + place, tl.sum(a * b, axis=1), mask=place < rows - task * ROWS)


@triton.jit
def rows_of(x, start, row, left, STRIDE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr) -> tl.tensor:
    """Rows `start + row` [R, PADDED] of what lies STRIDE apart; zeros from `left` rows on and outside of the width."""
    column = tl.arange(0, PADDED)[None, :]
    mask = (row[:, None] < left) & (column < WIDTH)
    return tl.load(x + start * STRIDE + (row[:, None] * STRIDE + column), mask=mask, other=0.0)


@triton.jit
def put_rows(x, start, row, left, value, STRIDE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr) -> None:
    column = tl.arange(0, PADDED)[None, :]
    mask = (row[:, None] < left) & (column < WIDTH)
    tl.store(x + start * STRIDE + (row[:, None] * STRIDE + column), value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _place(task, length, HEADS: tl.constexpr, TILE: tl.constexpr) -> tl.tensor:
    """(head, row of the batch, number of the tile in it, its first token there and, as int64, in the whole batch)."""
    tiles = tl.cdiv(length, TILE)
    batch = task // (tiles * HEADS)
    begin = task % tiles * TILE
    return task // tiles % HEADS, batch, task % tiles, begin, tl.cast(batch, tl.int64) * length + begin


@triton.jit
def _seen(documents, batch, query, key, queries, keys, MANY: tl.constexpr) -> tl.tensor:
    """[S, T]: which of some queries (places among the keys) see which keys."""
    seen = (key[None, :] <= query[:, None]) & (key[None, :] < keys) & (query[:, None] < keys)
    if MANY:
        ids = documents + tl.cast(batch, tl.int64) * keys
        own = tl.load(ids + query, mask=query < keys, other=-1)
        seen = seen & (own[:, None] == tl.load(ids + key, mask=key < keys, other=-2)[None, :])
    return seen


@triton.jit
def _forward(
    q, k, v, documents, first, out, log_sums, tasks, queries, keys, scale,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, VALUES: tl.constexpr,
    TILE: tl.constexpr, PADDED: tl.constexpr, PADDED_VALUES: tl.constexpr, MANY: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.arange(0, TILE)
    for task in range(tl.program_id(0), tasks, tl.num_programs(0)):
        head, batch, number, begin, start = _place(task, queries, HEADS, TILE)
        own = rows_of(q + head * WIDTH, start, row, queries - begin, HEADS * WIDTH, WIDTH, PADDED)
        place = keys - queries + begin + row
        top = tl.full((TILE,), LOWEST, tl.float32)
        total = tl.zeros((TILE,), dtype=tl.float32)
        result = tl.zeros((TILE, PADDED_VALUES), dtype=tl.float32)
        low = 0
        if MANY:
            low = tl.load(first + batch * tl.cdiv(queries, TILE) + number)
        for other_tile in range(low, tl.cdiv(tl.minimum(keys - queries + begin + TILE, keys), TILE)):
            at = other_tile * TILE
            source = tl.cast(batch, tl.int64) * keys + at
            other = rows_of(k + head * WIDTH, source, row, keys - at, HEADS * WIDTH, WIDTH, PADDED)
            seen = _seen(documents, batch, place, at + row, queries, keys, MANY)
            logits = tl.where(seen, multiply(own, tl.trans(other)) * scale, LOWEST)
            higher = tl.maximum(top, tl.max(logits, axis=1))
            powers = tl.where(seen, tl.exp(logits - higher[:, None]), 0.0)
            shrink = tl.exp(top - higher)
            values = rows_of(v + head * VALUES, source, row, keys - at, HEADS * VALUES, VALUES, PADDED_VALUES)
            total = total * shrink + tl.sum(powers, axis=1)
            result = result * shrink[:, None] + multiply(powers.to(values.dtype), values)
            top = higher
        total = tl.where(total == 0.0, 1.0, total)
        result = result / total[:, None]
        put_rows(out + head * VALUES, start, row, queries - begin, result, HEADS * VALUES, VALUES, PADDED_VALUES)
        target = log_sums + start * HEADS + (row * HEADS + head)
        tl.store(target, top + tl.log(total), mask=row < queries - begin)


@triton.jit
def _by_queries(
    q, k, v, documents, first, grad, log_sums, shares, d_q, tasks, queries, keys, scale,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, VALUES: tl.constexpr,
    TILE: tl.constexpr, PADDED: tl.constexpr, PADDED_VALUES: tl.constexpr, MANY: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.arange(0, TILE)
    for task in range(tl.program_id(0), tasks, tl.num_programs(0)):
        head, batch, number, begin, start = _place(task, queries, HEADS, TILE)
        left = queries - begin
        own = rows_of(q + head * WIDTH, start, row, left, HEADS * WIDTH, WIDTH, PADDED)
        slope = rows_of(grad + head * VALUES, start, row, left, HEADS * VALUES, VALUES, PADDED_VALUES)
        spots = start * HEADS + (row * HEADS + head)
        log_sum = tl.load(log_sums + spots, mask=row < left, other=0.0)[:, None]
        share = tl.load(shares + spots, mask=row < left, other=0.0)[:, None]
        place = keys - queries + begin + row
        result = tl.zeros((TILE, PADDED), dtype=tl.float32)
        low = 0
        if MANY:
            low = tl.load(first + batch * tl.cdiv(queries, TILE) + number)
        for other_tile in range(low, tl.cdiv(tl.minimum(keys - queries + begin + TILE, keys), TILE)):
            at = other_tile * TILE
            source = tl.cast(batch, tl.int64) * keys + at
            other = rows_of(k + head * WIDTH, source, row, keys - at, HEADS * WIDTH, WIDTH, PADDED)
            values = rows_of(v + head * VALUES, source, row, keys - at, HEADS * VALUES, VALUES, PADDED_VALUES)
            seen = _seen(documents, batch, place, at + row, queries, keys, MANY)
            logits = tl.where(seen, multiply(own, tl.trans(other)) * scale, LOWEST)
            powers = tl.where(seen, tl.exp(logits - log_sum), 0.0)
            steep = powers * (multiply(slope, tl.trans(values)) - share) * scale
            result += multiply(steep.to(other.dtype), other)
        put_rows(d_q + head * WIDTH, start, row, left, result, HEADS * WIDTH, WIDTH, PADDED)


@triton.jit
def _by_keys(
    q, k, v, documents, last, grad, log_sums, shares, d_k, d_v, tasks, queries, keys, scale,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, VALUES: tl.constexpr,
    TILE: tl.constexpr, PADDED: tl.constexpr, PADDED_VALUES: tl.constexpr, MANY: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.arange(0, TILE)
    for task in range(tl.program_id(0), tasks, tl.num_programs(0)):
        head, batch, number, begin, source = _place(task, keys, HEADS, TILE)
        own = rows_of(k + head * WIDTH, source, row, keys - begin, HEADS * WIDTH, WIDTH, PADDED)
        values = rows_of(v + head * VALUES, source, row, keys - begin, HEADS * VALUES, VALUES, PADDED_VALUES)
        result = tl.zeros((TILE, PADDED), dtype=tl.float32)
        sums = tl.zeros((TILE, PADDED_VALUES), dtype=tl.float32)
        high = tl.cdiv(queries, TILE)
        if MANY:
            high = tl.load(last + batch * tl.cdiv(keys, TILE) + number)
        for other_tile in range(tl.maximum(begin - (keys - queries), 0) // TILE, high):
            at = other_tile * TILE
            left = queries - at
            start = tl.cast(batch, tl.int64) * queries + at
            other = rows_of(q + head * WIDTH, start, row, left, HEADS * WIDTH, WIDTH, PADDED)
            slope = rows_of(grad + head * VALUES, start, row, left, HEADS * VALUES, VALUES, PADDED_VALUES)
            spots = start * HEADS + (row * HEADS + head)
            log_sum = tl.load(log_sums + spots, mask=row < left, other=0.0)[:, None]
            share = tl.load(shares + spots, mask=row < left, other=0.0)[:, None]
            seen = _seen(documents, batch, keys - queries + at + row, begin + row, queries, keys, MANY)
            logits = tl.where(seen, multiply(other, tl.trans(own)) * scale, LOWEST)
            powers = tl.where(seen, tl.exp(logits - log_sum), 0.0)
            sums += multiply(tl.trans(powers.to(slope.dtype)), slope)
            steep = powers * (multiply(slope, tl.trans(values)) - share) * scale
            result += multiply(tl.trans(steep.to(other.dtype)), other)
        put_rows(d_k + head * WIDTH, source, row, keys - begin, result, HEADS * WIDTH, WIDTH, PADDED)
        put_rows(d_v + head * VALUES, source, row, keys - begin, sums, HEADS * VALUES, VALUES, PADDED_VALUES)
