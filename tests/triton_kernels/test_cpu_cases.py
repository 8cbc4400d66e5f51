"""The tests of the compiled CPU kernels, on the Triton kernels: empty experts, odd sizes, views, one token."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[1] / "parity" / "cpu_kernels"
LONGEST = 80  # axis of a shape
# how their names begin
PARITY = ("attention", "experts", "hyper", "rms_norm", "rotate", "route", "swiglu", "window_attention")


def module(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"cpu_kernels_{file.stem}", file)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


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
        for file in sorted(FOLDER.glob("test_*.py"))
        for name, value in vars(module(file)).items()
        if name.startswith(tuple(f"test_{operation}" for operation in PARITY)) and "as_many_rows" not in name
    }
)
