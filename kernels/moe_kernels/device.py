"""The one place that knows device names. Everything else asks here and passes `torch.device` objects around.

The accelerator is found through `torch.accelerator`, so a backend that registers itself there (Ascend NPU, Cambricon
MLU, Moore Threads MUSA, Teco SDAA, CUDA, ...) needs no code of its own.
"""

from __future__ import annotations

import ctypes
import os
import platform
import time
from functools import cache
from pathlib import Path

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
COLLECTIVES = {"npu": "hccl", "mlu": "cncl", "musa": "mccl", "sdaa": "tccl", "cuda": "nccl", "cpu": "gloo"}


def default() -> torch.device:
    """The accelerator of this machine, or the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def collective(device: torch.device) -> str:
    """Backend for torch.distributed: the device's own collectives, with gloo for objects on the host."""
    name = COLLECTIVES.get(device.type, "gloo")
    return name if device.type == "cpu" else f"cpu:gloo,{device.type}:{name}"


def name(device: torch.device) -> str:
    """What a person calls this device: the processor's model name on a CPU, the backend's name elsewhere."""
    if device.type != "cpu":
        label = str(torch.get_device_module(device).get_device_name(device))
        return f"{label} (emulated)" if device.type == "npu" and emulated() else label
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor() or platform.machine()}, {threads()} threads"


@cache
def emulated() -> bool:
    """Whether Ascend devices of this process are those of kernels/fakecann, which computes on the CPU."""
    try:
        return hasattr(ctypes.CDLL("libascendcl.so"), "fakecannVersion")
    except OSError:
        return False


def threads() -> int:
    """CPU threads that PyTorch uses."""
    return torch.get_num_threads()


def matmul_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device has instructions for it (AMX, AVX512-BF16, tensor units), else float32."""
    if device.type == "cpu":
        fast = any(key.endswith("bf16") and held for key, held in torch.cpu.get_capabilities().items())
    else:
        fast = getattr(torch.get_device_module(device), "is_bf16_supported", lambda: True)()
    return torch.bfloat16 if fast else torch.float32


def prepare() -> None:
    """Set this process up for training: use the cores it may run on, and keep freed memory for the next step.

    On a virtual machine fresh pages cost several times the copy into them; glibc returns large blocks after each use
    unless told otherwise.
    """
    if "OMP_NUM_THREADS" not in os.environ and hasattr(os, "sched_getaffinity"):
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            libc.mallopt(option, 2**31 - 1)


@cache
def measured_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best square matmul of 1024 and 2048 in `dtype`, measured now, in about 0.2 s."""
    return max(_matmul_flops(device, dtype, size) for size in (1024, 2048))


def _matmul_flops(device: torch.device, dtype: torch.dtype, size: int) -> float:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        torch.mm(a, b)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
