"""A model folder that a stage wrote: loading it, with a sentence that helps when it is damaged, and describing it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import model
from model.config import ModelConfig
from model.size import count_parameters
from pipelines.params import UserError

if TYPE_CHECKING:
    from model import MoETransformer


def load(folder: Path, made_by: str) -> MoETransformer:
    """The model in `folder`; raises `UserError` that names the stage which makes it."""
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} is missing; `dvc repro {made_by}` makes it, `dvc pull` fetches it.")
    try:
        return model.load_pretrained(folder)  # imports PyTorch, which `describe` does without
    except ValueError as error:
        raise UserError(f"{error}; `dvc checkout {folder}` brings it back.") from None


def describe(config: ModelConfig) -> dict[str, Any]:
    """Family, parameters and kinds of attention, for pages."""
    total, active = count_parameters(config)
    kinds = Counter(config.layer_types) if config.is_v4 else {"latent attention": config.num_hidden_layers}
    attention = ", ".join(f"{kind.replace('_', ' ')} ({count})" for kind, count in kinds.items())
    family = "DeepSeek-V4" if config.is_v4 else "DeepSeek-V3"
    return {"config": config, "total": total, "active": active, "family": family, "attention": attention}
