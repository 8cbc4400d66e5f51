"""Multi-head latent attention (MLA): keys and values come from one small latent per token, which is all a cache keeps.

Shapes: B batch, S queries, T keys (cache + S), D hidden size, H heads, N channels without position, R rotary channels,
Q = N + R, V value channels, C latent channels. DeepSeek-V2, arXiv 2405.04434, section 2.1; V3, arXiv 2412.19437, 2.1.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import ModelConfig
from model.norm import RMSNorm
from model.rope import rotate, yarn_mscale

Rotation = tuple[Tensor, Tensor]


@dataclass
class LatentCache:
    """What one layer keeps of the past: the normalised latents [B, T, C] and the rotated shared keys [B, T, R]."""

    latent_BTC: Tensor | None = None
    key_BTR: Tensor | None = None

    def append(self, latent_BSC: Tensor, key_BSR: Tensor) -> tuple[Tensor, Tensor]:
        """Add S tokens and return everything kept so far."""
        if self.latent_BTC is not None and self.key_BTR is not None:
            latent_BSC = torch.cat([self.latent_BTC, latent_BSC], dim=1)
            key_BSR = torch.cat([self.key_BTR, key_BSR], dim=1)
        self.latent_BTC, self.key_BTR = latent_BSC, key_BSR
        return latent_BSC, key_BSR


class LatentAttention(nn.Module):
    """MLA with the parameter names of transformers' DeepseekV3Attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c, heads = config, config.num_attention_heads
        self.heads, self.channels = heads, [c.qk_nope_head_dim, c.qk_rope_head_dim]
        self.latent, self.v_head_dim = c.kv_lora_rank, c.v_head_dim
        if c.q_lora_rank is None:
            self.q_proj = nn.Linear(c.hidden_size, heads * c.qk_head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(c.hidden_size, c.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(c.q_lora_rank, 1e-6)
            self.q_b_proj = nn.Linear(c.q_lora_rank, heads * c.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, 1e-6)
        self.kv_b_proj = nn.Linear(c.kv_lora_rank, heads * (c.qk_nope_head_dim + c.v_head_dim), bias=False)
        self.o_proj = nn.Linear(heads * c.v_head_dim, c.hidden_size, bias=False)
        self.scale = c.qk_head_dim**-0.5 * yarn_mscale(c.rope_parameters, "mscale_all_dim") ** 2

    def forward(self, x_BSD: Tensor, rotation: Rotation, mask: Tensor | None, cache: LatentCache | None) -> Tensor:
        """[B, S, D] -> [B, S, D]. mask: additive, broadcastable to [B, H, S, T]; None means causal over S = T."""
        q_BSHQ = self._queries(x_BSD, rotation)
        latent_BSC, key_BSR = self.kv_a_proj_with_mqa(x_BSD).split([self.latent, self.channels[1]], dim=-1)
        latent_BTC = self.kv_a_layernorm(latent_BSC)
        key_BTR = rotate(key_BSR.unsqueeze(2), *rotation).squeeze(2)
        if cache is not None:
            latent_BTC, key_BTR = cache.append(latent_BTC, key_BTR)
        k_BTHN, v_BTHV = (
            self.kv_b_proj(latent_BTC)
            .unflatten(-1, (self.heads, -1))
            .split([self.channels[0], self.v_head_dim], dim=-1)
        )
        k_BTHR = key_BTR.to(k_BTHN.dtype).unsqueeze(2).expand(-1, -1, self.heads, -1)
        out_BSHV = _attend(q_BSHQ, torch.cat([k_BTHN, k_BTHR], dim=-1), v_BTHV, mask, self.scale)
        return self.o_proj(out_BSHV.flatten(2))

    def _queries(self, x_BSD: Tensor, rotation: Rotation) -> Tensor:
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BSD))) if hasattr(self, "q_a_proj") else self.q_proj(x_BSD)
        q_BSHN, q_BSHR = q.unflatten(-1, (self.heads, -1)).split(self.channels, dim=-1)
        return torch.cat([q_BSHN, rotate(q_BSHR, *rotation)], dim=-1)


def _attend(q_BSHQ: Tensor, k_BTHQ: Tensor, v_BTHV: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Softmax attention -> [B, S, H, V]. Values are padded to Q channels: fused CPU kernels need one head size."""
    width = v_BTHV.shape[-1]
    v_BTHQ = F.pad(v_BTHV, (0, q_BSHQ.shape[-1] - width))
    q, k, v = (tensor.transpose(1, 2) for tensor in (q_BSHQ, k_BTHQ, v_BTHQ))
    out_BHSQ = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    return out_BHSQ.transpose(1, 2)[..., :width]
