"""Architecture of a DeepSeek-style mixture-of-experts transformer, with Hugging Face's field names.

`ModelConfig.preset("demo")` names an architecture; `.replace(num_hidden_layers=2)` varies it; `from_dict` reads the
config.json of transformers or of DeepSeek. `model_type` says which of two families it is: "deepseek_v3"
(arXiv 2412.19437) or "deepseek_v4" (arXiv 2606.19348).
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import dataclass, field
from typing import Any

from model.presets import HEAVY, PRESETS, ROPE_DEFAULT, SLIDING, SPARSE

V3, V4 = "deepseek_v3", "deepseek_v4"
LAYER_TYPES, MLP_LAYER_TYPES = (SLIDING, SPARSE, HEAVY), ("hash_moe", "moe")
RATIOS = {0: SLIDING, 4: SPARSE, 128: HEAVY}  # of DeepSeek's own config.json
ROPE_YARN_KEYS = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
ROPE_TYPES = ("default", "yarn")
ALWAYS = {"attention_bias": False, "hidden_act": "silu", "tie_word_embeddings": False}
FIXED = {  # what a config.json may say of things that are one way here
    V3: ALWAYS | {"rope_interleave": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1},
    V4: ALWAYS | {"scoring_func": "sqrtsoftplus", "topk_method": "noaux_tc"},
}
UNSEEN = {  # what no tensor's shape gives away: a config.json has to say it
    V3: ("n_group", "norm_topk_prob", "num_experts_per_tok", "routed_scaling_factor", "topk_group"),
    V4: ("index_topk", "num_experts_per_tok", "routed_scaling_factor", "sliding_window"),
}
ONLY_V3 = {"intermediate_size", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "n_group"}
ONLY_V3 |= {"topk_group", "first_k_dense_replace"}
ONLY_V4 = {"head_dim", "o_groups", "o_lora_rank", "sliding_window", "layer_types", "compress_rates"}
ONLY_V4 |= {"mlp_layer_types", "index_n_heads", "index_head_dim", "index_topk", "hc_mult", "hc_sinkhorn_iters"}
ONLY_V4 |= {"hc_eps", "swiglu_limit"}


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a DeepSeek-V3 or V4 transformer. Raises `ValueError` for sizes that do not fit together."""

    model_type: str = V4
    vocab_size: int = 4096
    hidden_size: int = 256
    moe_intermediate_size: int = 192  # width of one expert
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    q_lora_rank: int | None = 128  # None (V3 only): queries without a bottleneck
    qk_rope_head_dim: int = 16  # channels with a position
    n_shared_experts: int = 1
    n_routed_experts: int = 16
    num_experts_per_tok: int = 2
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    num_nextn_predict_layers: int = 0  # multi-token prediction blocks (MTP): none or one
    max_position_embeddings: int = 4096
    rope_parameters: dict[str, Any] = field(default_factory=lambda: dict(ROPE_DEFAULT))  # V4: {"main", "compress"}
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    bos_token_id: int = 0
    eos_token_id: int = 1
    pad_token_id: int | None = None
    # DeepSeek-V3 alone
    intermediate_size: int = 768  # width of the dense layers' feed-forward
    kv_lora_rank: int = 64
    qk_nope_head_dim: int = 32
    v_head_dim: int = 48
    n_group: int = 1  # experts are chosen from `topk_group` of `n_group` groups
    topk_group: int = 1
    first_k_dense_replace: int = 1  # leading layers with a dense feed-forward
    # DeepSeek-V4 alone
    head_dim: int = 64  # of a query head, and of the one key that is also the value
    o_groups: int = 2  # groups of heads in the low-rank output projection
    o_lora_rank: int = 64
    sliding_window: int = 64  # raw tokens that every layer sees, the token itself included
    layer_types: list[str] = field(default_factory=list)  # attention of each layer; empty: see `_default_layer_types`
    compress_rates: dict[str, int] = field(default_factory=lambda: {SPARSE: 4, HEAVY: 128})  # tokens an entry
    mlp_layer_types: list[str] = field(default_factory=list)  # hash_moe or moe; empty: the first layer is hash_moe
    index_n_heads: int = 8
    index_head_dim: int = 32
    index_topk: int = 64  # compressed entries that a query of a sparse layer attends to
    hc_mult: int = 4  # residual streams
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    swiglu_limit: float = 10.0

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            default = each.default if each.default_factory is dataclasses.MISSING else each.default_factory()
            _check_type(each.name, getattr(self, each.name), default, "None" in str(each.type))
        _require(
            self.model_type in (V3, V4),
            f"model_type is {self.model_type!r}; choose one of {V3!r}, {V4!r}",
        )
        if self.model_type == V4:
            self._fill_in_v4()
        self._check_sizes()
        self._check_v4() if self.model_type == V4 else self._check_v3()

    @property
    def qk_head_dim(self) -> int:
        """Channels of one V3 query or key: those without and those with a position."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def is_v4(self) -> bool:
        """Whether this is the DeepSeek-V4 family."""
        return self.model_type == V4

    @property
    def first_moe_layer(self) -> int:
        """Number of the first layer with experts."""
        return 0 if self.is_v4 else min(self.first_k_dense_replace, self.num_hidden_layers)

    def rope(self, kind: str = "main") -> dict[str, Any]:
        """Rotary parameters; V4 has "main" (layers with a window alone) and "compress" (all others)."""
        return self.rope_parameters[kind] if self.is_v4 else self.rope_parameters

    @classmethod
    def preset(cls, name: str) -> ModelConfig:
        """The architecture of that name; raises `ValueError` listing the known ones."""
        if not isinstance(name, str) or name not in PRESETS:
            raise ValueError(f"no preset is called {name!r}; choose one of {', '.join(PRESETS)}")
        return cls(**PRESETS[name])

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with these fields changed; raises `ValueError` for a field that does not exist or has another type.

        With another number of layers and no types given, the list of types is cut, or goes on as it ended.
        """
        known = {f.name for f in dataclasses.fields(self)}
        for key in changes:
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                raise ValueError(
                    f"{key!r} is not a field of the model{f'; did you mean {close[0]!r}' if close else ''}"
                )
        layers = changes.get("num_hidden_layers", self.num_hidden_layers)
        if changes.get("model_type", self.model_type) == self.model_type == V4 and type(layers) is int and layers > 0:
            types = {"layer_types": _continued(self.layer_types, layers, 2)}
            changes = types | {"mlp_layer_types": _continued(self.mlp_layer_types, layers, 1)} | changes
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> ModelConfig:
        """From a config.json; raises `ValueError` when it describes another architecture."""
        kind = content.get("model_type")
        _require(kind in (V3, V4), f"model_type is {kind!r}; this code reads {V3!r} and {V4!r}")
        try:
            return cls(**cls._fields(kind, content))
        except (TypeError, AttributeError) as error:
            raise ValueError(f"a value has a type that it has in no {kind}: {error}") from None

    @classmethod
    def _fields(cls, kind: str, content: dict[str, Any]) -> dict[str, Any]:
        for key, value in FIXED[kind].items():
            found = content.get(key)
            _require(found in (None, value), f"{key} is {found!r}; this code computes {kind} with {value!r}")
        unsaid = [key for key in UNSEEN[kind] if content.get(key) is None]
        _require(not unsaid, f"config.json does not say {', '.join(unsaid)}, on which {kind}'s results depend; add it")
        known = {f.name for f in dataclasses.fields(cls)} - (ONLY_V4 if kind == V3 else ONLY_V3 - {"qk_rope_head_dim"})
        fields = {key: value for key, value in content.items() if key in known and (value is not None or "lora" in key)}
        if "n_shared_experts" in content:
            fields["n_shared_experts"] = content["n_shared_experts"] or 0
        fields["rope_parameters"] = _rope_v4(content) if kind == V4 else _rope_v3(content)
        return fields | (_fields_v4(content) if kind == V4 else {})

    def to_dict(self) -> dict[str, Any]:
        """The config.json that transformers' DeepseekV3Config or DeepseekV4Config reads."""
        fields = {k: v for k, v in dataclasses.asdict(self).items() if k not in (ONLY_V3 if self.is_v4 else ONLY_V4)}
        shared = {"dtype": "float32"} | ALWAYS
        if not self.is_v4:
            own = {"architectures": ["DeepseekV3ForCausalLM"], "rope_interleave": True}
            return shared | fields | own | {"num_key_value_heads": self.num_attention_heads}
        part = self.qk_rope_head_dim / self.head_dim
        part = part if int(self.head_dim * part) == self.qk_rope_head_dim else math.nextafter(part, 1)
        rope = {
            name: rope | {"partial_rotary_factor": part} | ({} if rope["rope_type"] == "default" else _PLAIN_YARN)
            for name, rope in self.rope_parameters.items()
        }
        own = {"architectures": ["DeepseekV4ForCausalLM"], "num_key_value_heads": 1, "scoring_func": "sqrtsoftplus"}
        return shared | fields | own | {"partial_rotary_factor": part, "rope_parameters": rope}

    def _fill_in_v4(self) -> None:
        """Types of the layers, and rotary parameters of both kinds, where they were left out."""
        fill = {
            "layer_types": self.layer_types or _default_layer_types(self.num_hidden_layers),
            "mlp_layer_types": self.mlp_layer_types or _continued(["hash_moe", "moe"], self.num_hidden_layers, 1),
        }
        if "main" not in self.rope_parameters:
            fill["rope_parameters"] = {"main": self.rope_parameters, "compress": self.rope_parameters}
        for name, value in fill.items():
            object.__setattr__(self, name, value)

    def _check_sizes(self) -> None:
        least = {"vocab_size": 1, "hidden_size": 1, "num_hidden_layers": 1, "num_attention_heads": 1}
        least |= {"n_routed_experts": 1, "n_shared_experts": 1, "moe_intermediate_size": 1, "qk_rope_head_dim": 2}
        least |= {"max_position_embeddings": 1, "q_lora_rank": 1}
        if not self.is_v4:
            least |= {"kv_lora_rank": 1, "v_head_dim": 1, "intermediate_size": 1, "first_k_dense_replace": 0}
            least |= {"qk_nope_head_dim": 0}
        for name, minimum in least.items():
            size = getattr(self, name)
            _require(size is None or size >= minimum, f"{name} is {size}; it must be at least {minimum}")
        for name in (
            "rms_norm_eps",
            "routed_scaling_factor",
            "initializer_range",
            *(("hc_eps",) if self.is_v4 else ()),
        ):
            number = getattr(self, name)
            _require(0 < number < 1e4, f"{name} is {number}; it must be above 0 and below 10,000")
        _require(
            1 <= self.num_experts_per_tok <= self.n_routed_experts,
            f"num_experts_per_tok ({self.num_experts_per_tok}) must lie between 1 and n_routed_experts "
            f"({self.n_routed_experts})",
        )
        _require(self.qk_rope_head_dim % 2 == 0, f"qk_rope_head_dim ({self.qk_rope_head_dim}) must be even")
        _require(
            self.num_nextn_predict_layers in (0, 1),
            f"num_nextn_predict_layers is {self.num_nextn_predict_layers}; it must be 0 or 1",
        )
        for kind in ("main", "compress") if self.is_v4 else ():
            rope = self.rope_parameters.get(kind)
            _require(
                isinstance(rope, dict), f"rope_parameters[{kind!r}] is {rope!r}; name its rope_type and rope_theta"
            )
        for rope in self.rope_parameters.values() if self.is_v4 else (self.rope_parameters,):
            _check_rope(rope)

    def _check_v3(self) -> None:
        top_k, groups = self.num_experts_per_tok, self.n_group
        reachable = self.n_routed_experts // max(groups, 1) * self.topk_group
        _require(
            groups >= 1 and self.n_routed_experts % groups == 0,
            f"n_routed_experts ({self.n_routed_experts}) must be a multiple of n_group ({groups})",
        )
        _require(
            1 <= self.topk_group <= groups, f"topk_group ({self.topk_group}) must lie between 1 and n_group ({groups})"
        )
        _require(
            top_k <= reachable,
            f"num_experts_per_tok ({top_k}) must not exceed the {reachable} experts that routing can reach "
            f"(n_routed_experts {self.n_routed_experts}, topk_group {self.topk_group} of n_group {groups})",
        )
        _require(
            self.n_routed_experts // groups >= 2,
            f"n_routed_experts ({self.n_routed_experts}) leaves a group one expert; it needs at least two",
        )
        _require(
            self.v_head_dim <= self.qk_head_dim,
            f"v_head_dim ({self.v_head_dim}) must not exceed qk_nope_head_dim + qk_rope_head_dim ({self.qk_head_dim})",
        )

    def _check_v4(self) -> None:
        for name, allowed in (("layer_types", LAYER_TYPES), ("mlp_layer_types", MLP_LAYER_TYPES)):
            types = getattr(self, name)
            unknown = [kind for kind in types if kind not in allowed]
            _require(not unknown, f"{name} holds {', '.join(map(repr, unknown))}; choose among {', '.join(allowed)}")
            _require(
                len(types) == self.num_hidden_layers,
                f"{name} has {len(types)} entries for num_hidden_layers {self.num_hidden_layers}; give one a layer",
            )
        for kind in (SPARSE, HEAVY):
            rate = self.compress_rates.get(kind)
            _require(type(rate) is int and rate >= 1, f"compress_rates[{kind!r}] is {rate!r}; it must be at least 1")
        for name in ("sliding_window", "o_lora_rank", "index_n_heads", "index_head_dim", "index_topk", "hc_mult"):
            _require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")
        _require(self.hc_sinkhorn_iters >= 1, f"hc_sinkhorn_iters is {self.hc_sinkhorn_iters}; it must be at least 1")
        _require(self.n_shared_experts == 1, f"n_shared_experts is {self.n_shared_experts}; DeepSeek-V4 has one")
        _require(self.q_lora_rank is not None, "q_lora_rank is None; DeepSeek-V4 needs a number")
        _require(self.norm_topk_prob, "norm_topk_prob is False; DeepSeek-V4 normalises the weights of the experts")
        _require(
            self.o_groups >= 1 and self.num_attention_heads % self.o_groups == 0,
            f"num_attention_heads ({self.num_attention_heads}) must be a multiple of o_groups ({self.o_groups})",
        )
        for name in ("head_dim", "index_head_dim"):
            _require(
                getattr(self, name) >= self.qk_rope_head_dim,
                f"{name} ({getattr(self, name)}) must not be below qk_rope_head_dim ({self.qk_rope_head_dim})",
            )
        _require(self.swiglu_limit > 0, f"swiglu_limit is {self.swiglu_limit}; it must be above 0")


