"""Model folders against transformers: what it writes we read, what we write it reads, bit for bit, V3 and V4."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV4Config,
    DeepseekV4ForCausalLM,
)

from model import MoETransformer, build, load_pretrained, save_pretrained
from model.config import HEAVY, SLIDING, SPARSE, ModelConfig
from model.hf import read_state, write_state
from model.names import DEEPSEEK, TRANSFORMERS, copies, layout
from model.shards import find_tensors

LARGE = 10**9
CLASSES = {"deepseek_v3": DeepseekV3ForCausalLM, "deepseek_v4": DeepseekV4ForCausalLM}
V4_SIZES = dict(
    vocab_size=24, hidden_size=16, moe_intermediate_size=8, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    q_lora_rank=8, partial_rotary_factor=0.5, num_experts_per_tok=2, sliding_window=8, o_groups=2, o_lora_rank=4,
    index_n_heads=2, index_head_dim=8, index_topk=2, max_position_embeddings=256, compress_rates={SPARSE: 4, HEAVY: 8},
)  # fmt: skip
V3_SIZES = dict(
    vocab_size=24, hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_attention_heads=2,
    num_key_value_heads=2, kv_lora_rank=8, qk_rope_head_dim=4, v_head_dim=4, qk_nope_head_dim=4, n_group=1,
    topk_group=1, num_experts_per_tok=2, max_position_embeddings=256,
)  # fmt: skip


def v4_config(layer_types: list[str], hashed: int, **sizes) -> DeepseekV4Config:
    mlp_types = ["hash_moe"] * hashed + ["moe"] * (len(layer_types) - hashed)
    fields = V4_SIZES | {"n_routed_experts": 4, "num_nextn_predict_layers": 0} | sizes
    return DeepseekV4Config(
        num_hidden_layers=len(layer_types), layer_types=layer_types, mlp_layer_types=mlp_types, **fields
    )


def v3_config(layers: int, dense: int, **sizes) -> DeepseekV3Config:
    fields = V3_SIZES | {"n_routed_experts": 4, "num_nextn_predict_layers": 0} | sizes
    return DeepseekV3Config(num_hidden_layers=layers, first_k_dense_replace=dense, **fields)


@st.composite
def configs(draw: st.DrawFn) -> DeepseekV3Config | DeepseekV4Config:
    experts, mtp = draw(st.integers(2, 12)), draw(st.integers(0, 1))
    sizes = {"n_routed_experts": experts, "num_nextn_predict_layers": mtp, "n_shared_experts": 1}
    if draw(st.booleans()):
        types = draw(st.lists(st.sampled_from([SLIDING, SPARSE, HEAVY]), min_size=1, max_size=12))
        return v4_config(types, draw(st.integers(0, len(types))), **sizes)
    layers = draw(st.integers(1, 12))
    dense, rank = draw(st.integers(0, layers)), draw(st.sampled_from([None, 8]))
    return v3_config(layers, dense, **sizes | {"q_lora_rank": rank, "n_shared_experts": draw(st.integers(1, 2))})


def randomised(config: DeepseekV3Config | DeepseekV4Config) -> torch.nn.Module:
    net = CLASSES[config.model_type](config).eval()
    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor.normal_() if tensor.is_floating_point() else tensor.random_(0, config.n_routed_experts)
    return net


def with_prediction(net: torch.nn.Module) -> dict[str, Tensor]:
    """The state dict, and where the config asks for it a prediction block: one more layer, projections and norms."""
    state, config = dict(net.state_dict()), net.config
    if not config.num_nextn_predict_layers:
        return state
    width = config.hidden_size
    if config.model_type == "deepseek_v4":
        single = randomised(v4_config([SLIDING], 0, n_routed_experts=config.n_routed_experts)).state_dict()
        shapes = {"e_proj": (width, width), "h_proj": (width, width)}
        state |= {f"mtp.0.{k.removeprefix('model.')}": v for k, v in single.items() if "hc_head" in k}
    else:
        sizes = {name: getattr(config, name) for name in ("n_routed_experts", "q_lora_rank", "n_shared_experts")}
        single = randomised(v3_config(1, 0, **sizes)).state_dict()
        shapes = {"eh_proj": (width, 2 * width)}
    shapes |= {"enorm": (width,), "hnorm": (width,), "norm": (width,)}
    state |= {f"mtp.0.{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    layer = "model.layers.0."
    return state | {f"mtp.0.{k.removeprefix(layer)}": v for k, v in single.items() if k.startswith(layer)}


def ours(config: DeepseekV3Config | DeepseekV4Config) -> ModelConfig:
    return ModelConfig.from_dict(config.to_dict())


def assert_equal(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=configs(), form=st.sampled_from([TRANSFORMERS, DEEPSEEK]), limit=st.sampled_from([LARGE, 3000]))
def test_round_trip_and_transformers_agree(
    config: DeepseekV3Config | DeepseekV4Config, form: str, limit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("folder")
    net = randomised(config)
    state = with_prediction(net)
    config.architectures = [type(net).__name__]
    config.save_pretrained(folder)
    write_state(state, folder, ours(config), form, limit)
    assert_equal(read_state(state, folder, ours(config), find_tensors(folder)), state)
    theirs, report = type(net).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert_equal(theirs.state_dict(), net.state_dict())
    assert not report["missing_keys"]
    assert all(f"layers.{config.num_hidden_layers}." in name for name in report["unexpected_keys"])


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=configs(), original=st.booleans())
def test_reads_and_names_what_transformers_writes(
    config: DeepseekV3Config | DeepseekV4Config, original: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    theirs_folder, ours_folder = tmp_path_factory.mktemp("theirs"), tmp_path_factory.mktemp("ours")
    net = randomised(config)
    net.save_pretrained(theirs_folder, max_shard_size="3KB", save_original_format=original)
    state = net.state_dict()
    assert_equal(read_state(state, theirs_folder, ours(config), find_tensors(theirs_folder)), state)
    if original:
        net.save_pretrained(theirs_folder)
        write_state(state, ours_folder, ours(config), TRANSFORMERS, LARGE)
        file = "model.safetensors"
        assert_equal(load_file(ours_folder / file), load_file(theirs_folder / file))


@pytest.mark.parametrize("kinds", [[SLIDING], [SLIDING, SPARSE], [HEAVY]])
def test_reads_what_transformers_makes_of_deepseeks_names(kinds: list[str], tmp_path: Path) -> None:
    config = v4_config(kinds, 1)
    net = randomised(config)
    config.save_pretrained(tmp_path / "theirs")
    write_state(net.state_dict(), tmp_path / "theirs", ours(config), DEEPSEEK, LARGE)
    type(net).from_pretrained(tmp_path / "theirs", dtype=torch.float32).save_pretrained(tmp_path / "again")
    state = read_state(net.state_dict(), tmp_path / "again", ours(config), find_tensors(tmp_path / "again"))
    assert_equal(state, net.state_dict())


def test_names_of_deepseek_v4(tmp_path: Path) -> None:
    config = v4_config([SLIDING, SPARSE, HEAVY], 1, n_routed_experts=2, num_nextn_predict_layers=1)
    write_state(with_prediction(randomised(config)), tmp_path, ours(config), DEEPSEEK, LARGE)
    norms = {"attn_norm.weight", "ffn_norm.weight"} | {
        f"hc_{part}_{leaf}" for part in ("attn", "ffn") for leaf in ("fn", "base", "scale")
    }
    attention = {f"attn.{leaf}.weight" for leaf in ("wq_a", "q_norm", "wq_b", "wkv", "kv_norm", "wo_a", "wo_b")}
    pooled = {"ape", "wkv.weight", "wgate.weight", "norm.weight"}
    compressor = {f"attn.compressor.{leaf}" for leaf in pooled}
    indexer = {f"attn.indexer.compressor.{leaf}" for leaf in pooled}
    indexer |= {"attn.indexer.wq_b.weight", "attn.indexer.weights_proj.weight"}
    experts = ("shared_experts", "experts.0", "experts.1")
    feed = {f"ffn.{expert}.w{number}.weight" for expert in experts for number in (1, 2, 3)} | {"ffn.gate.weight"}
    block = norms | attention | {"attn.attn_sink"} | feed
    head = {"hc_head_fn", "hc_head_base", "hc_head_scale", "norm.weight"}
    expected = head | {"embed.weight", "head.weight"}
    expected |= {f"layers.0.{name}" for name in block | {"ffn.gate.tid2eid"}}
    expected |= {f"layers.1.{name}" for name in block | {"ffn.gate.bias"} | compressor | indexer}
    expected |= {f"layers.2.{name}" for name in block | {"ffn.gate.bias"} | compressor}
    outside = head | {f"{name}.weight" for name in ("e_proj", "h_proj", "enorm", "hnorm")}
    expected |= {f"mtp.0.{name}" for name in block | {"ffn.gate.bias"} | outside}
    assert find_tensors(tmp_path).keys() == expected


def test_deepseek_v3_stores_embedding_and_head_again(tmp_path: Path) -> None:
    config = v3_config(2, 1, q_lora_rank=8, num_nextn_predict_layers=1)
    state = with_prediction(randomised(config))
    write_state(state, tmp_path, ours(config), DEEPSEEK, LARGE)
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    assert torch.equal(stored["model.layers.2.embed_tokens.weight"], state["model.embed_tokens.weight"])
    assert torch.equal(stored["model.layers.2.shared_head.head.weight"], state["lm_head.weight"])
    assert torch.equal(stored["model.layers.2.shared_head.norm.weight"], state["mtp.0.norm.weight"])
    stored["model.layers.2.embed_tokens.weight"][3, 3] += 1
    save_file(stored, file)
    with pytest.raises(ValueError, match="embed_tokens.weight differs from model.embed_tokens.weight"):
        read_state(state, tmp_path, ours(config), find_tensors(tmp_path))


def quantise_fp8(weight: Tensor, powers_of_two: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(e4m3 values, scales, what they stand for), block by block of 128 x 128."""
    rows, columns = weight.shape
    values, meant = torch.empty_like(weight).to(torch.float8_e4m3fn), torch.empty_like(weight)
    scales = torch.empty((rows + 127) // 128, (columns + 127) // 128)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
            scale = weight[block].abs().max() / 448
            scale = 2.0 ** scale.log2().ceil() if powers_of_two else scale
            values[block] = (weight[block] / scale).to(torch.float8_e4m3fn)
            meant[block], scales[i, j] = values[block].float() * scale, scale
    return values, scales.to(torch.float8_e8m0fnu) if powers_of_two else scales, meant


def quantise_fp4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(int8 with two e2m1 values, e8m0 scales, what they stand for), 32 values of a row a block."""
    known = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
    groups = weight.unflatten(1, (-1, 32))
    exponents = (groups.abs().amax(-1) / 6).log2().ceil()
    codes = (groups / 2.0 ** exponents[..., None])[..., None].sub(torch.tensor(known)).abs().argmin(-1)
    meant = (torch.tensor(known)[codes] * 2.0 ** exponents[..., None]).flatten(1)
    pairs = codes.flatten(1).unflatten(1, (-1, 2))
    packed = (pairs[..., 0] + 16 * pairs[..., 1]).to(torch.uint8).view(torch.int8)
    return packed, (exponents + 127).to(torch.uint8).view(torch.float8_e8m0fnu), meant


def quantise_folder(folder: Path, state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Replace matrices in the folder as DeepSeek does; returns what the folder now means, by name on disk."""
    write_state(state, folder, config, DEEPSEEK, LARGE)
    stored = load_file(folder / "model.safetensors")
    meant = dict(stored)
    for name in [name for name in stored if ("attn.w" in name or "experts" in name or "self_attn" in name)]:
        if stored[name].ndim == 2:
            stem = name.removesuffix("weight")
            ending = "scale" if config.is_v4 else "weight_scale_inv"
            fp4 = config.is_v4 and ".experts." in name
            quantise = quantise_fp4 if fp4 else lambda weight: quantise_fp8(weight, config.is_v4)
            stored[name], stored[stem + ending], meant[name] = quantise(stored[name])
    save_file(stored, folder / "model.safetensors")
    return meant


@pytest.mark.parametrize("kind", ["deepseek_v3", "deepseek_v4"])
def test_fp8_and_fp4_are_dequantised_exactly(kind: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 160, "moe_intermediate_size": 192, "q_lora_rank": 144, "num_nextn_predict_layers": 0}
    v4 = kind == "deepseek_v4"
    config = v4_config([SLIDING, SPARSE], 1, **sizes) if v4 else v3_config(2, 1, **sizes)
    state = randomised(config).state_dict()
    quantised, plain = tmp_path / "quantised", tmp_path / "plain"
    quantised.mkdir()
    plain.mkdir()
    meant = quantise_folder(quantised, state, ours(config))
    types = {header.dtype for header in find_tensors(quantised).values()}
    assert types == ({"F32", "I64", "I8", "F8_E4M3", "F8_E8M0"} if v4 else {"F32", "F8_E4M3"})
    save_file(meant, plain / "model.safetensors")
    expected = read_state(state, plain, ours(config), find_tensors(plain))
    found = read_state(state, quantised, ours(config), find_tensors(quantised))
    assert_equal(found, expected)
    for name, tensor in found.items():
        assert (tensor - state[name]).abs().max() <= 0.3 * state[name].abs().max(), name
    assert any(not torch.equal(tensor, state[name]) for name, tensor in found.items())


def test_scales_in_another_shard(tmp_path: Path) -> None:
    config = v3_config(1, 1, q_lora_rank=8)
    state = randomised(config).state_dict()
    meant = quantise_folder(tmp_path, state, ours(config))
    stored = load_file(tmp_path / "model.safetensors")
    scales = {name: tensor for name, tensor in stored.items() if name.endswith("scale_inv")}
    (tmp_path / "model.safetensors").unlink()
    save_file(scales, tmp_path / "model-1.safetensors")
    save_file({name: stored[name] for name in stored.keys() - scales.keys()}, tmp_path / "model-2.safetensors")
    assert_equal(read_state(state, tmp_path, ours(config), find_tensors(tmp_path)), meant)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"missing \S+weight_scale_inv|missing \S+, the scales of \S+weight"):
        read_state(state, tmp_path, ours(config), find_tensors(tmp_path))


