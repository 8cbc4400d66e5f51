"""The passport finds a kernel that computes wrong, says what is emulated, and holds for one stack alone."""

import json
import time
from pathlib import Path

import moe_kernels
import pytest
import torch
from filelock import FileLock
from moe_kernels import cache, dispatch, numerics
from moe_kernels.numerics import BF16, FP32

from pipelines import pages
from pipelines.commands import work
from pipelines.machine import environment, passport

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


def test_a_curve_is_drawn_beside_that_of_the_reference(quick: None, tmp_path: Path, monkeypatch) -> None:
    worst = numerics.Worst(0.1, "step 1", "loss", [3], [1], 2.2, 2.0)
    curve = passport.Entry("curve", "V4", "all", "float32", 3, 1e-3, worst, ([3.0, 2.2, float("nan")], [3.0, 2.0, 1.0]))
    monkeypatch.setattr(passport, "curves", lambda device: [curve])
    content = passport.passport(CPU, tmp_path / "passport.json", tmp_path / "passport.html")
    assert content["entries"][-1]["losses"] is None and passport.failed(content) == ["V4 (float32)"]
    assert (tmp_path / "passport.html").read_text().count("data:image/svg+xml") == 1


def test_an_emulated_device_is_called_so_on_every_row(quick: None, tmp_path: Path) -> None:
    content = passport.passport(CPU, tmp_path / "passport.json", tmp_path / "passport.html")
    content["stack"] |= {"emulated": "true", "device": "Ascend910B1 (emulated)"}
    pages.write(tmp_path / "page.html", "passport.html.j2", digest="", figures=[], **content)
    page = (tmp_path / "page.html").read_text()
    assert "EMULATED DEVICE" in page and page.count(">emulated</span>") == len(content["entries"])


@pytest.fixture
def cached(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A passport of this stack in a cache of its own, made in this process, where kernels can be replaced."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(dispatch, "_withheld", set())
    file = environment.passport_file(CPU)

    def run(words: list[str], **_: object) -> None:
        assert words[-2:] == ["cpu", str(file)]
        passport.main("cpu", file)

    monkeypatch.setattr(environment.subprocess, "run", run)
    return file


@pytest.mark.filterwarnings("ignore:the reference computes")
def test_it_is_made_once_and_holds_for_one_stack(cached: Path) -> None:
    assert environment.passport(CPU) == environment.NO_PASSPORT and environment.passport_page(CPU) is None
    environment.require_passport(CPU)
    assert environment.passport(CPU) == environment.digest(cached)
    assert environment.passport_page(CPU) == cached.with_suffix(".html")
    written = cached.stat().st_mtime_ns
    environment.require_passport(CPU)
    assert cached.stat().st_mtime_ns == written
    content = json.loads(cached.read_text())
    content["stack"]["torch"] = "2.0.0"
    cached.write_text(json.dumps(content))
    assert environment.passport(CPU) == environment.NO_PASSPORT


def refused(x, limit):
    raise RuntimeError("this card has no such kernel\nand a trace")


@pytest.mark.parametrize("wrong", [swapped, refused])
def test_what_did_not_pass_is_left_to_the_reference(wrong, cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch.FUNCTIONS, ("cpu", "swiglu"), wrong)
    monkeypatch.setattr(dispatch, "_probe", lambda operation, device_type: "cpu" if operation == "swiglu" else "none")
    monkeypatch.setattr(moe_kernels, "chosen", lambda device: {"swiglu": dispatch.backend_of("swiglu", device.type)})
    monkeypatch.setattr(passport, "operations", lambda device: operations_of_swiglu(device))
    monkeypatch.setattr(passport, "blocks", lambda device: [])
    with pytest.warns(UserWarning, match="the reference computes swiglu on cpu: no passport vouches for them"):
        environment.require_passport(CPU)
    assert moe_kernels.chosen(CPU) == {"swiglu": "reference"}
    entries = json.loads(cached.read_text())["entries"]
    assert not any(entry["passed"] for entry in entries)
    if wrong is refused:
        assert entries[0]["worst"]["result"] == "error: this card has no such kernel"
        assert "this card has no such kernel" in cached.with_suffix(".html").read_text()


def operations_of_swiglu(device: torch.device):
    for dtype in (FP32, BF16):
        worst, cases = numerics.compare("swiglu", dtype, device)
        yield passport.Entry("operation", "swiglu", "cpu", passport.NAMES[dtype], cases, 1e-2, worst)


def test_a_kernel_without_an_entry_is_not_used(cached: Path) -> None:
    """The passport of the fixture knows two operations; whatever else this processor has kernels for, it leaves."""
    own = {name for name, backend in moe_kernels.chosen(CPU).items() if backend == "cpu"}
    if not own:
        pytest.skip("no compiler, no kernels")
    with pytest.warns(UserWarning, match="no passport vouches for them"):
        environment.require_passport(CPU)
    assert {name for name, backend in moe_kernels.chosen(CPU).items() if backend == "cpu"} == {"swiglu"}


def test_without_a_passport_nothing_but_the_reference_computes(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.subprocess, "run", lambda words, **_: None)  # the process that makes one breaks
    with pytest.warns(UserWarning, match="no passport vouches for them"):
        environment.require_passport(CPU)
    assert set(moe_kernels.chosen(CPU).values()) == {"reference"}
    assert environment.passport(CPU) == environment.NO_PASSPORT


def test_that_of_this_processor_holds_every_comparison_and_passes() -> None:
    """Made by a process of its own, unless this machine has it from a training before."""
    environment.make_passport(CPU, if_absent=True)
    content = json.loads(environment.passport_file(CPU).read_text())
    parts = [entry["part"] for entry in content["entries"]]
    assert (parts.count("block"), parts.count("curve")) == (12, 4) and content["passed"]
    assert {entry["name"] for entry in content["entries"] if entry["part"] == "operation"} == numerics.CASES.keys()


def test_kernels_that_serve_any_device_need_an_entry_too(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their backend is not called like the device."""
    monkeypatch.setattr(dispatch, "_probe", lambda operation, device_type: "triton")
    entry = {"part": "operation", "backend": "triton", "passed": True}
    entries = [entry | {"name": "swiglu"}, entry | {"name": "rotate"}, entry | {"name": "rotate", "passed": False}]
    monkeypatch.setattr(environment, "_entries", lambda device: entries)
    with pytest.warns(UserWarning, match="no passport vouches for them"):
        environment.require_passport(CPU)
    assert {name for name, backend in moe_kernels.chosen(CPU).items() if backend == "triton"} == {"swiglu"}


def test_while_stages_run_it_is_begun_and_it_ends_with_them(tmp_path: Path, monkeypatch, capfd) -> None:
    kernels = cache.folder("kernels")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache.folder("passports").with_name("kernels").symlink_to(kernels)
    said, patience = "", time.monotonic() + 60
    with work._examined_meanwhile():
        while "comparing" not in said and time.monotonic() < patience:
            time.sleep(0.1)
            said += capfd.readouterr().err
    assert said == f"passport   comparing {environment.devices.name(CPU)} with the reference, once for this stack\n"
    assert environment.passport(CPU) == environment.NO_PASSPORT
    with FileLock(environment.passport_file(CPU).with_suffix(".lock"), timeout=5):
        assert capfd.readouterr().err == ""
