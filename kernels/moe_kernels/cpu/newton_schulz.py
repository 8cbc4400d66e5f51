"""Newton-Schulz orthogonalisation, a matrix a thread; `newton_schulz.cpp` has its cost.

Shapes: N matrices, r rows, c columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_kernels.cpu.operators import FLOATS, operator
from moe_kernels.reference import newton_schulz as reference
from moe_kernels.reference.newton_schulz import COEFFICIENTS, SMALLEST_NORM, Coefficients

LARGEST = 2**19  # elements of a matrix that one thread works on inside of its caches


@torch.no_grad()
def newton_schulz(x_Nrc: Tensor, coefficients: Coefficients = COEFFICIENTS, dtype: torch.dtype | None = None) -> Tensor:
    """U V^T of each X = U S V^T, nearly: [N, r, c] -> [N, r, c] in the dtype of `x_Nrc`; products in bfloat16."""
    rounded = (dtype or x_Nrc.dtype) is torch.bfloat16 and x_Nrc.dtype in FLOATS
    if not rounded or x_Nrc.shape[1] * x_Nrc.shape[2] > LARGEST:
        return reference.newton_schulz(x_Nrc, coefficients, dtype)
    steps = [number for step in coefficients for number in step]
    return torch.ops.moe_kernels_cpu.newton_schulz(x_Nrc.float().contiguous(), steps, SMALLEST_NORM).to(x_Nrc.dtype)


operator("newton_schulz(Tensor x, float[] steps, float smallest) -> Tensor", lambda x, *_: torch.empty_like(x))
