"""Configurations: what is refused, in a sentence that names the field, and what another number of layers means."""

import pytest
from small_models import V3, V4

from model import ModelConfig
from model.config import HEAVY, SLIDING, SPARSE


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ({"n_group": 3}, "multiple of n_group"),
        ({"n_group": 4, "topk_group": 5}, "topk_group"),
        ({"qk_rope_head_dim": 7}, "even"),
        ({"v_head_dim": 99}, "v_head_dim"),
        ({"hiden_size": 8}, "did you mean 'hidden_size'"),
        ({"hidden_size": "8"}, "must be of type int"),
        ({"num_hidden_layers": 0}, "at least 1"),
    ],
)
def test_impossible_v3_architectures_are_named(changes: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        V3.replace(**changes)


def test_unknown_preset_lists_the_known() -> None:
    with pytest.raises(ValueError, match="demo, demo-v3, v3-671b, v4-flash, v4-pro"):
        ModelConfig.preset("huge")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"layer_types": ["dense"] * 4}, "layer_types holds 'dense'.*; choose among sliding_attention"),
        ({"layer_types": [SLIDING]}, "layer_types has 1 entries for num_hidden_layers 4"),
        ({"mlp_layer_types": ["mlp"] * 4}, "choose among hash_moe, moe"),
        ({"compress_rates": {SPARSE: 0, HEAVY: 8}}, "must be at least 1"),
        ({"compress_rates": {SPARSE: 4}}, "is None; it must be at least 1"),
        ({"num_experts_per_tok": 9}, r"num_experts_per_tok \(9\) must lie between 1 and n_routed_experts \(8\)"),
        ({"o_groups": 3}, r"num_attention_heads \(2\) must be a multiple of o_groups \(3\)"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"head_dim": 4}, r"head_dim \(4\) must not be below qk_rope_head_dim \(8\)"),
        ({"hc_sinkhorn_iters": 0}, "hc_sinkhorn_iters is 0"),
        ({"num_nextn_predict_layers": 2}, "must be 0 or 1"),
        ({"q_lora_rank": None}, "DeepSeek-V4 needs a number"),
        ({"model_type": "llama"}, "choose one of 'deepseek_v3', 'deepseek_v4'"),
        ({"rope_parameters": {"main": {"rope_type": "linear"}, "compress": {}}}, "rope_type is 'linear'"),
    ],
)
def test_impossible_v4_architectures_are_named(changes: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        V4.replace(**changes)


ROPE = {"rope_type": "default", "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("preset", "changes", "sentence"),
    [
        ("demo-v3", {"kv_lora_rank": -1}, "kv_lora_rank is -1; it must be at least 1"),
        ("demo-v3", {"q_lora_rank": 0}, "q_lora_rank is 0; it must be at least 1"),
        ("demo-v3", {"first_k_dense_replace": -1}, "first_k_dense_replace is -1"),
        ("demo-v3", {"n_routed_experts": 1, "num_experts_per_tok": 1}, "leaves a group one expert"),
        ("demo-v3", {"rope_parameters": {"rope_theta": 1e4}}, "rope_type is None"),
        ("demo-v3", {"rope_parameters": YARN | {"factor": 0}}, "factor of rope_parameters is 0"),
        ("demo-v3", {"rope_parameters": YARN | {"beta_slow": -1}}, "beta_slow of rope_parameters is -1"),
        ("demo-v3", {"rope_parameters": ROPE | {"rope_theta": "1e4"}}, "rope_theta of rope_parameters is '1e4'"),
        ("demo-v3", {"rope_parameters": ROPE | {"rope_theta": 1.0}}, "rope_theta is 1.0; it must be above 1"),
        ("demo", {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; it must be above 0"),
        ("demo", {"routed_scaling_factor": float("inf")}, "routed_scaling_factor is inf"),
        ("demo", {"hc_eps": -1e-6}, "hc_eps is -1e-06"),
        ("demo", {"initializer_range": -1.0}, "initializer_range is -1.0"),
        ("demo", {"num_hidden_layers": "3"}, "num_hidden_layers is '3'; it must be of type int"),
        ("demo", {"compress_rates": {SPARSE: True, HEAVY: 2}}, "is True; it must be at least 1"),
    ],
)
def test_values_that_no_training_can_use_are_named(preset: str, changes: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ModelConfig.preset(preset).replace(**changes)


@pytest.mark.parametrize(
    ("preset", "changes", "sentence"),
    [
        ("demo-v3", {"rope_interleave": False}, "rope_interleave is False; this code computes deepseek_v3 with True"),
        ("demo-v3", {"scoring_func": "softmax"}, "scoring_func is 'softmax'; .* with 'sigmoid'"),
        ("demo-v3", {"topk_method": "greedy"}, "topk_method is 'greedy'"),
        ("demo-v3", {"rope_parameters": YARN | {"attention_factor": 2.0}}, "attention_factor is 2.0; .* with None"),
        ("demo-v3", {"rope_parameters": YARN | {"truncate": False}}, "truncate is False"),
        ("demo-v3", {"norm_topk_prob": None, "n_group": None}, "does not say n_group, norm_topk_prob, on which"),
        ("demo", {"sliding_window": None}, "does not say sliding_window, on which deepseek_v4's results depend"),
        ("demo", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; this code computes deepseek_v4 with 'silu'"),
        ("demo", {"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'"),
        ("demo", {"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ("demo", {"n_shared_experts": None}, "n_shared_experts is 0; it must be at least 1"),
        ("demo", {"norm_topk_prob": False}, "norm_topk_prob is False; DeepSeek-V4 normalises"),
        ("demo", {"rope_parameters": {"main": YARN, "compress": YARN}}, "attention_factor of 'main' is None"),
        ("demo", {"rope_parameters": {"main": YARN}}, "attention_factor of 'main' is None"),
        ("demo", {"rope_parameters": {"main": ROPE}}, r"rope_parameters\['compress'\] is None"),
        ("demo", {"rope_parameters": {"main": ROPE, "compress": 5}}, "a type that it has in no deepseek_v4"),
        ("demo", {"rope_parameters": {"main": ROPE, "compress": ROPE | {"partial_rotary_factor": 0.5}}}, "differs"),
        ("demo", {"hidden_size": "8"}, "hidden_size is '8'; it must be of type int"),
        ("demo", {"layer_types": 5}, "layer_types is 5; it must be of type list"),
        ("demo", {"compress_rates": [4, 128]}, "compress_rates is .*; it must be of type dict"),
    ],
)
def test_a_config_json_of_another_architecture_is_refused(preset: str, changes: dict, sentence: str) -> None:
    content = ModelConfig.preset(preset).to_dict()
    assert ModelConfig.from_dict(content) == ModelConfig.preset(preset)
    with pytest.raises(ValueError, match=sentence):
        ModelConfig.from_dict(content | changes)


def test_another_number_of_layers_continues_the_pattern() -> None:
    flash = ModelConfig.preset("v4-flash")
    assert flash.replace(num_hidden_layers=2).layer_types == [SLIDING, SLIDING]
    assert flash.replace(num_hidden_layers=45).layer_types[-3:] == [SPARSE, HEAVY, SPARSE]
    assert flash.replace(num_hidden_layers=45).mlp_layer_types[-1] == "moe"
    assert ModelConfig.from_dict(flash.to_dict()) == flash
    released = {key: value for key, value in flash.to_dict().items() if key not in ("layer_types", "mlp_layer_types")}
    released |= {"num_hidden_layers": 3, "compress_ratios": [0, 4, 128, 0], "num_hash_layers": 1}
    assert ModelConfig.from_dict(released).layer_types == [SLIDING, SPARSE, HEAVY]
    with pytest.raises(ValueError, match=r"compress_ratios holds \[8\]; known are 0, 4 and 128"):
        ModelConfig.from_dict(released | {"compress_ratios": [8, 0, 0]})
