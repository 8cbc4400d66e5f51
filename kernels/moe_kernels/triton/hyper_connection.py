"""Hyper-connections: the maps to the coefficients in one pass over the streams, coefficients with Sinkhorn-Knopp, then
one more pass for what a sub-layer reads; the backward pass reads the streams once.

Shapes: T tokens, N streams (up to 8), D hidden size, C = N D, P = (2 + N) N coefficients a token: read, write, mix.
All of it is fp32; other dtypes and more streams go to the reference.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.reference import hyper_connection as reference
from moe_kernels.triton.sinkhorn import balance, steps, unbalance
from moe_kernels.triton.tiles import grid, multiply, side

__all__ = ["hyper_head", "hyper_read", "hyper_write"]

MAX_STREAMS, ROWS, COLUMNS, WIDEST = 8, 16, 64, 1024  # most streams; tokens and channels of a product; of a sum


def hyper_read(
    x_TND: Tensor, fn_PC: Tensor, base_P: Tensor, scale_3: Tensor, norm_eps: float, iterations: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(what the sub-layer reads [T, D], write [T, N], mix [T, N from, N to])."""
    if not _fits(x_TND, fn_PC, base_P, scale_3) or iterations < 1:
        return reference.hyper_read(x_TND, fn_PC, base_P, scale_3, norm_eps, iterations, eps)
    tensors = (tensor.contiguous() for tensor in (x_TND, fn_PC, base_P, scale_3))
    return _Read.apply(*tensors, norm_eps, iterations, eps)


def hyper_write(x_TND: Tensor, y_TD: Tensor, write_TN: Tensor, mix_TNN: Tensor) -> Tensor:
    """x'_k = sum_j mix[j, k] x_j + write_k y, [T, N, D]."""
    if not _fits(x_TND, y_TD, write_TN, mix_TNN):
        return reference.hyper_write(x_TND, y_TD, write_TN, mix_TNN)
    return _Write.apply(*(tensor.contiguous() for tensor in (x_TND, y_TD, write_TN, mix_TNN)))


def hyper_head(x_TND: Tensor, fn_NC: Tensor, base_N: Tensor, scale_1: Tensor, norm_eps: float, eps: float) -> Tensor:
    """The streams read into one after the last layer, [T, D]."""
    if not _fits(x_TND, fn_NC, base_N, scale_1):
        return reference.hyper_head(x_TND, fn_NC, base_N, scale_1, norm_eps, eps)
    return _Head.apply(*(tensor.contiguous() for tensor in (x_TND, fn_NC, base_N, scale_1)), norm_eps, eps)


