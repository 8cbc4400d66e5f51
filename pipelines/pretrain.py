"""Pretrain a mixture-of-experts model on the encoded corpus.

    python -m pipelines.pretrain        data/tokens -> data/models/base

A run that was killed continues from its last checkpoint and ends with the same weights, bit for bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil

from model.config import ModelConfig
from model.data import PackedTokens
from model.hf import save_pretrained
from model.size import count_mtp_parameters, count_parameters
from model.transformer import build
from pipelines import stage
from pipelines.params import Pretrain, UserError
from pipelines.tracking import Run
from pipelines.training import fit, speed

TOKENS, BASE, CURVE = Path("data/tokens"), Path("data/models/base"), Path("reports/plots/pretrain.csv")


def pretrain(params: Pretrain, tokens: Path, base: Path, curve: Path, run: Run) -> dict[str, Any]:
    """Train from scratch on the train split of `tokens`; writes the folder `base` and the CSV `curve`."""
    manifest = stage.read_json(tokens / "manifest.json", made_by="encode")
    config = params.architecture().replace(vocab_size=manifest["vocab_size"])
    try:
        rows = PackedTokens(tokens, "train", params.sequence_length, params.seed)
    except ValueError as error:
        raise UserError(f"params.yaml: `pretrain.sequence_length`: {error}.") from None
    require_memory(config)
    net = build(config, params.seed)
    inputs = {"tokens": manifest["key"]}
    names = [name for shard in manifest["splits"]["train"]["shards"] for name in shard["documents"]]
    metrics = fit("pretrain", net, rows, names, params, inputs, curve, run)
    with stage.replacing(base) as fresh:
        save_pretrained(net, fresh, tokenizer=tokens)
    epochs = metrics["tokens"] / manifest["splits"]["train"]["tokens"]
    stage.say(
        f"pretrain   {metrics['parameters'] / 1e6:.1f} M weights ({metrics['active_parameters'] / 1e6:.1f} M active), "
        f"{metrics['tokens']:,} tokens ({epochs:.2f} epochs); loss {metrics['loss_first']:.2f} -> "
        f"{metrics['loss_last']:.2f}, {speed(metrics)}"
    )
    return metrics | {"epochs": epochs}


def require_memory(config: ModelConfig) -> None:
    """Raises `UserError` when the fp32 weights alone are more than this machine's memory."""
    weights = count_parameters(config)[0] + count_mtp_parameters(config)
    needed, there = 4 * weights, psutil.virtual_memory().total
    if needed > there:
        raise UserError(
            f"`pretrain.model` has {weights / 1e9:,.0f} billion weights, {needed / 2**30:,.0f} GiB in fp32, and this "
            f"machine has {there / 2**30:,.0f} GiB of memory; choose smaller sizes."
        )


if __name__ == "__main__":
    stage.main("pretrain", lambda params, run: pretrain(params.pretrain, TOKENS, BASE, CURVE, run))
