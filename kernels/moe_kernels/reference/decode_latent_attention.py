"""Multi-head latent attention over a cache, token by token; DeepSeek-V2, arXiv 2405.04434, section 2.1.

Shapes: B rows, S new tokens a row, D hidden size, H heads, Q query channels, of which the last R turn, N = Q - R,
C latent channels, V value channels, T positions so far.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_kernels.reference.decoding import keep, kept, new_tokens, turned
from moe_kernels.reference.rms_norm import rms_norm


def decode_latent_attention(
    x_BSD: Tensor,
    lengths_B: Tensor,
    ends_B: Tensor,
    query: Sequence[Tensor],
    key_value: Sequence[Tensor],
    output_DX: Tensor,
    values_BNX: Tensor,
    positions_BN: Tensor,
    frequencies_R: Tensor,
    factor: float,
    scale: float,
    heads: int,
    eps: float,
) -> Tensor:
    """[B, S, D], zeros past a row's end; the cache holds latent and rotated key [C + R] of each position."""
    out_BSD = torch.zeros_like(x_BSD)
    down_XD, norm_C, up_XC = key_value
    for b, s, position in new_tokens(lengths_B, ends_B, x_BSD.shape[1]):
        q_HQ = turned(_query(x_BSD[b, s], query, eps).unflatten(0, (heads, -1)), position, frequencies_R, factor)
        latent_C, key_R = F.linear(x_BSD[b, s], down_XD).split([len(norm_C), len(down_XD) - len(norm_C)])
        key_R = turned(key_R[None], position, frequencies_R, factor)[0]
        keep(torch.cat([rms_norm(latent_C, norm_C, eps), key_R]), values_BNX[b], positions_BN[b], position)
        out_BSD[b, s] = F.linear(_attend(q_HQ, kept(values_BNX[b], 0, position + 1), up_XC, scale), output_DX)
    return out_BSD


def _query(x_D: Tensor, weights: Sequence[Tensor], eps: float) -> Tensor:
    if len(weights) == 1:
        return F.linear(x_D, weights[0])
    down, norm, up = weights
    return F.linear(rms_norm(F.linear(x_D, down), norm, eps), up)


def _attend(q_HQ: Tensor, past_TX: Tensor, up_XC: Tensor, scale: float) -> Tensor:
    """Over keys and values made of the latents, [H V]."""
    heads, latent = len(q_HQ), up_XC.shape[1]
    nope = q_HQ.shape[1] - (past_TX.shape[1] - latent)
    k_THN, v_THV = F.linear(past_TX[:, :latent], up_XC).unflatten(1, (heads, -1)).tensor_split([nope], dim=-1)
    logits_HT = torch.einsum("hn,thn->ht", q_HQ[:, :nope], k_THN) + q_HQ[:, nope:] @ past_TX[:, latent:].mT
    return torch.einsum("ht,thv->hv", (logits_HT * scale).softmax(dim=-1), v_THV).flatten()
