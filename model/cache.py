"""What decoding keeps of the past, by position: taking tokens back only lowers a length.

A ring of slots keeps the last positions; a growing store keeps all. Every row of a batch has a length of its own, so
prompts of different lengths and speculative tokens need no copies; rows join and leave by copying what is kept of them.
Shapes: B rows, S new tokens, N slots, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from model.context import Context

NOWHERE = -(1 << 40)  # the position of an empty slot
STEP = 64  # a growing store shows a multiple of this many slots: products over them round alike for every number


class Cache:
    """The state of every layer for `rows` sequences; lengths_B: tokens that each of them has."""

    def __init__(self, rows: int, device: torch.device | None = None) -> None:
        self.lengths_B = torch.zeros(rows, dtype=torch.int64, device=device)
        self.capacity = 0  # no row is longer
        self.frequencies: dict[str, Tensor] = {}  # of rotations, for the contexts of all passes
        self._stores: dict[tuple[str, str], Slots] = {}

    def slots(self, layer: str, name: str, size: int | None = None) -> Slots:
        """The store of that name in a layer, made on first use; size None: it grows with the rows."""
        return self._stores.setdefault((layer, name), Slots(size))

    def reserve(self, tokens: int) -> None:
        """Expect that many more tokens in the longest row."""
        self.capacity += tokens

    def settle(self, lengths_B: Tensor) -> None:
        """Say how many tokens each row has now; a later forward pass goes on from there."""
        self.lengths_B, self.capacity = lengths_B, int(lengths_B.max())

    def keep(self, rows: Sequence[int]) -> None:
        """All other rows leave; these stay, in this order. None comes before its place: `rows[i] >= i`."""
        for slots in self._stores.values():
            slots.keep(rows)
        self.settle(self.lengths_B[list(rows)])

    def extend(self, other: Cache, rows: Sequence[int]) -> None:
        """Copies of those rows of `other`, which has been through the same layers, come last."""
        for key, slots in other._stores.items():
            self.slots(*key, slots.size).extend(slots, rows)
        self.settle(torch.cat([self.lengths_B, other.lengths_B[list(rows)]]))

    def copy(self) -> Cache:
        """The same, apart."""
        same = Cache(0, self.lengths_B.device)
        same.extend(self, range(len(self.lengths_B)))
        return same


@dataclass(frozen=True)
class Part:
    """Tokens [B, S] int64 that go on where each row of a cache ends; counts_B: how many of the S are real (None: all).

    The cache is filled; who reads the output says by `Cache.settle` how many tokens stay.
    """

    input_ids: Tensor
    cache: Cache
    counts_B: Tensor | None = None


class Slots:
    """Vectors by position: slot p mod `size`, or slot p of a store that grows. Beyond the rows there may be room."""

    def __init__(self, size: int | None) -> None:
        self.size = size
        self.values_BNC: Tensor | None = None
        self.positions_BN: Tensor | None = None
        self._all_values: Tensor | None = None
        self._all_positions: Tensor | None = None

    def keep(self, rows: Sequence[int]) -> None:
        """See `Cache.keep`."""
        assert self.values_BNC is not None and self.positions_BN is not None
        for place, row in enumerate(rows):
            if row != place:
                self.values_BNC[place] = self.values_BNC[row]
                self.positions_BN[place] = self.positions_BN[row]
        self.values_BNC, self.positions_BN = self.values_BNC[: len(rows)], self.positions_BN[: len(rows)]

    def extend(self, other: Slots, rows: Sequence[int]) -> None:
        """See `Cache.extend`; as many slots as the larger of the two."""
        values, positions = other.values_BNC, other.positions_BN
        assert values is not None and positions is not None
        have, kept = 0 if self.values_BNC is None else len(self.values_BNC), values.shape[1] - 1
        self._allocate(values, have + len(rows), kept)
        assert self.values_BNC is not None and self.positions_BN is not None
        for place, row in enumerate(rows, have):
            self.values_BNC[place, :kept] = values[row, :-1]
            self.positions_BN[place, :kept] = positions[row, :-1]
            self.positions_BN[place, kept:] = NOWHERE

    def _allocate(self, like_BNC: Tensor, rows: int, size: int) -> None:
        """Room for that many rows (at least doubled when it grows) and slots, and one slot for what is not kept."""
        old, old_positions = self.values_BNC, self.positions_BN
        have, slots = (0, 0) if old is None else (len(old), old.shape[1] - 1)
        size = max(size, slots)
        if self._all_values is None or len(self._all_values) < rows or size > slots:
            room = 0 if self._all_values is None else len(self._all_values)
            room = room if rows <= room else max(rows, 2 * have)
            self._all_values = like_BNC.new_zeros(room, size + 1, like_BNC.shape[-1])
            self._all_positions = torch.full((room, size + 1), NOWHERE, device=like_BNC.device)
            if old is not None and old_positions is not None:
                self._all_values[:have, :slots] = old[:, :-1]
                self._all_positions[:have, :slots] = old_positions[:, :-1]
        assert self._all_positions is not None
        self.values_BNC, self.positions_BN = self._all_values[:rows], self._all_positions[:rows]

    def ready(self, like: Tensor, channels: int, capacity: int = 0) -> tuple[Tensor, Tensor]:
        """(values [B, N + 1, C], positions [B, N + 1]) with room for `capacity`, for an operation that fills them."""
        size = self.size or _rounded(capacity)
        if self.values_BNC is None or self.values_BNC.shape[1] <= size:
            self._room(like.new_empty(len(like), 0, channels), size)
        assert self.values_BNC is not None and self.positions_BN is not None
        return self.values_BNC, self.positions_BN

    def joined(self, x_BSC: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """(kept vectors in order of position, then the new ones [B, N + S, C]; positions [B, N + S]); keeps the new.

        Kept vectors of positions that are taken again, empty slots (they come first) and padding are `NOWHERE`.
        """
        assert self.size is not None and context.cache is not None
        old_BNC, old_BN = self._room(x_BSC, self.size)
        start_B1 = context.cache.lengths_B[:, None]
        old_BN, order_BN = torch.where(old_BN < start_B1, old_BN, NOWHERE).sort(dim=1)
        old_BNC = old_BNC.gather(1, order_BN[..., None].expand_as(old_BNC))
        new_BS = context.positions_BS
        if context.real_BS is not None:
            new_BS = torch.where(context.real_BS, new_BS, NOWHERE)
        values, positions = torch.cat([old_BNC, x_BSC], dim=1), torch.cat([old_BN, new_BS], dim=1)
        self.write(x_BSC, new_BS, new_BS >= context.ends_B[:, None] - self.size)
        return values, positions

    def write(self, x_BSC: Tensor, positions_BS: Tensor, kept_BS: Tensor, capacity: int = 0) -> Tensor:
        """Store the vectors that are to be kept; returns all slots [B, N, C]. capacity: slots that a store needs."""
        size = self.size or _rounded(capacity)
        self._room(x_BSC, size)
        assert self.values_BNC is not None and self.positions_BN is not None
        slots = self.values_BNC.shape[1] - 1  # the last one takes what is not kept
        place_BS = torch.where(kept_BS & (positions_BS >= 0), positions_BS % (self.size or slots), slots)
        self.values_BNC.scatter_(1, place_BS[..., None].expand_as(x_BSC), x_BSC)
        self.positions_BN.scatter_(1, place_BS, positions_BS)
        return self.values_BNC[:, :size]

    def _room(self, like_BSC: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Slots for `size` positions (a store at least doubles) and one for what is not kept."""
        have = -1 if self.values_BNC is None else self.values_BNC.shape[1] - 1
        if have < size:
            self._allocate(like_BSC, len(like_BSC), size if self.size else max(size, 2 * have, 64))
        assert self.values_BNC is not None and self.positions_BN is not None
        return self.values_BNC[:, : self.size or -1], self.positions_BN[:, : self.size or -1]


def _rounded(capacity: int) -> int:
    return max(-(-capacity // STEP), 1) * STEP
