"""The lightning indexer's scores without a product of every query and key in memory; `index_scores.cpp` has the passes.

Shapes: B rows, S tokens, J indexer heads, I their channels, T entries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_kernels.autocast import in_autocast_dtype
from moe_kernels.cpu.operators import FLOATS, all_are, operator
from moe_kernels.reference import index_scores as reference


def index_scores(q_BSJI: Tensor, weights_BSJ: Tensor, keys_BTI: Tensor, visible_BST: Tensor) -> Tensor:
    """sum_j w_j relu(q_j . k) where visible, else -1e30, [B, S, T] fp32. bfloat16 is multiplied in pairs."""
    q, keys = in_autocast_dtype(q_BSJI, keys_BTI)
    fits = all_are(q.dtype, q, keys) and all_are(torch.float32, weights_BSJ)
    if q.dtype not in FLOATS or not fits or (q.dtype is torch.bfloat16 and q.shape[-1] % 2):
        return reference.index_scores(q_BSJI, weights_BSJ, keys_BTI, visible_BST)
    tensors = (tensor.contiguous() for tensor in (q, weights_BSJ, keys, visible_BST))
    return torch.ops.moe_kernels_cpu.index_scores(*tensors)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.moe_kernels_cpu.index_scores_backward(grad.contiguous(), *ctx.saved_tensors), None


operator(
    "index_scores(Tensor q, Tensor weights, Tensor keys, Tensor visible) -> Tensor",
    lambda q, weights, keys, visible: weights.new_empty(visible.shape),
    (_keep, _gradients),
)
operator(
    "index_scores_backward(Tensor grad, Tensor q, Tensor weights, Tensor keys, Tensor visible)"
    " -> (Tensor, Tensor, Tensor)",
    lambda grad, *inputs: tuple(torch.empty_like(tensor) for tensor in inputs[:3]),
)