def _fits(x_TND: Tensor, *others: Tensor) -> bool:
    return x_TND.shape[1] <= MAX_STREAMS and all(tensor.dtype is torch.float32 for tensor in (x_TND, *others))


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TND: Tensor, fn_PC: Tensor, base_P: Tensor, scale_3: Tensor,
        norm_eps: float, iterations: int, eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        tokens, streams, _ = x_TND.shape
        u_TP, inverse_T = _projected(x_TND, fn_PC, norm_eps)
        read_TN, write_TN = (x_TND.new_empty(tokens, streams) for _ in range(2))
        mix_TNN, sums_ITN = (
            x_TND.new_empty(tokens, streams, streams),
            x_TND.new_empty(steps(iterations), tokens, streams),
        )
        sizes = (streams, triton.next_power_of_2(streams), ROWS, iterations)
        tensors = (u_TP, base_P, scale_3, read_TN, write_TN, mix_TNN, sums_ITN)
        _coefficients[grid(triton.cdiv(tokens, ROWS), x_TND)](*tensors, tokens, tokens * streams, eps, *sizes)
        ctx.save_for_backward(x_TND, fn_PC, base_P, scale_3, u_TP, inverse_T, read_TN, write_TN, mix_TNN, sums_ITN)
        ctx.numbers = iterations, eps
        return _sum(x_TND, read_TN), write_TN, mix_TNN

    @staticmethod
    def backward(ctx: Any, d_h_TD: Tensor, d_write_TN: Tensor, d_mix_TNN: Tensor) -> tuple[Tensor | None, ...]:
        x_TND, fn_PC, base_P, scale_3, u_TP, inverse_T, read_TN, write_TN, mix_TNN, sums_ITN = ctx.saved_tensors
        (tokens, streams, _), (iterations, eps) = x_TND.shape, ctx.numbers
        d_h_TD, d_z_TP = d_h_TD.contiguous(), torch.empty_like(u_TP)
        tensors = (_read_gradient(d_h_TD, x_TND), d_write_TN.contiguous(), d_mix_TNN.contiguous())
        tensors = (*tensors, u_TP, base_P, scale_3, read_TN, write_TN, mix_TNN, sums_ITN, d_z_TP)
        sizes = (streams, triton.next_power_of_2(streams), ROWS, iterations)
        _coefficient_slopes[grid(triton.cdiv(tokens, ROWS), x_TND)](*tensors, tokens, tokens * streams, eps, *sizes)
        parts = [streams, streams, streams * streams]
        d_scale_3 = torch.stack([part.sum() for part in (d_z_TP * u_TP).split(parts, dim=1)])
        factors_P = torch.repeat_interleave(scale_3, torch.tensor(parts, device=x_TND.device), output_size=sum(parts))
        gradients = _map_gradients(d_h_TD, x_TND, fn_PC, read_TN, u_TP, inverse_T, d_z_TP * factors_P)
        return *gradients, d_z_TP.sum(dim=0), d_scale_3, None, None, None


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TND: Tensor, fn_NC: Tensor, base_N: Tensor, scale_1: Tensor, norm_eps: float, eps: float
    ) -> Tensor:
        u_TN, inverse_T = _projected(x_TND, fn_NC, norm_eps)
        share_TN = (u_TN * scale_1 + base_N).sigmoid()
        read_TN = share_TN + eps
        ctx.save_for_backward(x_TND, fn_NC, scale_1, u_TN, inverse_T, share_TN, read_TN)
        return _sum(x_TND, read_TN)

    @staticmethod
    def backward(ctx: Any, d_h_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TND, fn_NC, scale_1, u_TN, inverse_T, share_TN, read_TN = ctx.saved_tensors
        d_h_TD = d_h_TD.contiguous()
        d_z_TN = _read_gradient(d_h_TD, x_TND) * share_TN * (1 - share_TN)
        gradients = _map_gradients(d_h_TD, x_TND, fn_NC, read_TN, u_TN, inverse_T, d_z_TN * scale_1)
        return *gradients, d_z_TN.sum(dim=0), (d_z_TN * u_TN).sum().view(1), None, None


class _Write(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TND: Tensor, y_TD: Tensor, write_TN: Tensor, mix_TNN: Tensor) -> Tensor:
        ctx.save_for_backward(x_TND, y_TD, write_TN, mix_TNN)
        out_TND, sizes = torch.empty_like(x_TND), _write_sizes(x_TND)
        tasks = x_TND.shape[0] * triton.cdiv(x_TND.shape[2], sizes[-1])
        _write[grid(tasks, x_TND)](x_TND, y_TD, write_TN, mix_TNN, out_TND, x_TND.shape[0], *sizes)
        return out_TND

    @staticmethod
    def backward(ctx: Any, grad_TND: Tensor) -> tuple[Tensor, ...]:
        inputs = ctx.saved_tensors
        found, tokens = [torch.empty_like(tensor) for tensor in inputs], inputs[0].shape[0]
        tensors = (grad_TND.contiguous(), *inputs, *found)
        _write_slopes[grid(tokens, inputs[0])](*tensors, tokens, *_write_sizes(inputs[0]))
        return tuple(found)


def _projected(x_TND: Tensor, fn_PC: Tensor, norm_eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x) fn^T [T, P], the norm's factor r of each token [T])."""
    (tokens, streams, width), count = x_TND.shape, fn_PC.shape[0]
    u_TP, inverse_T = x_TND.new_empty(tokens, count), x_TND.new_empty(tokens)
    sizes = (streams * width, count, side(count, 128), ROWS, side(streams * width, COLUMNS))
    _project[grid(triton.cdiv(tokens, ROWS), x_TND)](x_TND, fn_PC, u_TP, inverse_T, tokens, norm_eps, *sizes)
    return u_TP, inverse_T


def _sum(x_TND: Tensor, read_TN: Tensor) -> Tensor:
    tokens, streams, width = x_TND.shape
    h_TD = x_TND.new_empty(tokens, width)
    _read[grid(tokens, x_TND)](x_TND, read_TN, h_TD, tokens, streams, width, _block(width))
    return h_TD


def _read_gradient(d_h_TD: Tensor, x_TND: Tensor) -> Tensor:
    tokens, streams, width = x_TND.shape
    d_read_TN = x_TND.new_empty(tokens, streams)
    _read_slope[grid(tokens, x_TND)](d_h_TD, x_TND, d_read_TN, tokens, streams, width, _block(width))
    return d_read_TN


def _map_gradients(
    d_h_TD: Tensor, x_TND: Tensor, fn_PC: Tensor, read_TN: Tensor, u_TP: Tensor, inverse_T: Tensor, d_u_TP: Tensor
) -> tuple[Tensor, Tensor]:
    """(d_x [T, N, D], d_fn [P, C]) of h = read x and u = (x fn^T) r with r = 1 / sqrt(mean(x^2) + eps):
    d_x = r d_u fn - x r^2 (d_u . u) / C + read d_h.
    """
    (tokens, streams, width), count = x_TND.shape, fn_PC.shape[0]
    d_p_TP, d_x_TND = d_u_TP * inverse_T.unsqueeze(1), torch.empty_like(x_TND)
    shrink_T = (d_u_TP * u_TP).sum(dim=1) * inverse_T.square() / (streams * width)
    sizes = (streams, width, count, side(count, 128), ROWS, side(width, COLUMNS))
    tasks = triton.cdiv(tokens, ROWS) * streams * triton.cdiv(width, sizes[-1])
    _stream_slopes[grid(tasks, x_TND)](d_h_TD, x_TND, fn_PC, read_TN, d_p_TP, shrink_T, d_x_TND, tokens, *sizes)
    return d_x_TND, d_p_TP.t() @ x_TND.flatten(1)


def _block(width: int) -> int:
    return min(WIDEST, triton.next_power_of_2(width))


def _write_sizes(x_TND: Tensor) -> tuple[int, int, int, int]:
    streams, width = x_TND.shape[1:]
    return streams, triton.next_power_of_2(streams), width, _block(width)


@triton.jit
def _project(
    x, fn, u, inverse, tokens, norm_eps,
    DEPTH: tl.constexpr, COUNT: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    """rms_norm(x) fn^T, with the division after the product; a task is some tokens."""
    row = tl.arange(0, ROWS)
    number = tl.arange(0, PADDED)
    for task in range(tl.program_id(0), tl.cdiv(tokens, ROWS), tl.num_programs(0)):
        first = tl.cast(task, tl.int64) * ROWS
        inside = row < tokens - task * ROWS
        total = tl.zeros((ROWS, PADDED), dtype=tl.float32)
        squares = tl.zeros((ROWS,), dtype=tl.float32)
        for start in range(0, DEPTH, COLUMNS):
            column = start + tl.arange(0, COLUMNS)[None, :]
            mask = inside[:, None] & (column < DEPTH)
            part = tl.load(x + first * DEPTH + (row[:, None] * DEPTH + column), mask=mask, other=0.0)
            mask = (number[:, None] < COUNT) & (column < DEPTH)
            maps = tl.load(fn + number[:, None] * DEPTH + column, mask=mask, other=0.0)
            squares += tl.sum(part * part, axis=1)
            total += multiply(part, tl.trans(maps))
        scale = tl.rsqrt(squares / DEPTH + norm_eps)
        tl.store(inverse + first + row, scale, mask=inside)
        mask = inside[:, None] & (number[None, :] < COUNT)
        tl.store(u + first * COUNT + (row[:, None] * COUNT + number[None, :]), total * scale[:, None], mask=mask)


@triton.jit
def _affine(u, base, scale, at, mask, exists) -> tl.tensor:
    """Some of a token's coefficients before their function."""
    return tl.load(u, mask=mask, other=0.0) * tl.load(scale) + tl.load(base + at, mask=exists, other=0.0)


@triton.jit
def _coefficients(
    u, base, scale, read, write, mix, sums, tokens, stride, eps,
    STREAMS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, ITERATIONS: tl.constexpr,
) -> None:  # fmt: skip
    COUNT: tl.constexpr = STREAMS * (STREAMS + 2)
    row = tl.arange(0, ROWS)
    stream = tl.arange(0, PADDED)
    cell = stream[None, :, None] * STREAMS + stream[None, None, :]
    corner = (stream[None, :, None] < STREAMS) & (stream[None, None, :] < STREAMS)
    for task in range(tl.program_id(0), tl.cdiv(tokens, ROWS), tl.num_programs(0)):
        first = tl.cast(task, tl.int64) * ROWS
        inside = row < tokens - task * ROWS
        at = row[:, None] * STREAMS + stream[None, :]
        exists = stream[None, :] < STREAMS
        mask = inside[:, None] & exists
        own = u + first * COUNT + (row[:, None] * COUNT + stream[None, :])
        value = _affine(own, base, scale, stream[None, :], mask, exists)
        tl.store(read + first * STREAMS + at, tl.sigmoid(value) + eps, mask=mask)
        value = _affine(own + STREAMS, base, scale + 1, STREAMS + stream[None, :], mask, exists)
        tl.store(write + first * STREAMS + at, 2.0 * tl.sigmoid(value), mask=mask)
        square = inside[:, None, None] & corner
        cells = u + first * COUNT + (row[:, None, None] * COUNT + (2 * STREAMS) + cell)
        value = _affine(cells, base, scale + 2, 2 * STREAMS + cell, square, corner)
        value = balance(value, corner, sums + first * STREAMS, at, stride, mask, eps, ITERATIONS)
        place = row[:, None, None] * (STREAMS * STREAMS) + cell
        tl.store(mix + first * (STREAMS * STREAMS) + place, value, mask=square)


@triton.jit
def _coefficient_slopes(
    d_read, d_write, d_mix, u, base, scale, read, write, mix, sums, d_z, tokens, stride, eps,
    STREAMS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, ITERATIONS: tl.constexpr,
) -> None:  # fmt: skip
    """d_z: gradient of each coefficient before its function."""
    COUNT: tl.constexpr = STREAMS * (STREAMS + 2)
    row = tl.arange(0, ROWS)
    stream = tl.arange(0, PADDED)
    cell = stream[None, :, None] * STREAMS + stream[None, None, :]
    corner = (stream[None, :, None] < STREAMS) & (stream[None, None, :] < STREAMS)
    for task in range(tl.program_id(0), tl.cdiv(tokens, ROWS), tl.num_programs(0)):
        first = tl.cast(task, tl.int64) * ROWS
        inside = row < tokens - task * ROWS
        at = row[:, None] * STREAMS + stream[None, :]
        mask = inside[:, None] & (stream[None, :] < STREAMS)
        start = first * STREAMS
        target = row[:, None] * COUNT + stream[None, :]
        share = tl.load(read + start + at, mask=mask, other=0.0) - eps
        slope = tl.load(d_read + start + at, mask=mask, other=0.0) * share * (1.0 - share)
        tl.store(d_z + first * COUNT + target, slope, mask=mask)
        share = tl.load(write + start + at, mask=mask, other=0.0) / 2.0
        slope = 2.0 * tl.load(d_write + start + at, mask=mask, other=0.0) * share * (1.0 - share)
        tl.store(d_z + first * COUNT + STREAMS + target, slope, mask=mask)
        square = inside[:, None, None] & corner
        place = row[:, None, None] * (STREAMS * STREAMS) + cell
        matrix = tl.load(mix + start * STREAMS + place, mask=square, other=0.0)
        slope = tl.load(d_mix + start * STREAMS + place, mask=square, other=0.0)
        cells = row[:, None, None] * COUNT + (2 * STREAMS) + cell
        logits = _affine(u + first * COUNT + cells, base, scale + 2, 2 * STREAMS + cell, square, corner)
        slope = unbalance(slope, matrix, logits, corner, sums + start, at, stride, mask, ITERATIONS)
        tl.store(d_z + first * COUNT + cells, slope, mask=square)


@triton.jit
def _read(x, read, h, tokens, STREAMS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr) -> None:
    """A task is a token."""
    for token in range(tl.program_id(0), tokens, tl.num_programs(0)):
        first = tl.cast(token, tl.int64) * WIDTH
        for start in range(0, WIDTH, BLOCK):
            column = start + tl.arange(0, BLOCK)
            total = tl.zeros((BLOCK,), dtype=tl.float32)
            for stream in range(STREAMS):
                own = tl.load(x + first * STREAMS + (stream * WIDTH + column), mask=column < WIDTH, other=0.0)
                total += own * tl.load(read + token * STREAMS + stream)
            tl.store(h + first + column, total, mask=column < WIDTH)


@triton.jit
def _read_slope(d_h, x, d_read, tokens, STREAMS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr) -> None:
    """A task is a token: d_h . x of each stream."""
    for token in range(tl.program_id(0), tokens, tl.num_programs(0)):
        first = tl.cast(token, tl.int64) * WIDTH
        for stream in range(STREAMS):
            total = tl.zeros((BLOCK,), dtype=tl.float32)
            for start in range(0, WIDTH, BLOCK):
                column = start + tl.arange(0, BLOCK)
                slope = tl.load(d_h + first + column, mask=column < WIDTH, other=0.0)
                own = x + first * STREAMS + (stream * WIDTH + column)
                total += slope * tl.load(own, mask=column < WIDTH, other=0.0)
            tl.store(d_read + token * STREAMS + stream, tl.sum(total, axis=0))


@triton.jit
def _stream_slopes(
    d_h, x, fn, read, d_p, shrink, d_x, tokens,
    STREAMS: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    """A task is some channels of a stream of some tokens: d_p fn - shrink x + read d_h."""
    row = tl.arange(0, ROWS)
    number = tl.arange(0, PADDED)
    blocks = tl.cdiv(WIDTH, COLUMNS)
    for task in range(tl.program_id(0), tl.cdiv(tokens, ROWS) * STREAMS * blocks, tl.num_programs(0)):
        tile = task // (STREAMS * blocks)
        stream = task // blocks % STREAMS
        first = tl.cast(tile, tl.int64) * ROWS
        inside = row < tokens - tile * ROWS
        column = (task % blocks) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        mask = inside[:, None] & (column < WIDTH)
        own = row[:, None] * (STREAMS * WIDTH) + stream * WIDTH + column
        start = first * (STREAMS * WIDTH)
        parts = (number[:, None] < COUNT) & (column < WIDTH)
        maps = tl.load(fn + number[:, None] * (STREAMS * WIDTH) + stream * WIDTH + column, mask=parts, other=0.0)
        parts = inside[:, None] & (number[None, :] < COUNT)
        slopes = tl.load(d_p + first * COUNT + (row[:, None] * COUNT + number[None, :]), mask=parts, other=0.0)
        total = multiply(slopes, maps)
        less = tl.load(shrink + first + row, mask=inside, other=0.0)[:, None]
        total -= less * tl.load(x + start + own, mask=mask, other=0.0)
        share = tl.load(read + first * STREAMS + (row * STREAMS + stream), mask=inside, other=0.0)[:, None]
        total += share * tl.load(d_h + first * WIDTH + (row[:, None] * WIDTH + column), mask=mask, other=0.0)
        tl.store(d_x + start + own, total, mask=mask)


@triton.jit
def _write(
    x, y, write, mix, out, tokens,
    STREAMS: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """A task is a block of a token."""
    stream = tl.arange(0, PADDED)
    blocks = tl.cdiv(WIDTH, BLOCK)
    for task in range(tl.program_id(0), tokens * blocks, tl.num_programs(0)):
        token = task // blocks
        column = (task % blocks) * BLOCK + tl.arange(0, BLOCK)
        first = tl.cast(token, tl.int64) * WIDTH
        value = tl.load(y + first + column, mask=column < WIDTH, other=0.0)
        share = tl.load(write + token * STREAMS + stream, mask=stream < STREAMS, other=0.0)
        total = share[:, None] * value[None, :]
        for source in range(STREAMS):
            own = tl.load(x + first * STREAMS + (source * WIDTH + column), mask=column < WIDTH, other=0.0)
            at = (token * STREAMS + source) * STREAMS + stream
            share = tl.load(mix + at, mask=stream < STREAMS, other=0.0)
            total += share[:, None] * own[None, :]
        mask = (stream[:, None] < STREAMS) & (column[None, :] < WIDTH)
        tl.store(out + first * STREAMS + (stream[:, None] * WIDTH + column[None, :]), total, mask=mask)


@triton.jit
def _write_slopes(
    grad, x, y, write, mix, d_x, d_y, d_write, d_mix, tokens,
    STREAMS: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """A task is a token; sums over its channels are kept until all blocks are done."""
    stream = tl.arange(0, PADDED)
    for token in range(tl.program_id(0), tokens, tl.num_programs(0)):
        first = tl.cast(token, tl.int64) * WIDTH
        shares = tl.load(write + token * STREAMS + stream, mask=stream < STREAMS, other=0.0)
        d_shares = tl.zeros((PADDED,), dtype=tl.float32)
        d_matrix = tl.zeros((PADDED, PADDED), dtype=tl.float32)
        for start in range(0, WIDTH, BLOCK):
            column = start + tl.arange(0, BLOCK)
            mask = (stream[:, None] < STREAMS) & (column[None, :] < WIDTH)
            at = first * STREAMS + (stream[:, None] * WIDTH + column[None, :])
            slope = tl.load(grad + at, mask=mask, other=0.0)
            value = tl.load(y + first + column, mask=column < WIDTH, other=0.0)
            d_shares += tl.sum(slope * value[None, :], axis=1)
            tl.store(d_y + first + column, tl.sum(slope * shares[:, None], axis=0), mask=column < WIDTH)
            for source in range(STREAMS):
                own = first * STREAMS + (source * WIDTH + column)
                part = tl.load(x + own, mask=column < WIDTH, other=0.0)
                row = (token * STREAMS + source) * STREAMS + stream
                weights = tl.load(mix + row, mask=stream < STREAMS, other=0.0)
                tl.store(d_x + own, tl.sum(slope * weights[:, None], axis=0), mask=column < WIDTH)
                found = tl.sum(slope * part[None, :], axis=1)
                d_matrix = tl.where(stream[:, None] == source, d_matrix + found[None, :], d_matrix)
        tl.store(d_write + token * STREAMS + stream, d_shares, mask=stream < STREAMS)
        cell = token * (STREAMS * STREAMS) + stream[:, None] * STREAMS + stream[None, :]
        tl.store(d_mix + cell, d_matrix, mask=(stream[:, None] < STREAMS) & (stream[None, :] < STREAMS))
