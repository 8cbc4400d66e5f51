"""Score a model on held-out text and dialogues, and let it write.

    python -m pipelines.evaluate base   data/models/base -> reports/evaluate-base.json
    python -m pipelines.evaluate chat   data/models/chat -> reports/evaluate-chat.json

Bits per byte compare models of any vocabulary: the nats of a document's tokens, over its UTF-8 bytes, over ln 2. Beside
them stand what xz and a 5-gram byte model need for the same bytes (pipelines/baselines.py).
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tiktoken
import torch
from moe_kernels import device as devices

from model.generate import generate
from model.score import diagnose, score, window_tokens
from model.transformer import MoETransformer
from pipelines import models, stage
from pipelines.bootstrap import interval
from pipelines.corpus import dialogues, heldout
from pipelines.encode import BOS, EOS, load_encoder
from pipelines.finetune import mark_assistant
from pipelines.machine import environment
from pipelines.params import Evaluate, Params
from pipelines.tracking import Run

MODELS, CLEAN, CHAT, REPORTS = Path("data/models"), Path("data/clean"), Path("data/chat"), Path("reports")
DIAGNOSED = 16  # documents that the figures of health are taken on


def evaluate(
    params: Evaluate,
    languages: list[str],
    variant: str,
    folder: Path,
    clean: Path,
    chat: Path,
    reports: Path,
    run: Run | None = None,
) -> dict[str, Any]:
    """Metrics of the model in `folder`; writes two CSVs below `reports`/plots. Raises `UserError`.

    variant: `base` is shown `params.prompts`, `chat` answers `params.questions`. languages: of the dialogues scored.
    """
    devices.prepare()
    environment.require_passport(devices.default())
    if run:
        run.tag(**environment.tags(devices.default()))
    net = models.load(folder, made_by="finetune" if variant == "chat" else "pretrain")
    encoder = load_encoder(folder)
    table = heldout(clean, params.max_bytes)
    ids = [np.array([BOS, *tokens]) for tokens in encoder.encode_ordinary_batch(table["text"].tolist())]
    table["nats"], load_ME = _score_documents(net, ids, params, variant)
    baselines = stage.read_json(reports / "baselines.json", made_by="baselines")
    metrics = {
        "bits_per_byte": bits_per_byte(table),
        "bytes": int(table["bytes"].sum()),
        "ci95": confidence_interval(table),
        "baselines": {name: baselines[name] for name in ("xz", "five_gram")},
        "by_source": _by(table, "source"),
        "by_language": _by(table, "language"),
        **expert_load(load_ME, net.config.first_moe_layer),
        "health": diagnose(net, ids[:DIAGNOSED], params.sequence_length, devices.default()),
        "samples": samples(net, encoder, params, variant),
    }
    metrics |= assistant_perplexity(net, encoder, chat, languages, params.sequence_length)
    _write_plots(metrics, table, reports / "plots", variant)
    perplexity = metrics["assistant_perplexity"]
    answers = f", assistant perplexity {perplexity:.1f}" if metrics["assistant_tokens"] else ""
    stage.say(
        f"evaluate   {variant}: {metrics['bits_per_byte']:.3f} bits per byte held out (xz {baselines['xz']:.3f}, "
        f"5-gram {baselines['five_gram']:.3f}){answers}"
    )
    return metrics


def _score_documents(
    net: MoETransformer, ids: list[np.ndarray], params: Evaluate, variant: str
) -> tuple[list[float], torch.Tensor]:
    with stage.progress(f"evaluate {variant}", window_tokens(ids, params.sequence_length)) as advance:
        nats, load_ME = score(net, ids, params.sequence_length, devices.default(), advance)
    return [float(row.sum()) for row in nats], load_ME


def bits_per_byte(table: pd.DataFrame) -> float:
    """Of a table with the columns nats and bytes."""
    return float(table["nats"].sum() / table["bytes"].sum() / math.log(2))


def confidence_interval(table: pd.DataFrame) -> list[float]:
    """95 % interval of bits per byte, by a bootstrap over documents."""
    return (interval(table["nats"].to_numpy(), table["bytes"].to_numpy()) / math.log(2)).tolist()


def _by(table: pd.DataFrame, column: str) -> dict[str, dict[str, float]]:
    groups = table.groupby(column)
    return {name: {"bits_per_byte": bits_per_byte(group), "bytes": int(group["bytes"].sum())} for name, group in groups}


def expert_load(load_ME: torch.Tensor, first_layer: int) -> dict[str, Any]:
    """Share of the tokens that each expert took, by layer, and the worst layer's largest share over its mean."""
    shares = {f"layer_{n}": (row / row.sum()).tolist() for n, row in enumerate(load_ME.double(), first_layer)}
    worst = max((max(row) * len(row) for row in shares.values()), default=0.0)
    return {"expert_load": shares, "max_load_over_mean": worst}


