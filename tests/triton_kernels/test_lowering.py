"""Every kernel compiles, which the interpreter does not show: it takes more than a compiler does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from kernels_of import kernels

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def compiled() -> list[list[str]]:
    """[kernel, target, what went wrong] of every launch that the passport's cases make."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-W", "ignore", str(HERE / "lowering.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("target", ["ascend", "nvidia"])
def test_every_kernel_compiles(target: str, compiled: list[list[str]]) -> None:
    if target not in triton.backends.backends:
        pytest.skip(f"needs a Triton that compiles for {target}")
    own = [entry for entry in compiled if entry[1] == target]
    assert sorted({kernel for kernel, *_ in own}) == sorted(kernels())
    assert [entry for entry in own if entry[2]] == []
