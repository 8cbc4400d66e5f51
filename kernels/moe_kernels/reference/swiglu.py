"""Gated activation, arXiv 2002.05202, equation 6, with the clamp of DeepSeek-V4."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def swiglu(gate_up_N2F: Tensor, limit: float | None = None) -> Tensor:
    """silu(gate) * up; `limit` clamps the gate from above and up from both sides first."""
    gate_NF, up_NF = gate_up_N2F.chunk(2, dim=-1)
    if limit is not None:
        gate_NF, up_NF = gate_NF.clamp(max=limit), up_NF.clamp(-limit, limit)
    return F.silu(gate_NF) * up_NF
