"""Device questions answered without an accelerator, and the published peaks."""

import json
import mmap
from pathlib import Path

import pytest
import torch
from moe_kernels import device

CPU = torch.device("cpu")


def test_memory_of_the_host_grows_with_what_is_held() -> None:
    before = device.memory(CPU)
    with mmap.mmap(-1, 64 << 20) as held:  # not from malloc, which may have pages to spare from tests before
        held[::4096] = bytes(len(held) // 4096)
        after = device.memory(CPU)
    assert after.allocated - before.allocated > 32 << 20
    assert after.peak >= after.allocated * 0.9 and after.total > after.allocated


def test_random_numbers_continue_where_they_were_left() -> None:
    torch.manual_seed(3)
    state = device.random_state(CPU)
    drawn = torch.randn(5)
    assert not torch.equal(drawn, torch.randn(5))
    device.restore_random_state(CPU, state)
    assert torch.equal(drawn, torch.randn(5))


def test_peaks_name_their_source_and_the_longest_name_counts() -> None:
    entries = json.loads(Path(device.__file__).with_name("peaks.json").read_text())
    assert all(entry["source"] and entry["confidence"] in ("high", "medium", "low") for entry in entries)
    assert device.peak("Ascend910B3").flops == 294.9e12
    assert device.peak("NVIDIA H100 80GB HBM3").flops == 989e12
    assert device.peak("Ascend910B3", tflops=300).source == "given by the user"


@pytest.mark.parametrize("label", ["Ascend910B1 (emulated)", "Xeon", "MLU590"])
def test_no_peak_is_made_up(label: str) -> None:
    assert device.peak(label) is None


def test_this_process_has_no_emulated_devices() -> None:
    assert device.default().type != "npu" or not device.emulated()


TORCH_NPU = """The Inner error is reported as above. The process exits for this inner error.
[ERROR] 2026-11-25-00:22:19 (PID:1, Device:0, RankID:-1) ERR00100 PTA call acl api failed."""


@pytest.mark.parametrize(
    ("error", "said"),
    [(RuntimeError(TORCH_NPU), "ERR00100 PTA call acl api failed: The Inner error is reported as above. The process "
      "exits for this inner error."),
     (torch.OutOfMemoryError("NPU out of memory. Tried to allocate 70.00 GiB\nmore"),
      "NPU out of memory. Tried to allocate 70.00 GiB"),
     (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None), (ValueError("ERR00100 in a text"), None)],
)  # fmt: skip
def test_a_device_that_failed_is_told_from_a_defect(error: Exception, said: str | None) -> None:
    assert device.failure(error) == said
    wrapped = ValueError("something else")
    wrapped.__cause__ = error
    assert device.failure(wrapped) == said


def test_a_cpu_is_reproducible_as_it_is() -> None:
    device.be_deterministic(CPU)
    assert not torch.are_deterministic_algorithms_enabled()
