"""Two architectures that tests build in no time: every kind of layer, sizes that tell one dimension from another."""

from model import ModelConfig
from model.config import HEAVY, SLIDING, SPARSE

V3 = ModelConfig(
    model_type="deepseek_v3", vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
    num_hidden_layers=2, num_attention_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8,
    qk_rope_head_dim=8, v_head_dim=8, n_routed_experts=8, num_nextn_predict_layers=1, initializer_range=0.15,
)  # fmt: skip
V4 = ModelConfig(
    vocab_size=64, hidden_size=32, moe_intermediate_size=16, num_hidden_layers=4, num_attention_heads=2,
    q_lora_rank=16, head_dim=16, qk_rope_head_dim=8, n_routed_experts=8, num_nextn_predict_layers=1, o_lora_rank=8,
    layer_types=[SLIDING, SPARSE, HEAVY, SPARSE], compress_rates={SPARSE: 4, HEAVY: 6}, sliding_window=7,
    index_n_heads=32, index_head_dim=8, index_topk=3, initializer_range=0.15,
)  # fmt: skip
