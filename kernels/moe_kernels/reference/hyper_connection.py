"""Manifold-constrained hyper-connections: N residual streams are read by a weighted sum, mixed by a doubly stochastic
matrix and written to, with coefficients that depend on the token (arXiv 2512.24880, section 4; DeepSeek-V4,
arXiv 2606.19348, section 2.2).

Shapes: T tokens, N streams, D hidden size, P = (2 + N) N coefficients a token, in order: read N, write N, mix N x N.
All of it is fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_kernels.reference.sinkhorn import sinkhorn


def hyper_read(
    x_TND: Tensor, fn_PC: Tensor, base_P: Tensor, scale_3: Tensor, norm_eps: float, iterations: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(read_t . x_t [T, D], write [T, N], mix [T, N from, N to]); equations 7 and 8 of arXiv 2512.24880.

    read = sigmoid(.) + eps, write = 2 sigmoid(.), mix = sinkhorn(.), each of scale * (rms_norm(x) fn^T) + base.
    """
    h_TD, write_TN, logits_TNN = read_and_logits(x_TND, fn_PC, base_P, scale_3, norm_eps, eps)
    return h_TD, write_TN, sinkhorn(logits_TNN, iterations, eps)


def read_and_logits(
    x_TND: Tensor, fn_PC: Tensor, base_P: Tensor, scale_3: Tensor, norm_eps: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(read_t . x_t [T, D], write [T, N], what Sinkhorn-Knopp makes the mix of [T, N, N])."""
    streams = x_TND.shape[1]
    u_TP = projected(x_TND.flatten(1), fn_PC, norm_eps)
    parts = [streams, streams, streams * streams]
    triples = zip(u_TP.split(parts, dim=-1), scale_3, base_P.split(parts), strict=True)
    read_TN, write_TN, mix_TX = (u * scale + base for u, scale, base in triples)
    h_TD = torch.bmm((read_TN.sigmoid() + eps).unsqueeze(1), x_TND).squeeze(1)
    return h_TD, 2 * write_TN.sigmoid(), mix_TX.unflatten(1, (streams, streams))


def hyper_write(x_TND: Tensor, y_TD: Tensor, write_TN: Tensor, mix_TNN: Tensor) -> Tensor:
    """x'_k = sum_j mix[j, k] x_j + write_k y, [T, N, D]."""
    return torch.baddbmm(torch.bmm(mix_TNN.mT, x_TND), write_TN.unsqueeze(2), y_TD.unsqueeze(1))


def hyper_head(x_TND: Tensor, fn_NC: Tensor, base_N: Tensor, scale_1: Tensor, norm_eps: float, eps: float) -> Tensor:
    """read_t . x_t [T, D] with the same read, and nothing else."""
    read_TN = (projected(x_TND.flatten(1), fn_NC, norm_eps) * scale_1 + base_N).sigmoid() + eps
    return torch.bmm(read_TN.unsqueeze(1), x_TND).squeeze(1)


def projected(x_TC: Tensor, fn_PC: Tensor, eps: float) -> Tensor:
    """rms_norm(x) fn^T, with the division after the product: [T, C] -> [T, P]."""
    mean_T1 = torch.linalg.vector_norm(x_TC, dim=-1, keepdim=True).square() / x_TC.shape[-1]
    return F.linear(x_TC, fn_PC) * torch.rsqrt(mean_T1 + eps)
