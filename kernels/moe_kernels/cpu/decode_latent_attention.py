"""Multi-head latent attention over a cache; `decode_latent_attention.cpp` has the passes and their cost.

Without gradients. Shapes: B rows, S new tokens a row, D hidden size, N slots, C latent, R rotary channels, X = C + R.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_kernels.cpu.operators import all_are, operator
from moe_kernels.reference import decode_latent_attention as reference


def decode_latent_attention(
    x_BSD: Tensor,
    lengths_B: Tensor,
    ends_B: Tensor,
    query: Sequence[Tensor],
    key_value: Sequence[Tensor],
    output_DX: Tensor,
    values_BNX: Tensor,
    positions_BN: Tensor,
    frequencies_R: Tensor,
    factor: float,
    scale: float,
    heads: int,
    eps: float,
) -> Tensor:
    """[B, S, D]; the cache is filled in place."""
    numbers = (frequencies_R, factor, scale, heads, eps)
    if torch.is_grad_enabled() or not all_are(torch.float32, x_BSD, *query, *key_value, output_DX, values_BNX):
        return reference.decode_latent_attention(
            x_BSD, lengths_B, ends_B, query, key_value, output_DX, values_BNX, positions_BN, *numbers
        )
    weights = [[weight.contiguous() for weight in group] for group in (query, key_value)]
    return torch.ops.moe_kernels_cpu.decode_latent_attention(
        x_BSD.contiguous(), lengths_B, ends_B, *weights, output_DX.contiguous(), values_BNX, positions_BN, *numbers
    )


operator(
    "decode_latent_attention(Tensor x, Tensor lengths, Tensor ends, Tensor[] query, Tensor[] key_value, Tensor output,"
    " Tensor(a!) values, Tensor(b!) positions, Tensor frequencies, float factor, float scale, int heads, float eps)"
    " -> Tensor",
    lambda x, *others: torch.empty_like(x),
)
