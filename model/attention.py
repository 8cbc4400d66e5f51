"""Multi-head latent attention (MLA): keys and values come from one small latent per token, which is all a cache keeps.

Shapes: B rows, S queries, T keys, D hidden size, H heads, N channels without position, R rotary channels,
Q = N + R, V value channels, C latent channels. DeepSeek-V2, arXiv 2405.04434, section 2.1; V3, arXiv 2412.19437, 2.1.1.
"""

from __future__ import annotations

import torch
from moe_kernels import attention, decode_latent_attention, rotate
from moe_kernels.reference.attention import masked_attention
from torch import Tensor, nn

from model.config import ModelConfig
from model.context import Context, Rotation
from model.linear import Linear
from model.norm import RMSNorm
from model.precision import rounded
from model.rope import rotation_scale, yarn_mscale


class LatentAttention(nn.Module):
    """MLA with the parameter names of transformers' DeepseekV3Attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c, heads = config, config.num_attention_heads
        self.heads, self.nope, self.rope = heads, c.qk_nope_head_dim, c.qk_rope_head_dim
        self.latent, self.v_head_dim = c.kv_lora_rank, c.v_head_dim
        if c.q_lora_rank is None:
            self.q_proj = Linear(c.hidden_size, heads * c.qk_head_dim)
        else:
            self.q_a_proj = Linear(c.hidden_size, c.q_lora_rank)
            self.q_a_layernorm = RMSNorm(c.q_lora_rank, 1e-6)
            self.q_b_proj = Linear(c.q_lora_rank, heads * c.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, 1e-6)
        self.kv_b_proj = Linear(c.kv_lora_rank, heads * (c.qk_nope_head_dim + c.v_head_dim))
        self.o_proj = Linear(heads * c.v_head_dim, c.hidden_size)
        self.scale = c.qk_head_dim**-0.5 * yarn_mscale(c.rope_parameters, "mscale_all_dim") ** 2

    def forward(self, x_BSD: Tensor, context: Context, layer: str) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        if context.decoding:
            return context.by_part(lambda part_BSD, part: self._decode(part_BSD, part, layer), x_BSD)
        turn, x_BSD = context.rotation(), rounded(x_BSD)
        q_BSHQ = self._queries(x_BSD, turn)
        latent_BSC, key_BSR = self.kv_a_proj_with_mqa(x_BSD).split([self.latent, self.rope], dim=-1)
        kept_BSX = torch.cat([self.kv_a_layernorm(latent_BSC), rotate(key_BSR.unsqueeze(2), *turn).squeeze(2)], dim=-1)
        kept_BTX, mask = self._with_past(kept_BSX, context, layer)
        latent_BTC, key_BTR = kept_BTX.split([self.latent, self.rope], dim=-1)
        k_BTHN, v_BTHV = (
            self.kv_b_proj(latent_BTC).unflatten(-1, (self.heads, -1)).split([self.nope, self.v_head_dim], dim=-1)
        )
        k_BTHR = key_BTR.to(k_BTHN.dtype).unsqueeze(2).expand(-1, -1, self.heads, -1)
        k_BTHQ = torch.cat([k_BTHN, k_BTHR], dim=-1)
        if mask is None:
            documents_BS = None if context.one_document else context.first_BS
            out_BSHV = attention(q_BSHQ, k_BTHQ, v_BTHV, self.scale, documents_BS)
        else:
            out_BSHV = masked_attention(q_BSHQ, k_BTHQ, v_BTHV, self.scale, mask)
        return self.o_proj(out_BSHV.flatten(2))

    def _decode(self, x_BSD: Tensor, context: Context, layer: str) -> Tensor:
        cache = context.cache
        assert cache is not None
        one = not hasattr(self, "q_a_proj")
        query = [self.q_proj.weight] if one else [self.q_a_proj.weight, self.q_a_layernorm.weight, self.q_b_proj.weight]
        key_value = [self.kv_a_proj_with_mqa.weight, self.kv_a_layernorm.weight, self.kv_b_proj.weight]
        return decode_latent_attention(
            x_BSD,
            cache.lengths_B,
            context.ends_B,
            query,
            key_value,
            self.o_proj.weight,
            *cache.slots(layer, "latent").ready(x_BSD, self.latent + self.rope, cache.capacity),
            context.frequencies("main"),
            rotation_scale(context.config.rope()),
            self.scale,
            self.heads,
            self.kv_a_layernorm.eps,
        )

    def _queries(self, x_BSD: Tensor, turn: Rotation) -> Tensor:
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BSD))) if hasattr(self, "q_a_proj") else self.q_proj(x_BSD)
        return rotate(q.unflatten(-1, (self.heads, -1)), *turn)

    def _with_past(self, kept_BSX: Tensor, context: Context, layer: str) -> tuple[Tensor, Tensor | None]:
        """(latents and rotated keys of past and present [B, T, C + R], additive mask; None where there is no past)."""
        cache = context.cache
        if cache is None:
            return kept_BSX, None
        real_BS = (
            torch.ones_like(context.positions_BS, dtype=torch.bool) if context.real_BS is None else context.real_BS
        )
        kept_BTX = cache.slots(layer, "latent").write(kept_BSX, context.positions_BS, real_BS, cache.capacity)
        seen_BST = torch.arange(kept_BTX.shape[1], device=kept_BTX.device) <= context.positions_BS[..., None]
        mask = torch.zeros(seen_BST.shape, device=kept_BTX.device).masked_fill_(~seen_BST, float("-inf"))
        return kept_BTX, mask.unsqueeze(1)
