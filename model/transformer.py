"""The language model: embedding, blocks of attention and feed-forward, norm, head; beside it multi-token prediction.

Shapes: B rows, S tokens a row, D hidden size, N residual streams (V4), V vocabulary, E routed experts, M layers with
experts. DeepSeek-V3, arXiv 2412.19437, figure 2; V4, arXiv 2606.19348, figure 2. Module names are transformers'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from moe_kernels import decodes
from torch import Tensor, nn

from model.block import Block
from model.cache import Cache, Part
from model.config import ModelConfig
from model.context import Context
from model.hyper_connections import HyperHead
from model.linear import Linear
from model.mtp import MultiTokenPrediction
from model.norm import RMSNorm

MAX_STREAMS = 8  # residual streams that the kernels of decoding take
MAX_TOKENS = {"deepseek_v3": 64, "deepseek_v4": 256}  # of a row, up to which these kernels are the faster ones


@dataclass
class Output:
    """What a forward pass gives.

    logits [B, S, V] fp32, or None where they were not asked for; hidden [B, S, D] before the head; state: the trunk's
    last, [B, S, D] or [B, S, N, D]; mtp_hidden [B, S, D]: as hidden, one token further ahead, where asked for;
    statistics: what the layers report, stacked by name, as expert_load [M, E] int64 (the MTP block's last).
    """

    logits: Tensor | None
    hidden: Tensor
    state: Tensor
    mtp_hidden: Tensor | None = None
    statistics: dict[str, Tensor] = field(default_factory=dict)

    @property
    def expert_load(self) -> Tensor:
        """Tokens that each expert of each layer took, [M, E] int64."""
        return self.statistics["expert_load"]


class Trunk(nn.Module):
    """Everything between token ids and the last hidden states."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        empty_VD = torch.empty(config.vocab_size, config.hidden_size)  # filled by `build` or from a file
        self.embed_tokens = nn.Embedding.from_pretrained(empty_VD, freeze=False)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.is_v4:
            self.hc_head = HyperHead(config)


class MoETransformer(nn.Module):
    """A DeepSeek-V3 or V4 language model. Master weights are fp32; compute follows `torch.autocast`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.num_nextn_predict_layers:
            self.mtp = nn.ModuleList([MultiTokenPrediction(config)])

    def forward(
        self,
        input_ids: Tensor,
        document_ids: Tensor | None = None,
        cache: Cache | None = None,
        counts_B: Tensor | None = None,
        with_logits: bool = True,
        with_mtp: bool = False,
        sparse: bool = True,
    ) -> Output:
        """input_ids [B, S] int64 -> Output.

        document_ids [B, S]: tokens see each other, and count positions, only inside a run of equal ids, negative ones
        are padding; None means one document a row. cache: go on where it ends, filled in place; counts_B: how many of
        the S tokens of each row are real. sparse False: sparse layers attend to every entry, not to the indexer's
        choice alone.
        """
        context = Context(
            self.config, input_ids, document_ids, cache, counts_B, sparse, self.decodes(input_ids.shape[1])
        )
        embedded_BSD, x, hidden_BSD = self._through(context)
        logits_BSV = context.linear(hidden_BSD, self.lm_head.weight).float() if with_logits else None
        mtp_hidden = None
        if with_mtp and self.config.num_nextn_predict_layers:
            mtp_hidden = self.mtp[0].predict(x, embedded_BSD.roll(-1, dims=1), context.ahead())
        statistics = {name: torch.stack(values) for name, values in context.statistics.items()}
        if "expert_load" not in statistics:
            statistics["expert_load"] = input_ids.new_zeros(0, self.config.n_routed_experts)
        return Output(logits_BSV, hidden_BSD, x, mtp_hidden, statistics)

    def forward_parts(self, parts: Sequence[Part]) -> list[Output]:
        """The pass of each part, without logits; where kernels take each token on its own, all parts go through a layer
        together."""
        shapes = [part.input_ids.shape for part in parts]
        if len(parts) == 1 or not all(self.decodes(length) for _, length in shapes):
            return [self(p.input_ids, cache=p.cache, counts_B=p.counts_B, with_logits=False) for p in parts]
        contexts = [Context(self.config, p.input_ids, cache=p.cache, counts_B=p.counts_B, decoding=True) for p in parts]
        context = Context.together(contexts)
        _, state, hidden = self._through(context)
        return [Output(None, h, x) for h, x in zip(context.split(hidden), context.split(state), strict=True)]

    def _through(self, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """(embeddings [B, S, D], the trunk's last state [B, S, D] or [B, S, N, D], hidden [B, S, D] for the head)."""
        x = embedded_BSD = self.model.embed_tokens(context.input_ids)
        if self.config.is_v4:
            x = x.unsqueeze(2).expand(-1, -1, self.config.hc_mult, -1)
        for number, block in enumerate(self.model.layers):
            x = block(x, context, f"layer {number}")
        return embedded_BSD, x, self.model.norm(self.model.hc_head(x) if self.config.is_v4 else x)

    def decodes(self, tokens: int = 1) -> bool:
        """Whether so many tokens a row, after those of a cache, go through kernels that take each on its own."""
        weight, c = self.lm_head.weight, self.config
        return (
            tokens <= MAX_TOKENS[c.model_type]
            and weight.dtype is torch.float32
            and not (torch.is_grad_enabled() or torch.is_autocast_enabled(weight.device.type))
            and (not c.is_v4 or c.hc_mult <= MAX_STREAMS)
            and decodes(weight.device.type)
        )

    def mtp_hidden(self, state: Tensor, next_ids: Tensor, cache: Cache, counts_B: Tensor) -> Tensor:
        """The MTP block's state for the head, [B, S, D], while decoding.

        state: the trunk's of S tokens that `cache`, the block's own, has not seen; next_ids [B, S]: the tokens after
        each; counts_B: how many of the S are real.
        """
        decoding = self.decodes(next_ids.shape[1])
        context = Context(self.config, next_ids, cache=cache, counts_B=counts_B, decoding=decoding)
        return self.mtp[0].predict(state, self.model.embed_tokens(next_ids), context)


def build(config: ModelConfig, seed: int = 0) -> MoETransformer:
    """A freshly initialised model for training, fp32, on the CPU.

    Matrices are normal with deviation `initializer_range`, except that those which write into the residual stream
    (`o_proj`, `o_b_proj`, `down_proj`) are divided by sqrt(2 * layers), so that its variance does not grow with depth.
    Hyper-connections start near the plain residual path: gating factors are 0.01 (arXiv 2512.24880, table 5), the bias
    of the mixing matrix favours its diagonal, and each sub-layer reads and writes one stream more than the others, a
    different one from layer to layer: streams that start alike and are treated alike would never come apart.
    """
    net = MoETransformer(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if weight.ndim < 2 or name.endswith("position_bias"):
                continue
            residual = name.endswith(("o_proj.weight", "o_b_proj.weight", "down_proj", "down_proj.weight"))
            scale = (2 * config.num_hidden_layers) ** -0.5 if residual else 1.0
            weight.normal_(0.0, config.initializer_range * scale, generator=generator)
        if config.is_v4:
            _separate_streams(net)
    return net


GATING, DIAGONAL, APART = 0.01, 4.0, 1.0  # of hyper-connections at the start


def _separate_streams(net: MoETransformer) -> None:
    n = net.config.hc_mult
    blocks = [*net.model.layers, *getattr(net, "mtp", [])]
    for number, residual in enumerate(r for block in blocks for r in (block.attn_hc, block.ffn_hc)):
        residual.scale.fill_(GATING)
        read, write, mix = residual.base.split(residual.parts)
        mix.view(n, n).copy_(DIAGONAL * torch.eye(n))
        read[number % n] += APART
        write[number % n] += APART
    for head in (net.model.hc_head, *(block.hc_head for block in getattr(net, "mtp", []))):
        head.hc_scale.fill_(GATING)
