"""The routed experts of one layer: y_t = sum_k w_tk * down_e(silu(gate_e(x_t)) * up_e(x_t)), e = indices_tk.

Shapes: T tokens, D hidden size, F expert width, E experts, K experts per token, N = T * K routed rows.

Tokens are sorted by expert once, every expert multiplies its own contiguous slice, and the sum over K is a gather:
no per-expert indexing of a stacked parameter under autograd, whose backward would fill a gradient of size [E, ...] for
each expert. The routing weight is folded into the hidden activation, so the experts' outputs need not be kept.
DeepSeek-V3, arXiv 2412.19437, equations 12 and 13.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def experts(x_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor) -> Tensor:
    """Mixture of SwiGLU experts, [T, D] -> [T, D], in the dtype of autocast where that is on, else of `x_TD`.

    indices_TK: int64, the experts of each token. weights_TK: fp32, their mixing weights. gate_up: gate rows first.
    """
    if torch.is_autocast_enabled(x_TD.device.type):
        dtype = torch.get_autocast_dtype(x_TD.device.type)
        x_TD, gate_up_E2FD, down_EDF = (tensor.to(dtype) for tensor in (x_TD, gate_up_E2FD, down_EDF))
    return _Experts.apply(x_TD, indices_TK, weights_TK, gate_up_E2FD, down_EDF)


class _Experts(torch.autograd.Function):
    """One autograd node for the whole layer; saves the sorted inputs and the gate/up activations."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor, gate_up: Tensor, down: Tensor
    ) -> Tensor:
        order_N = indices_TK.flatten().argsort(stable=True)
        slices = _slices(indices_TK, gate_up.shape[0])
        x_ND = x_TD.index_select(0, order_N // indices_TK.shape[1])
        scale_N1 = weights_TK.flatten()[order_N].unsqueeze(1).to(x_TD.dtype)
        gate_up_N2F = x_TD.new_empty(x_ND.shape[0], gate_up.shape[1])
        for expert, rows in slices:
            torch.mm(x_ND[rows], gate_up[expert].t(), out=gate_up_N2F[rows])
        gate_NF, up_NF = gate_up_N2F.chunk(2, dim=1)
        hidden_NF = F.silu(gate_NF).mul_(up_NF).mul_(scale_N1)
        y_ND = torch.empty_like(x_ND)
        for expert, rows in slices:
            torch.mm(hidden_NF[rows], down[expert].t(), out=y_ND[rows])
        place_N = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(len(order_N), device=order_N.device))
        ctx.save_for_backward(x_ND, order_N, place_N, scale_N1, gate_up_N2F, gate_up, down)
        ctx.slices, ctx.shape, ctx.weights_dtype = slices, indices_TK.shape, weights_TK.dtype
        return _combine(y_ND, place_N, ctx.shape)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, order_N, place_N, scale_N1, gate_up_N2F, gate_up, down = ctx.saved_tensors
        grad_ND = grad_TD.to(x_ND.dtype).index_select(0, order_N // ctx.shape[1])
        gate_NF, up_NF = gate_up_N2F.chunk(2, dim=1)
        d_hidden_NF = torch.empty_like(gate_NF, memory_format=torch.contiguous_format)
        for expert, rows in ctx.slices:
            torch.mm(grad_ND[rows], down[expert], out=d_hidden_NF[rows])
        silu_NF = F.silu(gate_NF)
        hidden_NF = silu_NF * up_NF
        d_scale_N = (d_hidden_NF * hidden_NF).sum(dim=1, dtype=torch.float32)
        hidden_NF.mul_(scale_N1)
        d_hidden_NF.mul_(scale_N1)
        d_gate_NF = torch.ops.aten.silu_backward(d_hidden_NF * up_NF, gate_NF)
        d_gate_up_N2F = torch.cat([d_gate_NF, d_hidden_NF.mul_(silu_NF)], dim=1)
        d_gate_up, d_down, d_x_ND = torch.zeros_like(gate_up), torch.zeros_like(down), torch.empty_like(x_ND)
        for expert, rows in ctx.slices:
            torch.mm(grad_ND[rows].t(), hidden_NF[rows], out=d_down[expert])
            torch.mm(d_gate_up_N2F[rows].t(), x_ND[rows], out=d_gate_up[expert])
            torch.mm(d_gate_up_N2F[rows], gate_up[expert], out=d_x_ND[rows])
        d_weights_TK = d_scale_N[place_N].view(ctx.shape).to(ctx.weights_dtype)
        return _combine(d_x_ND, place_N, ctx.shape), None, d_weights_TK, d_gate_up, d_down


def _slices(indices_TK: Tensor, num_experts: int) -> list[tuple[int, slice]]:
    """(expert, its rows among the sorted ones) for every expert that has at least one row."""
    ends = torch.bincount(indices_TK.flatten(), minlength=num_experts).cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    return [(expert, slice(a, b)) for expert, (a, b) in enumerate(zip(starts, ends, strict=True)) if b > a]


def _combine(y_ND: Tensor, place_N: Tensor, shape: torch.Size) -> Tensor:
    """Sum the K rows of each token: sorted rows [N, D] -> [T, D], accumulated in fp32."""
    rows_TKD = y_ND.index_select(0, place_N).unflatten(0, shape)
    return rows_TKD.sum(dim=1, dtype=torch.float32).to(y_ND.dtype)
