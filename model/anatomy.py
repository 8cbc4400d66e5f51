"""What one DeepSeek-V4 layer does to a text, as tensors to look at: the weights of its hyper-connections, what each
token attends to, and what its indexer chose. It observes the layers of `model/`; nothing here is used in training.

    parts = attention_parts(block.self_attn, block.input_layernorm(h), Context(config, ids))

Shapes: B rows (1 here), S tokens, N residual streams, D channels, H heads, T compressed entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from moe_kernels.reference.hyper_connection import projected
from moe_kernels.reference.sinkhorn import sinkhorn
from torch import Tensor

from model.compressed_attention import CompressedAttention, top_k_mask
from model.context import Context
from model.hyper_connections import HyperConnection


@dataclass(frozen=True)
class StreamWeights:
    """Of one hyper-connection, for each token: read [S, N], write [S, N], mix [S, N from, N to] (doubly stochastic),
    and the logits [S, N, N] that Sinkhorn's iterations turn into mix."""

    read_SN: Tensor
    write_SN: Tensor
    mix_SNN: Tensor
    logits_SNN: Tensor


@dataclass(frozen=True)
class AttentionParts:
    """Where the probability of each query goes, mean over heads: raw tokens near_SS, compressed entries far_ST, sink_S.

    visible_ST: entries of complete blocks of the past. chosen_ST: those among them that the indexer let through, all
    of them without an indexer. scores_ST: the indexer's, None without one. rate: tokens an entry stands for, 0 where
    the layer has no entries.
    """

    near_SS: Tensor
    far_ST: Tensor
    sink_S: Tensor
    visible_ST: Tensor
    chosen_ST: Tensor
    scores_ST: Tensor | None
    rate: int


@torch.no_grad()
def stream_weights(connection: HyperConnection, x_1SND: Tensor) -> StreamWeights:
    """The coefficients that `connection` computes from the streams; equations 7 and 8 of arXiv 2512.24880."""
    c, n = connection.config, connection.config.hc_mult
    u_SP = projected(x_1SND[0].float().flatten(1), connection.fn, c.rms_norm_eps)
    pieces = (u_SP.split(connection.parts, -1), connection.scale, connection.base.split(connection.parts))
    read_SN, write_SN, mix_SX = (u * scale + base for u, scale, base in zip(*pieces, strict=True))
    logits_SNN = mix_SX.unflatten(1, (n, n))
    mix_SNN = sinkhorn(logits_SNN, c.hc_sinkhorn_iters, c.hc_eps)
    return StreamWeights(read_SN.sigmoid() + c.hc_eps, 2 * write_SN.sigmoid(), mix_SNN, logits_SNN)


@torch.no_grad()
def sinkhorn_errors(weights: StreamWeights, iterations: int, eps: float) -> list[float]:
    """How far the worst row is from a sum of 1 after 1, 2, ... iterations; columns are exact after each."""
    made = (sinkhorn(weights.logits_SNN, count, eps) for count in range(1, iterations + 1))
    return [float((mix_SNN.sum(dim=-1) - 1).abs().max()) for mix_SNN in made]


@torch.no_grad()
def attention_parts(attention: CompressedAttention, x_1SD: Tensor, context: Context) -> AttentionParts:
    """What each token looks at when the layer gets its normalised input."""
    query_1SR, q_1SHD, kv_1SD = attention.queries_and_keys(x_1SD, context)
    entries_1TD, chosen_1ST, _ = attention.entries(x_1SD, query_1SR, context, "anatomy")
    near_SS, far_ST, sink_S = _probabilities(attention, q_1SHD[0], kv_1SD[0], entries_1TD[0], chosen_1ST[0])
    compressor = getattr(attention, "compressor", None)
    rate = compressor.rate if compressor else 0
    visible_1ST = context.blocks(rate).visible_BST if rate else chosen_1ST
    indexer = getattr(compressor, "indexer", None)
    scores_ST = indexer.scores(x_1SD, query_1SR, visible_1ST, context, "anatomy")[0] if indexer else None
    return AttentionParts(near_SS, far_ST, sink_S, visible_1ST[0], chosen_1ST[0], scores_ST, rate)


def _probabilities(
    attention: CompressedAttention, q_SHD: Tensor, kv_SD: Tensor, entries_TD: Tensor, chosen_ST: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """softmax over [raw tokens ; entries ; sink], every pair written out; mean over heads."""
    length, heads, width = q_SHD.shape
    age_SS = torch.arange(length)[:, None] - torch.arange(length)
    window_SS = (age_SS >= 0) & (age_SS < attention.config.sliding_window)
    allowed_SK = torch.cat([window_SS, chosen_ST], dim=1)
    logits_HSK = torch.einsum("shd,kd->hsk", q_SHD, torch.cat([kv_SD, entries_TD])) * width**-0.5
    logits_HSK = logits_HSK.masked_fill(~allowed_SK, -torch.inf)
    sinks_HS1 = attention.sinks.view(heads, 1, 1).expand(heads, length, 1)
    p_SK = torch.cat([logits_HSK, sinks_HS1], dim=-1).softmax(dim=-1).mean(dim=0)
    near_SS, far_ST, sink_S1 = p_SK.split([length, len(entries_TD), 1], dim=-1)
    return near_SS, far_ST, sink_S1.squeeze(-1)


def recall(dense: AttentionParts, count: int) -> Tensor:
    """Share of the entries' attention that lies on the indexer's best `count`, [S]; of parts made with sparse=False."""
    assert dense.scores_ST is not None
    kept_S = (dense.far_ST * top_k_mask(dense.scores_ST, count)).sum(dim=-1)
    return kept_S / dense.far_ST.sum(dim=-1).clamp(min=1e-20)
