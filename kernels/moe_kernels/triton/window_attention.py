"""DeepSeek-V4's core attention by tiles: window, entries and sink share one softmax, whose logarithm is kept.

Queries are cut into chunks, whose keys begin `back` before them: chunks of the window's W tokens with back = W, or one
chunk of all queries with back = 0 over a cache. A mask has a column for each key of a chunk; entries are keys of one
chunk as well. Forwards and for the queries' gradient a task is some queries of a head; a key's gradient is summed over
heads and the chunks that see it. What the entries got is made again from the logarithms, summed over heads.

Shapes: B rows, S queries, K keys, H heads, D channels, T compressed entries, W tokens of the window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.autocast import in_autocast_dtype
from moe_kernels.reference import window_attention as reference
from moe_kernels.triton.attention import LOWEST, WIDEST, put_rows, row_products, rows_of
from moe_kernels.triton.tiles import fit, grid, multiply, side


@dataclass(frozen=True)
class Keys:
    """How the mask of some keys lies: see above; reach: chunks of queries that see a chunk of keys."""

    chunk: int
    back: int
    columns: int
    reach: int


def window_attention(
    q_BSHD: Tensor, kv_BSD: Tensor, entries_BTD: Tensor, sinks_H: Tensor, window_BSK: Tensor, visible_BST: Tensor
) -> tuple[Tensor, Tensor]:
    """(out [B, S, H, D], probability of each entry summed over heads [B, S, T], detached)."""
    q, kv, entries = in_autocast_dtype(q_BSHD, kv_BSD, entries_BTD)
    if not _fits(q, kv, entries):
        return reference.window_attention(q_BSHD, kv_BSD, entries_BTD, sinks_H, window_BSK, visible_BST)
    width = window_BSK.shape[-1] // 2
    return _attend(q, kv, entries, sinks_H, window_BSK, visible_BST, Keys(width, width, 2 * width, 2))


def cached_window_attention(
    q_BSHD: Tensor, kv_BKD: Tensor, entries_BTD: Tensor, sinks_H: Tensor, allowed_BSK: Tensor, visible_BST: Tensor
) -> tuple[Tensor, Tensor]:
    """The same over any keys, with what each query may see of them [B, S, K]."""
    q, kv, entries = in_autocast_dtype(q_BSHD, kv_BKD, entries_BTD)
    if not _fits(q, kv, entries):
        return reference.cached_window_attention(q_BSHD, kv_BKD, entries_BTD, sinks_H, allowed_BSK, visible_BST)
    near = Keys(q.shape[1], 0, kv.shape[1], 1)
    return _attend(q, kv, entries, sinks_H, allowed_BSK, visible_BST, near)


def _fits(q: Tensor, kv: Tensor, entries: Tensor) -> bool:
    return fit(q, kv, entries) and q.dtype == kv.dtype == entries.dtype and q.shape[-1] <= WIDEST and q.numel() > 0


def _attend(
    q: Tensor, kv: Tensor, entries: Tensor, sinks: Tensor, allowed: Tensor, visible: Tensor, near: Keys
) -> tuple[Tensor, Tensor]:
    tensors = (tensor.contiguous() for tensor in (q, kv, entries, sinks.float()))
    masks = (mask.contiguous().view(torch.int8) for mask in (allowed, visible))
    return _WindowAttention.apply(*tensors, *masks, near)


class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, kv: Tensor, entries: Tensor, sinks: Tensor, allowed: Tensor, visible: Tensor, near: Keys
    ) -> tuple[Tensor, Tensor]:
        out, log_sums = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
        tasks, lengths, sizes = _by_chunk(q, kv, entries, allowed, near)
        tensors = (q, kv, entries, sinks, allowed, visible, out, log_sums)
        _forward[grid(tasks, q)](*tensors, tasks, *lengths, *sizes)
        mass = q.new_empty(visible.shape, dtype=torch.float32)
        tile = sizes[-2]
        tasks = q.shape[0] * triton.cdiv(q.shape[1], tile) * triton.cdiv(entries.shape[1], tile)
        numbers = (tasks, q.shape[1], entries.shape[1], *sizes)
        _mass[grid(tasks, q)](q, entries, visible, log_sums, mass, *numbers)
        ctx.save_for_backward(q, kv, entries, sinks, allowed, visible, out, log_sums)
        ctx.near = near
        ctx.mark_non_differentiable(mass)
        return out, mass

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, entries, sinks, allowed, visible, out, log_sums = ctx.saved_tensors
        grad, far = grad.contiguous(), Keys(q.shape[1], 0, entries.shape[1], 1)
        shares, d_q = row_products(grad, out), torch.empty_like(q)
        tasks, lengths, sizes = _by_chunk(q, kv, entries, allowed, ctx.near)
        tensors = (q, kv, entries, allowed, visible, grad, log_sums, shares, d_q)
        _by_queries[grid(tasks, q)](*tensors, tasks, *lengths, *sizes)
        slopes = (q, grad, log_sums, shares, sizes)
        d_kv, d_entries = _of_keys(kv, allowed, ctx.near, *slopes), _of_keys(entries, visible, far, *slopes)
        d_sinks = -((sinks - log_sums).exp_() * shares).sum(dim=(0, 1))
        return d_q, d_kv, d_entries, d_sinks, None, None, None


def _by_chunk(
    q: Tensor, kv: Tensor, entries: Tensor, allowed: Tensor, near: Keys
) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """(tasks of queries, lengths that the kernels take, sizes that they are compiled for)."""
    rows, queries, heads, width = q.shape
    tile = side(near.chunk, 64 if width <= 128 else 32)
    tasks = rows * heads * triton.cdiv(queries, near.chunk) * triton.cdiv(near.chunk, tile)
    step = 0 if len(allowed) < rows else queries * near.columns  # between the masks of two rows
    lengths = (queries, kv.shape[1], entries.shape[1], near.chunk, near.back, near.columns, step, width**-0.5)
    return tasks, lengths, (heads, width, tile, side(width, WIDEST))


def _of_keys(
    keys: Tensor, mask: Tensor, place: Keys, q: Tensor, grad: Tensor, log_sums: Tensor, shares: Tensor, sizes: tuple
) -> Tensor:
    """Gradient of keys that are their own values."""
    (rows, count), queries, tile, gradient = keys.shape[:2], q.shape[1], sizes[-2], torch.empty_like(keys)
    group = place.chunk if place.reach > 1 else max(1, count)  # keys of a chunk
    tasks = rows * triton.cdiv(count, group) * triton.cdiv(group, tile)
    step = 0 if len(mask) < rows else queries * place.columns
    lengths = (queries, count, group, place.chunk, place.back, place.columns, step, place.reach, sizes[1] ** -0.5)
    _by_keys[grid(tasks, q)](q, keys, mask, grad, log_sums, shares, gradient, tasks, *lengths, *sizes)
    return gradient


@triton.jit
def _keys_at(x, batch, place, keys, WIDTH: tl.constexpr, PADDED: tl.constexpr) -> tl.tensor:
    """The keys at some places of a row of the batch [K, PADDED]; zeros where there is none."""
    column = tl.arange(0, PADDED)[None, :]
    mask = (place[:, None] >= 0) & (place[:, None] < keys) & (column < WIDTH)
    return tl.load(
        x + tl.cast(batch, tl.int64) * keys * WIDTH + (place[:, None] * WIDTH + column), mask=mask, other=0.0
    )


@triton.jit
def _place(task, queries, chunk, HEADS: tl.constexpr, TILE: tl.constexpr) -> tl.tensor:
    """(head, row of the batch, first query of the chunk and of the tile, queries left, the tile's first as int64)."""
    each = tl.cdiv(chunk, TILE)
    tiles = tl.cdiv(queries, chunk) * each
    batch = task // (tiles * HEADS)
    origin = task % tiles // each * chunk
    begin = origin + task % each * TILE
    left = tl.minimum(queries, origin + chunk) - begin
    return task // tiles % HEADS, batch, origin, begin, left, tl.cast(batch, tl.int64) * queries + begin


@triton.jit
def _seen(mask, start, row, left, column, columns) -> tl.tensor:
    """[S, K] of a mask whose rows from `start` on are `columns` long."""
    inside = (row[:, None] < left) & (column[None, :] >= 0) & (column[None, :] < columns)
    return tl.load(mask + start + (row[:, None] * columns + column[None, :]), mask=inside, other=0) != 0


@triton.jit
def _meet(own, keys, seen, scale, top, total, result) -> tl.tensor:
    """The softmax carried on over a tile of keys, which are the values too."""
    logits = tl.where(seen, multiply(own, tl.trans(keys)) * scale, LOWEST)
    higher = tl.maximum(top, tl.max(logits, axis=1))
    powers = tl.where(seen, tl.exp(logits - higher[:, None]), 0.0)
    shrink = tl.exp(top - higher)
    total = total * shrink + tl.sum(powers, axis=1)
    return higher, total, result * shrink[:, None] + multiply(powers.to(keys.dtype), keys)


@triton.jit
def _steep(own, keys, seen, scale, slope, log_sum, share) -> tl.tensor:
    """(probabilities, gradient of the logits before the scale) of a tile."""
    logits = tl.where(seen, multiply(own, tl.trans(keys)) * scale, LOWEST)
    powers = tl.where(seen, tl.exp(logits - log_sum), 0.0)
    return powers, powers * (multiply(slope, tl.trans(keys)) - share) * scale


@triton.jit
def _forward(
    q, near, far, sinks, allowed, visible, out, log_sums,
    tasks, queries, keys, entries, chunk, back, columns, step, scale,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, PADDED: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.arange(0, TILE)
    for task in range(tl.program_id(0), tasks, tl.num_programs(0)):
        head, batch, origin, begin, left, start = _place(task, queries, chunk, HEADS, TILE)
        own = rows_of(q + head * WIDTH, start, row, left, HEADS * WIDTH, WIDTH, PADDED)
        top = tl.zeros((TILE,), dtype=tl.float32) + tl.load(sinks + head)
        total = tl.full((TILE,), 1.0, tl.float32)
        result = tl.zeros((TILE, PADDED), dtype=tl.float32)
        for at in range(tl.maximum(back - origin, 0) // TILE * TILE, columns, TILE):
            other = _keys_at(near, batch, origin - back + at + row, keys, WIDTH, PADDED)
            mask = tl.cast(batch, tl.int64) * step + tl.cast(begin, tl.int64) * columns
            seen = _seen(allowed, mask, row, left, at + row, columns)
            top, total, result = _meet(own, other, seen, scale, top, total, result)
        for at in range(0, entries, TILE):
            other = _keys_at(far, batch, at + row, entries, WIDTH, PADDED)
            seen = _seen(visible, start * entries, row, left, at + row, entries)
            top, total, result = _meet(own, other, seen, scale, top, total, result)
        result = result / total[:, None]
        put_rows(out + head * WIDTH, start, row, left, result, HEADS * WIDTH, WIDTH, PADDED)
        tl.store(log_sums + start * HEADS + (row * HEADS + head), top + tl.log(total), mask=row < left)


@triton.jit
def _mass(
    q, far, visible, log_sums, mass, tasks, queries, entries,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, PADDED: tl.constexpr,
) -> None:  # fmt: skip
    """A task is a tile of queries by entries: their probabilities, summed over heads."""
    row = tl.arange(0, TILE)
    across = tl.cdiv(entries, TILE)
    tiles = tl.cdiv(queries, TILE)
    for task in range(tl.program_id(0), tasks, tl.num_programs(0)):
        batch = task // (tiles * across)
        begin = task // across % tiles * TILE
        column = task % across * TILE + row
        left = queries - begin
        start = tl.cast(batch, tl.int64) * queries + begin
        other = _keys_at(far, batch, column, entries, WIDTH, PADDED)
        seen = _seen(visible, start * entries, row, left, column, entries)
        total = tl.zeros((TILE, TILE), dtype=tl.float32)
        for head in range(HEADS):
            own = rows_of(q + head * WIDTH, start, row, left, HEADS * WIDTH, WIDTH, PADDED)
            log_sum = tl.load(log_sums + start * HEADS + (row * HEADS + head), mask=row < left, other=0.0)
            logits = tl.where(seen, multiply(own, tl.trans(other)) * WIDTH**-0.5, LOWEST)
            total += tl.where(seen, tl.exp(logits - log_sum[:, None]), 0.0)
        inside = (row[:, None] < left) & (column[None, :] < entries)
        tl.store(mass + start * entries + (row[:, None] * entries + column[None, :]), total, mask=inside)


@triton.jit
def _by_queries(
    q, near, far, allowed, visible, grad, log_sums, shares, d_q,
    tasks, queries, keys, entries, chunk, back, columns, step, scale,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, PADDED: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.arange(0, TILE)
    for task in range(tl.program_id(0), tasks, tl.num_programs(0)):
        head, batch, origin, begin, left, start = _place(task, queries, chunk, HEADS, TILE)
        own = rows_of(q + head * WIDTH, start, row, left, HEADS * WIDTH, WIDTH, PADDED)
        slope = rows_of(grad + head * WIDTH, start, row, left, HEADS * WIDTH, WIDTH, PADDED)
        log_sum = tl.load(log_sums + start * HEADS + (row * HEADS + head), mask=row < left, other=0.0)[:, None]
        share = tl.load(shares + start * HEADS + (row * HEADS + head), mask=row < left, other=0.0)[:, None]
        result = tl.zeros((TILE, PADDED), dtype=tl.float32)
        for at in range(tl.maximum(back - origin, 0) // TILE * TILE, columns, TILE):
            other = _keys_at(near, batch, origin - back + at + row, keys, WIDTH, PADDED)
            mask = tl.cast(batch, tl.int64) * step + tl.cast(begin, tl.int64) * columns
            seen = _seen(allowed, mask, row, left, at + row, columns)
            powers, steep = _steep(own, other, seen, scale, slope, log_sum, share)
            result += multiply(steep.to(other.dtype), other)
        for at in range(0, entries, TILE):
            other = _keys_at(far, batch, at + row, entries, WIDTH, PADDED)
            seen = _seen(visible, start * entries, row, left, at + row, entries)
            powers, steep = _steep(own, other, seen, scale, slope, log_sum, share)
            result += multiply(steep.to(other.dtype), other)
        put_rows(d_q + head * WIDTH, start, row, left, result, HEADS * WIDTH, WIDTH, PADDED)


@triton.jit
def _by_keys(
    q, keys, mask, grad, log_sums, shares, d_keys,
    tasks, queries, count, group, chunk, back, columns, step, reach, scale,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, PADDED: tl.constexpr,
) -> None:  # fmt: skip
    """A task is some keys of a chunk of `group`, which the queries of `reach` chunks see."""
    row = tl.arange(0, TILE)
    each = tl.cdiv(group, TILE)
    tiles = tl.cdiv(count, group) * each
    steps = tl.cdiv(chunk, TILE)
    for task in range(tl.program_id(0), tasks, tl.num_programs(0)):
        batch = task // tiles
        number = task % tiles // each
        first = number * group + task % each * TILE
        left_keys = tl.minimum(count, (number + 1) * group) - first
        own = rows_of(keys, tl.cast(batch, tl.int64) * count + first, row, left_keys, WIDTH, WIDTH, PADDED)
        result = tl.zeros((TILE, PADDED), dtype=tl.float32)
        for turn in range(0, reach * steps):
            origin = (number + turn // steps) * chunk
            begin = origin + turn % steps * TILE
            left = tl.minimum(queries, origin + chunk) - begin
            start = tl.cast(batch, tl.int64) * queries + begin
            mask_start = tl.cast(batch, tl.int64) * step + tl.cast(begin, tl.int64) * columns
            seen = _seen(mask, mask_start, row, left, first + row - origin + back, columns) & (row[None, :] < left_keys)
            for head in range(HEADS):
                other = rows_of(q + head * WIDTH, start, row, left, HEADS * WIDTH, WIDTH, PADDED)
                slope = rows_of(grad + head * WIDTH, start, row, left, HEADS * WIDTH, WIDTH, PADDED)
                at = start * HEADS + (row * HEADS + head)
                log_sum = tl.load(log_sums + at, mask=row < left, other=0.0)[:, None]
                share = tl.load(shares + at, mask=row < left, other=0.0)[:, None]
                powers, steep = _steep(other, own, seen, scale, slope, log_sum, share)
                result += multiply(tl.trans(powers.to(slope.dtype)), slope)
                result += multiply(tl.trans(steep.to(other.dtype)), other)
        at = tl.cast(batch, tl.int64) * count + first
        put_rows(d_keys, at, row, left_keys, result, WIDTH, WIDTH, PADDED)
