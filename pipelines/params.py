"""Every key of params.yaml: one class a stage, checked on load.

An unknown key, a wrong type or an impossible value ends with one sentence that names the key and the fix.
YAML is read as version 1.2 (ruamel), the dialect that DVC reads, so `3e-4` is a number.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML, YAMLError

from model.config import ModelConfig

Schema = TypeVar("Schema", bound=BaseModel)
WRITTEN = 4  # tokens that the server adds to a prompt of the stage agreement


class UserError(Exception):
    """Something a person can mend: the message is one sentence with the fix; commands print it and exit with 2."""

    def _render_traceback_(self) -> list[str]:
        """Notebooks show the sentence, not where it was raised."""
        return [f"UserError: {self}"]


class Section(BaseModel):
    """A frozen section: unknown keys are refused and `"8"` is not a number."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Fetch(Section):
    timeout_s: float = Field(30.0, gt=0, description="seconds without a byte before a download is retried")
    retries: int = Field(5, ge=1, le=20, description="attempts per download, with exponential backoff")
    max_unpacked_mib: int = Field(2048, ge=1, description="an archive that unpacks to more than this is refused")


class Clean(Section):
    heldout_percent: float = Field(2.0, gt=0, lt=50, description="share of documents held out, by document hash")
    min_characters: int = Field(200, ge=1, description="shorter documents are dropped")
    max_characters: int = Field(200_000, ge=1000, description="longer documents are split at a paragraph")


class Contracts(Section):
    max_duplicate_rate: float = Field(0.2, ge=0, le=1, description="share of a source's raw documents that were copies")
    max_control_character_rate: float = Field(1e-4, ge=0, le=1, description="control characters per character")
    max_secret_rate: float = Field(0.1, ge=0, le=1, description="documents with an e-mail address or a key-like string")
    max_overlap_rate: float = Field(0.08, ge=0, le=1, description="held-out documents whose text training knows")
    max_drift: float = Field(0.25, gt=0, description="largest accepted change of a profile figure, as a fraction")
    min_documents: int = Field(50, ge=1, description="fewer documents than this are no corpus")
    min_median_characters: int = Field(100, ge=1, description="shortest ordinary median length of a document")
    max_median_characters: int = Field(50_000, ge=1, description="longest ordinary median length of a document")


class Encode(Section):
    vocab_size: int = Field(4096, ge=300, le=1_000_000, description="tokens, special ones included")
    shard_mib: int = Field(64, ge=1, description="size of one .bin shard")


class Training(Section):
    """What pretraining and fine-tuning share."""

    steps: int = Field(ge=1, le=10**8, description="optimiser steps")
    batch_tokens: int = Field(ge=8, le=10**8, description="tokens a step")
    sequence_length: int = Field(
        ge=8, le=10**7, description="tokens a row; documents are packed, attention stays inside"
    )
    learning_rate: float = Field(gt=0, le=1, description="peak learning rate")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")
    weight_decay: float = Field(0.1, ge=0, le=1)
    clip_norm: float = Field(1.0, gt=0, description="global gradient norm is clipped to this")
    optimizer: Literal["adamw", "muon"] = Field("adamw", description="muon: for matrices, AdamW for the rest")
    newton_schulz: Literal["deepseek-v4", "polar-express"] = Field(
        "deepseek-v4", description="muon's polynomials: DeepSeek-V4's ten, or five, arXiv 2505.16932, at half the cost"
    )
    micro_batch_tokens: int | None = Field(None, ge=8, description="tokens a forward pass; none: the whole batch")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="bfloat16: autocast over fp32 weights")
    seed: int = Field(0, ge=0, lt=2**63)
    checkpoint_every: int = Field(50, ge=1, description="steps between checkpoints")

    @model_validator(mode="after")
    def _consistent(self) -> Training:
        if self.batch_tokens % self.sequence_length:
            raise ValueError(
                f"`batch_tokens` ({self.batch_tokens}) must be a multiple of `sequence_length` ({self.sequence_length})"
            )
        if (self.micro_batch_tokens or self.sequence_length) % self.sequence_length:
            raise ValueError(
                f"`micro_batch_tokens` ({self.micro_batch_tokens}) must be a multiple of `sequence_length` "
                f"({self.sequence_length})"
            )
        if self.warmup_steps >= self.steps:
            raise ValueError(f"`warmup_steps` ({self.warmup_steps}) must be below `steps` ({self.steps})")
        return self


