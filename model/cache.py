"""What decoding keeps of the past, by position: taking tokens back only lowers a length.

A ring of slots keeps the last positions; a growing store keeps all. Every row of a batch has a length of its own, so
prompts of different lengths and speculative tokens need no copies; rows join and leave by copying what is kept of them.
Shapes: B rows, S new tokens, N slots, C channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from model.context import Context

NOWHERE = -(1 << 40)  # the position of an empty slot
STEP = 64  # a growing store shows a multiple of this many slots: products over them round alike for every number


class Cache:
    """The state of every layer for `rows` sequences; lengths_B: tokens that each of them has."""

    def __init__(self, rows: int, device: torch.device | None = None) -> None:
        self.lengths_B = torch.zeros(rows, dtype=torch.int64, device=device)
        self.capacity = 0  # no row is longer
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

    def rows(self, index_B: Tensor) -> Cache:
        """A cache of those rows, in that order; a row may come several times."""
        taken = Cache(0)
        taken._stores = {key: slots.rows(index_B) for key, slots in self._stores.items()}
        taken.settle(self.lengths_B[index_B])
        return taken

    def with_rows_of(self, other: Cache) -> Cache:
        """A cache of these rows, then those of `other`; both have been through the same layers."""
        both = Cache(0)
        both._stores = {key: slots.with_rows_of(other._stores[key]) for key, slots in self._stores.items()}
        both.settle(torch.cat([self.lengths_B, other.lengths_B]))
        return both


class Slots:
    """Vectors by position: slot p mod `size`, or slot p of a store that grows."""

    def __init__(self, size: int | None) -> None:
        self.size = size
        self.values_BNC: Tensor | None = None
        self.positions_BN: Tensor | None = None

    def rows(self, index_B: Tensor) -> Slots:
        """Those rows, copied."""
        assert self.values_BNC is not None and self.positions_BN is not None
        return self._filled(self.values_BNC[index_B], self.positions_BN[index_B])

    def with_rows_of(self, other: Slots) -> Slots:
        """These rows and those of `other`, copied, with as many slots as the larger of the two."""
        assert self.values_BNC is not None and other.values_BNC is not None
        size = max(self.values_BNC.shape[1], other.values_BNC.shape[1]) - 1
        values, positions = zip(self._widened(size), other._widened(size), strict=True)
        return self._filled(torch.cat(values), torch.cat(positions))

    def _filled(self, values_BNC: Tensor, positions_BN: Tensor) -> Slots:
        made = Slots(self.size)
        made.values_BNC, made.positions_BN = values_BNC, positions_BN
        return made

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
        have = 0 if self.values_BNC is None else self.values_BNC.shape[1] - 1
        if self.values_BNC is None:
            self.values_BNC = like_BSC.new_empty(len(like_BSC), 1, like_BSC.shape[-1])
            self.positions_BN = torch.full((len(like_BSC), 1), NOWHERE, device=like_BSC.device)
        if have < size:
            self.values_BNC, self.positions_BN = self._widened(size if self.size else max(size, 2 * have, 64))
        assert self.positions_BN is not None
        return self.values_BNC[:, : self.size or -1], self.positions_BN[:, : self.size or -1]

    def _widened(self, size: int) -> tuple[Tensor, Tensor]:
        """Values and positions with empty slots up to `size`, and one more for what is not kept."""
        assert self.values_BNC is not None and self.positions_BN is not None
        more = size + 1 - self.values_BNC.shape[1]
        if not more:
            return self.values_BNC, self.positions_BN
        return (
            F.pad(self.values_BNC[:, :-1], (0, 0, 0, more + 1)),
            F.pad(self.positions_BN[:, :-1], (0, more + 1), value=NOWHERE),
        )


def _rounded(capacity: int) -> int:
    return max(-(-capacity // STEP), 1) * STEP
