"""DeepSeek-V4 with Muon against DeepSeek-V3 with AdamW: same data, seed and active parameters, same time to train.

    python kernels/bench/architectures.py --seconds 600 --output reports/v4-against-v3

Run after `make demo` (it reads data/tokens and data/clean). Both train in one process, the one that has used less time
steps next, so that whatever else the machine does slows both. Time is CPU time of all threads on a CPU, wall time
elsewhere; the learning rate follows the share of the time used. Writes OUTPUT.csv, .json and .svg.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from measure import now
from moe_kernels import device as devices
from rich.console import Console
from rich.progress import Progress

from model import ModelConfig, build, count_parameters
from model.data import PackedTokens, batch
from model.optim import adamw, muon
from model.score import score
from model.train import TrainConfig, take_step
from model.transformer import MoETransformer
from pipelines.corpus import heldout
from pipelines.encode import BOS, load_encoder

TOKENS, CLEAN = Path("data/tokens"), Path("data/clean")
PARTS = 10_000  # of the time, as steps of the schedule
STYLE = {"svg.hashsalt": "shovel", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
COLOURS = {"V4, Muon": "#245a8d", "V3, AdamW": "#c0622f"}


@dataclass
class Contender:
    """One of the two, and what it has done so far."""

    name: str
    net: MoETransformer
    optimizer: torch.optim.Optimizer
    config: TrainConfig
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)

    def step(self, rows: PackedTokens, budget: float, device: torch.device) -> None:
        """One optimiser step."""
        count = self.config.batch_tokens // self.config.sequence_length
        data = batch(rows, len(self.curve) * count, count)
        start = now(device)
        part = min(int(self.seconds / budget * PARTS), PARTS - 1)
        record = take_step(self.net, self.optimizer, data, part, self.config, device)
        self.seconds += now(device) - start
        tokens = (len(self.curve) + 1) * self.config.batch_tokens
        self.curve.append({"seconds": self.seconds, "tokens": tokens} | record)


def main() -> None:
    """Train both, score both on held-out text, write what came of it."""
    parser = argparse.ArgumentParser(description="V4 with Muon against V3 with AdamW at equal time.")
    parser.add_argument("--seconds", type=float, default=600.0, help="of training, for each")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--heldout-bytes", type=int, default=400_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("reports/v4-against-v3"))
    arguments = parser.parse_args()
    devices.prepare()
    device = devices.default()
    rows = PackedTokens(TOKENS, "train", 512, arguments.seed)
    contenders = _contenders(arguments, device)
    with Progress(console=Console(stderr=True)) as bars:
        task = bars.add_task("training both", total=2 * arguments.seconds)
        while (last := min(contenders, key=lambda c: c.seconds)).seconds < arguments.seconds:
            last.step(rows, arguments.seconds, device)
            losses = "  ".join(f"{c.name}: {c.curve[-1]['loss']:.3f}" for c in contenders if c.curve)
            bars.update(task, completed=sum(c.seconds for c in contenders), description=losses)
    found = [_summary(contender, arguments.heldout_bytes, device) for contender in contenders]
    _write(contenders, found, arguments, devices.name(device))


def _contenders(arguments: argparse.Namespace, device: torch.device) -> list[Contender]:
    """V3's dense layer is as wide as makes active parameters equal."""
    vocabulary = json.loads((TOKENS / "manifest.json").read_text())["vocab_size"]
    v4, v3 = (ModelConfig.preset(name).replace(vocab_size=vocabulary) for name in ("demo", "demo-v3"))
    missing = count_parameters(v4)[1] - count_parameters(v3)[1]
    v3 = v3.replace(intermediate_size=v3.intermediate_size + round(missing / (3 * v3.hidden_size)))
    common = {"steps": PARTS, "batch_tokens": arguments.batch_tokens, "sequence_length": 512, "precision": "bfloat16"}
    common |= {"learning_rate": arguments.learning_rate, "warmup_steps": PARTS // 20, "decay_fraction": 0.5}
    common |= {"decay": "cosine", "final_fraction": 0.05, "balance_speed": 1e-2}
    config = TrainConfig(**common, seed=arguments.seed)
    made = []
    for name, architecture, optimizer in (("V4, Muon", v4, muon), ("V3, AdamW", v3, adamw)):
        net = build(architecture, arguments.seed).to(device).train()
        made.append(Contender(name, net, optimizer(net, config.learning_rate, config.weight_decay), config))
    return made


def _summary(contender: Contender, heldout_bytes: int, device: torch.device) -> dict[str, Any]:
    encoder, table = load_encoder(TOKENS), heldout(CLEAN, heldout_bytes)
    ids = [np.array([BOS, *tokens]) for tokens in encoder.encode_ordinary_batch(table["text"].tolist())]
    nats, _ = score(contender.net, ids, 512, device)
    total, active = count_parameters(contender.net.config)
    curve = pd.DataFrame(contender.curve)
    return {
        "name": contender.name,
        "bits_per_byte": sum(row.sum() for row in nats) / table["bytes"].sum() / math.log(2),
        "seconds": contender.seconds,
        "steps": len(curve),
        "tokens": int(curve["tokens"].iloc[-1]),
        "tokens_per_s": curve["tokens"].iloc[-1] / contender.seconds,
        "loss_last": curve["loss"].tail(10).mean(),
        "max_load_over_mean": curve["max_load_over_mean"].tail(10).mean(),
        "min_load_over_mean": curve["min_load_over_mean"].tail(10).mean(),
        "parameters": total,
        "active_parameters": active,
    }


def _write(contenders: list[Contender], found: list[dict[str, Any]], arguments: argparse.Namespace, name: str) -> None:
    for row in found:
        print("  ".join(f"{k} {v:,.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    curves = pd.concat([pd.DataFrame(c.curve).assign(name=c.name) for c in contenders])
    columns = ["name", "seconds", "tokens", "loss", "mtp_loss", "max_load_over_mean", "min_load_over_mean"]
    curves[columns].to_csv(arguments.output.with_suffix(".csv"), index=False, float_format="%.5g")
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    content = {"device": name, "torch": torch.__version__, "settings": settings, "contenders": found}
    arguments.output.with_suffix(".json").write_text(json.dumps(content, indent=2) + "\n")
    _draw(curves).savefig(arguments.output.with_suffix(".svg"), metadata={"Date": None}, bbox_inches="tight")


def _draw(curves: pd.DataFrame) -> Figure:
    """Loss over time, and over tokens."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 3))
        for axes, column, label in zip(
            figure.subplots(1, 2, sharey=True), ("seconds", "tokens"), ("CPU seconds", "tokens"), strict=True
        ):
            for name, curve in curves.groupby("name"):
                smooth = curve["loss"].ewm(halflife=4).mean()
                axes.plot(curve[column], smooth, color=COLOURS[name], label=name, linewidth=1.5)
            axes.set_xlabel(label)
        figure.axes[0].set_ylabel("training loss, nats a token")
        figure.axes[0].legend(frameon=False)
        return figure


if __name__ == "__main__":
    main()
