"""What stands before every request: who asks, and how long the body is. Counts the answers by status."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping
from pathlib import Path

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.params import UserError
from pipelines.serving.protocol import ApiError

OPEN = ("/health",)  # without a token
DRAINED = 64  # times the longest body: that much is read before the connection is given up


class Guard:
    """ASGI middleware. callers: bearer token -> name, None: nobody needs one. scope["caller"] is the name or None."""

    def __init__(
        self, app: ASGIApp, callers: Mapping[str, str] | None, max_bytes: int, count: Callable[[str, int], None]
    ) -> None:
        self.app, self.callers, self.max_bytes, self.count = app, callers, max_bytes, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401 or 413, or pass the request on with its body in one piece."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "other")
                self.count(route, message["status"])
            await send(message)

        try:
            scope["caller"] = self._caller(scope)
            body = await self._body(receive)
        except ApiError as error:
            await error.response()(scope, receive, counted)
            return
        if body is not None:
            await self.app(scope, _replayed(body, receive), counted)

    def _caller(self, scope: Scope) -> str | None:
        if self.callers is None or scope["path"] in OPEN:
            return None
        given = dict(scope["headers"]).get(b"authorization", b"")
        for token, name in self.callers.items():
            if hmac.compare_digest(given, b"Bearer " + token.encode()):
                return name
        raise ApiError(401, "The API key is missing or wrong; send `Authorization: Bearer KEY`.", "invalid_api_key")

    async def _body(self, receive: Receive) -> bytes | None:
        """None: the client hung up. A body that is too long is read to its end, else the client would not listen."""
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part, more = message.get("body", b""), message.get("more_body", False)
            size += len(part)
            if size <= self.max_bytes:
                parts.append(part)
            elif size > DRAINED * self.max_bytes:
                break
        if size > self.max_bytes:
            raise ApiError(413, f"The request is longer than {self.max_bytes // 1024} KiB; send less.", "too_large")
        return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body once more, then what comes after."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return messages.pop() if messages else await receive()

    return next_message


def read_callers(file: Path) -> dict[str, str]:
    """Bearer token -> name from lines of `NAME TOKEN`; raises `UserError`, also for a file that others may read."""
    if not file.is_file():
        raise UserError(f"{file} is missing; write a line `NAME TOKEN` into it for each caller.")
    if file.stat().st_mode & 0o077:
        raise UserError(f"{file} can be read by others; `chmod 600 {file}`.")
    lines = [line.split() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines or any(len(words) != 2 or len(words[1]) < 16 for words in lines):
        raise UserError(f"{file} must hold lines `NAME TOKEN` with tokens of at least 16 characters.")
    return {token: name for name, token in lines}
