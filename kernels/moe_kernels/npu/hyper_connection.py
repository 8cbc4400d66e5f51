"""Hyper-connections: the reference's few products over all tokens, and Sinkhorn-Knopp in one operator each way.

torch_npu's operators for the rest, `npu_mhc_pre` and `npu_mhc_post`, take streams in half precision; these are fp32.

Shapes: T tokens, N streams, D hidden size, P = (2 + N) N coefficients a token, C = N D.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_kernels.reference.hyper_connection import hyper_head, hyper_write, read_and_logits
from moe_kernels.reference.sinkhorn import sinkhorn as reference

__all__ = ["NEEDS", "hyper_head", "hyper_read", "hyper_write"]
NEEDS = {"npu_mhc_sinkhorn": ("eps", "num_iters", "out_flag"), "npu_mhc_sinkhorn_backward": ("grad_y", "norm", "sum")}
STREAMS, MOST_MATRICES = (4, 6, 8), 65536  # what the operator takes
WITH_STEPS = 1  # out_flag: the matrix of each step, which the backward pass reads


def hyper_read(
    x_TND: Tensor, fn_PC: Tensor, base_P: Tensor, scale_3: Tensor, norm_eps: float, iterations: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(what the sub-layer reads [T, D], write [T, N], mix [T, N from, N to])."""
    h_TD, write_TN, logits_TNN = read_and_logits(x_TND, fn_PC, base_P, scale_3, norm_eps, eps)
    fits = x_TND.shape[1] in STREAMS and len(x_TND) <= MOST_MATRICES
    return h_TD, write_TN, (_sinkhorn if fits else reference)(logits_TNN, iterations, eps)


@torch.library.custom_op("moe_kernels_npu::sinkhorn", mutates_args=())
def _sinkhorn(logits_TNN: Tensor, iterations: int, eps: float) -> Tensor:
    return torch.ops.npu.npu_mhc_sinkhorn(logits_TNN, eps=eps, num_iters=iterations)[0]


@_sinkhorn.register_fake
def _(logits_TNN: Tensor, iterations: int, eps: float) -> Tensor:
    return torch.empty_like(logits_TNN, memory_format=torch.contiguous_format)


@torch.library.custom_op("moe_kernels_npu::sinkhorn_backward", mutates_args=())
def _backward(grad_TNN: Tensor, logits_TNN: Tensor, iterations: int, eps: float) -> Tensor:
    """The steps are made again: kept, they would be 10 KB a token, sub-layer and 20 iterations."""
    _, steps, totals = torch.ops.npu.npu_mhc_sinkhorn(logits_TNN, eps=eps, num_iters=iterations, out_flag=WITH_STEPS)
    return torch.ops.npu.npu_mhc_sinkhorn_backward(grad_TNN, steps, totals)


@_backward.register_fake
def _(grad_TNN: Tensor, logits_TNN: Tensor, iterations: int, eps: float) -> Tensor:
    return torch.empty_like(grad_TNN)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits_TNN, ctx.iterations, ctx.eps = inputs
    ctx.save_for_backward(logits_TNN)


def _gradients(ctx: Any, grad_TNN: Tensor) -> tuple[Tensor, None, None]:
    return _backward(grad_TNN.contiguous(), *ctx.saved_tensors, ctx.iterations, ctx.eps), None, None


_sinkhorn.register_autograd(_gradients, setup_context=_keep)
