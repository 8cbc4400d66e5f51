"""The compiled kernels of the CPU are in use, and tests may change the number of threads."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator

import pytest
import torch
from moe_kernels.cpu import library


@pytest.fixture(autouse=True)
def compiled() -> None:
    if not any(map(shutil.which, library.COMPILERS)):
        pytest.skip("needs a C++ compiler")
    assert library.load()


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
