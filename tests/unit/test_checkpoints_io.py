"""Model folders: what is refused and with which sentence, shards, types, tokenizer, memory while loading."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import Tensor

from model import ModelConfig, build, load_pretrained, save_pretrained
from model.hf import check_tokenizer
from model.quantization import FP8, MXFP4

TINY = ModelConfig(
    model_type="deepseek_v3", vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
    num_hidden_layers=2, num_attention_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8,
    qk_rope_head_dim=8, v_head_dim=8, n_routed_experts=8, num_experts_per_tok=2, initializer_range=0.1,
)  # fmt: skip
INDEX = "model.safetensors.index.json"
HEAD = "lm_head.weight"


@pytest.fixture(scope="module")
def net() -> torch.nn.Module:
    return build(TINY, seed=3)


@pytest.fixture
def sharded(tmp_path: Path, net: torch.nn.Module) -> Path:
    save_pretrained(net, tmp_path, max_shard_bytes=20_000)
    return tmp_path


def rewrite(folder: Path, change: Callable[[dict], None]) -> None:
    """Change the tensors of a folder with one file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_json(file: Path, change: Callable[[dict], None]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_shards_stay_below_the_limit_and_load_back(sharded: Path, net: torch.nn.Module) -> None:
    shards = sorted(sharded.glob("*.safetensors"))
    assert len(shards) > 3
    assert all(sum(t.nbytes for t in load_file(shard).values()) <= 20_000 for shard in shards)
    index = json.loads((sharded / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in net.state_dict().values())
    assert {(sharded / name) for name in index["weight_map"].values()} == set(shards)
    assert {file.stat().st_mode & 0o777 for file in [*shards, sharded / INDEX]} == {0o644}
    loaded = load_pretrained(sharded)
    assert loaded.config == TINY
    assert not loaded.training
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_saving_again_leaves_nothing_of_before(sharded: Path, net: torch.nn.Module) -> None:
    save_pretrained(net, sharded)
    assert {file.name for file in sharded.iterdir()} == {"config.json", "model.safetensors"}
    with pytest.raises(ValueError, match="choose 'transformers' or 'deepseek'"):
        save_pretrained(net, sharded, format="gguf")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_types_become_fp32(tmp_path: Path, dtype: torch.dtype) -> None:
    narrow = build(TINY, seed=5).to(dtype)
    save_pretrained(narrow, tmp_path, max_shard_bytes=20_000)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    loaded = load_pretrained(tmp_path)
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, narrow.state_dict()[name].float())


def _lose_shard(folder: Path) -> str:
    shard = sorted(folder.glob("model-*"))[1]
    shard.unlink()
    return f"lacks {shard.name}"


def _damage_shard(folder: Path) -> str:
    shard = sorted(folder.glob("model-*"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    return f"{shard.name} is damaged"


def _forget_tensor(folder: Path) -> str:
    edit_json(folder / INDEX, lambda index: index["weight_map"].pop("model.norm.weight"))
    return r"model.norm.weight is in model-\S+, not in the index"


def _invent_tensor(folder: Path) -> str:
    shard = sorted(folder.glob("model-*"))[0].name
    edit_json(folder / INDEX, lambda index: index["weight_map"].update(extra=shard))
    return f"extra is not in {shard}, where the index expects it"


def _misplace_tensor(folder: Path) -> str:
    shard = sorted(folder.glob("model-*"))[0].name
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({HEAD: shard}))
    return f"{HEAD} is not in {shard}, where"


def _break_index(folder: Path) -> str:
    (folder / INDEX).write_text("{")
    return f"{INDEX} is not valid JSON"


def _empty_index(folder: Path) -> str:
    (folder / INDEX).write_text("[]")
    return "holds no weight_map"


def _twice(folder: Path) -> str:
    (folder / INDEX).unlink()
    save_file({HEAD: torch.zeros(64, 32)}, folder / "model-more.safetensors")
    return rf"{HEAD} is in model-more.safetensors and model-0\S+"


def _no_weights(folder: Path) -> str:
    for file in folder.glob("model*"):
        file.unlink()
    return "the weights are missing"


def _no_config(folder: Path) -> str:
    (folder / "config.json").unlink()
    return "holds no config.json"


def _break_config(folder: Path) -> str:
    (folder / "config.json").write_text('{"model_type": ')
    return "config.json is not valid JSON"


def _other_architecture(folder: Path) -> str:
    edit_json(folder / "config.json", lambda config: config.update(model_type="llama"))
    return "model_type is 'llama'; this code reads"


@pytest.mark.parametrize(
    "damage",
    [_lose_shard, _damage_shard, _forget_tensor, _invent_tensor, _misplace_tensor, _break_index, _empty_index, _twice,
     _no_weights, _no_config, _break_config, _other_architecture],
)  # fmt: skip
def test_a_folder_out_of_order_is_refused(sharded: Path, damage: Callable[[Path], str]) -> None:
    sentence = damage(sharded)
    with pytest.raises(ValueError, match=sentence) as error:
        load_pretrained(sharded)
    assert "\n" not in str(error.value)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_misfit_is_in_the_one_error(net, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("folder")
    save_pretrained(net, folder)
    names = sorted(load_file(folder / "model.safetensors"))
    drawn = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=6, unique=True))
    expected = []

    def change(tensors: dict[str, Tensor]) -> None:
        for name in drawn:
            kind = data.draw(st.sampled_from(["missing", "surplus", "misshaped", "retyped"]))
            shape = list(tensors[name].shape)
            if kind == "missing":
                del tensors[name]
                expected.append(f"missing {name}")
            elif kind == "surplus":
                tensors[f"{name}.more"] = torch.zeros(1)
                expected.append(f"surplus {name}.more")
            elif kind == "misshaped":
                tensors[name] = torch.zeros(shape[0] + 1, *shape[1:])
                expected.append(f"{name} is {[shape[0] + 1, *shape[1:]]}, not {shape}")
            else:
                tensors[name] = tensors[name].double()
                expected.append(f"{name} is of type F64, not F32 or BF16 or F16")

    rewrite(folder, change)
    with pytest.raises(ValueError, match="does not fit its config.json") as error:
        load_pretrained(folder)
    assert sorted(str(error.value).split("config.json: ")[1].split("; ")) == sorted(expected)


def test_many_misfits_are_counted(tmp_path: Path, net: torch.nn.Module) -> None:
    save_pretrained(net, tmp_path)
    layer = [name for name in load_file(tmp_path / "model.safetensors") if name.startswith("model.layers.1.")]
    edit_json(tmp_path / "config.json", lambda config: config.update(num_hidden_layers=4))
    with pytest.raises(ValueError, match=rf"missing model.layers.2\S+.*\({2 * len(layer)} in all\)$") as error:
        load_pretrained(tmp_path)
    assert str(error.value).count("missing") == 20


@pytest.mark.parametrize(
    ("stored", "sentence"),
    [
        ({HEAD: torch.zeros(64, 32).to(torch.float8_e4m3fn)}, "missing lm_head.scale, the scales of lm_head.weight"),
        ({HEAD: torch.zeros(64, 16, dtype=torch.int8)}, "missing lm_head.scale, the scales of lm_head.weight"),
        (
            {HEAD: torch.zeros(64, 32).to(torch.float8_e4m3fn), "lm_head.weight_scale_inv": torch.ones(2, 1)},
            r"lm_head.weight_scale_inv is \[2, 1\], not \[1, 1\]",
        ),
        (
            {HEAD: torch.zeros(64, 32, dtype=torch.int8), "lm_head.scale": torch.ones(64, 1)},
            r"lm_head.weight is \[64, 32\], not \[64, 16\]",
        ),
        (
            {HEAD: torch.zeros(64, 16, dtype=torch.int8), "lm_head.scale": torch.ones(64, 1).half()},
            "lm_head.scale is of type F16, not F32 or F8_E8M0",
        ),
        (
            {"model.norm.weight": torch.zeros(32).to(torch.float8_e4m3fn), "model.norm.scale": torch.ones(1)},
            "model.norm.weight is of type F8_E4M3, not F32",
        ),
        ({"lm_head.scale": torch.ones(1, 1)}, "surplus lm_head.scale"),
        ({HEAD: torch.zeros(64, 32, dtype=torch.int64)}, "lm_head.weight is of type I64"),
    ],
)
def test_types_that_cannot_be_weights(tmp_path: Path, net, stored: dict[str, Tensor], sentence: str) -> None:
    save_pretrained(net, tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update(stored))
    with pytest.raises(ValueError, match=sentence):
        load_pretrained(tmp_path)


def test_rotary_frequencies_of_old_folders_are_passed_over(tmp_path: Path, net: torch.nn.Module) -> None:
    save_pretrained(net, tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert load_pretrained(tmp_path).state_dict().keys() == net.state_dict().keys()


def test_an_announced_prediction_block_may_be_absent(tmp_path: Path, net: torch.nn.Module) -> None:
    save_pretrained(net, tmp_path)
    edit_json(tmp_path / "config.json", lambda config: config.update(num_nextn_predict_layers=1))
    loaded = load_pretrained(tmp_path)
    assert loaded.config.num_nextn_predict_layers == 0
    assert loaded.state_dict().keys() == net.state_dict().keys()


def test_known_values_of_the_block_formats() -> None:
    packed = torch.tensor([[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]], dtype=torch.uint8).view(torch.int8)
    scale = torch.tensor([[126]], dtype=torch.uint8).view(torch.float8_e8m0fnu)  # 2 ** (126 - 127)
    positive = [0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0]
    assert MXFP4.dequantise(packed, scale).tolist() == [positive + [-value for value in positive]]
    ones = torch.ones(130, 129).to(torch.float8_e4m3fn)
    weight = FP8.dequantise(ones, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert weight[:128, :128].unique().tolist() == [1.0]
    assert weight[:128, 128:].unique().tolist() == [2.0]
    assert weight[128:, :128].unique().tolist() == [3.0]
    assert weight[128:, 128:].unique().tolist() == [4.0]
    assert FP8.stored_shapes((130, 129)) == ([130, 129], [2, 2])
    assert MXFP4.stored_shapes((130, 64)) == ([130, 32], [130, 2])


def tokenizer_folder(folder: Path, size: int) -> Path:
    """A tokenizer of `size` tokens, the last one added outside the vocabulary of its model."""
    tokenizer = Tokenizer(models.BPE(vocab={f"t{n}": n for n in range(size - 1)}, merges=[]))
    tokenizer.add_special_tokens(["<end>"])
    assert tokenizer.token_to_id("<end>") == size - 1
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def test_tokenizer_must_fit_the_vocabulary(tmp_path: Path, net: torch.nn.Module) -> None:
    with pytest.raises(ValueError, match=r"lacks tokenizer.json and tokenizer_config.json"):
        check_tokenizer(tmp_path, TINY)
    for size in (40, 64):
        check_tokenizer(tokenizer_folder(tmp_path, size), TINY)
    save_pretrained(net, tmp_path / "model", tokenizer=tmp_path)
    assert (tmp_path / "model/tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    with pytest.raises(ValueError, match=r"token ids up to 64, the model a vocabulary of 64; use the tokenizer"):
        save_pretrained(net, tmp_path / "other", tokenizer=tokenizer_folder(tmp_path, 65))
    assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match=r"no token for the model's pad_token_id \(50\);"):
        check_tokenizer(tokenizer_folder(tmp_path, 40), TINY.replace(pad_token_id=50))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer.json is not valid JSON"):
        check_tokenizer(tmp_path, TINY)


MEASURE = """
import re, sys
from pathlib import Path
from model import load_pretrained
memory = lambda key: 1024 * int(re.search(key + r":\\s+([0-9]+) kB", Path("/proc/self/status").read_text())[1])
load_pretrained(sys.argv[1])  # what the first call imports stays
before = memory("VmRSS")
net = load_pretrained(sys.argv[2])
assert "transformers" not in sys.modules
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
def test_loading_holds_the_model_and_one_shard(tmp_path: Path, net: torch.nn.Module) -> None:
    large = TINY.replace(hidden_size=512, moe_intermediate_size=512, n_routed_experts=36, num_hidden_layers=3)
    narrow = build(large).bfloat16()
    shard_bytes, margin = 20_000_000, 10_000_000
    small, wide = tmp_path / "small", tmp_path / "large"
    save_pretrained(net, small)
    save_pretrained(narrow, wide, max_shard_bytes=shard_bytes)
    model_bytes = sum(2 * tensor.nbytes for tensor in narrow.state_dict().values())
    assert model_bytes > 200_000_000
    done = subprocess.run([sys.executable, "-c", MEASURE, small, wide], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= model_bytes + shard_bytes + margin
