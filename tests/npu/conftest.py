"""Tests on device `npu` through the real torch_npu: `make test-npu`. Without torch_npu there is nothing to collect.

Where no Ascend card is, kernels/fakecann stands in for CANN; what only a card can show is marked `npu_hardware` and
reported as NOT RUN.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Errors are reported where they happen; without this, whatever follows one in the process is garbage without a word.
os.environ["ASCEND_LAUNCH_BLOCKING"] = "1"

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # for cases.py and ranks.py
INSTALLED = importlib.util.find_spec("torch_npu") is not None
collect_ignore_glob = [] if INSTALLED else ["test_*.py"]

# What torch_npu says by itself on import and at its first operators.
QUIET = [
    "ignore:Cannot create tensor with internal format:UserWarning",
    "ignore:.*AutoNonVariableTypeMode:UserWarning",
    "ignore::DeprecationWarning:torch_npu",
    "ignore::UserWarning:torch_npu",
    "ignore::ImportWarning",
    "ignore:.*should not be instantiated:DeprecationWarning",  # torch.compile about autograd functions, every one
]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = [item for item in items if HERE in item.path.parents]
    if not here:
        return
    from moe_kernels import device

    for item in here:
        for line in QUIET:
            item.add_marker(pytest.mark.filterwarnings(line))
        if item.get_closest_marker("npu_hardware") and device.emulated():
            item.add_marker(pytest.mark.skip(reason="needs an Ascend card"))


@pytest.fixture(scope="session")
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a snippet or a file in a new process, where settings of the emulator can differ."""

    def run(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(HERE), os.environ.get("PYTHONPATH", "")])
        words = [sys.executable, "-W", "ignore", "-c", code, *arguments]
        environment = {**os.environ, "PYTHONPATH": path, **environment}
        return subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)

    return run
