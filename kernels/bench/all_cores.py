"""A training step as those who train run it: on all cores, wall time, each side alone in a process of its own.

    python kernels/bench/all_cores.py --rounds 5 --output all_cores.json

step.py gives every side one thread and our memory settings (`device.prepare`), and its CPU time knows of no core that
waits. Here transformers as shipped keeps what PyTorch and glibc give it, where large blocks return to the system after
each use; tuned it gets our settings too. The processes step in turn and must have the same loss before each step.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection

import peers
import torch
from measure import Row, Settings, busy, in_turn, main, require_equal
from moe_kernels import device as devices
from shapes import STEPS, shape, tokens
from step import COMPILED, OURS, SHIPPED, TARGETS, TOLERANCES, WARM, Contender, compiles, ours, row, transformers_peer

from model import ModelConfig, build
from model.transformer import MoETransformer


def _compiled(net: MoETransformer) -> Contender:
    return transformers_peer(peers.transformers_model(net, flash=True), fused=True, compiled=True)


SIDES: dict[str, Callable[[MoETransformer], Contender]] = {
    OURS: ours,
    SHIPPED: lambda net: transformers_peer(peers.transformers_model(net)),
    COMPILED: _compiled,
}


def measure(settings: Settings, _: argparse.Namespace) -> list[Row]:
    """A row a case and peer; with --quick V3 in float32 against transformers as shipped alone."""
    if settings.device.type != "cpu":
        return [Row("all-cores", "Steps on all cores", 0, None, unit="x", note="is of a CPU")]
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        del os.environ[name]  # run.py sets them; the processes would start with them
    return [found for case in (STEPS[:1] if settings.quick else STEPS) for found in _rows(*case, settings)]


def _rows(family: str, precision: str, size: int, settings: Settings) -> list[Row]:
    tuned = family == "v3" and size == 256 and not settings.quick
    rows = 1 if settings.quick else 4
    with ExitStack() as stack:
        sides = [OURS, SHIPPED, COMPILED] if tuned else [OURS, SHIPPED]
        started = {side: _start(stack, side, shape(family, size), precision, rows) for side in sides}
        ready = {side: process for side, process in started.items() if process.recv()}
        tolerances = dict.fromkeys(ready, TOLERANCES[precision])
        times = in_turn(
            {side: partial(_step, process) for side, process in ready.items()},
            settings.rounds,
            settings.device,
            wall=True,
            check=lambda losses: require_equal("the loss", losses, SHIPPED, tolerances),
            warm=WARM,
        )
    name = f"{family.upper()} step, {precision}{f', hidden {size}' if size > 256 else ''}, all cores"
    key, targets = f"all-cores-{family}-{precision}-{size}", TARGETS[family, precision]
    found = [row(f"{key}-shipped", f"{name}: over transformers as shipped", targets[0], times, SHIPPED, rows)]
    if COMPILED in times:
        found.append(row(f"{key}-tuned", f"{name}: over {COMPILED}", targets[1], times, COMPILED, rows))
    for line in found:
        line.note = busy()
    return found


def _start(stack: ExitStack, side: str, config: ModelConfig, precision: str, rows: int) -> Connection:
    """The end of a pipe to a new process, which first says whether that side takes part."""
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, side, config, precision, rows))
    process.start()
    stack.callback(process.join)
    stack.enter_context(here)
    there.close()
    return here


def _serve(asked: Connection, side: str, config: ModelConfig, precision: str, rows: int) -> None:
    """A step for each message, answered by the loss before it, until the pipe is closed."""
    if side != SHIPPED:
        devices.prepare()
    contender = SIDES[side](build(config, seed=0).train())
    data = tokens(config, rows, torch.device("cpu"))
    asked.send(side != COMPILED or compiles(contender, data, precision))
    while _goes_on(asked):
        asked.send(contender.step(data, precision))


def _goes_on(asked: Connection) -> bool:
    try:
        return asked.recv()
    except EOFError:
        return False


def _step(process: Connection) -> float:
    process.send(True)
    return process.recv()


if __name__ == "__main__":
    main("A training step on all cores, each side in a process of its own.", measure)