def test_expert_table_of_hash_routing_is_integer(tmp_path: Path) -> None:
    config = v4_config([SLIDING], 1)
    state = randomised(config).state_dict()
    write_state(state, tmp_path, ours(config), DEEPSEEK, LARGE)
    file, name = tmp_path / "model.safetensors", "layers.0.ffn.gate.tid2eid"
    stored = load_file(file)
    save_file(stored | {name: stored[name].int()}, file)
    assert_equal(read_state(state, tmp_path, ours(config), find_tensors(tmp_path)), state)
    save_file(stored | {name: stored[name].float()}, file)
    with pytest.raises(ValueError, match=f"{name} is of type F32, not I64 or I32"):
        read_state(state, tmp_path, ours(config), find_tensors(tmp_path))


# tensors in the released folders, scales included
PUBLISHED = {"v3-671b": 91_991, "v4-flash": 69_187, "v4-pro": 145_116}
IN_BF16 = ("gate.weight", "norm.weight", "embed", "head", "weights_proj", "compressor", "eh_proj")


@pytest.mark.parametrize("preset", PUBLISHED)
def test_as_many_tensors_as_were_published(preset: str) -> None:
    config = ModelConfig.preset(preset)
    with torch.device("meta"):
        state = MoETransformer(config).state_dict()
    stored = layout(state, config, DEEPSEEK).keys() | copies(config).keys()
    matrices = [name for name in stored if name.endswith("weight") and not any(part in name for part in IN_BF16)]
    assert len(stored) + len(matrices) == PUBLISHED[preset]


@pytest.mark.parametrize("form", [TRANSFORMERS, DEEPSEEK])
@pytest.mark.parametrize("preset", ["demo", "demo-v3"])
def test_models_with_a_prediction_block_come_back(preset: str, form: str, tmp_path: Path) -> None:
    small = {"hidden_size": 32, "vocab_size": 64, "moe_intermediate_size": 16, "num_nextn_predict_layers": 1}
    net = build(ModelConfig.preset(preset).replace(**small), seed=1)
    save_pretrained(net, tmp_path, format=form, max_shard_bytes=100_000)
    loaded = load_pretrained(tmp_path)
    assert loaded.config == net.config
    assert_equal(loaded.state_dict(), net.state_dict())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    trunk = {name: tensor for name, tensor in net.state_dict().items() if not name.startswith("mtp.")}
    assert_equal(theirs, trunk)
