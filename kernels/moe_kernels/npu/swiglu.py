"""Gated activation in one operator; the clamp before it is one more, with a bound per channel."""

from __future__ import annotations

import torch
from torch import Tensor

NEEDS = {"npu_swiglu": ("dim",)}


def swiglu(gate_up_N2F: Tensor, limit: float | None = None) -> Tensor:
    """silu(gate) * up; `limit` clamps the gate from above and up from both sides first."""
    if limit is not None:
        high = gate_up_N2F.new_full((gate_up_N2F.shape[-1],), limit)
        low = torch.cat([high[: len(high) // 2] * -torch.inf, high[len(high) // 2 :] * -1])
        gate_up_N2F = torch.clamp(gate_up_N2F, low, high)
    return torch.ops.npu.npu_swiglu(gate_up_N2F, dim=-1)
