"""A training step of ours against transformers, torchtitan and a dense model: forward, backward, AdamW.

    python kernels/bench/step.py --family v3 --precision bfloat16 --hidden-size 256 --rounds 5 --output step.json

All train the same weights on the same rows in one process, in turn, and must have the same loss before every step.
Peers: transformers with grouped_mm as it is shipped; tuned (flash attention, fused AdamW; the same compiled);
torchtitan with fused AdamW; our own model with the reference in place of kernels. `dense` is ours with a feed-forward
of as many active parameters in place of the experts, the limit that experts can reach at no overhead.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any

import peers
import torch
from measure import Row, Settings, Times, best_matmul, fastest, in_turn, main, ratio, require_equal
from moe_kernels import reference_only
from shapes import LENGTH, dense, shape, tokens
from torch import Tensor, nn
from torch.nn import functional as F

from model import ModelConfig, build
from model.losses import cross_entropy
from model.optim import adamw
from model.precision import autocast
from model.size import flops_per_token

RATE = 1e-4  # small: losses that differ by rounding alone stay together
OPTIMIZER = {"betas": (0.9, 0.95), "eps": 1e-20, "weight_decay": 0.0}
OURS, SHIPPED, DENSE = "ours", "transformers", "dense"
TUNED, COMPILED, TITAN = "transformers tuned", "transformers tuned, compiled", "torchtitan"
TARGETS = {  # family, precision -> against transformers as shipped, the best tuned peer, dense
    ("v3", "float32"): (2.0, 1.25, 0.97),
    ("v3", "bfloat16"): (3.5, 1.6, 0.9),
    ("v4", "float32"): (3.0, None, 0.95),
    ("v4", "bfloat16"): (4.0, None, 0.95),
}
SHARE_OF_MATMUL = 0.25
WARM = 2  # rounds: by the third, memory that contenders take from each other is no longer new
TOLERANCES = {"float32": 1e-4, "bfloat16": 1e-2}  # relative, of the loss
BF16_EXPERTS = {TITAN: 1e-2}  # torchtitan's experts are bfloat16 always


@dataclass(frozen=True)
class Contender:
    """A model, how its loss comes about, and the optimiser that is part of its step."""

    net: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    context: Callable[[], AbstractContextManager[Any]] = nullcontext

    def step(self, data: tuple[Tensor, Tensor], precision: str) -> float:
        """One step; the loss before it, nats a token."""
        with self.context():
            with autocast(precision, data[0].device):
                loss = self.loss(*data)
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


def ours(net: nn.Module, context: Callable[[], AbstractContextManager[Any]] = nullcontext) -> Contender:
    """Our model in training, without a multi-token-prediction block, which the peers lack."""

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        out = net(ids, with_logits=False)
        return cross_entropy(out.hidden.flatten(0, 1), net.lm_head.weight, targets.flatten())

    return Contender(net, loss, adamw(net, RATE, 0.0), context)


def peer(net: nn.Module, call: Callable[[Tensor], Tensor], fused: bool | None = None) -> Contender:
    """A peer's model; fused None: AdamW as PyTorch chooses."""

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(call(ids).flatten(0, 1).float(), targets.flatten())

    return Contender(net, loss, torch.optim.AdamW(net.parameters(), RATE, fused=fused, **OPTIMIZER))


def transformers_peer(net: nn.Module, fused: bool | None = None, compiled: bool = False) -> Contender:
    forward = torch.compile(net) if compiled else net
    return peer(net, lambda ids: forward(ids, use_cache=False).logits, fused)


def compiles(contender: Contender, data: tuple[Tensor, Tensor], precision: str) -> bool:
    """Compile by a forward and backward pass without a step; a model that does not compile is named and left out."""
    try:
        with autocast(precision, data[0].device):
            contender.loss(*data).backward()
    except RuntimeError as error:
        print(f"{COMPILED} is left out: {str(error).splitlines()[0]}", file=sys.stderr)
        return False
    contender.optimizer.zero_grad(set_to_none=True)
    return True


