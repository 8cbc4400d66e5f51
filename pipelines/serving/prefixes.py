"""Beginnings of prompts that were read already, as a long system message is by every dialogue that starts with it."""

from __future__ import annotations

from collections import OrderedDict

from model.cache import Cache
from model.decoding import CHUNK, Reading

State = tuple[Cache, Cache | None]


class Prefixes:
    """The caches after whole chunks of prompts, by the tokens read; the one not used for longest leaves first."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._states: OrderedDict[tuple[int, ...], State] = OrderedDict()

    def remember(self, reading: Reading, prompt: list[int]) -> None:
        """What was read so far, if whole chunks; the MTP block has seen the token after them, too."""
        key = tuple(prompt[: reading.at + 1])
        if self.size and not reading.done and self._known(key, reading) is None:
            self._states[key] = reading.state()
            self._states.move_to_end(key)
            if len(self._states) > self.size:
                self._states.popitem(last=False)

    def resume(self, reading: Reading, prompt: list[int]) -> int:
        """Let a fresh reading go on after the longest beginning that is known; returns its tokens."""
        for end in range((len(prompt) - 1) // CHUNK * CHUNK, 0, -CHUNK):
            key = tuple(prompt[: end + 1])
            if state := self._known(key, reading):
                self._states.move_to_end(key)
                reading.resume(end, state)
                return end
        return 0

    def _known(self, key: tuple[int, ...], reading: Reading) -> State | None:
        """One that was read without drafts is of no use to a reading with them, and makes room for its own."""
        state = self._states.get(key)
        return None if state and state[1] is None and reading.mtp_cache is not None else state
