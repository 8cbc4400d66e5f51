"""Which backend an installation uses: Triton where it is, the reference and one sentence where it is not."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import moe_kernels
import pytest
import torch
from moe_kernels import dispatch
from moe_kernels.triton import library

ROOT = Path(__file__).parents[2]
WITHOUT_OPERATOR = {"hyper_write", "newton_schulz", "route", "balance", "hyper_head", "skinny_linear"}  # of torch_npu
WITHOUT_OPERATOR |= {"linear", "decode_compressed_attention", "decode_experts", "decode_latent_attention"}
WITHOUT_OPERATOR |= {"index_scores"}
CUDA, NPU = torch.device("cuda"), SimpleNamespace(type="npu")  # PyTorch alone knows no device of that name


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    for memory in (dispatch._probe, library.load):
        memory.cache_clear()
    yield
    for memory in (dispatch._probe, library.load):
        memory.cache_clear()


def without(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on no module of that name is found."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module, *more: None if module == name else find(module))


def test_importing_the_operations_does_not_import_triton() -> None:
    code = "import sys, moe_kernels; assert not [name for name in sys.modules if name.split('.')[0] == 'triton']"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(ROOT / "kernels")})


def test_without_triton_the_reference_computes_and_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    without("triton", monkeypatch)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert set(moe_kernels.chosen(CUDA).values()) == {"reference"}
        assert set(moe_kernels.chosen(torch.device("meta")).values()) == {"reference"}
    assert [str(warning.message) for warning in said] == [
        "The Triton kernels are not in use on cuda, PyTorch computes instead: Triton is not installed; install the"
        " package of your device, triton or triton-ascend"
    ]


def test_an_npu_misses_nothing_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    without("triton", monkeypatch)
    monkeypatch.setattr(dispatch, "_lacks", lambda *_: "")
    chosen = moe_kernels.chosen(NPU)
    assert {name for name, backend in chosen.items() if backend == "reference"} == WITHOUT_OPERATOR


def stand_in(monkeypatch: pytest.MonkeyPatch, target: Any) -> None:
    """A Triton that is there, compiles for `target` (or raises it) and holds a function for each operation."""

    def current() -> SimpleNamespace:
        if isinstance(target, Exception):
            raise target
        return SimpleNamespace(backend=target)

    active = SimpleNamespace(get_current_target=current)
    module = SimpleNamespace(runtime=SimpleNamespace(driver=SimpleNamespace(active=active)))
    monkeypatch.setitem(sys.modules, "triton", module)
    find, load = importlib.util.find_spec, dispatch._load
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: module if name == "triton" else find(name))
    own = lambda backend, name: object() if backend == "triton" else load(backend, name)  # noqa: E731
    monkeypatch.setattr(dispatch, "_load", own)
    monkeypatch.setattr(dispatch, "FUNCTIONS", dict(dispatch.FUNCTIONS))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_triton_serves_cuda_and_what_ascend_has_no_operator_for(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "cuda")
    assert set(moe_kernels.chosen(CUDA).values()) == {"triton"}
    stand_in(monkeypatch, "npu")
    monkeypatch.setattr(dispatch, "_lacks", lambda *_: "")
    chosen = moe_kernels.chosen(NPU)
    assert {name for name, backend in chosen.items() if backend == "triton"} == WITHOUT_OPERATOR
    assert chosen["experts"] == "npu"
    with moe_kernels.reference_only():
        assert set(moe_kernels.chosen(CUDA).values()) == {"reference"}


@pytest.mark.parametrize(
    ("target", "reason"),
    [("npu", "the installed Triton compiles for npu"), (RuntimeError("0 active drivers ([]).\nmore"), "0 active driv")],
    ids=["another target", "no driver"],
)
def test_a_triton_that_does_not_compile_for_the_device(target: Any, reason: str, monkeypatch) -> None:
    stand_in(monkeypatch, target)
    with pytest.warns(UserWarning, match=f"not in use on cuda, PyTorch computes instead: {reason}"):
        assert moe_kernels.chosen(CUDA)["experts"] == "reference"
