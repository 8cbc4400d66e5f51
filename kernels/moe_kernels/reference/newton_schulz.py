"""Newton-Schulz orthogonalisation: every singular value of a matrix goes to 1, by matrix products alone.

Shapes: N matrices, r rows, c columns; m = min(r, c), k = max(r, c).

X_0 = X / ||X||_F, then X <- (a I + b A + c A^2) X with A = X X^T, an odd quintic in each singular value. The first
eight steps of `COEFFICIENTS` lift small singular values quickly and leave all near 1, the last two settle them there.
Tall matrices are transposed first, so that A is [m, m]. Muon: arXiv 2502.16982, section 2.1; the coefficients:
DeepSeek-V4, arXiv 2606.19348, section 2.4.

`POLAR_EXPRESS` takes half the products (arXiv 2505.16932, algorithm 1): each polynomial is the one that brings what the
steps before have left of [1e-3, 1] nearest to 1, for numbers 2 % larger, since those beyond its interval would run
away. They end in [0.82, 1.13], smaller ones below; DeepSeek-V4's take them from 5e-5 on to 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Coefficients = Sequence[tuple[float, float, float]]
COEFFICIENTS = ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2
POLAR_EXPRESS = (
    (8.1253, -22.2394, 15.6732),
    (4.0268, -2.7784, 0.4936),
    (3.8715, -2.7417, 0.4999),
    (3.2532, -2.3449, 0.4620),
    (2.3005, -1.6688, 0.4188),
)
SCHEDULES = {"deepseek-v4": COEFFICIENTS, "polar-express": POLAR_EXPRESS}
SMALLEST_NORM = 1e-15  # a matrix of zeros stays one; squares of smaller entries leave the range of fp32


@torch.no_grad()
def newton_schulz(
    x_Nrc: Tensor,
    coefficients: Coefficients = COEFFICIENTS,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """U V^T of each X = U S V^T, nearly: [N, r, c] -> [N, r, c] in the dtype of `x_Nrc`.

    coefficients: (a, b, c) of each step. dtype: of the matrix products, bfloat16 is enough; None: that of `x_Nrc`.
    """
    tall = x_Nrc.shape[1] > x_Nrc.shape[2]
    norm_N11 = torch.linalg.vector_norm(x_Nrc, dim=(1, 2), keepdim=True).clamp_(min=SMALLEST_NORM)
    x_Nmk = (x_Nrc / norm_N11).to(dtype or x_Nrc.dtype)
    x_Nmk = (x_Nmk.mT if tall else x_Nmk).contiguous()
    gram_Nmm = x_Nmk.new_empty(*x_Nmk.shape[:2], x_Nmk.shape[1])
    factor_Nmm, next_Nmk = torch.empty_like(gram_Nmm), torch.empty_like(x_Nmk)
    for a, b, c in coefficients:
        torch.bmm(x_Nmk, x_Nmk.mT, out=gram_Nmm)
        torch.baddbmm(gram_Nmm, gram_Nmm, gram_Nmm, beta=b, alpha=c, out=factor_Nmm)
        torch.baddbmm(x_Nmk, factor_Nmm, x_Nmk, beta=a, out=next_Nmk)
        x_Nmk, next_Nmk = next_Nmk, x_Nmk
    return (x_Nmk.mT if tall else x_Nmk).to(x_Nrc.dtype)
