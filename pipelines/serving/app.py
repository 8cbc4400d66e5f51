"""The OpenAI-compatible HTTP endpoint of a `Manager`: /v1/models, /v1/chat/completions, /v1/completions, and beside
them /health and /metrics. Mistakes of a client are answered with a 4xx in OpenAI's error format.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from pipelines.params import Serve
from pipelines.serving.call import Call
from pipelines.serving.engine import Closed, Engine, QueueFull
from pipelines.serving.guard import Guard
from pipelines.serving.ledger import Ledger
from pipelines.serving.manager import Manager
from pipelines.serving.metrics import Metrics
from pipelines.serving.protocol import ApiError, ChatRequest, CompletionRequest, Generation
from pipelines.serving.shapes import ChatShape, TextShape

Body = TypeVar("Body", bound=Generation)
RETRY_AFTER_S = 1
STREAM = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class Stream(StreamingResponse):
    """The events of a call, which ends with it: a client may hang up before the first event is asked for."""

    def __init__(self, call: Call) -> None:
        super().__init__(call.events(), media_type="text/event-stream", headers=STREAM)
        self._call = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._call.end()


def create_app(
    manager: Manager,
    params: Serve,
    ledger: Ledger,
    callers: Mapping[str, str] | None = None,
    more: Callable[[], dict[str, Any]] = dict,
) -> FastAPI:
    """The application. callers: bearer token -> who it is; None: everybody, without a token. more: for /health."""
    app = FastAPI(title="Shovel", docs_url=None, redoc_url=None)
    metrics = Metrics(manager)
    app.add_middleware(Guard, callers=callers, max_bytes=params.max_body_kib * 1024, count=metrics.count)
    app.add_exception_handler(ApiError, lambda request, error: error.response())
    app.add_exception_handler(HTTPException, lambda request, error: _http_error(error))
    _add_pages(app, manager, metrics, more)

    def account(request: Request, call: Call) -> None:
        metrics.generated(call.request, call.usage)
        caller = request.scope["caller"] or call.body.user or "anonymous"
        ledger.add(caller, call.engine.name, call.engine.version, request.url.path, call.usage)

    async def answer(request: Request, body: Generation, prepare: Callable[[Engine], Call]) -> Response:
        call = await _started(manager, body, prepare)
        call.on_end = lambda: account(request, call)
        if body.stream:
            return Stream(call)
        return JSONResponse(await call.whole(request.receive))

    @app.post("/v1/chat/completions", openapi_extra=_takes(ChatRequest))
    async def chat(request: Request) -> Response:
        """A dialogue goes on."""
        body = await _read(request, ChatRequest)
        return await answer(request, body, lambda engine: _chat(engine, body, params.max_new_tokens))

    @app.post("/v1/completions", openapi_extra=_takes(CompletionRequest))
    async def completions(request: Request) -> Response:
        """A text goes on."""
        body = await _read(request, CompletionRequest)
        return await answer(request, body, lambda engine: _completion(engine, body, params.max_new_tokens))

    return app


def _add_pages(app: FastAPI, manager: Manager, metrics: Metrics, more: Callable[[], dict[str, Any]]) -> None:
    @app.get("/health")
    def health() -> JSONResponse:
        """200 once a model answers, else 503."""
        engine = manager.current
        if engine is None or not engine.alive:
            return JSONResponse({"status": "loading"} | more(), 503)
        return JSONResponse({"status": "ready", "model": engine.name, "version": engine.version} | more())

    @app.get("/metrics")
    def prometheus() -> Response:
        """For Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        """The model that answers now."""
        return {"object": "list", "data": [_model(_engine(manager))]}

    @app.get("/v1/models/{name}")
    def model(name: str) -> dict[str, Any]:
        """It, if that is its name."""
        return _model(_engine(manager, name))


async def _started(manager: Manager, body: Generation, prepare: Callable[[Engine], Call]) -> Call:
    """The request in the queue of the current engine, which another may replace while the prompt is encoded."""
    while True:
        engine = _engine(manager, body.model)
        try:
            call = await asyncio.to_thread(prepare, engine)
            call.start()
            return call
        except ValueError as error:
            raise ApiError(400, f"{error}.") from None
        except QueueFull:
            message = f"{engine.max_queue} requests are waiting already; try again later."
            raise ApiError(429, message, "queue_full", RETRY_AFTER_S) from None
        except Closed:
            await asyncio.sleep(0.01)


def _chat(engine: Engine, body: ChatRequest, default: int) -> Call:
    prompt = engine.text.chat([message.plain() for message in body.messages])
    length = _length(engine, prompt, body.max_completion_tokens or body.max_tokens, default)
    top = (body.top_logprobs or 0) if body.logprobs else None
    return Call(engine, body, prompt, length, ChatShape(engine.text, top is not None), top)


def _completion(engine: Engine, body: CompletionRequest, default: int) -> Call:
    prompt = body.ids() or engine.text.encode(body.string())
    if max(prompt, default=0) >= engine.vocab_size:
        raise ValueError(f"token {max(prompt)} does not exist; the vocabulary has {engine.vocab_size}")
    length = _length(engine, prompt, body.max_tokens, default)
    echoed = (body.string() or engine.text.decode(prompt)) if body.echo else ""
    shape = TextShape(engine.text, body.logprobs is not None, echoed, bool(body.return_tokens_as_token_ids))
    return Call(engine, body, prompt, length, shape, body.logprobs, bool(body.echo) and body.logprobs is not None)


def _length(engine: Engine, prompt: list[int], wanted: int | None, default: int) -> int:
    """New tokens at most; raises `ApiError` when they do not fit."""
    if not prompt:
        raise ValueError("the prompt is empty; give it at least one token")
    room = engine.context - len(prompt)
    if room < 0 or (wanted or 0) > room or (wanted is None and room == 0):
        raise ApiError(
            400,
            f"This model's maximum context length is {engine.context} tokens; the prompt has {len(prompt)} and "
            f"{default if wanted is None else wanted} new ones were asked for. Shorten the prompt or lower max_tokens.",
            "context_length_exceeded",
        )
    return min(default, room) if wanted is None else wanted


def _engine(manager: Manager, name: str | None = None) -> Engine:
    """The current one; raises `ApiError` while there is none, or when it has another name."""
    engine = manager.current
    if engine is None:
        raise ApiError(503, "No model is loaded yet; try again later.", "loading", RETRY_AFTER_S)
    if name not in (None, engine.name):
        raise ApiError(404, f"The model `{name}` does not exist; this server has `{engine.name}`.", "model_not_found")
    return engine


def _model(engine: Engine) -> dict[str, Any]:
    extra = {"version": engine.version, "max_model_len": engine.context}
    return {"id": engine.name, "object": "model", "created": engine.loaded_at, "owned_by": "shovel", **extra}


async def _read(request: Request, schema: type[Body]) -> Body:
    try:
        return schema.model_validate_json(await request.body())
    except ValidationError as error:
        raise ApiError.of_body(error) from None


def _takes(schema: type[Generation]) -> dict[str, Any]:
    """The body in the OpenAPI page; it is parsed by `_read`, whose errors are OpenAI's."""
    content = {"application/json": {"schema": schema.model_json_schema()}}
    return {"requestBody": {"required": True, "content": content}}


def _http_error(error: HTTPException) -> JSONResponse:
    return ApiError(error.status_code, f"{error.detail}.").response(error.headers)
