"""To and from model folders: config.json, model*.safetensors, tokenizer files.

`load_pretrained` reads what transformers 5 wrote and what DeepSeek published, `save_pretrained` writes either form.
Names are in `model/names.py`, files in `model/shards.py`, FP8 and FP4 in `model/quantization.py`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from model.config import ModelConfig
from model.names import DEEPSEEK, FORMS, TRANSFORMERS, Place, copies, is_prediction, layout
from model.quantization import FORMATS, SCALE_ENDINGS, SCALE_TYPES
from model.shards import Stored, find_tensors, open_shard, read_json, refuse, write_shards
from model.transformer import MoETransformer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
FLOATS, INTEGERS = ("F32", "BF16", "F16"), ("I64", "I32")
ROTARY = "rotary_emb.inv_freq"  # in old folders; follows from config.json


@dataclass(frozen=True)
class Source:
    """A tensor on disk, its place in memory, and the name of its scales if it is quantised."""

    name: str
    place: Place
    scales: str | None


def save_pretrained(
    net: nn.Module,
    path: Path | str,
    tokenizer: Path | str | None = None,
    format: str = TRANSFORMERS,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write `net` so that transformers 5.23 loads it.

    tokenizer: a folder whose tokenizer files are copied along. format: "transformers" names tensors as its own
    `save_pretrained` does, "deepseek" as DeepSeek does. One file, or shards of at most `max_shard_bytes` and an index.
    Raises `ValueError` for another format or a tokenizer that does not fit.
    """
    if format not in (TRANSFORMERS, DEEPSEEK):
        raise ValueError(f"format is {format!r}; choose {TRANSFORMERS!r} or {DEEPSEEK!r}")
    if tokenizer:
        check_tokenizer(Path(tokenizer), net.config)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    content = net.config.to_dict() | {"dtype": str(next(net.parameters()).dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    write_state(net.state_dict(), folder, net.config, format, max_shard_bytes)
    for name in TOKENIZER_FILES if tokenizer else ():
        shutil.copyfile(Path(tokenizer) / name, folder / name)


def load_pretrained(path: Path | str) -> MoETransformer:
    """The model of a folder that `save_pretrained`, transformers or DeepSeek wrote: fp32, on the CPU, for evaluation.

    FP8 and FP4 weights are dequantised. A config.json that announces a multi-token-prediction block which the folder
    does not hold, as transformers writes it, gives a model without one. Raises `ValueError` in one sentence when the
    folder is incomplete, of another architecture, or when tensors are missing, surplus or misshaped; the model is never
    half loaded.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json; give a folder in Hugging Face layout")
    config = ModelConfig.from_dict(read_json(folder / "config.json"))
    stored = find_tensors(folder)
    if not any(is_prediction(name, config) for name in stored):
        config = config.replace(num_nextn_predict_layers=0)
    with torch.device("meta"):
        net = MoETransformer(config)
    state = read_state(net.state_dict(), folder, config, stored)
    net.load_state_dict(state, assign=True)
    return net.requires_grad_(True).eval()


def check_tokenizer(folder: Path, config: ModelConfig) -> None:
    """Raises `ValueError` when `folder` lacks tokenizer files or its token ids do not fit the model's vocabulary.

    A vocabulary larger than the tokenizer's is allowed: DeepSeek's models round theirs up.
    """
    absent = [name for name in TOKENIZER_FILES if not (folder / name).is_file()]
    if absent:
        raise ValueError(f"{folder} lacks {' and '.join(absent)}; give the folder of the model's tokenizer")
    read_json(folder / "tokenizer.json")
    ids = set(Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab(with_added_tokens=True).values())
    if max(ids, default=0) >= config.vocab_size:
        raise ValueError(
            f"{folder / 'tokenizer.json'} has token ids up to {max(ids)}, the model a vocabulary of "
            f"{config.vocab_size}; use the tokenizer that the model was trained with"
        )
    special = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    unknown = [f"{name} ({value})" for name, value in special.items() if value is not None and value not in ids]
    if unknown:
        raise ValueError(
            f"{folder / 'tokenizer.json'} has no token for the model's {', '.join(unknown)}; "
            "use the tokenizer that the model was trained with"
        )


def write_state(
    state: Mapping[str, Tensor], folder: Path, config: ModelConfig, format: str, max_shard_bytes: int
) -> None:
    """Write tensors with names as in memory under the names of `format`."""
    places = layout(state, config, format)
    tensors = {name: state[place.name][place.index] for name, place in places.items()}
    if format == DEEPSEEK:
        tensors |= {name: state[own].clone() for name, own in copies(config).items()}
    write_shards(tensors, folder, max_shard_bytes)


def read_state(
    wanted: Mapping[str, Tensor], folder: Path, config: ModelConfig, stored: dict[str, Stored]
) -> dict[str, Tensor]:
    """Tensors with the names, shapes and types of `wanted` (which may be on the meta device), read one at a time.

    Besides the result, memory holds one tensor and what the operating system maps of one shard.
    """
    sources = _plan(wanted, folder, config, stored)
    state = {name: torch.empty(like.shape, dtype=like.dtype) for name, like in wanted.items()}
    by_file: dict[Path, list[Source]] = {}
    for source in sources:
        by_file.setdefault(stored[source.name].file, []).append(source)
    for file, inside in sorted(by_file.items()):
        with open_shard(file) as content:
            for source in inside:
                target = state[source.place.name][source.place.index]
                target.copy_(_read(source, content, stored))
    _check_copies(state, folder, config, stored)
    return state


def _plan(wanted: Mapping[str, Tensor], folder: Path, config: ModelConfig, stored: dict[str, Stored]) -> list[Source]:
    """What to read, under the names of whichever form the folder has; raises `ValueError` with all misfits."""
    places = max((layout(wanted, config, form) for form in FORMS), key=lambda names: len(names.keys() & stored.keys()))
    sources = [Source(name, place, _scales(name, stored)) for name, place in places.items() if name in stored]
    used = {source.name for source in sources} | {source.scales for source in sources} | copies(config).keys()
    problems = [f"missing {name}" for name in places if name not in stored]
    problems += [f"surplus {name}" for name in stored if name not in used and not name.endswith(ROTARY)]
    for source in sources:
        problems += _misfits(source, wanted[source.place.name][source.place.index], stored)
    refuse(problems, f"{folder} does not fit its config.json")
    return sources


def _scales(name: str, stored: dict[str, Stored]) -> str | None:
    """Name of the scales of a quantised weight, present or not."""
    if stored[name].dtype not in FORMATS:
        return None
    names = [name.removesuffix("weight") + ending for ending in SCALE_ENDINGS]
    return next((found for found in names if found in stored), names[0])


def _misfits(source: Source, target: Tensor, stored: dict[str, Stored]) -> list[str]:
    """Why a tensor on disk cannot become `target`."""
    name, header = source.name, stored[source.name]
    expected = [(name, list(target.shape), FLOATS if target.is_floating_point() else INTEGERS)]
    if source.scales and target.is_floating_point() and target.ndim == 2:
        values, scales = FORMATS[header.dtype].stored_shapes(target.shape)
        expected = [(name, values, (header.dtype,)), (source.scales, scales, SCALE_TYPES)]
    problems = []
    for part, shape, types in expected:
        if part not in stored:
            problems.append(f"missing {part}, the scales of {name}")
        elif stored[part].dtype not in types:
            problems.append(f"{part} is of type {stored[part].dtype}, not {' or '.join(types)}")
        elif stored[part].shape != shape:
            problems.append(f"{part} is {stored[part].shape}, not {shape}")
    return problems


def _read(source: Source, content: Any, stored: dict[str, Stored]) -> Tensor:
    """The tensor, dequantised; scales may lie in another shard than `content`."""
    values = content.get_tensor(source.name)
    if source.scales is None:
        return values
    at, file = stored[source.name], stored[source.scales].file
    if file == at.file:
        return FORMATS[at.dtype].dequantise(values, content.get_tensor(source.scales))
    with open_shard(file) as other:
        return FORMATS[at.dtype].dequantise(values, other.get_tensor(source.scales))


def _check_copies(state: dict[str, Tensor], folder: Path, config: ModelConfig, stored: dict[str, Stored]) -> None:
    """Tensors that a folder holds twice must be equal."""
    problems = []
    for name, own in copies(config).items():
        if name in stored:
            with open_shard(stored[name].file) as content:
                same = torch.equal(content.get_tensor(name).float(), state[own])
            problems += [] if same else [f"{name} differs from {own}, of which it must be a copy"]
    refuse(problems, f"the weights in {folder} contradict each other")
