"""DeepSeek-V4's attention over a cache, token by token: a window of raw tokens, compressed entries of the past, an
indexer that chooses among them; arXiv 2606.19348, section 2.3.

Shapes: B rows, S new tokens a row, D hidden size, H heads, C channels of a head, M tokens an entry, X channels of the
compressor's values and gates, J indexer heads, I their channels, T entries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_kernels.reference.decoding import keep, kept, new_tokens, turned
from moe_kernels.reference.rms_norm import rms_norm

Cache = tuple[Tensor, Tensor]  # values and positions of one row


def decode_compressed_attention(
    x_BSD: Tensor,
    lengths_B: Tensor,
    ends_B: Tensor,
    weights: Sequence[Tensor],
    compression: Sequence[Tensor],
    indexing: Sequence[Tensor],
    caches: Sequence[Tensor],
    frequencies_R: Tensor,
    groups: int,
    top_k: int,
    eps: float,
) -> Tensor:
    """[B, S, D], zeros past a row's end."""
    out_BSD = torch.zeros_like(x_BSD)
    q_a, q_norm, q_b, kv, kv_norm, o_a, o_b, sinks_H = weights
    for b, s, position in new_tokens(lengths_B, ends_B, x_BSD.shape[1]):
        x_D, (window, *others) = x_BSD[b, s], _pairs(caches, b)
        low = rms_norm(F.linear(x_D, q_a), q_norm, eps)
        q_HC = rms_norm(F.linear(low, q_b).unflatten(0, (len(sinks_H), -1)), None, eps)
        key_1C = turned(rms_norm(F.linear(x_D, kv), kv_norm, eps)[None], position, frequencies_R)
        keep(key_1C[0], *window, position)
        keys_TC = kept(window[0], max(0, position + 2 - len(window[0])), position + 1)
        if compression:
            entries_TC = _entries(x_D, compression, *others[:2], position, frequencies_R, eps)
            index_TI = _entries(x_D, indexing, *others[2:], position, frequencies_R, eps) if indexing else None
            if index_TI is not None and len(index_TI) > top_k:
                entries_TC = entries_TC[_best(x_D, low, index_TI, indexing, position, frequencies_R)[:top_k]]
            keys_TC = torch.cat([keys_TC, entries_TC])
        out_HC = _attend(turned(q_HC, position, frequencies_R), keys_TC, sinks_H)
        grouped = turned(out_HC, position, frequencies_R, inverse=True).flatten().unflatten(0, (groups, -1, 1))
        out_BSD[b, s] = F.linear(torch.bmm(o_a.unflatten(0, (groups, -1)), grouped).flatten(), o_b)
    return out_BSD


def _pairs(caches: Sequence[Tensor], row: int) -> list[Cache]:
    return [(caches[n][row], caches[n + 1][row]) for n in range(0, len(caches), 2)]


def _entries(
    x_D: Tensor,
    weights: Sequence[Tensor],
    tokens: Cache,
    entries: Cache,
    position: int,
    frequencies_R: Tensor,
    eps: float,
) -> Tensor:
    """Keeps a token's values and gates, and the entry of a block that it completes; all entries so far."""
    value_XD, gate_XD, bias_MX, norm_C = weights[:4]
    rate, count = len(bias_MX), (position + 1) // len(bias_MX)
    keep(torch.cat([F.linear(x_D, value_XD), F.linear(x_D, gate_XD)]), *tokens, position)
    if (position + 1) % rate == 0:
        pooled_C = _pooled(tokens[0], bias_MX, len(norm_C), position + 1 - rate)
        entry_1C = turned(rms_norm(pooled_C, norm_C, eps)[None], position + 1 - rate, frequencies_R)
        keep(entry_1C[0], *entries, count - 1)
    return kept(entries[0], 0, count)


def _pooled(tokens_NX: Tensor, bias_MX: Tensor, width: int, first: int) -> Tensor:
    """A softmax over the tokens of a block weighs them channel by channel; where values and gates have two halves, the
    first is that of the block before."""
    rate, halves = bias_MX.shape[0], bias_MX.shape[1] // width
    starts = [first - rate, first][-halves:] if first else [first]
    values, gates = [], []
    for half, start in zip(range(halves)[-len(starts) :], starts, strict=True):
        value_MX, gate_MX = kept(tokens_NX, start, start + rate).chunk(2, dim=-1)
        part = slice(half * width, (half + 1) * width)
        values.append(value_MX[:, part])
        gates.append((gate_MX + bias_MX)[:, part])
    return (torch.cat(gates).softmax(dim=0) * torch.cat(values)).sum(dim=0)


def _best(
    x_D: Tensor, low: Tensor, keys_TI: Tensor, weights: Sequence[Tensor], position: int, frequencies_R: Tensor
) -> Tensor:
    """The entries, best first, of equal ones the first: the score is the sum over heads of w_h relu(q_h . k)."""
    q_b, weights_JD = weights[4:]
    q_JI = turned(F.linear(low, q_b).unflatten(0, (len(weights_JD), -1)), position, frequencies_R)
    scores_T = F.linear(x_D, weights_JD) @ (q_JI @ keys_TI.mT).relu()
    return scores_T.sort(descending=True, stable=True).indices


def _attend(q_HC: Tensor, keys_TC: Tensor, sinks_H: Tensor) -> Tensor:
    logits_HT = torch.cat([sinks_H[:, None], q_HC @ keys_TC.mT * q_HC.shape[1] ** -0.5], dim=1)
    return logits_HT.softmax(dim=1)[:, 1:] @ keys_TC
