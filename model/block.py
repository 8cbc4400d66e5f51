"""One layer of the trunk: attention, then feed-forward, each normalised before and on a residual path around.

Shapes: B rows, S tokens, D hidden size, N residual streams (V4). Module names are those of transformers.
"""

from __future__ import annotations

from torch import Tensor, nn

from model.attention import LatentAttention
from model.compressed_attention import CompressedAttention
from model.config import SLIDING, ModelConfig
from model.context import Context
from model.hyper_connections import HyperConnection, Residual
from model.moe import MixtureOfExperts, SwiGLU
from model.norm import RMSNorm


class Block(nn.Module):
    """Layer number `layer` of a DeepSeek-V3 or V4 trunk; None: a block outside of it, without compression."""

    def __init__(self, config: ModelConfig, layer: int | None) -> None:
        super().__init__()
        c, dense = config, layer is not None and layer < config.first_moe_layer
        if c.is_v4:
            self.self_attn = CompressedAttention(c, SLIDING if layer is None else c.layer_types[layer])
            self.mlp = MixtureOfExperts(c, "moe" if layer is None else c.mlp_layer_types[layer])
            self.attn_hc, self.ffn_hc = HyperConnection(c), HyperConnection(c)
        else:
            self.self_attn = LatentAttention(c)
            self.mlp = SwiGLU(c.hidden_size, c.intermediate_size) if dense else MixtureOfExperts(c)
            self.attn_hc, self.ffn_hc = Residual(), Residual()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x: Tensor, context: Context, name: str) -> Tensor:
        """[B, S, D] or, in V4, [B, S, N, D] -> the same. name: whose cache to use."""
        h_BSD, write = self.attn_hc(x, context)
        x = write(self.self_attn(self.input_layernorm(h_BSD), context, name))
        h_BSD, write = self.ffn_hc(x, context)
        return write(self.mlp(self.post_attention_layernorm(h_BSD), context))
