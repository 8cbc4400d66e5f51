"""What Muon costs: its share of a step of 16,384 tokens, and our batched one against torch.optim.Muon and fused AdamW.

    python kernels/bench/optimizer.py --rounds 3 --output optimizer.json

The share is of V3 under bfloat16 autocast, eight parts of 2,048 tokens and one update by the five polynomials of Polar
Express, as the presets have it; what it is with DeepSeek-V4's ten stands beside it. In the comparison all update the
same weights, both Muons with five steps in bfloat16 where the device has it.
"""

from __future__ import annotations

import argparse
from statistics import median
from typing import Any

import torch
from measure import Row, Settings, in_turn, main
from moe_kernels.reference.newton_schulz import COEFFICIENTS, POLAR_EXPRESS
from shapes import LENGTH, V3, tokens
from torch import nn

from model import build
from model.losses import cross_entropy
from model.optim import Muon, muon
from model.precision import autocast

TARGET, STEP_TOKENS, PART_ROWS = 0.12, 16384, 4
Weights = list[tuple[nn.Parameter, int]]  # and the matrices that lie one below the other in its rows
LAYER = {
    "experts": [((64, 256, 256), 2), ((64, 256, 128), 1)],
    "projections": [((256, 256), 1), ((256, 256), 1), ((768, 256), 1)],
}


def measure(settings: Settings, arguments: argparse.Namespace) -> list[Row]:
    """One row; the comparison is in its figures."""
    net = build(V3, seed=0).to(settings.device).train()
    optimizers = [muon(net, 1e-4, 0.1, coefficients=steps) for steps in (POLAR_EXPRESS, COEFFICIENTS)]
    ids, targets = tokens(V3, PART_ROWS, settings.device)

    def part() -> None:
        with autocast("bfloat16", settings.device):
            hidden = net(ids, with_logits=False).hidden
            loss = cross_entropy(hidden.flatten(0, 1), net.lm_head.weight, targets.flatten())
        net.zero_grad(set_to_none=True)
        loss.backward()

    five, ten = (optimizer.step for optimizer in optimizers)
    times = in_turn({"part": part, "five": five, "ten": ten}, settings.rounds, settings.device)
    parts = STEP_TOKENS // (PART_ROWS * LENGTH)
    shares, others = (
        [u / (u + parts * p) for u, p in zip(times[name], times["part"], strict=True)] for name in ("five", "ten")
    )
    row = Row("muon", "Muon's share of a V3 step of 16,384 tokens, bfloat16", TARGET, median(shares), at_least=False)
    row.unit, row.spread = "%", (min(shares), max(shares))
    row.note = f"with DeepSeek-V4's ten steps {median(others):.0%}"
    row.ours = f"{median(times['five']):.2f} s an update"
    row.figures = {name: _compare(layer * arguments.layers, settings) for name, layer in LAYER.items()}
    row.peer = f"torch.optim.Muon {row.figures['projections']['torch_muon_over_ours']:.1f} x, projections alone"
    return [row]


def _compare(layer: list[tuple[tuple[int, ...], int]], settings: Settings) -> dict[str, Any]:
    """Milliseconds of each contender, stepped in turn, and their ratio to ours."""
    weights = [(_weight(shape, settings.device), parts) for shape, parts in layer]
    parameters = [weight for weight, _ in weights]
    contenders = {
        "ours": _ours(weights),
        "torch_muon": torch.optim.Muon(_matrices(weights), lr=1e-4, ns_steps=len(POLAR_EXPRESS)),
        "fused_adamw": torch.optim.AdamW(parameters, lr=1e-4, fused=True),
    }
    times = in_turn({name: one.step for name, one in contenders.items()}, settings.rounds, settings.device)
    times_ms = {name: round(1e3 * median(taken), 2) for name, taken in times.items()}
    ratios = {f"{name}_over_ours": round(times_ms[name] / times_ms["ours"], 3) for name in list(times_ms)[1:]}
    return {"parameters": sum(p.numel() for p in parameters), "ms": times_ms} | ratios


def _weight(shape: tuple[int, ...], device: torch.device) -> nn.Parameter:
    weight = nn.Parameter(torch.randn(shape, device=device))
    weight.grad = torch.randn_like(weight)
    return weight


def _ours(weights: Weights) -> Muon:
    by_parts: dict[int, list[nn.Parameter]] = {}
    for weight, parts in weights:
        by_parts.setdefault(parts, []).append(weight)
    recipe = {"weight_decay": 0.1, "momentum": 0.95, "rms": 0.18}
    return Muon([recipe | {"params": group, "parts": parts} for parts, group in by_parts.items()], 1e-4, POLAR_EXPRESS)


def _matrices(weights: Weights) -> list[nn.Parameter]:
    """The same storage as one parameter a matrix, which is what torch.optim.Muon takes."""
    matrices = []
    for weight, parts in weights:
        shape = (-1, weight.shape[-2] // parts, weight.shape[-1])
        for matrix, grad in zip(weight.detach().view(shape), weight.grad.view(shape), strict=True):
            matrices.append(nn.Parameter(matrix))
            matrices[-1].grad = grad
    return matrices


if __name__ == "__main__":
    main("Muon.", measure, ("--layers", {"type": int, "default": 2, "help": "of the comparison"}))
