"""The peers with our weights: transformers as it is shipped, transformers tuned by hand, torchtitan.

Tuning transformers (the same model, nothing of ours): values padded to the width of keys, so that the CPU's flash
kernel takes them; AdamW fused; `torch.compile`. torchtitan 0.3 needs help to run on a CPU: it imports Triton, which
`_stand_in` pretends to be there, and its language models take FlexAttention, which has no backward pass on a CPU, so
causal scaled_dot_product_attention with padded values stands in. Its experts compute in bfloat16 in float32 runs too.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, DeepseekV3Config, DeepseekV3ForCausalLM, DeepseekV4Config
from transformers import DeepseekV4ForCausalLM as V4Peer

from model import ModelConfig
from model.transformer import MoETransformer


def transformers_model(ours: MoETransformer, flash: bool = False, experts: str = "grouped_mm") -> nn.Module:
    """transformers' model with the weights of `ours`, which must have no multi-token-prediction block."""
    content, attention = ours.config.to_dict(), {"attn_implementation": "padded"} if flash else {}
    if ours.config.is_v4:
        theirs = V4Peer._from_config(DeepseekV4Config(**content), experts_implementation=experts, **attention)
    else:
        described = DeepseekV3Config(**content)
        theirs = DeepseekV3ForCausalLM._from_config(described, experts_implementation=experts, **attention)
    theirs.load_state_dict(ours.state_dict())
    return theirs.to(ours.lm_head.weight.device).train(ours.training)


def padded_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Causal attention of [B, H, S, channels] through the flash kernel, which wants one head size -> [B, S, H, V]."""
    width = value.shape[-1]
    padded = F.pad(value, (0, query.shape[-1] - width))
    out = F.scaled_dot_product_attention(query, key, padded, is_causal=True, scale=scaling)
    return out[..., :width].transpose(1, 2).contiguous(), None


AttentionInterface.register("padded", padded_attention)


def has_torchtitan() -> bool:
    """Whether torchtitan is installed here."""
    return find_spec("torchtitan") is not None


def torchtitan_model(ours: MoETransformer) -> nn.Module:
    """torchtitan's DeepSeek-V3 with the weights of `ours`."""
    with _stand_in("triton", "triton.language"):
        from torchtitan.models import deepseek_v3 as titan

    c = ours.config
    layers = titan._build_dsv3_layers(**_titan_sizes(c), rope=_titan_rope(c))
    for layer in layers:
        layer.attention.inner_attention = _padded_inner_attention()
    config = titan.DeepSeekV3Model.Config(
        vocab_size=c.vocab_size,
        dim=c.hidden_size,
        tok_embeddings=titan.Embedding.Config(num_embeddings=c.vocab_size, embedding_dim=c.hidden_size),
        norm=titan.RMSNorm.Config(normalized_shape=c.hidden_size, eps=c.rms_norm_eps),
        lm_head=titan.Linear.Config(in_features=c.hidden_size, out_features=c.vocab_size),
        layers=layers,
        mtp_layers=[],
    )
    net = config.build()
    absent, surplus = net.load_state_dict(_titan_state(ours, config), strict=False)
    assert not surplus and not {name for name, _ in net.named_parameters()} & set(absent)
    for module in net.modules():
        if isinstance(module, nn.RMSNorm):
            module.eps = c.rms_norm_eps
    return net.to(ours.lm_head.weight.device).train(ours.training)


def _titan_sizes(c: ModelConfig) -> dict[str, Any]:
    return {
        "n_layers": c.num_hidden_layers,
        "n_dense_layers": c.first_k_dense_replace,
        "dim": c.hidden_size,
        "n_heads": c.num_attention_heads,
        "q_lora_rank": c.q_lora_rank or 0,
        "kv_lora_rank": c.kv_lora_rank,
        "qk_nope_head_dim": c.qk_nope_head_dim,
        "qk_rope_head_dim": c.qk_rope_head_dim,
        "v_head_dim": c.v_head_dim,
        "mscale": 1.0,
        "dense_hidden_dim": c.intermediate_size,
        "moe_hidden_dim": c.moe_intermediate_size,
        "num_experts": c.n_routed_experts,
        "num_shared_experts": c.n_shared_experts,
        "router_top_k": c.num_experts_per_tok,
        "router_score_func": "sigmoid",
        "router_route_scale": c.routed_scaling_factor,
        "router_route_norm": c.norm_topk_prob,
        "attn_backend": "flex",
        "moe_comm_backend": "standard",
        "non_blocking_capacity_factor": None,
    }


def _titan_rope(c: ModelConfig) -> Any:
    from torchtitan.models.common import ComplexRoPE

    return ComplexRoPE.Config(
        dim=c.qk_rope_head_dim, max_seq_len=c.max_position_embeddings, theta=c.rope_parameters["rope_theta"]
    )


def _padded_inner_attention() -> Any:
    """The configuration of an inner attention for torchtitan: causal, [B, S, H, channels] in and out."""
    from torchtitan.models.common.attention import ScaledDotProductAttention

    class Padded(ScaledDotProductAttention):
        @dataclass(kw_only=True, slots=True)
        class Config(ScaledDotProductAttention.Config):
            """Nothing to set."""

        def forward(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, **_: Any) -> Tensor:
            heads_first = (x.transpose(1, 2) for x in (q, k, v))
            return padded_attention(self, *heads_first, None, scale)[0]

    return Padded.Config()


def _titan_state(ours: MoETransformer, config: Any) -> dict[str, Tensor]:
    """The weights of `ours` under torchtitan's names, through its own converter."""
    from torchtitan.models.deepseek_v3.state_dict_adapter import DeepSeekV3StateDictAdapter

    from model.names import TRANSFORMERS, layout

    state = ours.state_dict()
    places = layout(state, ours.config, TRANSFORMERS)
    named = {name: state[place.name][place.index].clone() for name, place in places.items()}
    return DeepSeekV3StateDictAdapter(config, None).from_hf(named)


class _Absent(types.ModuleType):
    """A module of which every attribute is a decorator that changes nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *values, **_: values[0] if values and callable(values[0]) else lambda function: function


@contextmanager
def _stand_in(*names: str) -> Iterator[None]:
    """Inside, modules that are not installed seem to be; nothing of them runs on a CPU. PyTorch looks before that."""
    importlib.import_module("torch._inductor.compile_fx")
    absent = [name for name in names if find_spec(names[0]) is None]
    for name in absent:
        sys.modules[name] = module = _Absent(name)
        module.__spec__, module.__path__ = importlib.machinery.ModuleSpec(name, None, is_package=True), []
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]
