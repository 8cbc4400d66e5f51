"""What an optimiser step costs: our batched Muon, torch.optim.Muon matrix by matrix, fused AdamW.

    python kernels/bench/optimizer.py --rounds 3 --output optimizer.json

All three update the same weights in one process, in turn, both Muons with ten Newton-Schulz steps in bfloat16 where the
device has it. Times are medians: CPU time of all threads on a CPU, where other jobs do not count, wall time elsewhere.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from moe_kernels import device as devices
from moe_kernels.reference.newton_schulz import COEFFICIENTS
from torch import nn

from model.optim import Muon

Weights = list[tuple[nn.Parameter, int]]  # and the matrices that lie one below the other in its rows


def main() -> None:
    """Run both cases, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description="Time of one optimiser step.")
    parser.add_argument("--layers", type=int, default=16, help="each of 64 experts, and each of three projections")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("optimizer.json"))
    arguments = parser.parse_args()
    devices.prepare()
    device = devices.default()
    shapes = {
        "experts": [((64, 256, 256), 2), ((64, 256, 128), 1)],
        "projections": [((256, 256), 1), ((256, 256), 1), ((768, 256), 1)],
    }
    rows = []
    for name, layer in shapes.items():
        weights = [(_weight(shape, device), parts) for shape, parts in layer * arguments.layers]
        rows.append({"case": name} | _compare(weights, arguments.rounds, device))
    _print(rows)
    header = {"device": devices.name(device), "torch": torch.__version__, "rounds": arguments.rounds}
    arguments.output.write_text(json.dumps(header | {"cases": rows}, indent=2) + "\n")


def _weight(shape: tuple[int, ...], device: torch.device) -> nn.Parameter:
    weight = nn.Parameter(torch.randn(shape, device=device))
    weight.grad = torch.randn_like(weight)
    return weight


def _compare(weights: Weights, rounds: int, device: torch.device) -> dict[str, Any]:
    """Milliseconds of each contender, stepped in turn; the first round does not count."""
    parameters = [weight for weight, _ in weights]
    contenders = {
        "ours": _ours(weights),
        "torch_muon": torch.optim.Muon(_matrices(weights), lr=1e-4, ns_steps=len(COEFFICIENTS)),
        "fused_adamw": torch.optim.AdamW(parameters, lr=1e-4, fused=True),
    }
    rounds_s = [{key: _seconds(c.step, device) for key, c in contenders.items()} for _ in range(rounds + 1)][1:]
    times_ms = {key: round(1e3 * median(taken[key] for taken in rounds_s), 2) for key in contenders}
    ratios = {f"{key}_over_ours": round(times_ms[key] / times_ms["ours"], 3) for key in list(times_ms)[1:]}
    return {"parameters": sum(p.numel() for p in parameters), "ms": times_ms, "ratio": ratios}


def _ours(weights: Weights) -> Muon:
    by_parts: dict[int, list[nn.Parameter]] = {}
    for weight, parts in weights:
        by_parts.setdefault(parts, []).append(weight)
    recipe = {"weight_decay": 0.1, "momentum": 0.95, "rms": 0.18}
    return Muon([recipe | {"params": group, "parts": parts} for parts, group in by_parts.items()], 1e-4)


def _matrices(weights: Weights) -> list[nn.Parameter]:
    """The same storage as one parameter a matrix, which is what torch.optim.Muon takes."""
    matrices = []
    for weight, parts in weights:
        shape = (-1, weight.shape[-2] // parts, weight.shape[-1])
        for matrix, grad in zip(weight.detach().view(shape), weight.grad.view(shape), strict=True):
            matrices.append(nn.Parameter(matrix))
            matrices[-1].grad = grad
    return matrices


def _seconds(step: Callable[[], Any], device: torch.device) -> float:
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    start = clock()
    step()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return clock() - start


def _print(rows: list[dict[str, Any]]) -> None:
    columns = list(rows[0]["ms"])
    print(f"{'case':<12} {'parameters':>12} " + " ".join(f"{column + ' ms':>16}" for column in columns))
    for row in rows:
        print(f"{row['case']:<12} {row['parameters']:>12,} " + " ".join(f"{row['ms'][c]:>16,.1f}" for c in columns))


if __name__ == "__main__":
    main()
