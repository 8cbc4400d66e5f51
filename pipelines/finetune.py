"""Fine-tune the base model on dialogues; only the assistant's tokens count.

    python -m pipelines.finetune        data/models/base + data/chat -> data/models/chat

`method: lora` trains low-rank updates and merges them at the end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tiktoken

from model.data import PackedDialogues
from model.hf import save_pretrained
from model.lora import add_lora, merge_lora
from pipelines import models, stage
from pipelines.corpus import dialogues
from pipelines.encode import ASSISTANT, BOS, EOS, USER, load_encoder
from pipelines.params import Finetune, UserError
from pipelines.tracking import Run
from pipelines.training import fit

BASE, CHAT, TUNED = Path("data/models/base"), Path("data/chat"), Path("data/models/chat")
CURVE = Path("reports/plots/finetune.csv")


def finetune(params: Finetune, base: Path, chat: Path, tuned: Path, curve: Path, run: Run) -> dict[str, Any]:
    """Train `base` on the train split of the dialogues; writes the folder `tuned` and the CSV `curve`."""
    net = models.load(base, made_by="pretrain")
    encoder = load_encoder(base)
    talk = training_dialogues(params, chat)
    marked = [mark_assistant(messages, encoder) for messages in talk["messages"]]
    rows = PackedDialogues(marked, params.sequence_length, params.seed)
    if params.method == "lora":
        add_lora(net, params.lora_rank, params.lora_alpha, params.seed)
    inputs = {"base": _digest(base / "model.safetensors"), "chat": _digest(chat / "dialogues.parquet")}
    names = [f"{source}/{path}" for source, path in zip(talk["source"], talk["path"], strict=True)]
    metrics = fit("finetune", net, rows, names, params, inputs, curve, run)
    merge_lora(net)
    with stage.replacing(tuned) as fresh:
        save_pretrained(net, fresh, tokenizer=base)
    stage.say(
        f"finetune   {len(marked):,} dialogues, {metrics['steps']} steps ({params.method}), "
        f"loss {metrics['loss_first']:.2f} -> {metrics['loss_last']:.2f}"
    )
    return metrics | {"dialogues": len(marked)}


def training_dialogues(params: Finetune, chat: Path) -> pd.DataFrame:
    """messages, source and path of the train split in `params.languages`; raises `UserError` when there are none."""
    table = dialogues(chat, ["messages", "source", "path", "language", "split"])
    train = table[table["split"] == "train"]
    chosen = train[train["language"].isin(params.languages)]
    if train.empty:
        raise UserError("there are no dialogues to train on; add a source with `use: chat` to data/sources.yaml.")
    if chosen.empty:
        raise UserError(
            f"params.yaml: `finetune.languages` {params.languages} has no dialogues; "
            f"choose among {', '.join(sorted(train['language'].unique()))}."
        )
    return chosen


def mark_assistant(messages: Iterable[Mapping[str, str]], encoder: tiktoken.Encoding) -> tuple[np.ndarray, np.ndarray]:
    """(token ids [n], True where the assistant wrote the token, its end token included [n])."""
    ids, marks = [BOS], [False]
    for message in messages:
        assistant = message["role"] == "assistant"
        body = encoder.encode_ordinary(message["content"])
        body += [EOS] if assistant else []
        ids += [ASSISTANT if assistant else USER, *body]
        marks += [False, *[assistant] * len(body)]
    return np.array(ids), np.array(marks)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    stage.main("finetune", lambda params, run: finetune(params.finetune, BASE, CHAT, TUNED, CURVE, run))
