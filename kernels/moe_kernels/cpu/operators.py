"""Declares the operators of this folder to torch.library, where fake tensors, autograd and torch.compile find them.

Schemas, shapes and gradients are Python; the kernels of the CPU join when `library.load` has loaded them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "moe_kernels_cpu"
FLOATS = (torch.float32, torch.bfloat16)  # element types that the kernels know
Autograd = tuple[Callable[..., None], Callable[..., Any]]


def operator(schema: str, shapes: Callable[..., Any], autograd: Autograd | None = None) -> None:
    """Declare "name(arguments) -> results" with the function of its results' shapes, and (what to keep, gradients)."""
    name = f"{NAMESPACE}::{schema.split('(')[0]}"
    torch.library.define(name, schema[schema.index("(") :])
    torch.library.register_fake(name, shapes)
    if autograd is not None:
        torch.library.register_autograd(name, autograd[1], setup_context=autograd[0])


def all_are(dtype: torch.dtype, *tensors: Tensor) -> bool:
    """Whether all are plain strided tensors of that dtype."""
    return all(tensor.dtype is dtype and tensor.layout is torch.strided for tensor in tensors)
