"""The routed experts of one layer: y_t = sum_k w_tk * down_e(silu(gate_e(x_t)) * up_e(x_t)), e = indices_tk; with a
limit L (DeepSeek-V4, arXiv 2606.19348, section 4.2.1) the gate is cut above L and up outside of [-L, L], before silu.

Shapes: T tokens, D hidden size, F expert width, E experts, K experts per token, N = T * K routed rows.

Tokens are sorted by expert once, every expert multiplies its own contiguous slice, and the sum over K is a gather:
no per-expert indexing of a stacked parameter under autograd, whose backward would fill a gradient of size [E, ...] for
each expert. The routing weight is folded into the hidden activation, so the experts' outputs need not be kept.
DeepSeek-V3, arXiv 2412.19437, equations 12 and 13.

The products forwards take a multiple of four rows each, the last of which are the next expert's and come to nothing:
fewer rows go through other code of a BLAS, which rounds otherwise, and a token's result must not depend on how many
other tokens chose its experts.

Both passes are operators of torch.library, `moe_kernels::experts` and `moe_kernels::experts_backward`. How many rows an
expert gets is known only where the data is, and their shapes do not depend on it: fake tensors, the meta device and
torch.compile take each pass as one node.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_kernels.autocast import in_autocast_dtype

MULTIPLE = 4  # rows of a product


def experts(
    x_TD: Tensor,
    indices_TK: Tensor,
    weights_TK: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    limit: float | None = None,
) -> Tensor:
    """Mixture of SwiGLU experts, [T, D] -> [T, D], in the dtype of autocast where that is on, else of `x_TD`.

    indices_TK: int64, the experts of each token. weights_TK: fp32, their mixing weights. gate_up: gate rows first.
    """
    x_TD, gate_up_E2FD, down_EDF = in_autocast_dtype(x_TD, gate_up_E2FD, down_EDF)
    return _experts(x_TD, indices_TK, weights_TK, gate_up_E2FD, down_EDF, limit)[0]


@torch.library.custom_op("moe_kernels::experts", mutates_args=())
def _experts(
    x_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor, gate_up: Tensor, down: Tensor, limit: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y_TD, and what the backward pass needs: x_ND, order_TK, ends_E, scale_N1, gate_up_N2F, cut at the limit).

    order_TK: for each sorted row, which of the N = T * K pairs of token and choice it is, as a place in the flat pairs.
    """
    order_TK = indices_TK.flatten().argsort(stable=True).view_as(indices_TK)
    ends_E = torch.bincount(indices_TK.flatten(), minlength=gate_up.shape[0]).cumsum(0)
    x_ND = x_TD.index_select(0, order_TK.flatten() // indices_TK.shape[1])
    slices, wide_ND = _slices(ends_E, MULTIPLE), F.pad(x_ND, (0, 0, 0, MULTIPLE - 1))
    scale_N1 = weights_TK.flatten()[order_TK.flatten()].unsqueeze(1).to(x_TD.dtype)
    wide_N2F = x_TD.new_empty(len(wide_ND), gate_up.shape[1])
    for expert, rows in slices:
        torch.mm(wide_ND[rows], gate_up[expert].t(), out=wide_N2F[rows])
    gate_up_N2F = wide_N2F[: len(x_ND)]
    gate_NF, up_NF = gate_up_N2F.chunk(2, dim=1)
    if limit is not None:
        gate_NF.clamp_(max=limit)
        up_NF.clamp_(-limit, limit)
    hidden_NF = F.pad(F.silu(gate_NF).mul_(up_NF).mul_(scale_N1), (0, 0, 0, MULTIPLE - 1))
    y_ND = torch.empty_like(wide_ND)
    for expert, rows in slices:
        torch.mm(hidden_NF[rows], down[expert].t(), out=y_ND[rows])
    return _combine(y_ND[: len(x_ND)], order_TK), x_ND, order_TK, ends_E, scale_N1, gate_up_N2F


@_experts.register_fake
def _(
    x_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor, gate_up: Tensor, down: Tensor, limit: float | None
) -> tuple[Tensor, ...]:
    rows = indices_TK.numel()
    kept = x_TD.new_empty(rows, x_TD.shape[1]), torch.empty_like(indices_TK), indices_TK.new_empty(gate_up.shape[0])
    return torch.empty_like(x_TD), *kept, x_TD.new_empty(rows, 1), x_TD.new_empty(rows, gate_up.shape[1])


@torch.library.custom_op("moe_kernels::experts_backward", mutates_args=())
def _experts_backward(
    grad_TD: Tensor,
    x_ND: Tensor,
    order_TK: Tensor,
    ends_E: Tensor,
    scale_N1: Tensor,
    gate_up_N2F: Tensor,
    gate_up: Tensor,
    down: Tensor,
    limit: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x [T, D], of the weights [T, K] in fp32, of gate_up [E, 2F, D] and of down [E, D, F]."""
    slices = _slices(ends_E)
    grad_ND = grad_TD.to(x_ND.dtype).index_select(0, order_TK.flatten() // order_TK.shape[1])
    gate_NF, up_NF = gate_up_N2F.chunk(2, dim=1)
    d_hidden_NF = torch.empty_like(gate_NF, memory_format=torch.contiguous_format)
    for expert, rows in slices:
        torch.mm(grad_ND[rows], down[expert], out=d_hidden_NF[rows])
    silu_NF = F.silu(gate_NF)
    hidden_NF = silu_NF * up_NF
    d_scale_N = (d_hidden_NF * hidden_NF).sum(dim=1, dtype=torch.float32)
    hidden_NF.mul_(scale_N1)
    d_hidden_NF.mul_(scale_N1)
    d_gate_NF = torch.ops.aten.silu_backward(d_hidden_NF * up_NF, gate_NF)
    d_gate_up_N2F = torch.cat([d_gate_NF, d_hidden_NF.mul_(silu_NF)], dim=1)
    if limit is not None:
        d_gate_up_N2F[:, : gate_NF.shape[1]].masked_fill_(gate_NF == limit, 0.0)
        d_gate_up_N2F[:, gate_NF.shape[1] :].masked_fill_(up_NF.abs() == limit, 0.0)
    d_gate_up, d_down, d_x_ND = torch.zeros_like(gate_up), torch.zeros_like(down), torch.empty_like(x_ND)
    for expert, rows in slices:
        torch.mm(grad_ND[rows].t(), hidden_NF[rows], out=d_down[expert])
        torch.mm(d_gate_up_N2F[rows].t(), x_ND[rows], out=d_gate_up[expert])
        torch.mm(d_gate_up_N2F[rows], gate_up[expert], out=d_x_ND[rows])
    d_weights_TK = d_scale_N[_places(order_TK)]
    return _combine(d_x_ND, order_TK), d_weights_TK, d_gate_up, d_down


@_experts_backward.register_fake
def _(
    grad_TD: Tensor, x_ND: Tensor, order_TK: Tensor, *rest: Tensor | float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gate_up, down, _ = rest[-3:]
    d_weights_TK = torch.empty_like(order_TK, dtype=torch.float32)
    return x_ND.new_empty(grad_TD.shape), d_weights_TK, torch.empty_like(gate_up), torch.empty_like(down)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Sorted inputs and the gate/up activations are what the backward pass needs; they have no gradient."""
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:], *inputs[3:5])
    ctx.limit = inputs[5]
    ctx.weights_dtype = inputs[2].dtype


