"""A training step on two threads against one: wall time, so on a machine that has nothing else to do.

python kernels/bench/threads.py --rounds 5 --output threads.json
"""

from __future__ import annotations

import argparse
import os
from statistics import median

import torch
from measure import Row, Settings, busy, in_turn, main, ratio
from shapes import LENGTH, SHAPES, tokens
from step import Contender, ours
from torch import Tensor

from model import build

TARGET = 1.7


def measure(settings: Settings, _: argparse.Namespace) -> list[Row]:
    """One row a family, float32."""
    if settings.device.type != "cpu" or (os.cpu_count() or 1) < 2:
        return [Row("threads", "Two threads over one", TARGET, None, unit="x", note="needs a CPU with two cores")]
    return [_row(family, settings) for family in SHAPES]


def _row(family: str, settings: Settings) -> Row:
    rows = 1 if settings.quick else 4
    contender = ours(build(SHAPES[family], seed=0).train())
    data = tokens(SHAPES[family], rows, settings.device)
    sides = {str(count): lambda count=count: _step(contender, data, count) for count in (1, 2)}
    times = in_turn(sides, settings.rounds, settings.device, wall=True)
    value, spread = ratio(times["1"], times["2"])
    speeds = [f"{rows * LENGTH / median(seconds):,.0f} tokens/s" for seconds in times.values()]
    what = f"{family.upper()} step, float32: two threads over one"
    return Row(
        f"threads-{family}", what, TARGET, value, unit="x", spread=spread, ours=speeds[1], peer=speeds[0], note=busy()
    )


def _step(contender: Contender, data: tuple[Tensor, Tensor], threads: int) -> float:
    torch.set_num_threads(threads)
    return contender.step(data, "float32")


if __name__ == "__main__":
    main("Two threads against one.", measure)
