"""Architecture of a DeepSeek-style mixture-of-experts transformer, with Hugging Face's field names.

`ModelConfig.preset("demo")` names an architecture; `.replace(num_hidden_layers=2)` varies it; `from_dict` reads the
config.json that transformers writes. `count_parameters` needs the config alone: nothing is allocated.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from typing import Any

ROPE_DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
ROPE_YARN_KEYS = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a DeepSeek-V3 transformer (arXiv 2412.19437). Raises `ValueError` for sizes that do not fit together."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 768  # width of the dense layers' feed-forward
    moe_intermediate_size: int = 192  # width of one expert
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    q_lora_rank: int | None = 128  # None: queries without a bottleneck
    kv_lora_rank: int = 64
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 16
    v_head_dim: int = 48
    n_shared_experts: int = 1
    n_routed_experts: int = 16
    num_experts_per_tok: int = 2
    n_group: int = 1  # experts are chosen from `topk_group` of `n_group` groups
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    first_k_dense_replace: int = 1  # leading layers with a dense feed-forward
    max_position_embeddings: int = 4096
    rope_parameters: dict[str, Any] = field(default_factory=lambda: dict(ROPE_DEFAULT))
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    bos_token_id: int = 0
    eos_token_id: int = 1
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "n_routed_experts"):
            _require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")
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
            1 <= top_k <= reachable,
            f"num_experts_per_tok ({top_k}) must lie between 1 and the {reachable} experts that routing can reach "
            f"(n_routed_experts {self.n_routed_experts}, topk_group {self.topk_group} of n_group {groups})",
        )
        _require(
            groups == 1 or self.n_routed_experts // groups >= 2, "each group needs at least two experts; lower n_group"
        )
        _require(self.qk_rope_head_dim % 2 == 0, f"qk_rope_head_dim ({self.qk_rope_head_dim}) must be even")
        _require(
            self.v_head_dim <= self.qk_head_dim,
            f"v_head_dim ({self.v_head_dim}) must not exceed qk_nope_head_dim + qk_rope_head_dim ({self.qk_head_dim})",
        )

    @property
    def qk_head_dim(self) -> int:
        """Channels of one query or key: those without and those with a position."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @classmethod
    def preset(cls, name: str) -> ModelConfig:
        """The architecture of that name; raises `ValueError` listing the known ones."""
        if name not in PRESETS:
            raise ValueError(f"no preset is called {name!r}; choose one of {', '.join(PRESETS)}")
        return cls(**PRESETS[name])

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with these fields changed; raises `ValueError` for a field that does not exist or has another type."""
        known = {f.name: f for f in dataclasses.fields(self)}
        for key, value in changes.items():
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                raise ValueError(
                    f"{key!r} is not a field of the model{f'; did you mean {close[0]!r}' if close else ''}"
                )
            _check_type(key, value, getattr(self, key), "None" in str(known[key].type))
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> ModelConfig:
        """From a config.json; raises `ValueError` when it describes another architecture."""
        if content.get("model_type") != "deepseek_v3":
            raise ValueError(f"model_type is {content.get('model_type')!r}; this code reads 'deepseek_v3'")
        known = {f.name for f in dataclasses.fields(cls)}
        fields = {key: value for key, value in content.items() if key in known and (value is not None or "lora" in key)}
        rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
        theta = rope.get("rope_theta", content.get("rope_theta", 10000.0))
        kind = rope.get("rope_type", rope.get("type", "default"))
        kept = {key: rope[key] for key in ROPE_YARN_KEYS if key in rope} if kind == "yarn" else {}
        return cls(**fields | {"rope_parameters": {"rope_type": kind, "rope_theta": theta} | kept})

    def to_dict(self) -> dict[str, Any]:
        """The config.json that transformers' DeepseekV3Config reads."""
        fixed = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "dtype": "float32"}
        shared = {"num_key_value_heads": self.num_attention_heads, "rope_interleave": True, "attention_bias": False}
        tail = {"hidden_act": "silu", "tie_word_embeddings": False, "num_nextn_predict_layers": 0}
        return fixed | dataclasses.asdict(self) | shared | tail


def count_parameters(config: ModelConfig) -> tuple[int, int]:
    """(total, active per token). Active leaves out the embedding look-up and the experts a token does not visit."""
    c, heads = config, config.num_attention_heads
    query_in = c.q_lora_rank or c.hidden_size
    query = query_in * heads * c.qk_head_dim + (c.hidden_size * query_in + query_in if c.q_lora_rank else 0)
    key_value = c.hidden_size * (c.kv_lora_rank + c.qk_rope_head_dim) + c.kv_lora_rank
    key_value += c.kv_lora_rank * heads * (c.qk_nope_head_dim + c.v_head_dim)
    every_layer = query + key_value + heads * c.v_head_dim * c.hidden_size + 2 * c.hidden_size
    dense_layers = min(c.first_k_dense_replace, c.num_hidden_layers)
    moe_layers = c.num_hidden_layers - dense_layers
    expert = 3 * c.hidden_size * c.moe_intermediate_size
    fixed = c.num_hidden_layers * every_layer + dense_layers * 3 * c.hidden_size * c.intermediate_size
    fixed += moe_layers * (c.n_shared_experts * expert + c.n_routed_experts * c.hidden_size) + c.hidden_size
    vocabulary = c.vocab_size * c.hidden_size
    total = fixed + moe_layers * c.n_routed_experts * expert + 2 * vocabulary
    return total, fixed + moe_layers * c.num_experts_per_tok * expert + vocabulary


def flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Training FLOPs of one token, forward and backward: 6 per active parameter plus causal attention."""
    heads = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    return 6 * count_parameters(config)[1] + 6 * config.num_hidden_layers * heads * sequence_length / 2


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_type(key: str, value: Any, example: Any, optional: bool) -> None:
    if value is None and optional:
        return
    kinds = (int, float) if isinstance(example, float) else (int if example is None else type(example),)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise ValueError(f"{key} is {value!r}; it must be of type {kinds[-1].__name__}")


PRESETS: dict[str, dict[str, Any]] = {
    "demo": {},
    "v3-671b": {
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
        "first_k_dense_replace": 3,
        "max_position_embeddings": 163840,
        "rope_parameters": ROPE_DEFAULT
        | {
            "rope_type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "initializer_range": 0.006,
    },
}
