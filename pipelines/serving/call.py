"""One request on its way through an engine: pieces come from the engine's thread, an answer or a stream goes out."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

from pipelines.serving.engine import Engine, Piece, Request
from pipelines.serving.protocol import ApiError, Generation, Usage, envelope
from pipelines.serving.shapes import ChatShape, TextShape

Receive = Callable[[], Awaitable[Mapping[str, Any]]]


class Call:
    """A prompt, its engine and the shape of its answer. on_end is called once, by `end`."""

    def __init__(
        self,
        engine: Engine,
        body: Generation,
        prompt: list[int],
        length: int,
        shape: ChatShape | TextShape,
        logprobs: int | None = None,
        score_prompt: bool = False,
    ) -> None:
        self.engine, self.body, self.shape = engine, body, shape
        self.on_end: Callable[[], None] = lambda: None
        self._whole = Piece()
        self.request = Request(
            prompt=prompt,
            max_new_tokens=length,
            emit=self._emit,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=secrets.randbits(63) if body.seed is None else body.seed,
            stops=body.stops,
            logprobs=logprobs,
            score_prompt=score_prompt,
        )

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        asked = self.request
        return Usage(
            prompt_tokens=len(asked.prompt),
            cached_tokens=asked.cached_tokens,
            completion_tokens=asked.completion_tokens,
        )

    def start(self) -> None:
        """Join the engine's queue; raises `QueueFull`, `Closed`."""
        self._loop, self._pieces = asyncio.get_running_loop(), asyncio.Queue[Piece]()
        self.engine.submit(self.request)

    def end(self) -> None:
        """The client has got what it gets: nothing more is generated."""
        self.request.cancel()
        self.on_end()

    def _emit(self, piece: Piece) -> None:
        """In the engine's thread; a whole answer wakes the server's only at its end."""
        if not self.body.stream:
            self._whole.add(piece)
            piece = self._whole
        if self.body.stream or piece.finish_reason:
            with suppress(RuntimeError):  # the loop is closed: the server has ended, nobody waits
                self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

    async def whole(self, receive: Receive) -> dict[str, Any]:
        """The complete answer; raises `ApiError`. A client that hangs up ends the generation."""
        gathering, hung_up = asyncio.ensure_future(self._pieces.get()), asyncio.ensure_future(_disconnect(receive))
        try:
            await asyncio.wait({gathering, hung_up}, return_when=asyncio.FIRST_COMPLETED)
            if not gathering.done():
                raise ApiError(499, "The client hung up.")
            piece = gathering.result()
            if piece.finish_reason == "error":
                raise ApiError(500, piece.text)
        finally:
            gathering.cancel()
            hung_up.cancel()
            self.end()
        head = envelope(self.shape.kind, self.engine.name, self.engine.version)
        return head | {"choices": [self.shape.whole(piece)], "usage": self.usage.shape()}

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events; whoever sends them calls `end`."""
        head = envelope(self.shape.chunk_kind, self.engine.name, self.engine.version)
        counted = self.body.stream_options is not None and self.body.stream_options.include_usage
        head |= {"usage": None} if counted else {}
        for choice in self.shape.first():
            yield _event(head | {"choices": [choice]})
        async for piece in self._each():
            if piece.finish_reason == "error":
                yield _event(ApiError(500, piece.text).body())
                break
            if piece.text or piece.scored or piece.finish_reason:
                yield _event(head | {"choices": [self.shape.chunk(piece)]})
        if counted:
            yield _event(head | {"choices": [], "usage": self.usage.shape()})
        yield "data: [DONE]\n\n"

    async def _each(self) -> AsyncIterator[Piece]:
        while True:
            piece = await self._pieces.get()
            yield piece
            if piece.finish_reason:
                return


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _event(content: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
