"""The language model: embedding, blocks of attention and feed-forward, norm, head.

Shapes: B batch, S tokens a row, T keys, D hidden size, V vocabulary, E routed experts, M layers with experts.
DeepSeek-V3, arXiv 2412.19437, figure 2. Module names are those of transformers' DeepseekV3ForCausalLM.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.attention import LatentAttention, LatentCache, Rotation
from model.config import ModelConfig
from model.moe import MixtureOfExperts, SwiGLU
from model.norm import RMSNorm
from model.rope import frequencies, rotation


@dataclass
class Output:
    """logits [B, S, V] fp32; hidden [B, S, D] before the head; expert_load [M, E] int64: tokens each expert took."""

    logits: Tensor | None
    hidden: Tensor
    expert_load: Tensor


class Block(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        dense = layer < config.first_k_dense_replace
        self.self_attn = LatentAttention(config)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size) if dense else MixtureOfExperts(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x_BSD: Tensor, rotation: Rotation, mask: Tensor | None, cache: LatentCache | None
    ) -> tuple[Tensor, Tensor | None]:
        """([B, S, D], load [E] or None in a dense layer)."""
        x_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), rotation, mask, cache)
        fed = self.mlp(self.post_attention_layernorm(x_BSD))
        y_BSD, load_E = fed if isinstance(fed, tuple) else (fed, None)
        return x_BSD + y_BSD, load_E


class Trunk(nn.Module):
    """Everything between token ids and the last hidden states."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class MoETransformer(nn.Module):
    """A DeepSeek-V3 language model. Master weights are fp32; compute follows `torch.autocast`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        input_ids: Tensor,
        document_ids: Tensor | None = None,
        caches: list[LatentCache] | None = None,
        start: int = 0,
        with_logits: bool = True,
    ) -> Output:
        """input_ids [B, S] int64 -> Output.

        document_ids [B, S]: tokens see each other, and count positions, only inside a run of equal ids; None means one
        document a row. caches: one per layer, filled in place; `start` is the number of tokens they hold already.
        """
        positions_BS = _positions(input_ids, document_ids, start)
        mask = _mask(input_ids, document_ids, start)
        x_BSD = self.model.embed_tokens(input_ids)
        rope = self.config.rope_parameters
        turn = rotation(positions_BS, frequencies(self.config.qk_rope_head_dim, rope), rope)
        loads = []
        for number, block in enumerate(self.model.layers):
            x_BSD, load_E = block(x_BSD, turn, mask, caches[number] if caches else None)
            loads += [] if load_E is None else [load_E]
        hidden_BSD = self.model.norm(x_BSD)
        logits_BSV = F.linear(hidden_BSD, self.lm_head.weight).float() if with_logits else None
        load_ME = torch.stack(loads) if loads else input_ids.new_zeros(0, self.config.n_routed_experts)
        return Output(logits_BSV, hidden_BSD, load_ME)


def _positions(input_ids: Tensor, document_ids: Tensor | None, start: int) -> Tensor:
    """Position of each token inside its document, [B, S]."""
    steps_S = torch.arange(start, start + input_ids.shape[1], device=input_ids.device)
    if document_ids is None:
        return steps_S.expand_as(input_ids)
    new_BS = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0), value=True)
    return steps_S - torch.where(new_BS, steps_S, 0).cummax(dim=1).values


def _mask(input_ids: Tensor, document_ids: Tensor | None, start: int) -> Tensor | None:
    """Additive attention mask [B or 1, 1, S, T], fp32; None where plain causal attention over S = T is meant."""
    length = input_ids.shape[1]
    if document_ids is None and start == 0:
        return None
    queries, keys = (torch.arange(first, start + length, device=input_ids.device) for first in (start, 0))
    allowed = (keys <= queries[:, None])[None]
    if document_ids is not None:
        allowed = allowed & (document_ids[:, :, None] == document_ids[:, None, :])
    return torch.zeros(allowed.shape, device=input_ids.device).masked_fill_(~allowed, float("-inf")).unsqueeze(1)


def build(config: ModelConfig, seed: int = 0) -> MoETransformer:
    """A freshly initialised model, fp32, on the CPU.

    Matrices are normal with deviation `initializer_range`, except that those which write into the residual stream
    (`o_proj`, `down_proj`) are divided by sqrt(2 * layers), so that its variance does not grow with depth.
    """
    net = MoETransformer(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if weight.ndim < 2:
                continue
            residual = name.endswith(("o_proj.weight", "down_proj", "down_proj.weight"))
            scale = (2 * config.num_hidden_layers) ** -0.5 if residual else 1.0
            weight.normal_(0.0, config.initializer_range * scale, generator=generator)
    return net