def _gradients(ctx: Any, grad_TD: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    d_x_TD, d_weights_TK, d_gate_up, d_down = _experts_backward(grad_TD, *ctx.saved_tensors, ctx.limit)
    return d_x_TD, None, d_weights_TK.to(ctx.weights_dtype), d_gate_up, d_down, None


_experts.register_autograd(_gradients, setup_context=_keep)


def _slices(ends_E: Tensor, multiple: int = 1) -> list[tuple[int, slice]]:
    """(expert, its rows among the sorted ones) for every expert that has at least one row; a multiple of rows each."""
    ends = ends_E.tolist()
    starts = [0, *ends[:-1]]
    pairs = ((expert, a, b) for expert, (a, b) in enumerate(zip(starts, ends, strict=True)) if b > a)
    return [(expert, slice(a, b + (a - b) % multiple)) for expert, a, b in pairs]


def _places(order_TK: Tensor) -> Tensor:
    """The sorted row of each pair of token and choice: the inverse permutation, [T, K]."""
    rows_N = torch.arange(order_TK.numel(), device=order_TK.device)
    return torch.empty_like(rows_N).scatter_(0, order_TK.flatten(), rows_N).view_as(order_TK)


def _combine(y_ND: Tensor, order_TK: Tensor) -> Tensor:
    """Sum the K rows of each token: sorted rows [N, D] -> [T, D], accumulated in fp32."""
    rows_TKD = y_ND.index_select(0, _places(order_TK).flatten()).unflatten(0, order_TK.shape)
    return rows_TKD.sum(dim=1, dtype=torch.float32).to(y_ND.dtype)
