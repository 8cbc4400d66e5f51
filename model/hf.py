"""To and from folders in Hugging Face layout: config.json, model*.safetensors, tokenizer files.

In memory the experts of a layer are stacked, on disk each expert has its own tensors, as transformers writes them.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from model.config import ModelConfig
from model.transformer import MoETransformer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")


def save_pretrained(net: nn.Module, path: Path | str, tokenizer: Path | str | None = None) -> None:
    """Write `net` so that transformers 5.23 loads it. tokenizer: a folder whose tokenizer files are copied along."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(net.config.to_dict(), indent=2, sort_keys=True) + "\n")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _to_disk(net.state_dict())}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    for name in TOKENIZER_FILES if tokenizer else ():
        shutil.copyfile(Path(str(tokenizer)) / name, folder / name)


def load_pretrained(path: Path | str) -> MoETransformer:
    """The model of a folder written by `save_pretrained` or by transformers, fp32, in evaluation mode, on the CPU.

    Raises `ValueError` in one sentence when the folder is incomplete, of another architecture, or when tensors are
    missing, surplus or misshaped; the model is never half loaded.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json; give a folder in Hugging Face layout")
    config = ModelConfig.from_dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    with torch.device("meta"):
        net = MoETransformer(config)
    wanted = {name: tensor.shape for name, tensor in net.state_dict().items()}
    state = _from_disk(_read(folder), config.n_routed_experts)
    problems = [f"missing {name}" for name in wanted.keys() - state.keys()]
    problems += [f"surplus {name}" for name in state.keys() - wanted.keys()]
    problems += [
        f"{n} is {list(state[n].shape)}, not {list(s)}" for n, s in wanted.items() if n in state and state[n].shape != s
    ]
    if problems:
        raise ValueError(f"{folder} does not fit its config.json: {'; '.join(sorted(problems)[:20])}")
    net.load_state_dict(state, assign=True)
    return net.requires_grad_(True).eval()


def _read(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no model*.safetensors; the export is incomplete")
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as content:
                tensors |= {name: content.get_tensor(name).float() for name in content.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}); restore it, for example with `dvc checkout`") from None
    return tensors


def _to_disk(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Stacked experts -> one tensor an expert and projection."""
    for name, tensor in state.items():
        if name.endswith("experts.gate_up_proj"):
            for expert, (gate, up) in enumerate(half.chunk(2) for half in tensor):
                yield name.replace("gate_up_proj", f"{expert}.gate_proj.weight"), gate
                yield name.replace("gate_up_proj", f"{expert}.up_proj.weight"), up
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(tensor):
                yield name.replace("down_proj", f"{expert}.down_proj.weight"), down
        else:
            yield name, tensor


def _from_disk(tensors: dict[str, Tensor], num_experts: int) -> dict[str, Tensor]:
    """One tensor an expert and projection -> stacked experts; incomplete stacks stay apart and show as surplus."""
    state = {name: tensor for name, tensor in tensors.items() if not EXPERT.fullmatch(name)}
    found: dict[str, dict[tuple[str, int], Tensor]] = {}
    for name, tensor in tensors.items():
        if match := EXPERT.fullmatch(name):
            found.setdefault(match[1], {})[match[3], int(match[2])] = tensor
    for prefix, parts in found.items():
        wanted = [(kind, expert) for kind in ("gate_proj", "up_proj", "down_proj") for expert in range(num_experts)]
        if sorted(parts) != sorted(wanted):
            state |= {f"{prefix}.{expert}.{kind}.weight": tensor for (kind, expert), tensor in parts.items()}
            continue
        gates, ups, downs = (
            [parts[kind, e] for e in range(num_experts)] for kind in ("gate_proj", "up_proj", "down_proj")
        )
        state[f"{prefix}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(gates, ups, strict=True)])
        state[f"{prefix}.down_proj"] = torch.stack(downs)
    return state
