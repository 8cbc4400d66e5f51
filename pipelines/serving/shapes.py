"""Pieces of an answer in the shapes of chat and text completions, whole or as chunks of a stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipelines.serving.engine import Piece, Scored
from pipelines.serving.text import Offsets, Text


class ChatShape:
    """/v1/chat/completions."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def __init__(self, text: Text, logprobs: bool) -> None:
        self.text, self.logprobs = text, logprobs

    def first(self) -> list[dict[str, Any]]:
        """What a stream begins with."""
        return [{"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}]

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """A choice of a stream."""
        delta = {"content": piece.text} if piece.text else {}
        return {"index": 0, "delta": delta, **self._rest(piece)}

    def whole(self, piece: Piece) -> dict[str, Any]:
        """The choice of an answer."""
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return {"index": 0, "message": message, **self._rest(piece)}

    def _rest(self, piece: Piece) -> dict[str, Any]:
        content = [self._scored(scored) for scored in piece.scored] if self.logprobs else None
        logprobs = None if content is None else {"content": content, "refusal": None}
        return {"logprobs": logprobs, "finish_reason": piece.finish_reason}

    def _scored(self, scored: Scored) -> dict[str, Any]:
        best = [self._token(token, logprob) for token, logprob in scored.top]
        return {**self._token(scored.token, scored.logprob), "top_logprobs": best}

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        return {"token": self.text.token(token), "logprob": logprob, "bytes": list(self.text.bytes_of(token))}


class TextShape:
    """/v1/completions; `prompt`: what is echoed before the answer."""

    kind = chunk_kind = "text_completion"

    def __init__(self, text: Text, logprobs: bool, prompt: str = "", as_ids: bool = False) -> None:
        self.text, self.logprobs, self.prompt, self.as_ids = text, logprobs, prompt, as_ids
        self._offsets = Offsets(text)

    def first(self) -> list[dict[str, Any]]:
        """What a stream begins with."""
        return [self._choice(Piece(text=self.prompt))] if self.prompt else []

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """A choice of a stream."""
        return self._choice(piece)

    def whole(self, piece: Piece) -> dict[str, Any]:
        """The choice of an answer."""
        piece.text = self.prompt + piece.text
        return self._choice(piece)

    def _choice(self, piece: Piece) -> dict[str, Any]:
        logprobs = self._scores(piece.scored) if self.logprobs else None
        return {"index": 0, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish_reason}

    def _scores(self, scored: Sequence[Scored]) -> dict[str, Any]:
        tokens = [self._token(entry.token) for entry in scored]
        offsets = [self._offsets.push(entry.token) for entry in scored]
        top = [
            None if entry.logprob is None else {self._token(t): logprob for t, logprob in reversed(entry.top)}
            for entry in scored
        ]
        logprobs = [entry.logprob for entry in scored]
        return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": top, "text_offset": offsets}

    def _token(self, token: int) -> str:
        return f"token_id:{token}" if self.as_ids else self.text.token(token)
