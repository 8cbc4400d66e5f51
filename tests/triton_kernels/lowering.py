"""Compiles every launch that the passport's cases make, for the targets of the installed Triton; a card is not needed.

`python lowering.py` prints a JSON list of [kernel, target, what went wrong or nothing]. Tensors are on the meta device,
which has shapes and no data, so that it also shows that no operation asks the device how a computation came out.
For Ascend it goes as far as triton-ascend goes without CANN: through its intermediate language to Linalg.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels"))
import triton  # noqa: E402
from moe_kernels import device, dispatch, numerics  # noqa: E402
from moe_kernels.triton import library  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.int32: "*i32", torch.int8: "*i8"}
Launch = tuple[Any, dict[str, str], dict[str, Any]]  # kernel, types of its arguments, its constants


def launches() -> Iterator[Launch]:
    """One of each kernel, element types and flags."""
    found: dict[str, Launch] = {}

    def note(kernel: Any, *arguments: Any, grid: Any, warmup: bool) -> None:
        pairs = list(zip(kernel.params, arguments, strict=True))
        constants = {p.name: value for p, value in pairs if p.is_constexpr or value is None}
        types = {p.name: _type(value) for p, value in pairs if p.name not in constants}
        flags = {name: value for name, value in constants.items() if isinstance(value, bool)}
        found.setdefault(f"{name_of(kernel)} {types} {flags}", (kernel, types, constants))

    triton.JITFunction.run = note
    torch.autocast = lambda *_, **__: contextlib.nullcontext()  # which knows no meta device
    dispatch.ORDER["meta"], library.load, device.cores = ("triton",), lambda _: True, lambda _: 3
    for operation in filter(_has_kernel, numerics.CASES):
        for dtype in numerics.dtypes(operation):
            for case in numerics.CASES[operation]():
                inputs = [numerics.cast(value, dtype) for value in case.inputs]
                numerics.results(case.call, [numerics.to_device(value, torch.device("meta")) for value in inputs])
    yield from found.values()


def _has_kernel(operation: str) -> bool:
    return importlib.util.find_spec(f"moe_kernels.triton.{dispatch.OPERATIONS[operation]}") is not None


def name_of(kernel: Any) -> str:
    return f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def for_ascend(kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> None:
    """As the backend does it until it calls CANN's compiler."""
    from triton._C.libtriton import ir
    from triton.backends.ascend import compiler

    backend, context = compiler.AscendBackend(GPUTarget("npu", "Ascend910B", 0)), ir.context()
    options = backend.parse_options({})
    ir.load_dialects(context)
    backend.load_dialects(context)
    source = ASTSource(kernel, types, constants)
    module = source.make_ir(options, backend.get_codegen_implementation(), backend.get_module_map(), context)
    metadata = dict(vars(options))
    compiler.ttir_to_linalg(compiler.make_ttir(module, metadata, options), metadata, options, named_ops=True)


def for_cuda(kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> None:
    """To machine code."""
    every = {p.name: "constexpr" if p.name in constants else types[p.name] for p in kernel.params}
    triton.compile(ASTSource(kernel, every, constants), target=GPUTarget("cuda", 90, 32))


TARGETS: dict[str, Callable[..., None]] = {"ascend": for_ascend, "nvidia": for_cuda}


def attempt(target: str, launch: Launch) -> str:
    """What went wrong, in one line."""
    try:
        TARGETS[target](*launch)
    except subprocess.CalledProcessError as error:
        return (error.stderr or b"").decode().strip().partition("\n")[0] or str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}".replace("\n", " ")
    return ""


if __name__ == "__main__":
    able = [target for target in TARGETS if target in triton.backends.backends]
    print(json.dumps([[name_of(one[0]), target, attempt(target, one)] for one in launches() for target in able]))
