"""The routed experts of one layer, parallel over experts; `experts.cpp` has the passes and their cost.

Shapes: T tokens, D hidden size, F expert width, E experts, K experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_kernels.autocast import in_autocast_dtype
from moe_kernels.cpu.operators import FLOATS, all_are, operator
from moe_kernels.reference import experts as reference


def experts(
    x_TD: Tensor,
    indices_TK: Tensor,
    weights_TK: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    limit: float | None = None,
) -> Tensor:
    """Mixture of SwiGLU experts, [T, D] -> [T, D], in the dtype of autocast where that is on, else of `x_TD`.

    fp32 weights stay what they are beside rows in bfloat16: each expert rounds its own.
    """
    (x,) = in_autocast_dtype(x_TD)
    fits = all_are(gate_up_E2FD.dtype, gate_up_E2FD, down_EDF) and gate_up_E2FD.dtype in (x.dtype, torch.float32)
    if x.dtype not in FLOATS or not fits:
        return reference.experts(x_TD, indices_TK, weights_TK, gate_up_E2FD, down_EDF, limit)
    tensors = (tensor.contiguous() for tensor in (x, indices_TK, weights_TK.float(), gate_up_E2FD, down_EDF))
    return torch.ops.moe_kernels_cpu.experts(*tensors, limit)[0]


def _shapes(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, limit: float | None
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(indices.numel(), gate_up.shape[1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5], output[1])
    ctx.limit = inputs[5]


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    d_x, *others = torch.ops.moe_kernels_cpu.experts_backward(grad.contiguous(), *ctx.saved_tensors, ctx.limit)
    return d_x, None, *others, None


operator(
    "experts(Tensor x, Tensor indices, Tensor weights, Tensor gate_up, Tensor down, float? limit) -> (Tensor, Tensor)",
    _shapes,
    (_keep, _gradients),
)
operator(
    "experts_backward(Tensor grad, Tensor x, Tensor indices, Tensor weights, Tensor gate_up, Tensor down, Tensor kept,"
    " float? limit) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda grad, x, indices, weights, gate_up, down, *others: tuple(
        torch.empty_like(tensor) for tensor in (x, weights, gate_up, down)
    ),
)
