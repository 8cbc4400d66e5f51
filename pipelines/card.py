"""The model card of an exported folder: README.md as Hugging Face has it, with licences, data, languages and metrics.

`export` writes it into the folder, so it is signed with the weights. It holds what the same data and weights always
give, no times and no dates: the same model has the same digest.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from model.config import ModelConfig
from pipelines import models, stage
from pipelines.corpus import dialogues, documents
from pipelines.pages import TEMPLATES
from pipelines.params import Params

NAME, TEMPLATE = "README.md", TEMPLATES / "card.md.j2"
SPOKEN = 0.01  # share of the text from which on a language is one of the model's
COLUMNS = ["source", "licence", "language", "bytes", "split"]


def write(folder: Path, params: Params, config: ModelConfig, clean: Path, chat: Path, reports: Path) -> None:
    """Write the card of the model `params.register.name` into `folder`; clean, chat: what it was trained on."""
    base, tuned = (stage.read_json(reports / f"evaluate-{name}.json", made_by="evaluate") for name in ("base", "chat"))
    text, talk = documents(clean, COLUMNS), dialogues(chat, COLUMNS)
    talk = talk[talk["language"].isin(params.finetune.languages)]
    trained = pd.concat([text, talk])
    trained = trained[trained["split"] == "train"]
    shares = trained.groupby("language")["bytes"].sum().sort_values(ascending=False) / trained["bytes"].sum()
    card = ModelCard.from_template(
        _front_matter(params, config, trained, shares, tuned),
        template_path=str(TEMPLATE),
        name=params.register_.name,
        model=models.describe(config),
        method=params.finetune.method,
        sources=_sources(trained),
        shares=shares[shares >= SPOKEN].to_dict(),
        others=int((shares < SPOKEN).sum()),
        base=base,
        tuned=tuned,
    )
    card.save(folder / NAME)


def _front_matter(
    params: Params, config: ModelConfig, trained: pd.DataFrame, shares: pd.Series, tuned: dict[str, Any]
) -> ModelCardData:
    """The YAML that the hub reads. Programs are no language there; a country is left out of pt_BR."""
    spoken = [language.split("_")[0] for language in shares[shares >= SPOKEN].index if language != "code"]
    metrics = {"bits_per_byte": tuned["bits_per_byte"], "perplexity": tuned["assistant_perplexity"]}
    known = {name: round(value, 4) for name, value in metrics.items() if value is not None and math.isfinite(value)}
    return ModelCardData(
        model_name=params.register_.name,
        language=list(dict.fromkeys(spoken)) or None,
        license=params.export.licence,
        license_name="not-stated" if params.export.licence == "other" else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["mixture-of-experts", config.model_type, "shovel", *(["code"] if "code" in shares.index else [])],
        datasets=sorted(trained["source"].unique()),
        metrics=list(known),
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type="heldout",
                dataset_name="held-out documents and answers of the same sources",
                metric_type=name,
                metric_value=value,
            )
            for name, value in known.items()
        ],
    )


def _sources(trained: pd.DataFrame) -> list[dict[str, Any]]:
    """One row a source and licence: what was trained on."""
    groups = trained.groupby(["source", "licence"], sort=True)
    return [
        {"name": name, "licence": licence, "documents": len(rows), "bytes": int(rows["bytes"].sum()),
         "languages": rows["language"].nunique()}
        for (name, licence), rows in groups
    ]  # fmt: skip
