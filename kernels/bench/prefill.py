"""What reading a prompt costs a token at 8,192 tokens and at 1,024: V4 with its cache, transformers beside it.

python kernels/bench/prefill.py --rounds 3 --output prefill.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from typing import Any

import peers
import torch
from measure import Row, Settings, in_turn, main
from shapes import V4, tokens

from model import build, generate

SHORT, LONG = 1024, 8192
TARGET = 1.3


def measure(settings: Settings, _: argparse.Namespace) -> list[Row]:
    """One row: cost of a token of the long prompt over one of the short prompt."""
    long = SHORT * 4 if settings.quick else LONG
    net = build(V4, seed=0).to(settings.device).eval()
    theirs = peers.transformers_model(net)
    prompts = {length: tokens(V4, 1, settings.device, length)[0] for length in (SHORT, long)}
    sides: dict[str, Callable[[], Any]] = {
        f"ours {length}": lambda ids=ids: generate(net, ids, 1) for length, ids in prompts.items()
    }
    times = in_turn(sides, settings.rounds, settings.device)
    costs = {length: [s / length for s in times[f"ours {length}"]] for length in prompts}
    ratios = [b / a for a, b in zip(costs[SHORT], costs[long], strict=True)]

    @torch.no_grad()
    def read(length: int) -> Any:
        return theirs(prompts[length], use_cache=True, logits_to_keep=1)

    their = {length: 0.0 for length in prompts}
    if not settings.quick:
        found = in_turn({f"{length}": lambda n=length: read(n) for length in prompts}, 1, settings.device)
        their = {length: median(found[f"{length}"]) / length for length in prompts}
    what = f"V4 prefill: a token at {long:,} over one at {SHORT:,}"
    row = Row("prefill", what, TARGET, median(ratios), at_least=False)
    row.unit, row.spread = "x", (min(ratios), max(ratios))
    row.ours = f"{1 / median(costs[long]):,.0f} tokens/s"
    row.peer = f"{1 / their[long]:,.0f} tokens/s, {their[long] / their[SHORT]:.2f} x" if their[long] else ""
    row.figures = {"seconds_per_token": {str(length): median(cost) for length, cost in costs.items()}}
    return [row]


if __name__ == "__main__":
    main("Cost of reading a prompt.", measure)
