"""The operators of torch_npu that kernels/moe_kernels/npu calls, as this wheel declares them.

A new wheel that changes one fails here, with both texts, before anything computes something else. To accept a change,
check the adapters against the wheel's documentation and run `python tests/npu/test_schema.py`.
"""

from __future__ import annotations

import importlib
import json
import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from moe_kernels import dispatch

ADAPTERS = Path(dispatch.__file__).parent / "npu"
SNAPSHOT = Path(__file__).with_name("schemas.json")


def called() -> list[str]:
    """Every torch.ops.npu operator in the adapters' text."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(ADAPTERS.glob("*.py")))
    return sorted(set(re.findall(r"torch\.ops\.npu\.(\w+)", text)))


def declared(name: str) -> str:
    return str(getattr(torch.ops.npu, name).default._schema)


@pytest.mark.parametrize("name", called())
def test_the_operator_is_declared_as_before(name: str) -> None:
    known = json.loads(SNAPSHOT.read_text())
    assert declared(name) == known.get(name), f"torch-npu {version('torch-npu')} declares {name} differently"


def test_the_snapshot_holds_what_is_called_and_nothing_else() -> None:
    assert sorted(json.loads(SNAPSHOT.read_text())) == called()


def test_every_adapter_says_what_it_needs() -> None:
    needs = {}
    for path in ADAPTERS.glob("[!_]*.py"):
        needs |= getattr(importlib.import_module(f"moe_kernels.npu.{path.stem}"), "NEEDS", {})
    assert sorted(needs) == called()


def test_an_operator_that_lacks_an_argument_falls_back_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_kernels.npu import rms_norm

    dispatch._probe.cache_clear()
    monkeypatch.setitem(rms_norm.NEEDS, "npu_rms_norm", ("gamma", "momentum"))
    with pytest.warns(UserWarning, match="rms_norm cannot use the backend npu: npu_rms_norm has no argument momentum"):
        assert dispatch.chosen(torch.device("npu"))["rms_norm"] == "reference"
    dispatch._probe.cache_clear()


if __name__ == "__main__":
    SNAPSHOT.write_text(json.dumps({name: declared(name) for name in called()}, indent=2) + "\n")