class Pretrain(Training):
    model: dict[str, Any] = Field(description="`preset` names an architecture; other keys override its fields")
    decay_fraction: float = Field(0.4, ge=0, le=1, description="last share of the steps, over which the rate decays")
    decay: Literal["linear", "cosine"] = Field("linear", description="shape of that decay")
    final_fraction: float = Field(0.0, ge=0, le=1, description="share of the peak rate where the decay ends")
    start_batch_tokens: int | None = Field(None, ge=8, description="batch of the first step; none: no ramp")
    batch_ramp_steps: int = Field(0, ge=0, description="steps over which the batch grows to `batch_tokens`")
    balance_speed: float = Field(1e-3, ge=0, description="router bias step, DeepSeek-V3 section 2.1.2")
    balance_weight: float = Field(
        1e-4,
        ge=0,
        description="weight of the sequence-wise balance loss; DeepSeek's suits batches of millions of tokens, which "
        "the bias alone balances; batches of a few thousand need about 1",
    )
    mtp_weights: list[float] = Field(
        default_factory=lambda: [0.3, 0.1],
        min_length=2,
        max_length=2,
        description="weight of the multi-token prediction loss before and during the decay of the rate",
    )
    indexer_weight: float = Field(1.0, ge=0, description="weight of the indexer's loss, V4")
    dense_attention_steps: int = Field(0, ge=0, description="first steps, in which sparse layers see every entry, V4")

    @model_validator(mode="after")
    def _architecture_is_possible(self) -> Pretrain:
        config = self.architecture()
        start = self.start_batch_tokens or self.batch_tokens
        if start % self.sequence_length or start > self.batch_tokens:
            raise ValueError(
                f"`start_batch_tokens` ({start}) must be a multiple of `sequence_length` ({self.sequence_length}), and "
                f"not above `batch_tokens` ({self.batch_tokens})"
            )
        if self.sequence_length > config.max_position_embeddings:
            raise ValueError(
                f"`sequence_length` ({self.sequence_length}) must not exceed the model's max_position_embeddings "
                f"({config.max_position_embeddings})"
            )
        return self

    def architecture(self) -> ModelConfig:
        """The preset with its overrides; `vocab_size` is still the preset's. Raises `ValueError`."""
        overrides = dict(self.model)
        if "vocab_size" in overrides:
            raise ValueError("`model.vocab_size` is the tokenizer's; set `encode.vocab_size` instead")
        return ModelConfig.preset(overrides.pop("preset", None)).replace(**overrides)


class Finetune(Training):
    method: Literal["full", "lora"] = Field("full", description="lora: low-rank updates, merged at the end")
    lora_rank: int = Field(16, ge=1)
    lora_alpha: float = Field(32.0, gt=0)
    languages: list[str] = Field(default_factory=lambda: ["en"], description="chat sources' languages to train on")


class Evaluate(Section):
    sequence_length: int = Field(ge=8, description="context in tokens")
    max_bytes: int = Field(1_000_000, ge=1000, description="held-out bytes scored, taken in order of document hash")
    sample_tokens: int = Field(64, ge=1, description="length of each sample generation")
    temperature: float = Field(0.7, ge=0, description="of the samples; 0 is greedy")
    top_p: float = Field(0.9, gt=0, le=1, description="the samples draw from the smallest set with this probability")
    prompts: list[str] = Field(min_length=1, description="the base model continues these")
    questions: list[str] = Field(min_length=1, description="the chat model answers these")


class Export(Section):
    max_logit_difference: float = Field(1e-4, gt=0, description="largest |ours - transformers| in fp32")
    licence: str = Field(
        "other", pattern=r"^[a-z0-9.-]+$", description="of the weights, as the Hugging Face hub names it"
    )


class Limits(Section):
    kl: float = Field(gt=0, description="mean KL divergence in nats from the trained module")
    top1_agreement: float = Field(ge=0, le=1, description="share of positions with the same best token")
    difference: float = Field(gt=0, description="largest difference of a log-probability, in nats")


class Agreement(Section):
    lengths: list[int] = Field(min_length=1, description="tokens of the prompts, in turn")
    documents: int = Field(ge=1, description="held-out documents compared, languages in turn")
    dialogues: int = Field(ge=0, description="held-out dialogues compared, in chat format")
    top_tokens: int = Field(20, ge=1, le=20, description="most likely tokens compared at each position")
    float32: Limits = Field(description="for weights exported in float32")
    bfloat16: Limits = Field(description="for weights exported in bfloat16")

    @model_validator(mode="after")
    def _lengths_are_possible(self) -> Agreement:
        if min(self.lengths) < 2:
            raise ValueError(f"`lengths` must be at least 2, not {min(self.lengths)}: one token is predicted by none")
        return self

    def limits(self, dtype: str) -> Limits:
        """Of weights of that type; raises `UserError` for a type without limits."""
        if dtype not in ("float32", "bfloat16"):
            raise UserError(f"params.yaml: `agreement` has no limits for {dtype}; export in float32 or bfloat16.")
        return getattr(self, dtype)


class Register(Section):
    name: str = Field("shovel-demo", pattern=r"^[A-Za-z0-9][\w.-]*$", description="registered model in MLflow")
    margin_bits_per_byte: float = Field(0.02, ge=0, description="a challenger may be worse than the champion by this")


