"""What surrounds training: the demo's time outside of it, `dvc repro` with nothing to do, the import of the command.

    python kernels/bench/project.py --output project.json

The demo's figures come from the records of its last run (the runs that MLflow holds, reports/*.json).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from measure import Row, Settings, main

from pipelines import tracking

REPORTS = Path("reports")
OUTSIDE, REPRO_S, IMPORT_S = 0.4, 2.0, 0.3
IMPORT = "import time; start = time.perf_counter(); import pipelines.cli; print(time.perf_counter() - start)"


def measure(settings: Settings, _: argparse.Namespace) -> list[Row]:
    """Three rows."""
    return [_outside_training(), _no_op_repro(settings.rounds), _import(settings.rounds)]


def _outside_training() -> Row:
    """Share of the time from the first stage's start to the last one's end that no model was training."""
    row = Row("demo", "make demo: share of its time outside of training", OUTSIDE, None, at_least=False, unit="%")
    files = sorted((REPORTS / "runs").glob("*.json"))
    runs = []
    if files and tracking.is_local() and (tracking.home() / "mlflow.db").exists():
        client = tracking.connect()
        runs = [tracking.find_run(client, json.loads(file.read_text())["run_id"]) for file in files]
    if not runs or not all(run and run.info.end_time for run in runs):
        row.note = "there is no record of a whole run; make demo makes one"
        return row
    if len({run.data.tags.get(tracking.PARENT) for run in runs}) > 1:
        row.note = "the last stages are of several runs; make demo in a fresh clone makes one"
        return row
    trained = [json.loads((REPORTS / f"{name}.json").read_text()) for name in ("pretrain", "finetune")]
    if any(report["emulated"] for report in trained):
        row.note = "the training was emulated; make demo without DEVICE=npu measures"
        return row
    whole_s = (max(run.info.end_time for run in runs) - min(run.info.start_time for run in runs)) / 1e3
    training_s = sum(report["seconds"] for report in trained)
    row.measured = 1 - training_s / whole_s
    row.ours = f"{whole_s - training_s:.0f} s of {whole_s:.0f} s"
    stages_s = {run.info.run_name: (run.info.end_time - run.info.start_time) / 1e3 for run in runs}
    row.figures = {"seconds": {name: round(value, 1) for name, value in stages_s.items()}}
    return row


def _no_op_repro(rounds: int) -> Row:
    row = Row("repro", "dvc repro with nothing to do", REPRO_S, None, at_least=False, unit="s")
    dvc = [sys.executable, "-m", "dvc"]
    status = subprocess.run([*dvc, "status", "--json"], capture_output=True, text=True, check=False)
    if status.returncode or json.loads(status.stdout or "{}"):
        row.note = "there is something to do; after make demo there is not"
        return row
    times = [_seconds([*dvc, "repro", "--quiet"]) for _ in range(rounds)]
    row.measured, row.spread = median(times), (min(times), max(times))
    return row


def _import(rounds: int) -> Row:
    times = []
    for _ in range(rounds):
        done = subprocess.run([sys.executable, "-c", IMPORT], stdout=subprocess.PIPE, text=True, check=True)
        times.append(float(done.stdout))
    row = Row("import", "import of the shovel command", IMPORT_S, median(times), at_least=False, unit="s")
    row.spread = (min(times), max(times))
    return row


def _seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    main("The project's own time.", measure)
