"""Text to tokens and back: chat template, pieces of an answer as they come, stop strings."""

from __future__ import annotations

import json
from codecs import getincrementaldecoder
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from pipelines.byte_level import BYTES
from pipelines.params import UserError


class Text:
    """The tokenizer and the chat template of an exported folder. Raises `UserError` where they are missing."""

    def __init__(self, folder: Path) -> None:
        try:
            self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            self.settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        except Exception as error:  # noqa: BLE001  the library raises bare ones
            raise UserError(f"{folder} has no tokenizer that can be read ({error}); export it again.") from None
        self.added = self.tokenizer.get_added_tokens_decoder()
        self.special = [token.content for token in self.added.values() if token.special]
        self.chat_template = self.settings.get("chat_template")

    def encode(self, text: str) -> list[int]:
        """With the beginning-of-text token that the tokenizer puts first."""
        return self.tokenizer.encode(text).ids

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """A dialogue up to where the assistant goes on; raises `ValueError`."""
        for message in messages:
            if found := next((word for word in self.special if word in message["content"]), None):
                raise ValueError(f"a message holds the control token {found}; leave it out")
        if not self.chat_template:
            raise ValueError("this model has no chat template; use /v1/completions")
        names = {
            key: value for key, value in self.settings.items() if key.endswith("_token") and isinstance(value, str)
        }
        try:
            text = self._template.render(messages=messages, add_generation_prompt=True, **names)
        except TemplateError as error:
            raise ValueError(f"the chat template does not take these messages: {error}") from None
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    @cached_property
    def _template(self) -> Template:
        return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(self.chat_template)

    def decode(self, ids: Sequence[int]) -> str:
        """Without control tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def token(self, id: int) -> str:
        """One token as text, control tokens as they are written; bytes that are no text alone are U+FFFD."""
        return self.tokenizer.decode([id], skip_special_tokens=False)

    def bytes_of(self, id: int) -> bytes:
        """One token, which may be a part of a character, in UTF-8; control tokens as they are written."""
        if id in self.added:
            return self.added[id].content.encode()
        return bytes(BYTES[character] for character in self.tokenizer.id_to_token(id) or "")


class Offsets:
    """Where tokens begin in their text, which has no control tokens, in characters."""

    def __init__(self, text: Text) -> None:
        self._text, self._decoder, self._at = text, getincrementaldecoder("utf-8")("replace"), 0

    def push(self, token: int) -> int:
        """Of the next token; one that goes on with a character begins after those before it."""
        content = b"" if self._text.token(token) in self._text.special else self._text.bytes_of(token)
        if content and not 0x80 <= content[0] < 0xC0:  # a character that was begun before stays incomplete
            self._at += len(self._decoder.decode(b"", final=True))
        begin = self._at
        self._at += len(self._decoder.decode(content))
        return begin


class Answer:
    """The text of an answer as it grows, held back where it could be the beginning of a stop string."""

    def __init__(self, text: Text, stops: Sequence[str] = ()) -> None:
        self._text, self._stops = text, [stop for stop in stops if stop]
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._known, self._sent = "", 0
        self.stopped = False

    def push(self, token: int) -> str:
        """What can be sent now that this token has come."""
        self._ids.append(token)
        self._known += self._stream.step(self._text.tokenizer, token) or ""
        return self._release(self._held())

    def finish(self) -> str:
        """The rest, bytes without their end included; nothing after a stop string."""
        whole = self._text.decode(self._ids)
        if not self.stopped and whole.startswith(self._known):
            self._known = whole
        return self._release(0)

    def _release(self, held: int) -> str:
        if not self.stopped:
            places = [at for stop in self._stops if (at := self._known.find(stop, self._sent)) >= 0]
            if places:
                self._known, self.stopped, held = self._known[: min(places)], True, 0
        new = self._known[self._sent : len(self._known) - held]
        self._sent += len(new)
        return new

    def _held(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for length in range(min(longest, len(self._known) - self._sent), 0, -1):
            if any(stop.startswith(self._known[-length:]) for stop in self._stops):
                return length
        return 0
