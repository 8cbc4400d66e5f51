"""What all layers of one forward pass share: where each token stands, masks, rotations, caches, and what they report.

Shapes: B batch, S tokens a row, T blocks of `rate` tokens, R rotary channels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from moe_kernels import linear, skinny_linear
from torch import Tensor
from torch.nn import functional as F

from model.cache import Cache
from model.config import ModelConfig
from model.rope import frequencies, rotation, rotation_scale

Rotation = tuple[Tensor, Tensor]
Made = TypeVar("Made")


@dataclass(frozen=True)
class Blocks:
    """The complete blocks of each row: `rate` neighbours of one document, counted from its first token.

    first_BT: index of a block's first token in its row. position_BT: that token's position in its document.
    visible_BST: whether the token s sees the block: same document, and its last token is not in the future.
    Rows with fewer blocks than T are filled up with blocks that nobody sees.
    """

    first_BT: Tensor
    position_BT: Tensor
    visible_BST: Tensor


class Context:
    """The state of one forward pass over rows of tokens.

    document_ids [B, S]: tokens see each other and count positions inside a run of equal ids; negative ids mark padding.
    With a cache the tokens go on where each row's cache ends, and every row is one document; counts_B says how many
    of the S tokens of each row are real (the rest is padding on the right). decoding: there are few of them, and
    kernels that take each on its own.
    """

    def __init__(
        self,
        config: ModelConfig,
        input_ids: Tensor,
        document_ids: Tensor | None = None,
        cache: Cache | None = None,
        counts_B: Tensor | None = None,
        sparse: bool = True,
        decoding: bool = False,
    ) -> None:
        self.config, self.input_ids, self.cache, self.sparse = config, input_ids, cache, sparse
        self.decoding = decoding and cache is not None  # by operations that take each token on its own
        self.parts: list[Context] = []  # with caches of their own; none: this is the only one
        self.statistics: dict[str, list[Tensor]] = {}
        self._made: dict[object, object] = {}
        self._frequencies = {} if cache is None else cache.frequencies
        length, device = input_ids.shape[1], input_ids.device
        self.real_BS: Tensor | None = None  # what counts in loads and losses; None: everything
        self.one_document = document_ids is None  # a row
        steps_S = torch.arange(length, device=device)
        if cache is not None:
            self.positions_BS = cache.lengths_B[:, None] + steps_S
            if counts_B is not None:
                self.real_BS = steps_S < counts_B[:, None]
            self.ends_B = cache.lengths_B + (length if counts_B is None else counts_B)
            cache.reserve(length)
        elif document_ids is None:
            self.positions_BS = steps_S.expand_as(input_ids)
        else:
            new_BS = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0), value=True)
            self.positions_BS = steps_S - torch.where(new_BS, steps_S, 0).cummax(dim=1).values
            self.real_BS = document_ids >= 0
        self.first_BS = steps_S - self.positions_BS  # index of the first token of each token's document

    def ahead(self) -> Context:
        """The same tokens for a block that needs the next one: the last of each document does not count."""
        inner_BS = F.pad(self.first_BS[:, 1:] == self.first_BS[:, :-1], (0, 1))
        other = copy.copy(self)
        other.real_BS = inner_BS if self.real_BS is None else inner_BS & self.real_BS
        return other

    @staticmethod
    def together(parts: list[Context]) -> Context:
        """The tokens of all those that decode, as one row; only attention takes each part by itself."""
        whole = copy.copy(parts[0])
        whole.input_ids = torch.cat([part.input_ids.flatten() for part in parts])[None]
        whole.parts = parts
        return whole

    def split(self, x: Tensor) -> list[Tensor]:
        """The [B, S, ...] of each part."""
        pieces = x.flatten(0, 1).split([part.input_ids.numel() for part in self.parts])
        return [piece.unflatten(0, part.input_ids.shape) for part, piece in zip(self.parts, pieces, strict=True)]

    def by_part(self, attend: Callable[[Tensor, Context], Tensor], x_BSD: Tensor) -> Tensor:
        """What it makes of each part."""
        if not self.parts:
            return attend(x_BSD, self)
        made = [attend(x, part).flatten(0, 1) for part, x in zip(self.parts, self.split(x_BSD), strict=True)]
        return torch.cat(made)[None]

    def note(self, name: str, value: Tensor) -> None:
        """Keep a layer's figure; the forward pass stacks those of one name."""
        self.statistics.setdefault(name, []).append(value)

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """x weight^T over the last axis."""
        if not self.decoding:
            return linear(x, weight)
        return skinny_linear(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])

    def frequencies(self, kind: str) -> Tensor:
        """Angle a position of each pair of rotary channels, [R / 2]."""
        if kind not in self._frequencies:
            self._frequencies[kind] = frequencies(self.config.qk_rope_head_dim, self.config.rope(kind))
        return self._frequencies[kind]

    def rotation(self, kind: str = "main") -> Rotation:
        """(cosine, sine) at the tokens' positions, [B, S, 1, R / 2]."""
        return self._once(("rotation", kind), lambda: self.rotation_at(self.positions_BS, kind))

    def rotation_at(self, positions_BT: Tensor, kind: str) -> Rotation:
        """(cosine, sine) at any positions, [B, T, 1, R / 2]."""
        rope = self.config.rope(kind)
        factor = 1.0 if self.config.is_v4 else rotation_scale(rope)
        return rotation(positions_BT, self.frequencies(kind), factor)

    def blocks(self, rate: int) -> Blocks:
        """The complete blocks of `rate` tokens."""
        return self._once(("blocks", rate), lambda: self._blocks(rate))

    def window_mask(self) -> Tensor:
        """Whether each token sees the W tokens before its chunk of W and those in it, [B or 1, S, 2 W] bool."""
        return self._once("window", self._window_mask)

    def _once(self, key: object, make: Callable[[], Made]) -> Made:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]  # type: ignore[return-value]

    def _blocks(self, rate: int) -> Blocks:
        length, device = self.positions_BS.shape[1], self.positions_BS.device
        count, index_S = length // rate, torch.arange(length, device=device)
        last_BS = F.pad(self.first_BS[:, rate - 1 :], (0, min(rate - 1, length)), value=-1)  # of the block's last token
        start_BS = (self.positions_BS % rate == 0) & (last_BS == self.first_BS)
        rank_BS = torch.where(start_BS, start_BS.cumsum(1) - 1, count)
        first_BT = torch.full((len(start_BS), count + 1), length, device=device)
        first_BT = first_BT.scatter(1, rank_BS, index_S.expand_as(rank_BS))[:, :count]
        exists_BT, first_BT = first_BT < length, first_BT.clamp(max=max(length - rate, 0))
        same_BST = self.first_BS.gather(1, first_BT)[:, None] == self.first_BS[:, :, None]
        visible_BST = exists_BT[:, None] & same_BST & (first_BT[:, None] + rate <= index_S[:, None] + 1)
        return Blocks(first_BT, self.positions_BS.gather(1, first_BT), visible_BST)

    def _window_mask(self) -> Tensor:
        window, length = self.config.sliding_window, self.first_BS.shape[1]
        query_S = torch.arange(length, device=self.first_BS.device)
        key_SK = (query_S // window * window - window)[:, None] + torch.arange(2 * window, device=query_S.device)
        near_SK = (key_SK <= query_S[:, None]) & (key_SK > query_S[:, None] - window) & (key_SK >= 0)
        if self.one_document:
            return near_SK[None]
        return near_SK & (key_SK >= self.first_BS[:, :, None])