def contenders(
    config: ModelConfig, settings: Settings, wide: bool, data: tuple[Tensor, Tensor], precision: str
) -> dict[str, Contender]:
    """Who takes part; all but `dense` start from the weights of ours."""
    net = build(config, seed=0).to(settings.device).train()
    found = {OURS: ours(net), SHIPPED: transformers_peer(peers.transformers_model(net))}
    if not wide:
        found[DENSE] = ours(dense(config).to(settings.device).train())
    if config.is_v4 or wide:
        return found
    found[TUNED] = transformers_peer(peers.transformers_model(net, flash=True), fused=True)
    if not settings.quick:
        compiled = transformers_peer(peers.transformers_model(net, flash=True), fused=True, compiled=True)
        found |= {COMPILED: compiled} if compiles(compiled, data, precision) else {}
        reference = build(config, seed=0).to(settings.device).train()
        found["ours, reference"] = ours(reference, reference_only)
    if not settings.quick and peers.has_torchtitan():
        titan = peers.torchtitan_model(net)
        found[TITAN] = peer(titan, titan, fused=True)
    return found


def measure(settings: Settings, arguments: argparse.Namespace) -> list[Row]:
    """The rows of one family, precision and width."""
    family, precision, size = arguments.family, arguments.precision, arguments.hidden_size
    config, rows = shape(family, size), 1 if settings.quick else 4
    data = tokens(config, rows, settings.device)
    taking_part = contenders(config, settings, size > 256, data, precision)
    tolerances = {name: TOLERANCES[precision] for name in taking_part if name != DENSE} | {
        name: value for name, value in BF16_EXPERTS.items() if name in taking_part
    }
    times = in_turn(
        {name: lambda c=contender: c.step(data, precision) for name, contender in taking_part.items()},
        settings.rounds,
        settings.device,
        check=lambda losses: require_equal("the loss", losses, SHIPPED, tolerances),
        warm=WARM,
    )
    name = f"{family.upper()} step, {precision}" + (f", hidden {size}" if size > 256 else "")
    key = f"{family}-{precision}-{size}"
    targets = TARGETS[family, precision]
    found = [row(f"{key}-shipped", f"{name}: over transformers as shipped", targets[0], times, SHIPPED, rows)]
    tuned = [peer_name for peer_name in (TUNED, COMPILED, TITAN) if peer_name in times]
    if tuned:
        best = fastest(times, tuned)
        found.append(row(f"{key}-tuned", f"{name}: over the best tuned peer ({best})", targets[1], times, best, rows))
    if DENSE in times:
        what = "a dense model of equal active parameters"
        found.append(row(f"{key}-dense", f"{name}: over {what}", targets[2], times, DENSE, rows))
    found.append(_share(f"{key}-matmul", f"{name}: share of the best {precision} matrix product", config, data, times))
    return found


def row(key: str, what: str, target: float, times: Times, other: str, rows: int) -> Row:
    """How many times as fast ours is as another contender; both in tokens a second too, of `rows` rows."""
    value, spread = ratio(times[other], times[OURS])
    speeds = {name: round(rows * LENGTH / median(seconds)) for name, seconds in times.items()}
    texts = [f"{speeds[name]:,} tokens/s" for name in (OURS, other)]
    figures = {"tokens_per_s": speeds, "seconds": {name: median(seconds) for name, seconds in times.items()}}
    return Row(key, what, target, value, unit="x", spread=spread, ours=texts[0], peer=texts[1], figures=figures)


def _share(key: str, what: str, config: ModelConfig, data: tuple[Tensor, Tensor], times: Times) -> Row:
    """Operations of the step a second over those of the best product of that precision: how near the limit is."""
    peak = best_matmul(getattr(torch, key.split("-")[1]), data[0].device)
    flops = data[0].numel() * flops_per_token(config, LENGTH)
    shares = [flops / seconds / peak for seconds in times[OURS]]
    return Row(
        key,
        what,
        SHARE_OF_MATMUL,
        median(shares),
        unit="%",
        spread=(min(shares), max(shares)),
        ours=f"{flops / median(times[OURS]) / 1e9:,.0f} GFLOP/s",
        peer=f"{flops / median(times[SHIPPED]) / 1e9:,.0f} GFLOP/s",
        figures={"matmul_gflops": peak / 1e9},
    )


if __name__ == "__main__":
    main(
        "Time of one training step.",
        measure,
        ("--family", {"choices": ["v3", "v4"], "default": "v3"}),
        ("--precision", {"choices": ["float32", "bfloat16"], "default": "float32"}),
        ("--hidden-size", {"type": int, "choices": [256, 512], "default": 256}),
    )
