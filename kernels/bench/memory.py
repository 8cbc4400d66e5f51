"""Peak memory of training steps: ours against transformers as shipped, each in a process of its own.

    python kernels/bench/memory.py --output memory.json

Peak resident memory minus what the process held before there was a model. Weights, gradients and both moments of AdamW
are 16 bytes a parameter for either side.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import peers
from measure import Row, Settings, main
from moe_kernels import device as devices
from shapes import SHAPES, tokens
from step import OURS, SHIPPED, ours, transformers_peer

from model import build

TARGET, STEPS = 0.75, 2


def measure(settings: Settings, arguments: argparse.Namespace) -> list[Row]:
    """One row a family; with --contender, as a child, prints the bytes of that one and returns none."""
    rows = 1 if settings.quick else 4
    if arguments.contender:
        print(json.dumps(peak_bytes(arguments.contender, arguments.family, rows, settings)))
        return []
    found = []
    for family in ("v3", "v4"):
        taken = {name: _child(name, family, settings) for name in (OURS, SHIPPED)}
        row = Row(f"memory-{family}", f"{family.upper()} step: peak memory over transformers'", TARGET, None)
        row.measured, row.at_least, row.unit = taken[OURS] / taken[SHIPPED], False, "x"
        row.ours, row.peer = (f"{taken[name] / 2**20:,.0f} MiB" for name in (OURS, SHIPPED))
        found.append(row)
    return found


def peak_bytes(contender: str, family: str, rows: int, settings: Settings) -> int:
    """Of two steps in float32."""
    before = devices.memory(settings.device).allocated
    net = build(SHAPES[family], seed=0).to(settings.device).train()
    taking_part = ours(net) if contender == OURS else transformers_peer(peers.transformers_model(net))
    del net
    data = tokens(SHAPES[family], rows, settings.device)
    for _ in range(STEPS):
        taking_part.step(data, "float32")
    return devices.memory(settings.device).peak - before


def _child(contender: str, family: str, settings: Settings) -> int:
    command = [sys.executable, __file__, "--contender", contender, "--family", family]
    command += ["--quick"] if settings.quick else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


if __name__ == "__main__":
    main(
        "Peak memory of a training step.",
        measure,
        ("--contender", {"choices": [OURS, SHIPPED]}),
        ("--family", {"choices": list(SHAPES), "default": "v3"}),
    )
