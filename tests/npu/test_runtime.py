"""The device as PyTorch sees it, and what a person reads when it fails; each fault is provoked by the emulator."""

from __future__ import annotations

from collections.abc import Callable
from subprocess import CompletedProcess

import pytest
import torch
from cases import NPU, random
from moe_kernels import device

Python = Callable[..., "CompletedProcess[str]"]
emulated = pytest.mark.skipif(not device.emulated(), reason="provokes faults that only the emulator has")
TRAIN = """
import torch
weight = torch.randn(64, 64, device="npu", requires_grad=True)
for step in range(20):
    (torch.randn(64, 64, device="npu") @ weight).square().mean().backward()
    print("step", step, weight.grad.norm().item(), flush=True)
"""


def last_line(done: CompletedProcess[str], holding: str) -> str:
    assert done.returncode != 0, done.stdout
    lines = [line for line in done.stderr.splitlines() if holding in line]
    assert lines, done.stderr
    return lines[-1]


def test_the_accelerator_is_found_and_named() -> None:
    assert device.default().type == "npu"
    assert torch.accelerator.device_count() >= 1
    assert device.emulated() == ("emulated" in device.name(torch.device("npu", 0)))


def test_memory_is_counted_and_given_back() -> None:
    before = torch.accelerator.memory_allocated()
    held = torch.empty(1 << 20, device=NPU)
    assert 4 << 20 <= torch.accelerator.memory_allocated() - before <= (4 << 20) + 512
    del held
    assert torch.accelerator.memory_allocated() == before


def test_memory_and_peaks_of_the_device() -> None:
    found = device.memory(torch.device("npu", 0))
    assert 0 <= found.allocated <= found.peak <= found.total
    assert device.matmul_dtype(NPU) == torch.bfloat16
    assert (device.peak(device.name(torch.device("npu", 0))) is None) == device.emulated()


def test_random_numbers_of_the_device_continue_where_they_were_left() -> None:
    state = device.random_state(torch.device("npu", 0))
    drawn = torch.randn(5, device=NPU).cpu()
    device.restore_random_state(torch.device("npu", 0), state)
    assert torch.equal(drawn, torch.randn(5, device=NPU).cpu())


def test_copies_keep_values_for_every_dtype_and_stride() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool):
        value = (random(4, 6) * 10).abs().to(dtype)
        assert torch.equal(value.to(NPU).cpu(), value)
        assert torch.equal(value.to(NPU).t()[1:4].cpu(), value.t()[1:4])


def test_random_numbers_follow_their_seed() -> None:
    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.randn(100, device=NPU).cpu()

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


@emulated
def test_an_unknown_operator_is_named(python: Python) -> None:
    done = python("import torch; print(torch.erfinv(torch.rand(3, device='npu')).cpu())")
    assert "Erfinv" in last_line(done, "not emulated")


@emulated
def test_host_memory_passed_to_an_operator_is_noticed(python: Python) -> None:
    code = "import torch, torch_npu; torch_npu.npu_swiglu(torch.randn(2, 4)).cpu()"
    done = python(code)
    assert done.returncode != 0 and ("npu_swiglu" in done.stderr or "not in device memory" in done.stderr)


@emulated
def test_out_of_memory_at_the_size_that_was_set(python: Python) -> None:
    code = "import torch; held = [torch.empty(64 << 18, device='npu') for _ in range(9)]"
    line = last_line(python(code, FAKECANN_HBM_GIB="0.5"), "OutOfMemoryError")
    assert "NPU out of memory" in line and "512.00 MiB total capacity" in line


@emulated
def test_devices_are_as_many_as_were_asked_for(python: Python) -> None:
    counted = python("import torch; print(torch.accelerator.device_count())", FAKECANN_DEVICES="3")
    assert counted.stdout.endswith("\n3\n")
    line = last_line(python("import torch; torch.zeros(1, device='npu:3')", FAKECANN_DEVICES="3"), "Error")
    assert "Invalid NPU device" in line or "device" in line


@emulated
def test_a_wrong_setting_of_the_emulator_says_what_to_write(python: Python) -> None:
    done = python("import torch; torch.zeros(1, device='npu')", FAKECANN_DEVICES="many")
    assert done.returncode == 2
    assert "FAKECANN_DEVICES is 'many'; give a number from 1" in done.stderr


@emulated
def test_an_operator_that_fails_is_named_where_it_is_called(python: Python) -> None:
    done = python(TRAIN, FAKECANN_FAULT="operator:aclnnMatmul:5", ASCEND_LAUNCH_BLOCKING="1")
    assert "aclnnMatmul failed" in last_line(done, "fakecann:")
    assert 'File "<string>", line 5' in done.stderr


@emulated
def test_an_asynchronous_error_is_reported_at_the_next_synchronisation(python: Python) -> None:
    done = python(TRAIN, FAKECANN_FAULT="async:aclnnMatmul:5", ASCEND_LAUNCH_BLOCKING="0")
    assert "an earlier aclnnMatmul raised an exception" in last_line(done, "fakecann:")
    assert done.stdout.count("step") < 20


@emulated
def test_a_lost_device_is_reported(python: Python) -> None:
    done = python(TRAIN, FAKECANN_FAULT="lost:60", ASCEND_LAUNCH_BLOCKING="0")
    assert "the device is lost" in last_line(done, "fakecann:")
    assert 0 < done.stdout.count("step") < 20
