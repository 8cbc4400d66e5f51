"""Which backend computes an operation: that of the tensor's device where it has the operation, else the reference.

A backend is a folder beside `reference/` with the same file names: `cpu/`, `npu/` for tensors on Ascend, `triton/` for
every other accelerator and for what Ascend has no operator for, imported where it is used and not before. A
backend of compiled code has a file `library`, whose `load(device type)` says whether the code is there. A file of a
backend may say in `NEEDS` which operators it calls, with the arguments that it passes; when this installation's
operator lacks one of them, the next backend computes instead and a warning says so, once. `reference_only` forces the
reference everywhere, `withhold` for operations whose numbers nothing vouches for. A compiled graph keeps the choice
that was made when it was compiled.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

ORDER = {"cpu": ("cpu",), "npu": ("npu", "triton"), "meta": ()}  # device type -> backends, the best first
OTHERS = ("triton",)  # those of any other accelerator
OPERATIONS = {  # operation -> the file that holds it
    "adamw_step": "adamw",
    "attention": "attention",
    "balance": "balance",
    "cached_window_attention": "window_attention",
    "cross_entropy": "cross_entropy",
    "cross_entropy_with_gradient": "cross_entropy",
    "decode_compressed_attention": "decode_compressed_attention",
    "decode_experts": "decode_experts",
    "decode_latent_attention": "decode_latent_attention",
    "expert_load": "permute",
    "experts": "experts",
    "grouped_matmul": "grouped_matmul",
    "hyper_head": "hyper_connection",
    "hyper_read": "hyper_connection",
    "hyper_write": "hyper_connection",
    "index_scores": "index_scores",
    "linear": "linear",
    "newton_schulz": "newton_schulz",
    "permute": "permute",
    "rms_norm": "rms_norm",
    "rotate": "rope",
    "route": "router",
    "skinny_linear": "skinny_linear",
    "swiglu": "swiglu",
    "unpermute": "permute",
    "window_attention": "window_attention",
}
DECODING = [name for name in OPERATIONS if name.startswith(("decode_", "hyper_", "rms_norm", "skinny_"))]


def _load(backend: str, name: str) -> Callable[..., Any]:
    """The backend's function of that name, or the reference's where the backend has none."""
    own = importlib.util.find_spec(f"moe_kernels.{backend}.{OPERATIONS[name]}") is not None
    return getattr(importlib.import_module(f"moe_kernels.{backend if own else 'reference'}.{OPERATIONS[name]}"), name)


FUNCTIONS = {(backend, name): _load(backend, name) for backend in ("reference", "cpu", "npu") for name in OPERATIONS}
_forced = False  # of the whole process: backward passes and recomputation run in threads of their own
_withheld: set[tuple[str, str]] = set()  # (operation, device type)


def withhold(operations: Iterable[str], device_type: str) -> None:
    """From here on the reference computes these operations for such a device; a warning names them."""
    found = {(name, device_type) for name in operations} - _withheld
    _withheld.update(found)
    if found:
        names = ", ".join(sorted(name for name, _ in found))
        warnings.warn(f"the reference computes {names} on {device_type}: no passport vouches for them", stacklevel=2)


@contextmanager
def reference_only() -> Iterator[None]:
    """Inside, every operation is computed by the reference, on whatever device its tensors are."""
    global _forced
    before, _forced = _forced, True
    try:
        yield
    finally:
        _forced = before


def implementation(operation: str, device_type: str) -> Callable[..., Any]:
    """The function that computes `operation` for tensors on such a device."""
    return FUNCTIONS[backend_of(operation, device_type), operation]


def decodes(device_type: str) -> bool:
    """Whether kernels of its own compute whole decoding steps there, in which rows and tokens do not touch."""
    return all(backend_of(operation, device_type) != "reference" for operation in DECODING)


def chosen(device: torch.device) -> dict[str, str]:
    """Operation -> "reference" or the backend that computes it for tensors on this device, as things stand now."""
    return {name: backend_of(name, device.type) for name in OPERATIONS}


def backend_of(operation: str, device_type: str) -> str:
    """The best backend of the device of which this installation has what it needs, unless the reference is forced."""
    if _forced or (operation, device_type) in _withheld:
        return "reference"
    return _probe(operation, device_type)


# torch.compiler.assume_constant_result sets this too, but imports the compiler, two seconds, into every process.
backend_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _probe(operation: str, device_type: str) -> str:
    able = (name for name in ORDER.get(device_type, OTHERS) if _can(name, operation, device_type))
    return next(able, "reference")


def _can(backend: str, operation: str, device_type: str) -> bool:
    """Whether the backend has a function of its own for the operation, and this installation what that calls."""
    reference = FUNCTIONS["reference", operation]
    if FUNCTIONS.get((backend, operation)) is reference:
        return False
    if importlib.util.find_spec(f"moe_kernels.{backend}.library"):
        if not importlib.import_module(f"moe_kernels.{backend}.library").load(device_type):
            return False
        return FUNCTIONS.setdefault((backend, operation), _load(backend, operation)) is not reference
    needs = getattr(sys.modules[FUNCTIONS[backend, operation].__module__], "NEEDS", {})
    lacking = [text for name, arguments in needs.items() if (text := _lacks(backend, name, arguments))]
    if lacking:
        warnings.warn(f"{operation} cannot use the backend {backend}: {'; '.join(lacking)}", stacklevel=2)
    return not lacking


def _lacks(namespace: str, name: str, arguments: tuple[str, ...]) -> str:
    """What this installation's operator lacks, in words; empty when it has everything."""
    packet = getattr(getattr(torch.ops, namespace), name, None)
    if packet is None:
        return f"there is no operator {name}"
    known = {argument.name for argument in packet.default._schema.arguments}
    missing = [argument for argument in arguments if argument not in known]
    return f"{name} has no argument {', '.join(missing)}" if missing else ""
