"""Sinkhorn-Knopp of the matrices of some tokens at a time: the parts that hyper-connections are made of.

Shapes: R tokens of a tile, N x N matrices in a corner of P x P ones, P a power of two; first index: from, second: to.
What is outside of the corner is 0 and stays 0. Forwards the sum of each step is kept, N numbers a token and step;
backwards a step is undone by multiplication with it. Steps run over columns, then over rows and columns in turn.
"""

from __future__ import annotations

import triton
import triton.language as tl


def steps(iterations: int) -> int:
    """Divisions by sums, after the softmax, which was the first row step."""
    return 2 * iterations - 1


@triton.jit
def softmax_rows(logits, corner) -> tl.tensor:
    """Softmax over `to` of a tile [R, P, P] inside of the corner."""
    logits = tl.where(corner, logits, float("-inf"))
    top = tl.maximum(tl.max(logits, axis=2), -1e38)
    powers = tl.exp(logits - top[:, :, None])
    total = tl.sum(powers, axis=2)
    return powers / tl.where(total == 0.0, 1.0, total)[:, :, None]


@triton.jit
def balance(logits, corner, sums, at, stride, inside, eps, ITERATIONS: tl.constexpr) -> tl.tensor:
    """The doubly stochastic matrix; writes the sums of step i at `sums + i * stride + at`, [R, P]."""
    matrix = tl.where(corner, softmax_rows(logits, corner) + eps, 0.0)
    total = tl.sum(matrix, axis=1) + eps
    tl.store(sums + at, total, mask=inside)
    matrix = matrix / total[:, None, :]
    for step in range(1, ITERATIONS):
        total = tl.sum(matrix, axis=2) + eps
        tl.store(sums + tl.cast(2 * step - 1, tl.int64) * stride + at, total, mask=inside)
        matrix = matrix / total[:, :, None]
        total = tl.sum(matrix, axis=1) + eps
        tl.store(sums + tl.cast(2 * step, tl.int64) * stride + at, total, mask=inside)
        matrix = matrix / total[:, None, :]
    return matrix


@triton.jit
def unbalance(grad, matrix, logits, corner, sums, at, stride, inside, ITERATIONS: tl.constexpr) -> tl.tensor:
    """Gradient of the logits from that of the matrix."""
    for back in range(1, ITERATIONS):
        step = ITERATIONS - back
        total = tl.load(sums + tl.cast(2 * step, tl.int64) * stride + at, mask=inside, other=1.0)
        grad = (grad - tl.sum(grad * matrix, axis=1)[:, None, :]) / total[:, None, :]
        matrix = matrix * total[:, None, :]
        total = tl.load(sums + tl.cast(2 * step - 1, tl.int64) * stride + at, mask=inside, other=1.0)
        grad = (grad - tl.sum(grad * matrix, axis=2)[:, :, None]) / total[:, :, None]
        matrix = matrix * total[:, :, None]
    total = tl.load(sums + at, mask=inside, other=1.0)
    grad = (grad - tl.sum(grad * matrix, axis=1)[:, None, :]) / total[:, None, :]
    first = softmax_rows(logits, corner)
    return first * (grad - tl.sum(grad * first, axis=2)[:, :, None])