_PLAIN_YARN = {"attention_factor": 1.0}  # V4 does not scale cosine and sine


def _default_layer_types(layers: int) -> list[str]:
    """As in V4-Flash: two layers with a window alone, then sparse and heavy compression in turn."""
    return _continued([SLIDING, SLIDING, SPARSE, HEAVY], layers, 2)


def _continued(types: list[str], layers: int, period: int) -> list[str]:
    """The first `layers` types; where there are fewer, the last `period` of them go on."""
    tail = types[-period:]
    return [*types, *(tail[n % len(tail)] for n in range(max(layers - len(types), 0)))][:layers]


def _rope_v3(content: dict[str, Any]) -> dict[str, Any]:
    rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
    for key, value in (("attention_factor", None), ("truncate", True)):
        found = rope.get(key)
        _require(found in (None, value), f"{key} is {found!r}; this code computes {V3} with {value!r}")
    theta = rope.get("rope_theta", content.get("rope_theta", 10000.0))
    return _rope(rope, theta)


def _rope_v4(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Both kinds, from transformers' nested form or from DeepSeek's rope_scaling with two thetas."""
    nested = content.get("rope_parameters") or {}
    if "main" not in nested:
        scaling = nested or content.get("rope_scaling") or {}
        nested = {"main": {"rope_theta": content.get("rope_theta", 1e4)}}
        nested["compress"] = scaling | {"rope_theta": content.get("compress_rope_theta", 1.6e5)}
        nested["compress"].setdefault("attention_factor", 1.0)
    parts = {rope.get("partial_rotary_factor") for rope in nested.values()}
    _require(len(parts) == 1, f"partial_rotary_factor differs from layer to layer ({parts}); DeepSeek-V4 has one")
    for name, rope in nested.items():
        factor = rope.get("attention_factor") if rope.get("rope_type") == "yarn" else 1.0
        _require(
            factor == 1.0,
            f"attention_factor of {name!r} is {factor}; DeepSeek-V4 does not scale rotations, so it has to be 1.0",
        )
    return {name: _rope(rope, rope.get("rope_theta", 1e4)) for name, rope in nested.items()}


def _rope(rope: dict[str, Any], theta: float) -> dict[str, Any]:
    kind = rope.get("rope_type", rope.get("type", "default"))
    kept = {key: rope[key] for key in ROPE_YARN_KEYS if key in rope} if kind == "yarn" else {}
    return {"rope_type": kind, "rope_theta": theta} | kept


def _check_rope(rope: dict[str, Any]) -> None:
    kind = rope.get("rope_type")
    _require(kind in ROPE_TYPES, f"rope_type is {kind!r}; choose one of {', '.join(map(repr, ROPE_TYPES))}")
    needed = ("rope_theta", *(("factor", "original_max_position_embeddings") if kind == "yarn" else ()))
    missing = [key for key in needed if key not in rope]
    _require(not missing, f"rope_parameters lack {', '.join(missing)}; add them")
    for key in ("rope_theta", *ROPE_YARN_KEYS):
        number = rope.get(key, 1)
        _require(
            isinstance(number, (int, float)) and not isinstance(number, bool) and 0 < number < math.inf,
            f"{key} of rope_parameters is {number!r}; it must be a number above 0",
        )
    _require(rope["rope_theta"] > 1, f"rope_theta is {rope['rope_theta']}; it must be above 1")


def _fields_v4(content: dict[str, Any]) -> dict[str, Any]:
    """What DeepSeek's own config.json says in other words, and channels with a position from transformers' fraction."""
    layers, found = content.get("num_hidden_layers", 43), {}
    if content.get("qk_rope_head_dim") is None:
        found["qk_rope_head_dim"] = int(content.get("head_dim", 512) * content.get("partial_rotary_factor", 0.125))
    if content.get("layer_types") is None and "compress_ratios" in content:
        ratios = content["compress_ratios"][:layers]
        unknown = sorted(set(ratios) - set(RATIOS))
        _require(not unknown, f"compress_ratios holds {unknown}; known are 0, 4 and 128: give layer_types instead")
        found["layer_types"] = [RATIOS[ratio] for ratio in ratios]
    if content.get("mlp_layer_types") is None and "num_hash_layers" in content:
        hashed = min(content["num_hash_layers"], layers)
        found["mlp_layer_types"] = ["hash_moe"] * hashed + ["moe"] * (layers - hashed)
    return found


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_type(key: str, value: Any, example: Any, optional: bool) -> None:
    if value is None and optional:
        return
    kinds = (int, float) if isinstance(example, float) else (int if example is None else type(example),)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise ValueError(f"{key} is {value!r}; it must be of type {kinds[-1].__name__}")
