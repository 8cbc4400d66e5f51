"""Our DeepSeek-V4 (`ours`) against transformers' (`theirs`), fp32, over configurations drawn at random."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from model import ModelConfig, count_parameters
from model.config import HEAVY, LAYER_TYPES, SLIDING, SPARSE
from model.size import count_mtp_parameters
from model.transformer import MoETransformer

TOKENS = 75
THETA = {"rope_theta": 160000.0}


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    layers = draw(st.integers(1, 4))
    heads, groups = draw(st.sampled_from([(2, 1), (4, 2), (3, 3), (4, 4)]))
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    yarn = {
        "rope_type": "yarn",
        "factor": 16.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "beta_slow": 1,
    }
    return ModelConfig(
        vocab_size=96,
        hidden_size=draw(st.sampled_from([32, 48])),
        moe_intermediate_size=draw(st.sampled_from([16, 24])),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        q_lora_rank=draw(st.sampled_from([16, 24])),
        head_dim=draw(st.sampled_from([16, 24])),
        qk_rope_head_dim=draw(st.sampled_from([4, 8, 16])),
        n_shared_experts=1,
        n_routed_experts=draw(st.sampled_from([4, 8])),
        num_experts_per_tok=draw(st.integers(1, 3)),
        routed_scaling_factor=draw(st.sampled_from([1.5, 2.5])),
        max_position_embeddings=1024,
        rope_parameters={"main": rope, "compress": draw(st.sampled_from([yarn, rope])) | THETA},
        o_groups=groups,
        o_lora_rank=draw(st.sampled_from([8, 12])),
        sliding_window=draw(st.sampled_from([1, 5, 16, 128])),
        layer_types=draw(st.lists(st.sampled_from(LAYER_TYPES), min_size=layers, max_size=layers)),
        compress_rates={SPARSE: draw(st.sampled_from([1, 2, 4])), HEAVY: draw(st.sampled_from([3, 8, 32]))},
        mlp_layer_types=draw(st.lists(st.sampled_from(["hash_moe", "moe"]), min_size=layers, max_size=layers)),
        index_n_heads=32,
        index_head_dim=draw(st.sampled_from([16, 24])),
        index_topk=draw(st.sampled_from([3, 8, 100])),
        hc_mult=draw(st.sampled_from([2, 4])),
        hc_sinkhorn_iters=draw(st.sampled_from([1, 3, 20])),
        swiglu_limit=draw(st.sampled_from([0.5, 10.0])),
    )


def pair(config: ModelConfig) -> tuple[MoETransformer, DeepseekV4ForCausalLM]:
    """The same random weights in both; norms, biases, sinks and tables are random too."""
    torch.manual_seed(1)
    described = DeepseekV4Config(**config.to_dict())
    theirs = DeepseekV4ForCausalLM._from_config(described, attn_implementation="eager", experts_implementation="eager")
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.1) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.3)
        for name, buffer in theirs.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.1)
            if name.endswith("tid2eid"):
                rows = [torch.randperm(config.n_routed_experts)[: buffer.shape[1]] for _ in buffer]
                buffer.copy_(torch.stack(rows))
    ours = MoETransformer(config)
    ours.load_state_dict(theirs.state_dict())
    return ours.eval(), theirs.eval()


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(config=configs())
def test_logits_and_gradients_equal(config: ModelConfig) -> None:
    ours, theirs = pair(config)
    ids = torch.randint(0, config.vocab_size, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    mine, other = ours(ids).logits, theirs(ids, use_cache=False).logits
    assert (mine - other).abs().max() <= 1e-5 * other.abs().max()
    if config.swiglu_limit < 1:
        return  # at the kink of the clamp rounding decides whether there is a gradient; test_experts covers it

    torch.nn.functional.cross_entropy(mine.flatten(0, 1), ids.flatten()).backward()
    torch.nn.functional.cross_entropy(other.flatten(0, 1), ids.flatten()).backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    everywhere = max(grad.abs().max() for grad in expected.values() if grad is not None)
    for name, parameter in ours.named_parameters():
        if expected[name] is None:
            assert ".indexer." in name or not parameter.numel() and parameter.grad is None, name
            continue
        difference = (parameter.grad - expected[name]).abs().max()
        assert difference <= 1e-4 * expected[name].abs().max() + 1e-6 * everywhere, (name, difference)


def test_counts_are_of_what_is_built() -> None:
    for kinds in ([SLIDING], [SPARSE, HEAVY], [HEAVY, SPARSE, SLIDING]):
        config = ModelConfig.preset("demo").replace(num_hidden_layers=len(kinds), layer_types=kinds)
        with torch.device("meta"):
            net = MoETransformer(config)
        ahead = sum(parameter.numel() for parameter in net.mtp.parameters())
        assert count_mtp_parameters(config) == ahead
        assert count_parameters(config)[0] == sum(parameter.numel() for parameter in net.parameters()) - ahead


@pytest.mark.parametrize(
    ("preset", "total", "ahead", "active"),
    [("v4-flash", 284.33, 6.6, 13.27), ("v4-pro", 1573.0, 25.8, 48.85), ("v3-671b", 671.0, 11.6, 36.6)],
)
def test_released_sizes(preset: str, total: float, ahead: float, active: float) -> None:
    config = ModelConfig.preset(preset)
    counted, working = (number / 1e9 for number in count_parameters(config))
    assert counted == pytest.approx(total, abs=0.05) and working == pytest.approx(active, abs=0.05)
    assert count_mtp_parameters(config) / 1e9 == pytest.approx(ahead, abs=0.05)


@pytest.mark.parametrize("preset", ["v4-flash", "v4-pro", "v3-671b"])
def test_full_size_models_build_on_meta_and_each_type_of_layer_runs(preset: str) -> None:
    config = ModelConfig.preset(preset)
    with torch.device("meta"):
        net = MoETransformer(config).train()
        kinds = {(type(block.mlp), *_attention(block)): block for block in [*net.model.layers, net.mtp[0]]}
        net.model.layers = torch.nn.ModuleList(list(kinds.values())[:-1] if config.is_v4 else kinds.values())
        ids = torch.zeros(1, 1024, dtype=torch.int64)
        out = net(ids, torch.zeros_like(ids), with_mtp=True)
        extra = [out.statistics[name].sum() for name in ("balance_loss", "indexer_loss") if name in out.statistics]
        (out.logits.sum() + out.mtp_hidden.sum() + sum(extra)).backward()
    assert out.logits.shape == (1, 1024, config.vocab_size)
    assert all(parameter.grad is not None for parameter in net.parameters())


def _attention(block: torch.nn.Module) -> tuple[str, ...]:
    """What tells the types of attention layers apart."""
    return tuple(name for name, _ in block.self_attn.named_parameters() if "compressor" in name)
