"""Whether Triton can compile for a device here: CUDA and others have a Triton of their own, Ascend triton-ascend."""

from __future__ import annotations

import importlib.util
import os
import warnings
from functools import cache

BESIDE_ADAPTERS = ("npu",)  # devices whose own operators compute nearly everything: nothing is missed without Triton


@cache
def load(device_type: str) -> bool:
    """Whether the kernels can run on such a device; False: the reference has to compute, and one warning says so."""
    reason = _lacking(device_type)
    if reason and device_type not in BESIDE_ADAPTERS:
        text = f"The Triton kernels are not in use on {device_type}, PyTorch computes instead: {reason}"
        warnings.warn(text, stacklevel=2)
    return not reason


def _lacking(device_type: str) -> str:
    """Why they cannot run, in one clause; empty when they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; install the package of your device, triton or triton-ascend"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    import triton

    try:
        target = triton.runtime.driver.active.get_current_target().backend
    except (RuntimeError, OSError, ImportError, AttributeError) as error:
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    backends = {"cuda": ("cuda", "hip")}.get(device_type, (device_type,))
    return "" if target in backends else f"the installed Triton compiles for {target}"
