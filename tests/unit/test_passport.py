"""The passport finds a kernel that computes wrong, says what is emulated, and holds for one stack alone."""

import json
from pathlib import Path

import moe_kernels
import pytest
import torch
from moe_kernels import dispatch, numerics
from moe_kernels.numerics import BF16, FP32

from pipelines import environment, pages, passport

CPU = torch.device("cpu")


def test_every_operation_has_cases_and_every_tolerance_an_operation() -> None:
    assert numerics.CASES.keys() == dispatch.OPERATIONS.keys()
    assert numerics.TOLERANCE.keys() <= numerics.CASES.keys() and numerics.CASES.keys() >= numerics.FP32_ONLY


@pytest.mark.parametrize("operation", sorted(numerics.CASES))
def test_operations_pass_on_this_processor(operation: str) -> None:
    for dtype in numerics.dtypes(operation):
        worst, cases = numerics.compare(operation, dtype, CPU)
        assert worst.error <= numerics.tolerance(operation, dtype) and cases > 0, worst


def swapped(x, limit):
    up, gate = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def unclamped(x, limit):
    return dispatch.FUNCTIONS["reference", "swiglu"](x, None)


def not_a_number(x, limit):
    return unclamped(x, limit) * torch.nan


def without_a_gradient(x, limit):
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate.detach()) * up


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("wrong", [swapped, unclamped, not_a_number, without_a_gradient])
def test_a_wrong_kernel_fails(wrong, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch.FUNCTIONS, ("cpu", "swiglu"), wrong)
    monkeypatch.setattr(dispatch, "_probe", lambda operation, device_type: "cpu")
    worst, _ = numerics.compare("swiglu", dtype, CPU)
    assert not worst.error <= numerics.tolerance("swiglu", dtype)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two operations, one type of block and no curve."""
    cases = {name: numerics.CASES[name] for name in ("swiglu", "expert_load")}
    monkeypatch.setattr(numerics, "CASES", cases)
    monkeypatch.setattr(passport, "block_types", lambda: [("V4", passport.V4, 1)])
    monkeypatch.setattr(passport, "curves", lambda device: [])


def test_the_page_and_the_file_hold_every_entry_and_no_network(quick: None, tmp_path: Path) -> None:
    content = passport.passport(CPU, tmp_path / "passport.json", tmp_path / "passport.html")
    assert content == json.loads((tmp_path / "passport.json").read_text()) and content["passed"]
    names = [f"{entry['name']} {entry['dtype']}" for entry in content["entries"]]
    assert names == ["swiglu float32", "swiglu bfloat16", "expert_load float32", "V4 float32", "V4 bfloat16"]
    page = (tmp_path / "passport.html").read_text()
    assert "All 5 comparisons are within" in page and "EMULATED" not in page and "http" not in page
    assert environment.digest(tmp_path / "passport.json") in page


def test_an_emulated_device_is_called_so_on_every_row(quick: None, tmp_path: Path) -> None:
    content = passport.passport(CPU, tmp_path / "passport.json", tmp_path / "passport.html")
    content["stack"] |= {"emulated": "true", "device": "Ascend910B1 (emulated)"}
    pages.write(tmp_path / "page.html", "passport.html.j2", digest="", **content)
    page = (tmp_path / "page.html").read_text()
    assert "EMULATED DEVICE" in page and page.count(">emulated</span>") == len(content["entries"])


def test_it_holds_for_one_stack(quick: None, tmp_path: Path) -> None:
    file = tmp_path / "passport.json"
    assert environment.passport(CPU, file) == environment.NO_PASSPORT
    content = passport.passport(CPU, file, tmp_path / "passport.html")
    assert environment.passport(CPU, file) == environment.digest(file)
    content["stack"]["torch"] = "2.0.0"
    file.write_text(json.dumps(content))
    assert environment.passport(CPU, file) == environment.NO_PASSPORT


def test_what_did_not_pass_is_left_to_the_reference(quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_withheld", set())
    monkeypatch.setitem(dispatch.FUNCTIONS, ("cpu", "swiglu"), swapped)
    monkeypatch.setattr(dispatch, "_probe", lambda operation, device_type: "cpu")
    content = passport.passport(CPU, tmp_path / "passport.json", tmp_path / "passport.html")
    assert "swiglu (float32)" in passport.failed(content) and not content["passed"]
    with pytest.warns(UserWarning, match="the reference computes swiglu on cpu: they did not pass the passport"):
        environment.distrust(CPU, tmp_path / "passport.json")
    assert moe_kernels.chosen(CPU)["swiglu"] == "reference" and moe_kernels.chosen(CPU)["experts"] == "cpu"
    environment.distrust(CPU, tmp_path / "passport.json")  # a second time says nothing
