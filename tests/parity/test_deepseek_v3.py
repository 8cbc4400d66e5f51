"""Our DeepSeek-V3 (`ours`) against transformers' (`theirs`), fp32, over configurations drawn at random."""

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from model import ModelConfig, build, count_parameters, load_pretrained, save_pretrained

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    groups = draw(st.sampled_from([1, 2, 4]))
    layers = draw(st.integers(1, 3))
    return ModelConfig(
        model_type="deepseek_v3",
        vocab_size=128,
        hidden_size=draw(st.sampled_from([32, 48])),
        intermediate_size=64,
        moe_intermediate_size=draw(st.sampled_from([16, 24])),
        num_hidden_layers=layers,
        num_attention_heads=draw(st.sampled_from([1, 3, 4])),
        q_lora_rank=draw(st.sampled_from([None, 24])),
        kv_lora_rank=16,
        qk_nope_head_dim=draw(st.sampled_from([8, 16])),
        qk_rope_head_dim=draw(st.sampled_from([4, 8])),
        v_head_dim=draw(st.sampled_from([8, 12])),
        n_shared_experts=draw(st.sampled_from([1, 2])),
        n_routed_experts=8,
        num_experts_per_tok=draw(st.integers(1, 2)),
        n_group=groups,
        topk_group=draw(st.integers(1, groups)),
        norm_topk_prob=draw(st.booleans()),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
        first_k_dense_replace=draw(st.integers(0, layers)),
        max_position_embeddings=1024,
        rope_parameters=draw(st.sampled_from([YARN, {"rope_type": "default", "rope_theta": 10000.0}])),
        initializer_range=0.1,
    )


def _ours(config: ModelConfig) -> torch.nn.Module:
    net, generator = build(config, seed=1), torch.Generator().manual_seed(2)
    for name, buffer in net.named_buffers():
        assert name.endswith("e_score_correction_bias")
        buffer.normal_(0, 0.1, generator=generator)
    return net


def _logits_and_margin(net: torch.nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Logits, and how far apart two experts or groups are that a token could confuse: rounding decides below 1e-6."""
    gaps = [1.0]

    def look(gate: torch.nn.Module, _: object, chosen: tuple[torch.Tensor, ...]) -> None:
        scores = (chosen[2] + gate.e_score_correction_bias).detach()
        groups = scores.unflatten(-1, (net.config.n_group, -1)).topk(2, dim=-1).values.sum(dim=-1)
        gaps.extend(float(x.sort(dim=-1).values.diff(dim=-1).min()) for x in (scores, groups) if x.shape[-1] > 1)

    for name, module in net.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(look)
    return net(ids).logits, min(gaps)


@settings(max_examples=24, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=configs())
def test_logits_and_gradients_equal(config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("export")
    ours = _ours(config)
    save_pretrained(ours, folder)
    theirs = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(0, config.vocab_size, (2, 70), generator=torch.Generator().manual_seed(0))
    mine, margin = _logits_and_margin(ours, ids)
    assume(not margin <= 1e-6)  # what is no number goes on, and fails
    other = theirs(ids).logits
    assert (mine - other).abs().max() <= 1e-5 * other.abs().max()

    torch.nn.functional.cross_entropy(mine.flatten(0, 1), ids.flatten()).backward()
    torch.nn.functional.cross_entropy(other.flatten(0, 1), ids.flatten()).backward()
    expected = dict(theirs.named_parameters())
    everywhere = max(parameter.grad.abs().max() for parameter in theirs.parameters())
    for name, parameter in ours.named_parameters():
        theirs_grad = expected[name].grad
        rounding = 1e-6 * everywhere  # a single normalised expert has weight 1: its router's gradient is rounding alone
        difference = (parameter.grad - theirs_grad).abs().max()
        assert difference <= 1e-4 * theirs_grad.abs().max() + rounding, (name, difference, theirs_grad.abs().max())


def test_reads_what_transformers_writes(tmp_path) -> None:
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=128, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=8, kv_lora_rank=16, q_lora_rank=24,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, n_group=2, topk_group=1, num_experts_per_tok=2,
        first_k_dense_replace=1,
    )  # fmt: skip
    theirs = DeepseekV3ForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours = load_pretrained(tmp_path)
    expected = theirs.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.state_dict().items())
    ids = torch.randint(0, 128, (1, 40))
    assert (ours(ids).logits - theirs(ids).logits).abs().max() <= 1e-5


@settings(max_examples=10, deadline=None)
@given(config=configs())
def test_count_parameters_counts_what_is_built(config: ModelConfig) -> None:
    with torch.device("meta"):
        from model.transformer import MoETransformer

        net = MoETransformer(config)
    assert count_parameters(config)[0] == sum(parameter.numel() for parameter in net.parameters())
