"""The tests of the compiled CPU kernels, on the Triton kernels: empty experts, odd sizes, views, one token."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

FILE = Path(__file__).parents[1] / "parity" / "test_cpu_kernels.py"
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
LONGEST = 80  # axis of a shape
# how their names begin
PARITY = ("attention", "experts", "hyper", "rms_norm", "rotate", "route", "swiglu", "window_attention")


def cpu_kernels() -> ModuleType:
    """The module of the other tests, comparing with this backend."""
    spec = importlib.util.spec_from_file_location("cpu_kernels", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.BACKEND, module.TOLERANCE = "triton", TOLERANCE
    return module


def of_small_shapes(test: Callable[..., None]) -> Callable[..., None]:
    """The test without the shapes that the interpreter is too slow for."""
    for place, mark in enumerate(getattr(test, "pytestmark", [])):
        if mark.args[0] == "shape":
            shapes = [shape for shape in mark.args[1] if max(shape) <= LONGEST]
            test.pytestmark[place] = pytest.mark.parametrize("shape", shapes, ids=str).mark
    return test


globals().update(
    {
        name: of_small_shapes(value)
        for name, value in vars(cpu_kernels()).items()
        if name.startswith(tuple(f"test_{operation}" for operation in PARITY)) and "as_many_rows" not in name
    }
)
