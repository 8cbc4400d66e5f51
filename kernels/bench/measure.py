"""How the benchmarks measure: contenders in turn, in one process, medians of rounds; what a row of the table holds.

Times are CPU time of all threads on a CPU, where other jobs do not count, wall time elsewhere or where a row says so.
A ratio is the median over rounds of the ratio inside a round, so that a machine that slows down slows both sides.
Contenders that compute the same thing must agree: `require_equal` ends the benchmark when they do not.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from moe_kernels import device as devices

Times = dict[str, list[float]]
BUSY = 2.5  # load


@dataclass
class Row:
    """One line of the table. measured None: `note` says why there is no figure."""

    key: str
    what: str
    target: float
    measured: float | None
    at_least: bool = True  # whether the target is a lower bound
    unit: str = ""
    spread: tuple[float, float] | None = None  # least and most over the rounds
    ours: str = ""
    peer: str = ""
    note: str = ""
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None without a figure."""
        if self.measured is None:
            return None
        return self.measured >= self.target if self.at_least else self.measured <= self.target


@dataclass(frozen=True)
class Settings:
    """What every script takes from the command line."""

    quick: bool
    rounds: int
    threads: int
    device: torch.device


def main(
    description: str, measure: Callable[[Settings, argparse.Namespace], list[Row]], *options: tuple[str, dict[str, Any]]
) -> None:
    """Parse, measure, print the rows, write them as JSON. A benchmark that fails says why in one line, exit code 1."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="smaller shapes, fewer rounds, fewer peers")
    parser.add_argument("--rounds", type=int, help="default 5, with --quick 1")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--output", type=Path)
    for name, settings in options:
        parser.add_argument(name, **settings)
    arguments = parser.parse_args()
    devices.prepare()
    torch.set_num_threads(arguments.threads)
    rounds = arguments.rounds or (1 if arguments.quick else 5)
    try:
        rows = measure(Settings(arguments.quick, rounds, arguments.threads, devices.default()), arguments)
    except Unequal as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    for row in rows:
        print(text_of(row), flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


def text_of(row: Row) -> str:
    """What was measured beside its target, on one line."""
    verdict = {True: "met", False: "not met", None: "no figure"}[row.met]
    return (
        f"{row.what}: {value_text(row.measured, row.unit)} (target {target_text(row)}, {verdict}) {row.note}".rstrip()
    )


def target_text(row: Row) -> str:
    return f"{'>=' if row.at_least else '<='} {value_text(row.target, row.unit)}"


def value_text(value: float | None, unit: str) -> str:
    """A figure with its unit: x (times), % (of 1), or a unit that follows a blank."""
    if value is None:
        return "-"
    if unit == "%":
        return f"{100 * value:.0f} %"
    digits = f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
    return f"{digits} {unit}".rstrip()


def now(device: torch.device, wall: bool = False) -> float:
    """CPU time of this process on a CPU unless `wall`, else wall time once the device has done its work."""
    if device.type == "cpu":
        return time.perf_counter() if wall else time.process_time()
    torch.accelerator.synchronize(device)
    return time.perf_counter()


def busy() -> str:
    """A note for rows of wall time on two threads, where other jobs had a part of the cores."""
    return "" if (load := os.getloadavg()[0]) < BUSY else f"the machine was busy: load {load:.1f}"


def in_turn(
    contenders: Mapping[str, Callable[[], Any]],
    rounds: int,
    device: torch.device,
    wall: bool = False,
    check: Callable[[dict[str, Any]], None] | None = None,
    warm: int = 1,
) -> Times:
    """Seconds of each contender, round by round; the first `warm` do not count, each starts with another contender.

    check: gets what each returned, after every round, the first ones included.
    """
    taken: Times = {name: [] for name in contenders}
    names = deque(contenders)
    for _ in range(warm + rounds):
        found = {}
        for name in names:
            start = now(device, wall)
            found[name] = contenders[name]()
            taken[name].append(now(device, wall) - start)
        names.rotate(-1)
        if check:
            check(found)
    return {name: seconds[warm:] for name, seconds in taken.items()}


def ratio(slower: Sequence[float], faster: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """(median of slower / faster over the rounds, (least, most))."""
    ratios = [s / f for s, f in zip(slower, faster, strict=True)]
    return median(ratios), (min(ratios), max(ratios))


def fastest(times: Times, names: Sequence[str]) -> str:
    """The one with the least median."""
    return min(names, key=lambda name: median(times[name]))


class Unequal(RuntimeError):
    """Two contenders that must compute the same did not: their times mean nothing."""


def require_equal(what: str, found: Mapping[str, float], reference: str, tolerances: Mapping[str, float]) -> None:
    """Raises `Unequal` when a contender is further from the reference than its relative tolerance."""
    for name, tolerance in tolerances.items():
        off = abs(found[name] - found[reference]) / abs(found[reference])
        if not off <= tolerance:
            raise Unequal(
                f"{what} of {name} is {found[name]:.6f}, of {reference} {found[reference]:.6f}: "
                f"{off:.1e} apart, {tolerance:.0e} allowed; nothing was compared"
            )


def best_matmul(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the best square matrix product here and now."""
    best = 0.0
    for size in (512, 1024, 2048):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        for _ in range(4):
            start = now(device)
            torch.mm(a, b, out=out)
            best = max(best, 2 * size**3 / (now(device) - start))
    return best
