"""Causal attention within documents by tiles that skip what nobody sees; `attention.cpp` has the passes and their cost.

Shapes: B batch, S queries, T keys, H heads, D query and key channels, V value channels. Sums are fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_kernels.cpu.operators import FLOATS, all_are, operator
from moe_kernels.reference import attention as reference


def attention(
    q_BSHD: Tensor, k_BTHD: Tensor, v_BTHV: Tensor, scale: float, document_ids_BT: Tensor | None = None
) -> Tensor:
    """[B, S, H, V]; the queries are the last S of the T tokens."""
    if q_BSHD.dtype not in FLOATS or not all_are(q_BSHD.dtype, k_BTHD, v_BTHV):
        return reference.attention(q_BSHD, k_BTHD, v_BTHV, scale, document_ids_BT)
    tensors = (tensor.contiguous() for tensor in (q_BSHD, k_BTHD, v_BTHV))
    documents = None if document_ids_BT is None else document_ids_BT.contiguous()
    return torch.ops.moe_kernels_cpu.attention(*tensors, scale, documents)[0]


def _shapes(q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Tensor | None) -> tuple[Tensor, Tensor]:
    rows, queries, heads, _ = q.shape
    return q.new_empty(rows, queries, heads, v.shape[-1]), q.new_empty(rows, heads, queries, dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, documents = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1], documents)


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, documents = ctx.saved_tensors
    backward = torch.ops.moe_kernels_cpu.attention_backward
    return *backward(grad.contiguous(), *tensors, ctx.scale, documents), None, None


operator(
    "attention(Tensor q, Tensor k, Tensor v, float scale, Tensor? documents) -> (Tensor, Tensor)",
    _shapes,
    (_keep, _gradients),
)
operator(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor log_sums, float scale, Tensor? documents)"
    " -> (Tensor, Tensor, Tensor)",
    lambda grad, q, k, v, *others: tuple(torch.empty_like(tensor) for tensor in (q, k, v)),
)
