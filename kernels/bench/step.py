"""What a training step costs with the kernels of this device and with the reference alone.

    python kernels/bench/step.py --preset demo --rounds 5 --output step.json

Both train the same weights on the same packed documents in one process, in turn, in float32 and under bfloat16
autocast. Times are medians: CPU time of all threads on a CPU, where other jobs do not count, wall time elsewhere. The
loss after the same number of steps stands beside them.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from moe_kernels import chosen, reference_only
from moe_kernels import device as devices
from torch import Tensor

from model import ModelConfig, build
from model.losses import losses_of
from model.optim import adamw
from model.precision import autocast

DOCUMENT = 250  # tokens of a document, on average


def main() -> None:
    """Time both precisions, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description="Time of one training step.")
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("step.json"))
    arguments = parser.parse_args()
    devices.prepare()
    torch.set_num_threads(arguments.threads)
    device = devices.default()
    data = packed(ModelConfig.preset(arguments.preset), arguments.rows, arguments.length, device)
    rows = []
    for precision in ("float32", "bfloat16"):
        rows.append({"precision": precision} | compare(arguments.preset, precision, data, arguments.rounds, device))
        print(row_text(rows[-1]))
    header = {"device": devices.name(device), "torch": torch.__version__, "preset": arguments.preset}
    header |= {"tokens": data[0].numel(), "rounds": arguments.rounds, "operations": chosen(device)}
    arguments.output.write_text(json.dumps(header | {"cases": rows}, indent=2) + "\n")


def packed(config: ModelConfig, rows: int, length: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(input ids, targets, document ids), each [rows, length], random from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (rows, length + 1), generator=generator)
    documents = (torch.rand(rows, length, generator=generator) < 1 / DOCUMENT).cumsum(dim=1)
    return ids[:, :-1].to(device), ids[:, 1:].to(device), documents.to(device)


def compare(
    preset: str, precision: str, data: tuple[Tensor, Tensor, Tensor], rounds: int, device: torch.device
) -> dict[str, Any]:
    """Seconds of both contenders' steps, taken in turn; the first round does not count."""
    contenders = {"kernels": nullcontext, "reference": reference_only}
    nets = {name: build(ModelConfig.preset(preset), seed=0).to(device).train() for name in contenders}
    optimizers = {name: adamw(net, 1e-3, 0.1) for name, net in nets.items()}
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    losses = {}
    for _ in range(rounds + 1):
        for name, context in contenders.items():
            start = clock(device)
            losses[name] = step(nets[name], optimizers[name], data, precision, context(), device)
            taken[name].append(clock(device) - start)
    times_s = {name: median(values[1:]) for name, values in taken.items()}
    speeds = {f"{name}_tokens_per_s": data[0].numel() / value for name, value in times_s.items()}
    gain = median(r / k for r, k in zip(taken["reference"][1:], taken["kernels"][1:], strict=True))
    return {"seconds": times_s, **speeds, "reference_over_kernels": gain, "loss": losses}


def step(
    net: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    data: tuple[Tensor, Tensor, Tensor],
    precision: str,
    context: AbstractContextManager[Any],
    device: torch.device,
) -> float:
    """One optimiser step; the loss of the next token before it."""
    with context:
        with autocast(precision, device):
            losses, _ = losses_of(net, *data, sparse=True)
        torch.stack(list(losses.values())).sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return losses["loss"].item()


def clock(device: torch.device) -> float:
    """CPU time of this process on a CPU, else wall time once the device has done its work."""
    if device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize(device)
    return time.perf_counter()


def row_text(row: dict[str, Any]) -> str:
    speeds = " ".join(f"{name} {row[f'{name}_tokens_per_s']:>8,.0f} tokens/s" for name in ("kernels", "reference"))
    losses = " ".join(f"{value:.6f}" for value in row["loss"].values())
    return f"{row['precision']:<9} {speeds}   ratio {row['reference_over_kernels']:.2f}   losses {losses}"


if __name__ == "__main__":
    main()
