"""Window attention by tiles that skip what nobody sees; `window_attention.cpp` has the passes and their cost.

Shapes: B rows, S queries, K keys, H heads, D channels, T compressed entries, W tokens of the window.
Sums are fp32; with bfloat16 tensors the operands of products are bfloat16, probabilities too. Attention over a cache
goes to the reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_kernels.autocast import in_autocast_dtype
from moe_kernels.cpu.operators import FLOATS, all_are, operator
from moe_kernels.reference import window_attention as reference
from moe_kernels.reference.window_attention import cached_window_attention

__all__ = ["cached_window_attention", "window_attention"]


def window_attention(
    q_BSHD: Tensor, kv_BSD: Tensor, entries_BTD: Tensor, sinks_H: Tensor, window_BSK: Tensor, visible_BST: Tensor
) -> tuple[Tensor, Tensor]:
    """(out [B, S, H, D], probability of each entry summed over heads [B, S, T], detached)."""
    q, kv, entries = in_autocast_dtype(q_BSHD, kv_BSD, entries_BTD)
    if q.dtype not in FLOATS or not all_are(q.dtype, kv, entries):
        return reference.window_attention(q_BSHD, kv_BSD, entries_BTD, sinks_H, window_BSK, visible_BST)
    tensors = (q, kv, entries, sinks_H.float(), window_BSK, visible_BST)
    return torch.ops.moe_kernels_cpu.window_attention(*(tensor.contiguous() for tensor in tensors))[:2]


def _shapes(
    q: Tensor, kv: Tensor, entries: Tensor, sinks: Tensor, window: Tensor, visible: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), sinks.new_empty(visible.shape), sinks.new_empty(q.shape[:3])


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs, output[2])


def _gradients(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.moe_kernels_cpu.window_attention_backward(grad.contiguous(), *ctx.saved_tensors), None, None


operator(
    "window_attention(Tensor q, Tensor kv, Tensor entries, Tensor sinks, Tensor window, Tensor visible)"
    " -> (Tensor, Tensor, Tensor)",
    _shapes,
    (_keep, _gradients),
)
operator(
    "window_attention_backward(Tensor grad, Tensor q, Tensor kv, Tensor entries, Tensor sinks, Tensor window,"
    " Tensor visible, Tensor log_sums) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda grad, q, kv, entries, sinks, *others: tuple(torch.empty_like(t) for t in (q, kv, entries, sinks)),
)
