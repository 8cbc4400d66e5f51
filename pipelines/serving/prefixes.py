"""Beginnings of prompts that were read already, as a long system message is by every dialogue that starts with it."""

from __future__ import annotations

from collections import OrderedDict

from model.batch import CHUNK, Reading
from model.cache import Cache

State = tuple[Cache, Cache | None]


class Prefixes:
    """The caches after whole chunks of prompts, by the tokens read; the one not used for longest leaves first."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._states: OrderedDict[tuple[int, ...], State] = OrderedDict()

    def remember(self, reading: Reading, prompt: list[int]) -> None:
        """What was read so far, if whole chunks; the MTP block has seen the token after them, too."""
        if self.size and not reading.done and (key := tuple(prompt[: reading.at + 1])) not in self._states:
            self._states[key] = reading.state()
            if len(self._states) > self.size:
                self._states.popitem(last=False)

    def resume(self, reading: Reading, prompt: list[int]) -> int:
        """Let a fresh reading go on after the longest beginning that is known; returns its tokens."""
        for end in range((len(prompt) - 1) // CHUNK * CHUNK, 0, -CHUNK):
            key = tuple(prompt[: end + 1])
            if key in self._states:
                self._states.move_to_end(key)
                reading.resume(end, self._states[key])
                return end
        return 0
