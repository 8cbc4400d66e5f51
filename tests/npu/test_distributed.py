"""Groups of 2 and 4 processes on torch_npu's ProcessGroupHCCL: collectives, sharded training, checkpoints, failures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import training
from moe_kernels import device
from ranks import CHECKS, steps

from model import build

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
SOUND = [name for name in CHECKS if name != "reduce_twenty_times"]
emulated = pytest.mark.skipif(not device.emulated(), reason="provokes faults that only the emulator has")


def start(size: int, folder: Path, names: list[str], **environment: str) -> list[subprocess.Popen[str]]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "ASCEND_LAUNCH_BLOCKING": "0", **environment}
    words = [sys.executable, "-W", "ignore", str(HERE / "ranks.py")]
    return [
        subprocess.Popen(
            [*words, str(rank), str(size), str(folder), *names], env=environment, cwd=ROOT, text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )
        for rank in range(size)
    ]  # fmt: skip


def finish(processes: list[subprocess.Popen[str]], timeout_s: float) -> list[str]:
    """What each rank wrote to its error stream, once all have ended; none outlives the test."""
    try:
        return [process.communicate(timeout=timeout_s)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module", params=[2, 4])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Check -> what went wrong, of each rank."""
    if torch.accelerator.device_count() < request.param:
        pytest.skip(f"needs {request.param} devices")
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    curve = steps(build(training.V3, seed=0), 0, 1, 4, on="cpu")
    (folder / "expected.json").write_text(json.dumps(curve))
    processes = start(request.param, folder, SOUND)
    errors = finish(processes, timeout_s=300)
    assert [process.returncode for process in processes] == [0] * request.param, "\n".join(errors)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(request.param)]


@pytest.mark.parametrize("check", SOUND)
def test_on_every_rank(results: list[dict[str, str]], check: str) -> None:
    assert [found[check] for found in results] == [""] * len(results)


@emulated
def test_a_rank_that_dies_is_named_by_the_others(tmp_path: Path) -> None:
    processes = start(2, tmp_path, ["reduce_twenty_times"], FAKECANN_FAULT="exit:1:7")
    errors = finish(processes, timeout_s=120)
    assert all(process.returncode != 0 for process in processes)
    assert "rank 1 has ended; rank 0 was waiting for it" in errors[0]


@emulated
def test_a_rank_that_hangs_is_named_after_the_timeout(tmp_path: Path) -> None:
    processes = start(2, tmp_path, ["reduce_twenty_times"], FAKECANN_FAULT="hang:1:7", FAKECANN_TIMEOUT_S="2")
    errors = processes[0].communicate(timeout=120)[1]
    processes[1].kill()
    processes[1].communicate()
    assert processes[0].returncode != 0
    assert "rank 1 did not arrive in time; rank 0 was waiting for it" in errors
