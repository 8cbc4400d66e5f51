"""DeepSeek-V4's attention: a window of raw tokens, and compressed entries of everything before.

One key of D channels a token serves all heads and is the value too. Layers with `sliding_attention` see the window
alone; `heavily_compressed_attention` (HCA) adds one entry for each block of tokens; `compressed_sparse_attention` (CSA)
adds overlapping smaller blocks, of which a lightning indexer chooses a few for each query.
arXiv 2606.19348, section 2.3; names are those of transformers' DeepseekV4Attention.

Shapes: B rows, S tokens, H heads, D head channels, R rank of the query, G groups of heads, T compressed entries,
J indexer heads, M tokens a block, C channels of an entry times 1 (HCA) or 2 (CSA: next block's half, own half).
"""

from __future__ import annotations

import torch
from moe_kernels import (
    cached_window_attention,
    decode_compressed_attention,
    index_scores,
    linear,
    rms_norm,
    rotate,
    window_attention,
)
from moe_kernels.reference.index_scores import HIDDEN
from torch import Tensor, nn
from torch.nn import functional as F

from model.cache import Cache, Slots
from model.config import SLIDING, SPARSE, ModelConfig
from model.context import Context
from model.linear import Linear
from model.norm import RMSNorm
from model.precision import rounded


class CompressedAttention(nn.Module):
    """Attention of one layer of the given type."""

    def __init__(self, config: ModelConfig, kind: str) -> None:
        super().__init__()
        c, width = config, config.num_attention_heads * config.head_dim
        self.config, self.rope = config, "main" if kind == SLIDING else "compress"
        self.q_a_proj = Linear(c.hidden_size, c.q_lora_rank)
        self.q_a_norm = RMSNorm(c.q_lora_rank, c.rms_norm_eps)
        self.q_b_proj = Linear(c.q_lora_rank, width)
        self.kv_proj = Linear(c.hidden_size, c.head_dim)
        self.kv_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
        self.o_a_proj = Linear(width // c.o_groups, c.o_groups * c.o_lora_rank)
        self.o_b_proj = Linear(c.o_groups * c.o_lora_rank, c.hidden_size)
        self.sinks = nn.Parameter(torch.zeros(c.num_attention_heads))
        if kind != SLIDING:
            self.compressor = Compressor(c, c.head_dim, c.compress_rates[kind], overlap=kind == SPARSE)
        if kind == SPARSE:
            self.compressor.indexer = Indexer(c)

    def forward(self, x_BSD: Tensor, context: Context, layer: str) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        if context.decoding:
            return context.by_part(lambda part_BSD, part: self._decode(part_BSD, part, layer), x_BSD)
        x_BSD = rounded(x_BSD)
        query_BSR, q_BSHD, kv_BSD = self.queries_and_keys(x_BSD, context)
        entries_BTD, visible_BST, scores_BST = self.entries(x_BSD, query_BSR, context, layer)
        out_BSHD, mass_BST = self._attend(q_BSHD, kv_BSD, entries_BTD, visible_BST, context, layer)
        if scores_BST is not None and context.cache is None:
            compare_indexer(scores_BST, mass_BST, visible_BST, self.config.index_topk, context, self.training)
        out_BSHD = rotate(out_BSHD, *context.rotation(self.rope), inverse=True)
        return self.o_b_proj(self._grouped(out_BSHD.flatten(2)))

    def queries_and_keys(self, x_BSD: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """(latents of the queries [B, S, R], queries [B, S, H, D], keys [B, S, D]), the last two rotated."""
        c, turn = self.config, context.rotation(self.rope)
        query_BSR = self.q_a_norm(self.q_a_proj(x_BSD))
        q_BSHD = self.q_b_proj(query_BSR).unflatten(-1, (c.num_attention_heads, c.head_dim))
        q_BSHD = rotate(rms_norm(q_BSHD, None, c.rms_norm_eps), *turn)
        kv_BSD = rotate(self.kv_norm(self.kv_proj(x_BSD)).unsqueeze(2), *turn).squeeze(2)
        return query_BSR, q_BSHD, kv_BSD

    def _decode(self, x_BSD: Tensor, context: Context, layer: str) -> Tensor:
        c, cache = self.config, context.cache
        assert cache is not None
        query = [self.q_a_proj.weight, self.q_a_norm.weight, self.q_b_proj.weight]
        outward = [self.o_a_proj.weight, self.o_b_proj.weight, self.sinks]
        weights = [*query, self.kv_proj.weight, self.kv_norm.weight, *outward]
        caches = [*cache.slots(layer, "window", c.sliding_window).ready(x_BSD, c.head_dim)]
        compression, indexing = [], []
        if self.rope != "main":
            compression = self.compressor.weights()
            caches += self.compressor.stores(x_BSD, cache, layer)
            if context.sparse and (indexer := getattr(self.compressor, "indexer", None)) is not None:
                indexing = [*indexer.weights(), indexer.q_b_proj.weight, indexer.scorer["weights_proj"].weight]
                caches += indexer.stores(x_BSD, cache, f"{layer} indexer")
        given = (weights, compression, indexing, caches, context.frequencies(self.rope))
        numbers = (c.o_groups, c.index_topk, c.rms_norm_eps)
        return decode_compressed_attention(x_BSD, cache.lengths_B, context.ends_B, *given, *numbers)

    def entries(
        self, x_BSD: Tensor, query_BSR: Tensor, context: Context, layer: str
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(entries [B, T, D], which of them each query attends to [B, S, T], the indexer's scores where it chose)."""
        if self.rope == "main":
            none_BST = torch.zeros(*x_BSD.shape[:2], 0, dtype=torch.bool, device=x_BSD.device)
            return x_BSD.new_zeros(len(x_BSD), 0, self.config.head_dim), none_BST, None
        entries_BTD, visible_BST = self.compressor(x_BSD, context, layer)
        indexer = getattr(self.compressor, "indexer", None)
        if indexer is None or not visible_BST.shape[-1]:
            return entries_BTD, visible_BST, None
        all_chosen = context.sparse and visible_BST.shape[-1] <= self.config.index_topk
        if all_chosen and not self.training and context.cache is None:
            return entries_BTD, visible_BST, None
        scores_BST = indexer.scores(x_BSD.detach(), query_BSR.detach(), visible_BST, context, layer)
        if context.sparse:
            stable = context.cache is not None
            visible_BST = visible_BST & top_k_mask(scores_BST, self.config.index_topk, stable)
        return entries_BTD, visible_BST, scores_BST

    def _attend(
        self,
        q_BSHD: Tensor,
        kv_BSD: Tensor,
        entries_BTD: Tensor,
        visible_BST: Tensor,
        context: Context,
        layer: str,
    ) -> tuple[Tensor, Tensor]:
        if context.cache is None:
            return window_attention(q_BSHD, kv_BSD, entries_BTD, self.sinks, context.window_mask(), visible_BST)
        window = self.config.sliding_window
        keys_BKD, at_BK = context.cache.slots(layer, "window", window).joined(kv_BSD, context)
        age_BSK = context.positions_BS[:, :, None] - at_BK[:, None]
        allowed_BSK = (age_BSK >= 0) & (age_BSK < window)
        return cached_window_attention(q_BSHD, keys_BKD, entries_BTD, self.sinks, allowed_BSK, visible_BST)

    def _grouped(self, out_BSX: Tensor) -> Tensor:
        """Each group of heads through a matrix of its own: [B, S, H D] -> [B, S, G o_lora_rank]."""
        groups = self.config.o_groups
        pairs = zip(out_BSX.chunk(groups, dim=-1), self.o_a_proj.weight.chunk(groups), strict=True)
        return torch.cat([linear(part_BSx, weight_LX) for part_BSx, weight_LX in pairs], dim=-1)


class Compressor(nn.Module):
    """Blocks of M tokens to one entry each: a softmax over the tokens weighs them, channel by channel.

    With overlap an entry draws on 2 M tokens: its own block, and, through channels of their own, the block before.
    Only complete blocks of one document give an entry.
    """

    def __init__(self, config: ModelConfig, width: int, rate: int, overlap: bool) -> None:
        super().__init__()
        channels = width * (2 if overlap else 1)
        self.rate, self.width, self.overlap = rate, width, overlap
        self.kv_proj = Linear(config.hidden_size, channels)
        self.gate_proj = Linear(config.hidden_size, channels)
        self.position_bias = nn.Parameter(torch.zeros(rate, channels))
        self.kv_norm = RMSNorm(width, config.rms_norm_eps)

    def forward(self, x_BSD: Tensor, context: Context, layer: str) -> tuple[Tensor, Tensor]:
        """(entries [B, T, width] with their positions rotated in, which tokens may see them [B, S, T])."""
        tokens_BSC = torch.cat([self.kv_proj(x_BSD), self.gate_proj(x_BSD)], dim=-1)
        if context.cache is None:
            blocks = context.blocks(self.rate)
            return self._pool(tokens_BSC, blocks.first_BT, blocks.position_BT, context), blocks.visible_BST
        return self._continue(tokens_BSC, context, layer)

    def weights(self) -> list[Tensor]:
        """Of values, gates, places in a block, norm."""
        return [self.kv_proj.weight, self.gate_proj.weight, self.position_bias, self.kv_norm.weight]

    def stores(self, x_BSD: Tensor, cache: Cache, layer: str) -> list[Tensor]:
        """Values and positions of the last tokens, and of all entries."""
        tokens = self._tokens(cache, layer).ready(x_BSD, 2 * self.position_bias.shape[1])
        entries = cache.slots(layer, "entries").ready(x_BSD, self.width, cache.capacity // self.rate)
        return [*tokens, *entries]

    def _tokens(self, cache: Cache, layer: str) -> Slots:
        return cache.slots(layer, "tokens", self.rate * (2 if self.overlap else 1))

    def _pool(self, tokens_BSC: Tensor, first_BT: Tensor, position_BT: Tensor, context: Context) -> Tensor:
        """Entries of the blocks that start at index `first_BT` of `tokens_BSC` and at those positions."""
        value, gate = self._block(tokens_BSC, first_BT)
        gate = gate.float() + self.position_bias
        if self.overlap:
            before, before_gate = self._block(tokens_BSC, (first_BT - self.rate).clamp(min=0))
            before_gate = before_gate.float() + self.position_bias
            absent_BT11 = (position_BT < self.rate)[..., None, None]
            halves = (before[..., : self.width].masked_fill(absent_BT11, 0.0), value[..., self.width :])
            before_gate = before_gate[..., : self.width].masked_fill(absent_BT11, -torch.inf)
            value, gate = torch.cat(halves, dim=2), torch.cat([before_gate, gate[..., self.width :]], dim=2)
        pooled_BTD = (gate.softmax(dim=2) * value.float()).sum(dim=2).to(value.dtype)
        turn = context.rotation_at(position_BT, "compress")
        return rotate(self.kv_norm(pooled_BTD).unsqueeze(2), *turn).squeeze(2)

    def _block(self, tokens_BSC: Tensor, first_BT: Tensor) -> tuple[Tensor, Tensor]:
        """(values, gates) of M tokens from each index on, [B, T, M, C]."""
        rows, length = tokens_BSC.shape[:2]
        index_BTM = first_BT[..., None] + torch.arange(self.rate, device=first_BT.device)
        row_B11 = torch.arange(rows, device=first_BT.device)[:, None, None]
        place_BTM = index_BTM.clamp(max=length - 1) + row_B11 * length
        return F.embedding(place_BTM, tokens_BSC.flatten(0, 1)).chunk(2, dim=-1)

    def _continue(self, tokens_BSC: Tensor, context: Context, layer: str) -> tuple[Tensor, Tensor]:
        """The entries of a cache, those that the new tokens complete included."""
        cache = context.cache
        assert cache is not None
        tokens = self._tokens(cache, layer)
        history_BNC, _ = tokens.joined(tokens_BSC, context)
        count = (tokens_BSC.shape[1] + self.rate - 1) // self.rate
        number_BT = (cache.lengths_B // self.rate)[:, None] + torch.arange(count, device=tokens_BSC.device)
        position_BT = number_BT * self.rate
        first_BT = position_BT - cache.lengths_B[:, None] + tokens.size
        complete_BT = position_BT + self.rate <= context.ends_B[:, None]
        store = cache.slots(layer, "entries")
        # most single tokens complete no block; an accelerator computes sooner than it answers
        if store.values_BNC is None or complete_BT.device.type != "cpu" or complete_BT.any():
            new_BTD = self._pool(history_BNC, first_BT, position_BT, context)
        else:
            new_BTD = store.values_BNC.new_zeros(*complete_BT.shape, self.width)
        entries = store.write(new_BTD, number_BT, complete_BT, cache.capacity // self.rate)
        last_T = (torch.arange(entries.shape[1], device=entries.device) + 1) * self.rate - 1
        return entries, last_T <= context.positions_BS[:, :, None]


class Indexer(Compressor):
    """The lightning indexer: an entry's score for a query is the sum over heads of w_h relu(q_h . k).

    Its choice has no gradient, so it learns from `compare_indexer` alone; the caller detaches its inputs.
    """

    def __init__(self, config: ModelConfig) -> None:
        c = config
        super().__init__(c, c.index_head_dim, c.compress_rates[SPARSE], overlap=True)
        self.heads = c.index_n_heads
        self.q_b_proj = Linear(c.q_lora_rank, self.heads * self.width)
        self.scorer = nn.ModuleDict({"weights_proj": Linear(c.hidden_size, self.heads)})

    def scores(self, x_BSD: Tensor, query_BSR: Tensor, visible_BST: Tensor, context: Context, layer: str) -> Tensor:
        """Of every entry for every token that may see it, [B, S, T] fp32."""
        keys_BTI, _ = self(x_BSD, context, f"{layer} indexer")
        q_BSJI = self.q_b_proj(query_BSR).unflatten(-1, (self.heads, self.width))
        q_BSJI = rotate(q_BSJI, *context.rotation("compress"))
        weights_BSJ = self.scorer["weights_proj"](x_BSD).float() * (self.width * self.heads) ** -0.5
        return index_scores(q_BSJI, weights_BSJ, keys_BTI, visible_BST)


def compare_indexer(
    scores_BST: Tensor, mass_BST: Tensor, visible_BST: Tensor, count: int, context: Context, training: bool
) -> None:
    """Note how far the indexer is from attention: its loss, and where attention is dense also its recall.

    Loss: KL(p || softmax(scores)), where p is the attention that the entries got, summed over heads and normalised,
    over the entries attended to; mean over the queries that have any (DeepSeek-V3.2, arXiv 2512.02556, equations 3
    and 4, with compressed entries in place of tokens). Recall: share of that attention on the indexer's best entries.
    """
    any_BS = visible_BST.any(dim=-1)
    real_BS = any_BS if context.real_BS is None else any_BS & context.real_BS
    p_BST = mass_BST / mass_BST.sum(dim=-1, keepdim=True).clamp(min=1e-20)
    if not context.sparse:
        found_BS = (p_BST * top_k_mask(scores_BST, count)).sum(dim=-1)
        context.note("indexer_recall", (found_BS * real_BS).sum() / real_BS.sum().clamp(min=1))
    if training:
        log_q_BST = scores_BST.masked_fill(~visible_BST, HIDDEN).log_softmax(dim=-1)
        log_p_BST = p_BST.clamp(min=torch.finfo(p_BST.dtype).tiny).log()  # `xlogy` takes one number at a time
        kl_BS = (p_BST * (log_p_BST - log_q_BST)).sum(dim=-1)
        context.note("indexer_loss", (kl_BS * real_BS).sum() / real_BS.sum().clamp(min=1))


def top_k_mask(scores_BST: Tensor, count: int, stable: bool = False) -> Tensor:
    """True at the `count` highest scores of each query, [B, S, T]. stable: of equal ones the first, whatever T is.

    Otherwise those that transformers would take: which, of equal ones, changes with how many later entries there are,
    and these a cache can not know. Both agree unless scores are equal, which is when all heads of an
    indexer score 0: rare from eight heads on, frequent with one or two, where cached decoding then departs from the
    full forward pass.
    """
    if stable:
        chosen = scores_BST.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    else:
        chosen = scores_BST.topk(min(count, scores_BST.shape[-1]), dim=-1, sorted=False).indices
    return torch.zeros_like(scores_BST, dtype=torch.bool).scatter_(-1, chosen, True)
