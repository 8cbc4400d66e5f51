"""The models of the benchmarks, and their data.

V3 and V4 of about fifty million parameters, hidden size 256, and both once at twice the width (`wide`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from model import ModelConfig, build
from model.config import HEAVY, SPARSE
from model.moe import SwiGLU
from model.transformer import MoETransformer

LENGTH = 512  # tokens of a row
SHARED = {"hidden_size": 256, "moe_intermediate_size": 128, "num_hidden_layers": 8, "num_attention_heads": 8}
SHARED |= {"q_lora_rank": 128, "n_routed_experts": 64, "num_experts_per_tok": 6, "max_position_embeddings": 16384}
V3 = ModelConfig(
    model_type="deepseek_v3",
    intermediate_size=768,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    v_head_dim=32,
    **SHARED,
)
V4 = ModelConfig(
    layer_types=[HEAVY, SPARSE] * 4,
    mlp_layer_types=["hash_moe"] * 3 + ["moe"] * 5,
    sliding_window=64,
    o_groups=2,
    o_lora_rank=64,
    **SHARED,
)
TWICE = {"hidden_size": 512, "moe_intermediate_size": 256, "num_attention_heads": 16, "q_lora_rank": 256}
WIDE = {
    "v3": V3.replace(**TWICE, intermediate_size=1536, kv_lora_rank=128),
    "v4": V4.replace(**TWICE, o_lora_rank=128),
}
SHAPES = {"v3": V3, "v4": V4}
# Steps of the table: family, precision, hidden size.
STEPS = [("v3", "float32", 256), ("v3", "bfloat16", 256), ("v4", "float32", 256), ("v4", "bfloat16", 256)]
STEPS += [("v3", "bfloat16", 512), ("v4", "bfloat16", 512)]


def shape(family: str, hidden_size: int) -> ModelConfig:
    """The model of that family ("v3", "v4") and hidden size (256, 512)."""
    return {256: SHAPES, 512: WIDE}[hidden_size][family]


def tokens(config: ModelConfig, rows: int, device: torch.device, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    """(input ids, targets), each [rows, length], random from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, config.vocab_size, (rows, length + 1), generator=generator).to(device)
    return ids[:, :-1], ids[:, 1:]


def dense(config: ModelConfig) -> MoETransformer:
    """The same model with a dense feed-forward of as many active parameters in place of each layer's experts.

    The router's parameters, which work on every token too, count as width.
    """
    net = build(config, seed=0)
    c, wide = config, config.num_experts_per_tok + config.n_shared_experts
    width = c.moe_intermediate_size * wide + round(c.n_routed_experts / 3)
    for block in net.model.layers[c.first_moe_layer :]:
        block.mlp = SwiGLU(c.hidden_size, width, c.swiglu_limit if c.is_v4 else None)
    return net
