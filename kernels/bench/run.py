"""All benchmarks, one process each: the table, reports/bench.json, reports/bench.svg and the block of README.md.

    make bench            everything, about twenty minutes on two quiet cores; 12 GB of memory
    make bench-quick      smaller shapes and fewer peers in three minutes; prints the table and writes no file

A benchmark that fails (two sides that must compute the same do not, say) leaves its rows out and is named at the end;
then nothing is written either, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import report
from measure import Row, text_of
from moe_kernels import device as devices
from shapes import STEPS

HERE = Path(__file__).parent
TOPICS = ("all_cores", "memory", "optimizer", "threads", "decoding", "prefill", "data", "project")
ROUNDS = {"v4": 3, "512": 3, "decoding": 2, "prefill": 2}
QUIET_LOAD = 0.5  # of the cores
ENVIRONMENT = {  # large buffers stay with the process: fresh pages cost most of a copy
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "true",
    "PYTHONWARNINGS": "ignore",
    "PYTHONUNBUFFERED": "1",
}
PACKAGES = ("torch", "transformers", "torchtitan", "tiktoken", "tokenizers")


def main() -> None:
    """Run all scripts and report."""
    parser = argparse.ArgumentParser(description="All benchmarks.")
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    machine = _machine()
    if float(machine["load"]) > QUIET_LOAD * machine["cores"]:
        print(f"the machine is busy (load {machine['load']}): ratios are less certain, threads and data too slow")
    rows: list[Row] = []
    failed = []
    for command in commands(quick):
        found = _run(command)
        rows += found or []
        failed += [] if found is not None else [" ".join(command)]
    met = [row.met for row in rows]
    shapes = "; the targets are for the shapes of make bench" if quick else ""
    print(f"\n{met.count(True)} targets met, {met.count(False)} not met, {met.count(None)} without a figure{shapes}")
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")
    if not quick:
        content = {"date": datetime.now(UTC).date().isoformat(), "machine": machine, "rows": [vars(r) for r in rows]}
        report.JSON.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        report.main()
        print(f"{report.JSON}, {report.SVG} and the table in {report.README} are new")


def commands(quick: bool) -> list[list[str]]:
    """Script and arguments of every benchmark."""
    steps = [(*case, ROUNDS.get(case[0]) or ROUNDS.get(str(case[2]))) for case in STEPS]
    found = []
    for family, precision, size, rounds in steps:
        if quick and size > 256:
            continue
        options = ["--family", family, "--precision", precision, "--hidden-size", str(size)]
        found.append(["step.py", *options, *(["--rounds", str(rounds)] if rounds and not quick else [])])
    for topic in TOPICS:
        rounds = ROUNDS.get(topic)
        found.append([f"{topic}.py", *(["--rounds", str(rounds)] if rounds and not quick else [])])
    return [[*command, "--quick"] for command in found] if quick else found


def _run(command: list[str]) -> list[Row] | None:
    """The rows of one script, printed as soon as they are there; None when it failed."""
    print(f"\n{' '.join(command)}", flush=True)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "rows.json"
        process = [sys.executable, str(HERE / command[0]), *command[1:], "--output", str(output)]
        done = subprocess.run(process, stdout=subprocess.DEVNULL, env=os.environ | ENVIRONMENT, check=False)
        rows = [Row(**row) for row in json.loads(output.read_text())] if done.returncode == 0 else None
    for row in rows or []:
        print(f"  {text_of(row)}")
    print(f"  {time.monotonic() - start:.0f} s", flush=True)
    return rows


def _machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "device": devices.name(devices.default()),
        "processor": devices.processor(),
        "cores": os.cpu_count() or 1,
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "load": f"{os.getloadavg()[0]:.1f}",
        "system": platform.platform(),
        "versions": {name: metadata.version(name) for name in PACKAGES if _installed(name)},
    }


def _installed(name: str) -> bool:
    return any(distribution.name == name for distribution in metadata.distributions(name=name))


if __name__ == "__main__":
    main()
