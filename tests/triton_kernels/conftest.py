"""Tests of the Triton kernels on the CPU by Triton's interpreter: `make test-triton`. Without Triton there are none.

What only an accelerator can show is marked `triton_hardware` and reported as NOT RUN.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # for kernels_of.py
INSTALLED = importlib.util.find_spec("triton") is not None
collect_ignore_glob = [] if INSTALLED else ["test_*.py"]
os.environ |= {"TRITON_INTERPRET": "1"} if INSTALLED else {}

# What NumPy says of infinities, which a device computes with without a word.
QUIET = ["ignore:(overflow|divide by zero|invalid value) encountered:RuntimeWarning"]


def pytest_configure() -> None:
    """The interpreter of triton-ascend 3.2 takes arrays of one element for numbers, which NumPy 2.4 no longer does; it
    cuts numbers to bfloat16, where devices round; and it patches the language at every call of a function, where once
    is enough and several times as fast."""
    if not INSTALLED:
        return
    import triton
    from triton.runtime import interpreter

    if not triton.__version__.startswith("3.2."):
        return
    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor: Any) -> None:
        patch_tensor(tensor)
        tensor.__index__ = lambda self: self.handle.data.item()

    convert = interpreter._convert_float

    def rounded(value: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
        if (source.name, target.name) != ("fp32", "bf16"):
            return convert(value, source, target, mode)
        return torch.from_numpy(np.array(value)).bfloat16().view(torch.int16).numpy().view(np.uint16)

    interpreter._patch_lang_tensor, interpreter._convert_float = patched, rounded
    interpreter._patch_lang = cache(interpreter._patch_lang)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    from moe_kernels import device

    for item in (item for item in items if HERE in item.path.parents):
        for line in QUIET:
            item.add_marker(pytest.mark.filterwarnings(line))
        if item.get_closest_marker("triton_hardware") and device.default().type == "cpu":
            item.add_marker(pytest.mark.skip(reason="needs a device that Triton compiles for"))


@pytest.fixture(autouse=True)
def interpreted() -> Iterator[None]:
    """Tensors on the CPU are computed by the Triton kernels, in three programs side by side."""
    from moe_kernels import device, dispatch

    dispatch._probe.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dispatch.ORDER, "cpu", ("triton",))
        patch.setattr(device, "cores", lambda _: 3)
        patch.setattr("moe_kernels.triton.tiles.ELSEWHERE", 1)
        patch.setattr("kernel_cases.BACKEND", "triton")
        patch.setattr("kernel_cases.TOLERANCE", {torch.float32: 2e-5, torch.bfloat16: 2e-2})
        yield
    dispatch._probe.cache_clear()