class Serve(Section):
    port: int = Field(8000, ge=1, le=65535, description="of `shovel serve`")
    max_batch: int = Field(16, ge=1, le=1024, description="requests that are decoded together")
    max_queue: int = Field(64, ge=1, description="requests that wait; one more is answered with 429")
    max_prefixes: int = Field(64, ge=0, description="beginnings of prompts whose caches are kept: a number, not bytes")
    max_new_tokens: int = Field(256, ge=1, description="length of an answer whose request names none")
    max_body_kib: int = Field(1024, ge=1, description="a longer request is answered with 413")
    currency: str = Field("EUR", pattern=r"^[A-Z]{3}$", description="of the prices below, ISO 4217")
    prompt_price: float = Field(0.10, ge=0, description="of a million prompt tokens")
    cached_price: float = Field(0.02, ge=0, description="of a million prompt tokens that were known already")
    completion_price: float = Field(0.40, ge=0, description="of a million new tokens")


class Policy(Section):
    no_nvidia: bool = Field(True, description="no model is promoted whose training loaded an NVIDIA library")
    signed: bool = Field(True, description="no model is promoted whose signature and lineage `shovel verify` refuses")
    comment: bool = Field(False, description="no model is promoted without a comment that says why")


class Params(Section):
    """The whole of params.yaml."""

    fetch: Fetch
    clean: Clean
    contracts: Contracts
    encode: Encode
    pretrain: Pretrain
    finetune: Finetune
    evaluate: Evaluate
    export: Export
    agreement: Agreement
    register_: Register = Field(alias="register")
    serve: Serve
    policy: Policy

    @model_validator(mode="after")
    def _consistent(self) -> Params:
        for key in ("finetune", "evaluate"):
            length = getattr(self, key).sequence_length
            if length > self.pretrain.sequence_length:
                raise ValueError(
                    f"`{key}.sequence_length` ({length}) must not exceed "
                    f"`pretrain.sequence_length` ({self.pretrain.sequence_length})"
                )
        longest, context = max(self.agreement.lengths), self.pretrain.architecture().max_position_embeddings
        if longest + WRITTEN > context:
            raise ValueError(
                f"`agreement.lengths` ({longest}), with {WRITTEN} tokens that the server adds, must not exceed the "
                f"model's max_position_embeddings ({context})"
            )
        return self


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read and check params.yaml; raises `UserError` with one sentence."""
    return checked(Params, read_yaml(path), path)


def read_yaml(path: Path) -> Any:
    """YAML 1.2 as plain dicts and lists; raises `UserError` when the file is absent or not YAML."""
    try:
        return YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; run from the repository's root, or restore it with git.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8.") from None
    except YAMLError as error:
        require_merged(path)
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise UserError(
            f"{path} is not valid YAML{where}: {getattr(error, 'problem', error)}; mend that line."
        ) from None


def require_merged(path: Path) -> None:
    """Raises `UserError` where git left both sides of a merge in a text file."""
    if any(line.startswith("<<<<<<< ") for line in path.read_text(encoding="utf-8").splitlines()):
        raise UserError(
            f"{path} holds both sides of a merge; take one with `git checkout --ours {path}` (or --theirs) "
            f"or mend it by hand, then `shovel run`."
        )


def checked(schema: type[Schema], content: Any, path: Path) -> Schema:
    """Validate `content` against `schema`; the first problem becomes one sentence with key and fix."""
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        worst = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")  # a misspelt key first
        raise UserError(f"{path}: {_sentence(worst, schema)}") from None


def _sentence(problem: dict[str, Any], schema: type[BaseModel]) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    given = repr(problem["input"])
    given = given if len(given) < 60 else given[:57] + "..."
    match problem["type"]:
        case "missing":
            return f"`{key}` is missing; add it."
        case "extra_forbidden":
            return f"`{key}` is not a known key{_suggestion(problem['loc'], schema)}."
        case "model_type" | "model_attributes_type":
            return (
                f"{f'`{key}`' if key else 'the file'} must be a section of keys, not {given}; write `key: value` lines."
            )
        case "value_error":
            return f"{f'`{key}`: ' if key else ''}{problem['ctx']['error']}; change one of them."
        case _:
            message = problem["msg"][0].lower() + problem["msg"][1:]
            return f"`{key}` is {given}, but {message.replace('input should', 'it must')}; correct the value."


def _suggestion(location: tuple[Any, ...], schema: type[BaseModel]) -> str:
    """`; did you mean ...` for a misspelt key, else where the known keys are."""
    for part in location[:-1]:
        inner = getattr(schema.model_fields.get(part), "annotation", None)
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            schema = inner
    names = [field.alias or name for name, field in schema.model_fields.items()]
    close = difflib.get_close_matches(str(location[-1]), names, n=1)
    return f"; did you mean `{close[0]}`" if close else f"; remove it (known keys: {', '.join(names)})"
