"""Cross entropy in one pass over the logits, its gradient in another, by chunks of the vocabulary. fp32 inside.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.reference import cross_entropy as reference
from moe_kernels.triton.tiles import ELEMENTS, fit, grid


def cross_entropy(logits_TV: Tensor, targets_T: Tensor, ignored: int = -100) -> Tensor:
    """-log softmax(logits)[target] in nats, fp32 [T]; 0 where the target is `ignored`."""
    if not fit(logits_TV):
        return reference.cross_entropy(logits_TV, targets_T, ignored)
    return _CrossEntropy.apply(logits_TV.contiguous(), targets_T.contiguous(), ignored)


@torch.no_grad()
def cross_entropy_with_gradient(
    logits_TV: Tensor, targets_T: Tensor, scale: Tensor, ignored: int = -100
) -> tuple[Tensor, Tensor]:
    """(-log softmax(logits)[target] [T] fp32, `scale` times the gradient of their sum [T, V])."""
    if not fit(logits_TV, scale):
        return reference.cross_entropy_with_gradient(logits_TV, targets_T, scale, ignored)
    logits_TV, targets_T = logits_TV.contiguous(), targets_T.contiguous()
    losses_T, log_sums_T = _losses(logits_TV, targets_T, ignored)
    return losses_T, _gradient(logits_TV, targets_T, log_sums_T, scale.expand_as(losses_T), ignored)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, targets_T: Tensor, ignored: int) -> Tensor:
        losses_T, log_sums_T = _losses(logits_TV, targets_T, ignored)
        ctx.save_for_backward(logits_TV, targets_T, log_sums_T)
        ctx.ignored = ignored
        return losses_T

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None, None]:
        return _gradient(*ctx.saved_tensors, grad_T, ctx.ignored), None, None


def _losses(logits_TV: Tensor, targets_T: Tensor, ignored: int) -> tuple[Tensor, Tensor]:
    """(losses, logarithm of the sum of exponentials) of each token."""
    tokens, words = logits_TV.shape
    losses_T, log_sums_T = (logits_TV.new_empty(tokens, dtype=torch.float32) for _ in range(2))
    tensors = (logits_TV, targets_T, losses_T, log_sums_T)
    _loss_kernel[grid(tokens, logits_TV)](*tensors, tokens, ignored, words, _chunk(words))
    return losses_T, log_sums_T


def _gradient(logits_TV: Tensor, targets_T: Tensor, log_sums_T: Tensor, factors_T: Tensor, ignored: int) -> Tensor:
    tokens, words = logits_TV.shape
    gradient_TV, stride = torch.empty_like(logits_TV), factors_T.stride(0) if tokens else 0
    tensors = (logits_TV, targets_T, log_sums_T, factors_T, gradient_TV)
    tasks = tokens * triton.cdiv(words, _chunk(words))
    _gradient_kernel[grid(tasks, logits_TV)](*tensors, tokens, stride, ignored, words, _chunk(words))
    return gradient_TV


def _chunk(words: int) -> int:
    return min(ELEMENTS, triton.next_power_of_2(words))


@triton.jit
def _loss_kernel(logits, targets, losses, log_sums, tokens, ignored, WORDS: tl.constexpr, CHUNK: tl.constexpr) -> None:
    """Maximum and sum of each element of a chunk, joined at the end of the row; no number for a word that is none."""
    for token in range(tl.program_id(0), tokens, tl.num_programs(0)):
        row = logits + tl.cast(token, tl.int64) * WORDS
        word = tl.arange(0, CHUNK)
        top = tl.full((CHUNK,), float("-inf"), tl.float32)
        total = tl.zeros((CHUNK,), dtype=tl.float32)
        for start in range(0, WORDS, CHUNK):
            value = tl.load(row + start + word, mask=start + word < WORDS, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(tl.maximum(top, value), -1e38)
            total = total * tl.exp(top - higher) + tl.exp(value - higher)
            top = higher
        best = tl.max(top, axis=0)
        log_sum = best + tl.log(tl.sum(total * tl.exp(top - best), axis=0))
        target = tl.load(targets + token).to(tl.int32)
        counts = target != ignored
        known = (target >= 0) & (target < WORDS)
        own = tl.load(row + target, mask=known, other=float("nan")).to(tl.float32)
        tl.store(log_sums + token, log_sum)
        tl.store(losses + token, tl.where(counts, log_sum - own, 0.0))


@triton.jit
def _gradient_kernel(
    logits, targets, log_sums, factors, gradient, tokens, stride, ignored, WORDS: tl.constexpr, CHUNK: tl.constexpr
) -> None:
    """A task is a chunk of a row."""
    chunks = tl.cdiv(WORDS, CHUNK)
    for task in range(tl.program_id(0), tokens * chunks, tl.num_programs(0)):
        token = task // chunks
        word = (task % chunks) * CHUNK + tl.arange(0, CHUNK)
        start = tl.cast(token, tl.int64) * WORDS
        value = tl.load(logits + start + word, mask=word < WORDS, other=0.0).to(tl.float32)
        target = tl.load(targets + token).to(tl.int32)
        factor = tl.where(target != ignored, tl.load(factors + token * stride).to(tl.float32), 0.0)
        slope = tl.exp(value - tl.load(log_sums + token)) - tl.where(word == target, 1.0, 0.0)
        tl.store(gradient + start + word, (slope * factor).to(gradient.dtype.element_ty), mask=word < WORDS)