def assistant_perplexity(
    net: MoETransformer, encoder: tiktoken.Encoding, chat: Path, languages: list[str], sequence_length: int
) -> dict[str, Any]:
    """Perplexity of the assistant's tokens in held-out dialogues, with its 95 % interval over dialogues.

    None where there are no such tokens (`assistant_tokens` is 0): JSON has no NaN.
    """
    table = dialogues(chat, ["messages", "language", "split"])
    table = table[(table["split"] == "heldout") & table["language"].isin(languages)]
    if table.empty:
        return {"assistant_perplexity": None, "assistant_ci95": None, "assistant_tokens": 0}
    marked = [mark_assistant(messages, encoder) for messages in table["messages"]]
    nats, _ = score(net, [ids for ids, _ in marked], sequence_length, devices.default())
    kept = [row[marks[1:]] for row, (_, marks) in zip(nats, marked, strict=True)]
    sums, counts = np.array([row.sum() for row in kept]), np.array([len(row) for row in kept])
    return {
        "assistant_perplexity": float(np.exp(sums.sum() / counts.sum())),
        "assistant_ci95": np.exp(interval(sums, counts)).tolist(),
        "assistant_tokens": int(counts.sum()),
    }


def samples(net: MoETransformer, encoder: tiktoken.Encoding, params: Evaluate, variant: str) -> list[dict[str, str]]:
    """What the model writes: a continuation of each prompt, or an answer to each question."""
    written = []
    for prompt in params.questions if variant == "chat" else params.prompts:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": ""}]
        ids = mark_assistant(turns, encoder)[0][:-1] if variant == "chat" else [BOS, *encoder.encode_ordinary(prompt)]
        start = torch.from_numpy(np.asarray(ids, dtype=np.int64))[None].to(devices.default())
        out = generate(net, start, params.sample_tokens, params.temperature, params.top_p, seed=0, eos_token_id=EOS)
        tokens = [token for token in out[0, start.shape[1] :].tolist() if token != EOS]
        written.append({"prompt": prompt, "text": encoder.decode(tokens)})
    return written


def _write_plots(metrics: dict[str, Any], table: pd.DataFrame, folder: Path, variant: str) -> None:
    """CSVs that `dvc plots` draws; the documents one by one make a paired comparison with another model possible."""
    load = [
        {"layer": layer, "expert": expert, "share": share}
        for layer, shares in metrics["expert_load"].items()
        for expert, share in enumerate(shares)
    ]
    bits = [{"source": source, "bits_per_byte": row["bits_per_byte"]} for source, row in metrics["by_source"].items()]
    documents = table[["sha256", "source", "language", "bytes", "nats"]]
    documents = documents.assign(bits_per_byte=table["nats"] / table["bytes"] / math.log(2))
    for name, rows in (("expert_load", load), ("bits_per_byte", bits), ("documents", documents)):
        with stage.replacing(folder / f"{name}-{variant}.csv") as fresh:
            pd.DataFrame(rows).to_csv(fresh, index=False, float_format="%.6g")


def main(variant: str) -> None:
    """One variant as a stage."""

    def function(params: Params, run: Run) -> dict[str, Any]:
        languages = params.finetune.languages
        return evaluate(params.evaluate, languages, variant, MODELS / variant, CLEAN, CHAT, REPORTS, run)

    stage.main("evaluate", function, variant)


if __name__ == "__main__":
    main(sys.argv[1])
