"""Loading a model folder that a stage wrote, with the sentence that helps when it is missing or damaged."""

from __future__ import annotations

from pathlib import Path

from model.hf import load_pretrained
from model.transformer import MoETransformer
from pipelines.params import UserError


def load(folder: Path, made_by: str) -> MoETransformer:
    """The model in `folder`; raises `UserError` that names the stage which makes it."""
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} is missing; `dvc repro {made_by}` makes it, `dvc pull` fetches it.")
    try:
        return load_pretrained(folder)
    except ValueError as error:
        raise UserError(f"{error}; `dvc checkout {folder}` brings it back.") from None
