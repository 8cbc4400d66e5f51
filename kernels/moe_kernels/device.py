"""The one place that calls the runtime of a device. Everything else asks here and passes `torch.device` objects around.

The accelerator is found through `torch.accelerator`, so a backend that registers itself there (Ascend NPU, Cambricon
MLU, Moore Threads MUSA, Teco SDAA, CUDA, ...) needs no code of its own. Published peaks are in peaks.json, each with
its source and how far to trust it.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import platform
import re
import resource
import time
import warnings
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch
from torch import Tensor

USUAL_CORES = 32  # of an accelerator that does not say
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
FAILURE = re.compile(r"ERR\d{5} .*")  # the line of a torch_npu error that says what failed
DETERMINISM = {  # device -> what its libraries read from the environment when they start
    "npu": {"HCCL_DETERMINISTIC": "true"},
    "cuda": {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
}
PLUGINS = {"npu": "torch_npu", "mlu": "torch_mlu", "musa": "torch_musa", "sdaa": "torch_sdaa"}


@dataclass(frozen=True)
class Memory:
    """Bytes of one device: held by tensors now, held at most so far, and all there is."""

    allocated: int
    peak: int
    total: int


@dataclass(frozen=True)
class Peak:
    """Published FLOP/s of dense matrix products; confidence is high, medium or low."""

    flops: float
    source: str
    confidence: str


def default() -> torch.device:
    """The accelerator of this machine, or the CPU. Plugins that PyTorch did not load by itself are loaded first."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        for module in PLUGINS.values():
            if find_spec(module) is not None:
                importlib.import_module(module)
        found = torch.accelerator.current_accelerator(check_available=True)
    return found or torch.device("cpu")


def name(device: torch.device) -> str:
    """What a person calls this device: the processor's model name on a CPU, the backend's name elsewhere."""
    if device.type != "cpu":
        label = str(torch.get_device_module(device).get_device_name(device))
        return f"{label} (emulated)" if device.type == "npu" and emulated() else label
    return f"{processor()}, {threads()} threads"


def processor() -> str:
    """The CPU's model name where Linux tells it, else its architecture."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    models = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


@cache
def emulated() -> bool:
    """Whether Ascend devices of this process are those of kernels/fakecann, which computes on the CPU.

    Speed and memory of an emulated device say nothing about a real one.
    """
    try:
        return hasattr(ctypes.CDLL("libascendcl.so"), "fakecannVersion")
    except OSError:
        return False


def memory(device: torch.device) -> Memory:
    """Memory of an accelerator; on a CPU that of this process and of the machine."""
    if device.type != "cpu":
        module = torch.accelerator
        total = module.get_memory_info(device)[1]
        return Memory(module.memory_allocated(device), module.max_memory_allocated(device), total)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
    return Memory(psutil.Process().memory_info().rss, peak, psutil.virtual_memory().total)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """State of the generators of the host and of the device, to be saved with a checkpoint."""
    state = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state(device)
    return state


def restore_random_state(device: torch.device, state: dict[str, Tensor]) -> None:
    """Continue the random numbers where `random_state` left them; a state of another device type restores the host."""
    torch.set_rng_state(state["cpu"])
    if device.type != "cpu" and "device" in state:
        torch.get_device_module(device).set_rng_state(state["device"], device)


def failure(error: BaseException | None) -> str | None:
    """What a device said when it failed or ran out of memory, in one line; None when `error` has another reason."""
    while error is not None:
        first = str(error).strip().partition("\n")[0]
        if isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError):
            return first
        if isinstance(error, RuntimeError) and (found := FAILURE.search(str(error))):
            return f"{found[0].rstrip('. ')}: {first}"
        error = error.__cause__ or error.__context__
    return None


def be_deterministic(device: torch.device) -> None:
    """Equal inputs give equal bits from here on, collectives included; call it before the device's first operator.

    Operators of an accelerator that have a reproducible form take it, at some cost in speed; one that has none says so
    in a warning. The kernels that a CPU uses here have no other form.
    """
    if device.type == "cpu":
        return
    for variable, value in DETERMINISM.get(device.type, {}).items():
        os.environ.setdefault(variable, value)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what it did not write
    torch.use_deterministic_algorithms(True, warn_only=True)


def threads() -> int:
    """CPU threads that PyTorch uses."""
    return torch.get_num_threads()


def cores(device: torch.device) -> int:
    """Processors of an accelerator that run programs side by side; a CPU, which only interprets those, has 1."""
    if device.type == "cpu":
        return 1
    properties = torch.get_device_module(device).get_device_properties(device)
    names = ("multi_processor_count", "cube_core_num", "gpu_subslice_count")
    return next((int(found) for name in names if (found := getattr(properties, name, None))), USUAL_CORES)


def matmul_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device has instructions for it (AMX, AVX512-BF16, tensor units), else float32."""
    if device.type == "cpu":
        fast = any(key.endswith("bf16") and held for key, held in torch.cpu.get_capabilities().items())
    else:
        fast = getattr(torch.get_device_module(device), "is_bf16_supported", lambda: True)()
    return torch.bfloat16 if fast else torch.float32


def prepare() -> None:
    """Set this process up for training: use the cores it may run on, and keep freed memory for the next step.

    What torch_npu says of its own storage formats at the first tensor is left out.
    On a virtual machine fresh pages cost several times the copy into them; glibc returns large blocks after each use
    unless told otherwise.
    """
    warnings.filterwarnings("ignore", "Cannot create tensor with internal format")
    if "OMP_NUM_THREADS" not in os.environ and hasattr(os, "sched_getaffinity"):
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            libc.mallopt(option, 2**31 - 1)


def peak(label: str, dtype: str = "bfloat16", tflops: float | None = None) -> Peak | None:
    """Published peak of the device that `name` calls so; `tflops` overrides it; None where nothing is published.

    The longest name in peaks.json that the label starts with counts.
    """
    if tflops is not None:
        return Peak(tflops * 1e12, "given by the user", "high")
    entries = json.loads(Path(__file__).with_name("peaks.json").read_text(encoding="utf-8"))
    fitting = [entry for entry in entries if entry["dtype"] == dtype and label.startswith(entry["device"])]
    if not fitting or "emulated" in label:
        return None
    best = max(fitting, key=lambda entry: len(entry["device"]))
    return Peak(best["tflops"] * 1e12, best["source"], best["confidence"])


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
