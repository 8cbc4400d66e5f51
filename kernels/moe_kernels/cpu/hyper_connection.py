"""Hyper-connections in one pass over the streams each way; `hyper_connection.cpp` has the passes and their cost.

Shapes: T tokens, N streams (up to 8), D hidden size, P = (2 + N) N coefficients a token. All of it is fp32; other
dtypes and more streams go to the reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_kernels.cpu.operators import all_are, operator
from moe_kernels.reference import hyper_connection as reference

MAX_STREAMS = 8


def hyper_read(
    x_TND: Tensor, fn_PC: Tensor, base_P: Tensor, scale_3: Tensor, norm_eps: float, iterations: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(read_t . x_t [T, D], write [T, N], mix [T, N from, N to])."""
    if not _fits(x_TND, fn_PC, base_P, scale_3):
        return reference.hyper_read(x_TND, fn_PC, base_P, scale_3, norm_eps, iterations, eps)
    tensors = (tensor.contiguous() for tensor in (x_TND, fn_PC, base_P, scale_3))
    return torch.ops.moe_kernels_cpu.hyper_read(*tensors, norm_eps, iterations, eps)[:3]


def hyper_head(x_TND: Tensor, fn_NC: Tensor, base_N: Tensor, scale_1: Tensor, norm_eps: float, eps: float) -> Tensor:
    """read_t . x_t [T, D]."""
    if not _fits(x_TND, fn_NC, base_N, scale_1):
        return reference.hyper_head(x_TND, fn_NC, base_N, scale_1, norm_eps, eps)
    tensors = (tensor.contiguous() for tensor in (x_TND, fn_NC, base_N, scale_1))
    return torch.ops.moe_kernels_cpu.hyper_head(*tensors, norm_eps, eps)[0]


def hyper_write(x_TND: Tensor, y_TD: Tensor, write_TN: Tensor, mix_TNN: Tensor) -> Tensor:
    """x'_k = sum_j mix[j, k] x_j + write_k y, [T, N, D]."""
    if not _fits(x_TND, y_TD, write_TN, mix_TNN):
        return reference.hyper_write(x_TND, y_TD, write_TN, mix_TNN)
    return torch.ops.moe_kernels_cpu.hyper_write(*(t.contiguous() for t in (x_TND, y_TD, write_TN, mix_TNN)))


def _fits(x_TND: Tensor, *others: Tensor) -> bool:
    return x_TND.shape[1] <= MAX_STREAMS and all_are(torch.float32, x_TND, *others)


def _read_shapes(
    x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm_eps: float, iterations: int, eps: float
) -> tuple[Tensor, ...]:
    tokens, streams, width = x.shape
    shapes = ((width,), (streams,), (streams, streams), (fn.shape[0],), ())
    return tuple(x.new_empty(tokens, *shape) for shape in shapes)


def _read_keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[3:])
    ctx.save_for_backward(*inputs[:4], *output[3:])
    ctx.numbers = inputs[5:]


def _read_gradients(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    parts = (grad.contiguous() for grad in grads[:3])
    return *torch.ops.moe_kernels_cpu.hyper_read_backward(*parts, *ctx.saved_tensors, *ctx.numbers), None, None, None


def _head_shapes(x: Tensor, fn: Tensor, *others: Any) -> tuple[Tensor, ...]:
    tokens, _, width = x.shape
    return x.new_empty(tokens, width), x.new_empty(tokens, fn.shape[0]), x.new_empty(tokens)


def _head_keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:4], *output[1:])
    ctx.eps = inputs[5]


def _head_gradients(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    found = torch.ops.moe_kernels_cpu.hyper_head_backward(grad.contiguous(), *ctx.saved_tensors, ctx.eps)
    return *found, None, None


def _write_keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _write_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    return torch.ops.moe_kernels_cpu.hyper_write_backward(grad.contiguous(), *ctx.saved_tensors)


operator(
    "hyper_read(Tensor x, Tensor fn, Tensor base, Tensor scale, float norm_eps, int iterations, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _read_shapes,
    (_read_keep, _read_gradients),
)
operator(
    "hyper_read_backward(Tensor d_h, Tensor d_write, Tensor d_mix, Tensor x, Tensor fn, Tensor base, Tensor scale,"
    " Tensor projection, Tensor inverse_rms, int iterations, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda d_h, d_write, d_mix, *inputs: tuple(torch.empty_like(tensor) for tensor in inputs[:4]),
)
operator(
    "hyper_head(Tensor x, Tensor fn, Tensor base, Tensor scale, float norm_eps, float eps) -> (Tensor, Tensor, Tensor)",
    _head_shapes,
    (_head_keep, _head_gradients),
)
operator(
    "hyper_head_backward(Tensor d_h, Tensor x, Tensor fn, Tensor base, Tensor scale, Tensor projection,"
    " Tensor inverse_rms, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda d_h, *inputs: tuple(torch.empty_like(tensor) for tensor in inputs[:4]),
)
operator(
    "hyper_write(Tensor x, Tensor y, Tensor write, Tensor mix) -> Tensor",
    lambda x, *others: torch.empty_like(x),
    (_write_keep, _write_gradients),
)
operator(
    "hyper_write_backward(Tensor grad, Tensor x, Tensor y, Tensor write, Tensor mix)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    lambda grad, *inputs: tuple(torch.empty_like(tensor) for tensor in inputs),
)
