"""Safetensors files of a model folder: one model.safetensors, or shards that model.safetensors.index.json lists.

Reading takes names, shapes and types from the headers first, then one tensor at a time; writing holds one shard.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LISTED = 20  # problems that a message names


@dataclass(frozen=True)
class Stored:
    """Header of a tensor on disk; `dtype` as safetensors spells it, for example "BF16"."""

    file: Path
    shape: list[int]
    dtype: str


def find_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor in the folder; raises `ValueError` when files are absent or damaged, or do not match their index."""
    index = _read_index(folder)
    files = sorted({folder / name for name in index.values()} if index else folder.glob("model*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no model*.safetensors; the weights are missing")
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise ValueError(f"{folder} lacks {', '.join(absent[:LISTED])}, which {INDEX} lists; complete the folder")
    found: dict[str, Stored] = {}
    problems = []
    for file in files:
        with open_shard(file) as content:
            for name in content.keys():  # noqa: SIM118
                problems += [f"{name} is in {file.name} and {found[name].file.name}"] if name in found else []
                part = content.get_slice(name)
                found[name] = Stored(file, part.get_shape(), part.get_dtype())
    problems += _disagreements(index, found) if index else []
    refuse(problems, f"the weights in {folder} contradict each other")
    return found


@contextmanager
def open_shard(file: Path) -> Iterator[Any]:
    """The file opened by safetensors; raises `ValueError` when it is damaged."""
    try:
        with safe_open(file, framework="pt") as content:
            yield content
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}); replace it with an intact copy") from None


def refuse(problems: list[str], sentence: str) -> None:
    """Raises one `ValueError` with the first problems and their number, if there are any."""
    if problems:
        more = f" ({len(problems)} in all)" if len(problems) > LISTED else ""
        raise ValueError(f"{sentence}: {'; '.join(problems[:LISTED])}{more}")


def read_json(file: Path) -> Any:
    """Content of a JSON file; raises `ValueError` that names it when it is damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}); replace it with an intact copy") from None


def write_shards(tensors: Mapping[str, Tensor], folder: Path, max_shard_bytes: int) -> None:
    """Write the tensors into one file, or into shards with an index; weights that the folder held are removed."""
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    shards = _divide(tensors, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = folder / (SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors")
        content = {name: tensors[name].detach().cpu().contiguous() for name in names}
        save_file(content, file, metadata={"format": "pt"})
        file.chmod(0o644)
        weight_map |= dict.fromkeys(names, file.name)
    if len(shards) > 1:
        size = sum(tensor.nbytes for tensor in tensors.values())
        content = json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=2, sort_keys=True)
        (folder / INDEX).write_text(content + "\n", encoding="utf-8")
        (folder / INDEX).chmod(0o644)


def _read_index(folder: Path) -> dict[str, str]:
    """Tensor -> shard; empty where there is no index."""
    file = folder / INDEX
    if not file.is_file():
        return {}
    content = read_json(file)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"{file} holds no weight_map from tensors to files; replace it with an intact copy")
    return weight_map


def _disagreements(index: dict[str, str], found: dict[str, Stored]) -> list[str]:
    problems = [f"{name} is in {at.file.name}, not in the index" for name, at in found.items() if name not in index]
    for name, shard in index.items():
        if name not in found or found[name].file.name != shard:
            problems.append(f"{name} is not in {shard}, where the index expects it")
    return problems


def _divide(tensors: Mapping[str, Tensor], max_shard_bytes: int) -> list[list[str]]:
    """Names in order, cut where the next tensor would make a shard too large."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards
