"""DeepSeek-V4's attention over a cache; `decode_compressed_attention.cpp` has the passes and their cost.

Shapes: B rows, S new tokens a row, D hidden size, R rotary channels. Without gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_kernels.cpu.operators import all_are, operator
from moe_kernels.reference import decode_compressed_attention as reference


def decode_compressed_attention(
    x_BSD: Tensor,
    lengths_B: Tensor,
    ends_B: Tensor,
    weights: Sequence[Tensor],
    compression: Sequence[Tensor],
    indexing: Sequence[Tensor],
    caches: Sequence[Tensor],
    frequencies_R: Tensor,
    groups: int,
    top_k: int,
    eps: float,
) -> Tensor:
    """[B, S, D]; the caches are filled in place."""
    given, numbers = (weights, compression, indexing), (frequencies_R, groups, top_k, eps)
    floats = (tensor for group in (*given, caches[::2]) for tensor in group)
    if torch.is_grad_enabled() or not all_are(torch.float32, x_BSD, *floats):
        return reference.decode_compressed_attention(x_BSD, lengths_B, ends_B, *given, caches, *numbers)
    groups_of_weights = ([weight.contiguous() for weight in group] for group in given)
    return torch.ops.moe_kernels_cpu.decode_compressed_attention(
        x_BSD.contiguous(), lengths_B, ends_B, *groups_of_weights, caches, *numbers
    )


operator(
    "decode_compressed_attention(Tensor x, Tensor lengths, Tensor ends, Tensor[] weights, Tensor[] compression,"
    " Tensor[] indexing, Tensor(a!)[] caches, Tensor frequencies, int groups, int top_k, float eps) -> Tensor",
    lambda x, *others: torch.empty_like(x),
)
