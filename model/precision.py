"""Where matrix products round: bfloat16 over fp32 weights, or fp32 whatever surrounds it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from moe_kernels.autocast import in_autocast_dtype
from torch import Tensor


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """bfloat16 matrix products over fp32 weights, or nothing. precision: "bfloat16" or "float32"."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bfloat16" else nullcontext()


def rounded(x: Tensor) -> Tensor:
    """`x` in the dtype of autocast where that is on: once, for all that multiply it."""
    return in_autocast_dtype(x)[0]
