"""What only a device can show: that compiled kernels are right there, and fast. Without one these are NOT RUN."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from kernels_of import LEFT_OUT
from moe_kernels import numerics

pytestmark = pytest.mark.triton_hardware
KERNELS = Path(__file__).parents[2] / "kernels"
SETUP = """
import json, time, torch, moe_kernels
from moe_kernels import device, numerics
here = device.default()
"""
ERRORS = """
found = {}
for name in numerics.CASES:
    chosen = moe_kernels.chosen(here)[name]
    worst = [numerics.compare(name, dtype, here)[0].error / numerics.tolerance(name, dtype)
             for dtype in numerics.dtypes(name)]
    found[name] = [chosen, max(worst)]
print(json.dumps(found))
"""
LONG_ROW = """
q, k, v = (numerics.random(1, 4096, 4, width, seed=n).bfloat16() for n, width in enumerate((192, 192, 128)))
ours = moe_kernels.attention(q.to(here), k.to(here), v.to(here), 192**-0.5).cpu()
with moe_kernels.reference_only():
    theirs = moe_kernels.attention(q.double(), k.double(), v.double(), 192**-0.5)
print(json.dumps(float((ours - theirs).norm() / theirs.norm())))
"""
SPEED = """
x, weight = (numerics.random(*shape).bfloat16().to(here) for shape in ((8192, 1024), (64, 2048, 1024)))
counts = torch.full((64,), 128, device=here)
def seconds(call):
    call()
    torch.accelerator.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        call()
    torch.accelerator.synchronize()
    return time.perf_counter() - start
def one_by_one():
    for rows, matrix in zip(x.split(128), weight, strict=True):
        torch.mm(rows, matrix.t())
print(json.dumps([seconds(lambda: moe_kernels.grouped_matmul(x, weight, counts)), seconds(one_by_one)]))
"""


def on_the_device(code: str) -> Any:
    """What a program prints in a process of its own, in which Triton compiles."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(KERNELS)}
    command = [sys.executable, "-W", "ignore", "-c", SETUP + code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def errors() -> dict[str, list[Any]]:
    """Of each operation: the backend, and its error over the tolerance."""
    return on_the_device(ERRORS)


@pytest.mark.parametrize("operation", sorted(numerics.CASES.keys() - LEFT_OUT))
def test_an_operation_computes_as_the_reference(operation: str, errors: dict[str, list[Any]]) -> None:
    backend, error = errors[operation]
    assert backend != "reference" and error <= 1


def test_attention_over_a_long_row() -> None:
    assert on_the_device(LONG_ROW) < 2e-2


def test_one_grouped_product_is_faster_than_one_product_per_expert() -> None:
    together, one_by_one = on_the_device(SPEED)
    assert together < one_by_one
