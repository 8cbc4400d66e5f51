"""Sinkhorn-Knopp: logits of small square matrices to nearly doubly stochastic ones.

Shapes: T matrices of N x N (T tokens, N residual streams); first index: from, second: to.
mHC, arXiv 2512.24880, section 4.2; in the order of DeepSeek-V4's code: softmax over `to`, columns, then rows and
columns in turn. Matrices lie side by side in memory ([N, N, T]), so that every step runs over long vectors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FROM, TO = 0, 1  # axes of [N, N, T]


def sinkhorn(logits_TNN: Tensor, iterations: int, eps: float) -> Tensor:
    """[T, N, N] fp32 -> [T, N, N]: columns sum to 1 up to eps, rows as closely as `iterations` bring them there."""
    return _Sinkhorn.apply(logits_TNN, iterations, eps)


class _Sinkhorn(torch.autograd.Function):
    """Keeps the logits alone; the steps are made again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, logits_TNN: Tensor, iterations: int, eps: float) -> Tensor:
        ctx.save_for_backward(logits_TNN)
        ctx.iterations, ctx.eps = iterations, eps
        m_NNT = logits_TNN.permute(1, 2, 0).contiguous().softmax(dim=TO).add_(eps)
        for axis in _axes(iterations):
            m_NNT.div_(m_NNT.sum(dim=axis, keepdim=True).add_(eps))
        return m_NNT.permute(2, 0, 1).contiguous()

    @staticmethod
    def backward(ctx: Any, grad_TNN: Tensor) -> tuple[Tensor, None, None]:
        (logits_TNN,) = ctx.saved_tensors
        first_NNT = logits_TNN.permute(1, 2, 0).contiguous().softmax(dim=TO)
        m_NNT, steps = first_NNT + ctx.eps, []
        for axis in _axes(ctx.iterations):
            total = m_NNT.sum(dim=axis, keepdim=True).add_(ctx.eps)
            m_NNT = m_NNT / total
            steps.append((axis, total, m_NNT))
        grad_NNT = grad_TNN.permute(1, 2, 0).contiguous()
        for axis, total, m_NNT in reversed(steps):
            grad_NNT = grad_NNT.sub_((grad_NNT * m_NNT).sum(dim=axis, keepdim=True)).div_(total)
        grad_NNT = first_NNT * (grad_NNT - (grad_NNT * first_NNT).sum(dim=TO, keepdim=True))
        return grad_NNT.permute(2, 0, 1).contiguous(), None, None


def _axes(iterations: int) -> list[int]:
    """Columns sum over `from`, rows over `to`; the softmax was the first row step."""
    return [FROM, *[TO, FROM] * (iterations - 1)]
