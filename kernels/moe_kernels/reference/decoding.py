"""What the operations over a cache share: tokens one by one, each after those before it, and caches by position.

Shapes: B rows, S new tokens a row, N slots of a cache and one for what is not kept, C channels, R rotary channels.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moe_kernels.reference.rope import rotate


def new_tokens(lengths_B: Tensor, ends_B: Tensor, count: int) -> Iterator[tuple[int, int, int]]:
    """(row, place among the new tokens, position) of each new token: row b goes on from its length up to its end."""
    for row, (length, end) in enumerate(zip(lengths_B.tolist(), ends_B.tolist(), strict=True)):
        for place in range(min(count, end - length)):
            yield row, place, length + place


def keep(x_C: Tensor, values_NC: Tensor, positions_N: Tensor, position: int) -> None:
    """Write a vector to the slot of its position."""
    slot = position % (len(values_NC) - 1)
    values_NC[slot], positions_N[slot] = x_C, position


def kept(values_NC: Tensor, first: int, last: int) -> Tensor:
    """The vectors of positions from first up to last, that one left out, [T, C]."""
    if first == last:
        return values_NC[:0]
    return values_NC[torch.arange(first, last, device=values_NC.device) % (len(values_NC) - 1)]


def turned(x_HD: Tensor, position: int, frequencies_R: Tensor, factor: float = 1.0, inverse: bool = False) -> Tensor:
    """The last channels of some rows rotated to a position."""
    angles_R = position * frequencies_R
    cos, sin = (table.view(1, 1, 1, -1) for table in (angles_R.cos() * factor, angles_R.sin() * factor))
    return rotate(x_HD[None, None], cos, sin, inverse)[0, 0]
