"""Names of the tensors on disk: DeepSeek's own, and those that transformers writes.

In memory a model has transformers' names with the routed experts of a layer stacked; on disk each expert has tensors of
its own. DeepSeek-V3 was published under transformers' names, with the multi-token-prediction block as one more layer.
DeepSeek-V4 has short names of its own (table `V4`); transformers writes those of a layer behind "model.", and long ones
elsewhere. A `Layout` goes both ways: it maps every name on disk to its place in memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from model.config import ModelConfig

TRANSFORMERS, DEEPSEEK, STACKED, WINDOWS = "transformers", "deepseek", "stacked", "windows"
# stacked: as in memory, transformers' save_original_format=False writes it; windows: what transformers writes of a V4
# without compression that it read from DeepSeek's form
FORMS = (TRANSFORMERS, DEEPSEEK, STACKED, WINDOWS)

V4 = {  # inside "model.", "model.layers.#." or "mtp.#."; names that are not here are the same on both sides
    "embed_tokens.weight": "embed.weight",
    "lm_head.weight": "head.weight",
    "hc_head.hc_fn": "hc_head_fn",
    "hc_head.hc_base": "hc_head_base",
    "hc_head.hc_scale": "hc_head_scale",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "attn_hc.fn": "hc_attn_fn",
    "attn_hc.base": "hc_attn_base",
    "attn_hc.scale": "hc_attn_scale",
    "ffn_hc.fn": "hc_ffn_fn",
    "ffn_hc.base": "hc_ffn_base",
    "ffn_hc.scale": "hc_ffn_scale",
    "self_attn.q_a_proj.weight": "attn.wq_a.weight",
    "self_attn.q_a_norm.weight": "attn.q_norm.weight",
    "self_attn.q_b_proj.weight": "attn.wq_b.weight",
    "self_attn.kv_proj.weight": "attn.wkv.weight",
    "self_attn.kv_norm.weight": "attn.kv_norm.weight",
    "self_attn.o_a_proj.weight": "attn.wo_a.weight",
    "self_attn.o_b_proj.weight": "attn.wo_b.weight",
    "self_attn.sinks": "attn.attn_sink",
    "self_attn.compressor.position_bias": "attn.compressor.ape",
    "self_attn.compressor.kv_proj.weight": "attn.compressor.wkv.weight",
    "self_attn.compressor.gate_proj.weight": "attn.compressor.wgate.weight",
    "self_attn.compressor.kv_norm.weight": "attn.compressor.norm.weight",
    "self_attn.compressor.indexer.q_b_proj.weight": "attn.indexer.wq_b.weight",
    "self_attn.compressor.indexer.scorer.weights_proj.weight": "attn.indexer.weights_proj.weight",
    "self_attn.compressor.indexer.position_bias": "attn.indexer.compressor.ape",
    "self_attn.compressor.indexer.kv_proj.weight": "attn.indexer.compressor.wkv.weight",
    "self_attn.compressor.indexer.gate_proj.weight": "attn.indexer.compressor.wgate.weight",
    "self_attn.compressor.indexer.kv_norm.weight": "attn.indexer.compressor.norm.weight",
    "mlp.gate.weight": "ffn.gate.weight",
    "mlp.gate.e_score_correction_bias": "ffn.gate.bias",
    "mlp.gate.tid2eid": "ffn.gate.tid2eid",
    "mlp.experts.#.gate_proj.weight": "ffn.experts.#.w1.weight",
    "mlp.experts.#.down_proj.weight": "ffn.experts.#.w2.weight",
    "mlp.experts.#.up_proj.weight": "ffn.experts.#.w3.weight",
    "mlp.shared_experts.gate_proj.weight": "ffn.shared_experts.w1.weight",
    "mlp.shared_experts.down_proj.weight": "ffn.shared_experts.w2.weight",
    "mlp.shared_experts.up_proj.weight": "ffn.shared_experts.w3.weight",
}
BLOCK = re.compile(r"(?:model\.)?(layers\.\d+\.|mtp\.\d+\.|)(.*)")
EXPERT = re.compile(r"(?<=\.experts\.)\d+")


@dataclass(frozen=True)
class Place:
    """`state[name][index]`: where a tensor from disk belongs in memory."""

    name: str
    index: tuple[int | slice, ...] = ()


Layout = dict[str, Place]


def layout(state: Mapping[str, Tensor], config: ModelConfig, form: str) -> Layout:
    """Every name on disk with its place in `state` (tensors may be on the meta device), in the order of `state`."""
    rename = {DEEPSEEK: _deepseek_v4, WINDOWS: _windows_v4}.get(form, _transformers_v4)
    names: Layout = {}
    for name, tensor in state.items():
        if form == STACKED:
            names[name] = Place(name)
            continue
        for part, index in _parts(name, tensor):
            names[rename(part) if config.is_v4 else _v3(part, config)] = Place(name, index)
    return names


def copies(config: ModelConfig) -> dict[str, str]:
    """Tensors that DeepSeek-V3 stores a second time, in its prediction block: name on disk -> name in memory."""
    if config.is_v4 or not config.num_nextn_predict_layers:
        return {}
    block = _v3("mtp.0.", config)
    return {
        f"{block}embed_tokens.weight": "model.embed_tokens.weight",
        f"{block}shared_head.head.weight": "lm_head.weight",
    }


def is_prediction(name: str, config: ModelConfig) -> bool:
    """Whether this is the name on disk of a tensor in the multi-token-prediction block."""
    return name.startswith(("mtp.", f"model.layers.{config.num_hidden_layers}."))


def _parts(name: str, tensor: Tensor) -> Iterator[tuple[str, tuple[int | slice, ...]]]:
    """Stacked experts as one tensor an expert and projection; gate rows come first in `gate_up_proj`."""
    if name.endswith(".experts.gate_up_proj"):
        width = tensor.shape[1] // 2
        for expert in range(len(tensor)):
            yield name.replace("gate_up_proj", f"{expert}.gate_proj.weight"), (expert, slice(0, width))
            yield name.replace("gate_up_proj", f"{expert}.up_proj.weight"), (expert, slice(width, 2 * width))
    elif name.endswith(".experts.down_proj"):
        for expert in range(len(tensor)):
            yield name.replace("down_proj", f"{expert}.down_proj.weight"), (expert,)
    else:
        yield name, ()


def _v3(name: str, config: ModelConfig) -> str:
    name = "mtp.0.shared_head.norm.weight" if name == "mtp.0.norm.weight" else name
    return name.replace("mtp.0.", f"model.layers.{config.num_hidden_layers}.")


def _deepseek_v4(name: str) -> str:
    block, rest = BLOCK.fullmatch(name).groups()
    expert = EXPERT.search(rest)
    rest = EXPERT.sub("#", rest)
    return block + V4.get(rest, rest).replace("#", expert[0] if expert else "")


def _transformers_v4(name: str) -> str:
    """As transformers 5 writes them; the prediction block, which it does not know, keeps DeepSeek's names."""
    if not name.startswith("model."):
        return _deepseek_v4(name)
    if not name.startswith("model.layers."):
        return name
    return "model." + _deepseek_v4(name).replace(".attn.kv_norm.", ".attn.norm.")


def _windows_v4(name: str) -> str:
    return _transformers_v4(name).replace(".attn.norm.", ".attn.kv_norm.")
