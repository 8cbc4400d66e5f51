"""Named architectures, as fields of `ModelConfig`: the released DeepSeek models, and two small ones for a laptop.

Sizes of the released ones: config.json of DeepSeek-V3, V4-Flash and V4-Pro (arXiv 2412.19437, section 4.2;
arXiv 2606.19348, section 4.2.1).
"""

from __future__ import annotations

from typing import Any

ROPE_DEFAULT: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
V4_YARN = {"rope_type": "yarn", "rope_theta": 160000.0, "factor": 16.0, "beta_fast": 32, "beta_slow": 1}
V4_ROPE = {"main": ROPE_DEFAULT, "compress": V4_YARN | {"original_max_position_embeddings": 65536}}
V3_ROPE = ROPE_DEFAULT | {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096}
V3_ROPE |= {"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}
SLIDING, SPARSE, HEAVY = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"

V4_FLASH: dict[str, Any] = {
    "vocab_size": 129280,
    "hidden_size": 4096,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 43,
    "num_attention_heads": 64,
    "q_lora_rank": 1024,
    "qk_rope_head_dim": 64,
    "n_routed_experts": 256,
    "num_experts_per_tok": 6,
    "routed_scaling_factor": 1.5,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 1048576,
    "rope_parameters": V4_ROPE,
    "head_dim": 512,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "sliding_window": 128,
    "layer_types": [SLIDING, SLIDING, *[SPARSE, HEAVY] * 20, SPARSE],
    "mlp_layer_types": ["hash_moe"] * 3 + ["moe"] * 40,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 512,
}

PRESETS: dict[str, dict[str, Any]] = {
    "demo": {
        "moe_intermediate_size": 96,
        "num_experts_per_tok": 4,
        "layer_types": [SLIDING, SPARSE, HEAVY, SPARSE, HEAVY, SLIDING],
        "mlp_layer_types": ["hash_moe"] + ["moe"] * 5,
        "compress_rates": {SPARSE: 4, HEAVY: 32},
        "rope_parameters": {"main": ROPE_DEFAULT, "compress": V4_YARN | {"original_max_position_embeddings": 4096}},
        "routed_scaling_factor": 1.5,
        "num_nextn_predict_layers": 1,
    },
    "demo-v3": {
        "model_type": "deepseek_v3",
        "moe_intermediate_size": 96,
        "num_experts_per_tok": 4,
        "num_nextn_predict_layers": 1,
    },
    "v3-671b": {
        "model_type": "deepseek_v3",
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 1,
        "first_k_dense_replace": 3,
        "max_position_embeddings": 163840,
        "rope_parameters": V3_ROPE,
        "initializer_range": 0.006,
    },
    "v4-flash": V4_FLASH,
    "v4-pro": V4_FLASH
    | {
        "hidden_size": 7168,
        "moe_intermediate_size": 3072,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "q_lora_rank": 1536,
        "n_routed_experts": 384,
        "routed_scaling_factor": 2.5,
        "o_groups": 16,
        "layer_types": [HEAVY, HEAVY, *[SPARSE, HEAVY] * 29, SPARSE],
        "mlp_layer_types": ["hash_moe"] * 3 + ["moe"] * 58,
        "index_topk": 1024,
    },
}
