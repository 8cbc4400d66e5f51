"""Requests and answers in OpenAI's shapes, and what of them this server does."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from starlette.responses import JSONResponse

NEUTRAL = {  # parameter -> values with which it changes nothing; anything else is refused, not ignored
    "n": (1,),
    "best_of": (1,),
    "suffix": ("",),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
TOP_LOGPROBS = 1000
STOPS, STOP_CHARACTERS = 16, 1000
UNIONS = {  # parameter -> its limit in words; pydantic tells of one of its forms only, and in terms of Python
    "prompt": "this server takes one prompt a request, which is a string or token ids",
    "stop": f"at most {STOPS} stop strings of 1 to {STOP_CHARACTERS:,} characters are supported",
    "content": "text content alone is supported, which is a string or parts of the type `text`",
}
Stop = Annotated[str, StringConstraints(min_length=1, max_length=STOP_CHARACTERS)]
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class ApiError(Exception):
    """An answer in OpenAI's error format. param: the parameter that is to blame."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        retry_after_s: int | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.retry_after_s = status, message, code, retry_after_s
        self.param = param

    @classmethod
    def of_body(cls, error: ValidationError) -> ApiError:
        """The first mistake in a body."""
        problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
        path, message = problem["loc"], problem["msg"].removeprefix("Value error, ")
        for depth, part in enumerate(path[:-1], start=1):
            if part in UNIONS:
                path, message = path[:depth], UNIONS[part]
                break
        where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)[1:]
        named = message.partition("`")[2].partition("`")[0] if problem["type"] == "value_error" else ""
        return cls(400, f"{f'`{where}`: ' if where else ''}{message}.", "invalid_request", param=where or named or None)

    def response(self, headers: Mapping[str, str] | None = None) -> JSONResponse:
        """As an answer."""
        retry = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        return JSONResponse(self.body(), self.status, {**(headers or {}), **retry})

    def body(self) -> dict[str, Any]:
        """Its JSON."""
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class StreamOptions(BaseModel):
    include_usage: bool = False


class Generation(BaseModel):
    """What both endpoints share. Unknown parameters are ignored, known ones without effect here are refused."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: Stop | Annotated[list[Stop], Field(max_length=STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=200)

    @model_validator(mode="after")
    def _refuses_what_it_cannot_do(self) -> Generation:
        for name, value in (self.model_extra or {}).items():
            if name in NEUTRAL and value is not None and value not in NEUTRAL[name]:
                raise ValueError(f"`{name}` is not supported here; leave it out")
        return self

    @property
    def stops(self) -> list[str]:
        """Stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])


class Content(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Content]

    def plain(self) -> dict[str, str]:
        """Role and text for the chat template."""
        parts = self.content if isinstance(self.content, list) else [Content(type="text", text=self.content)]
        return {"role": self.role, "content": "".join(part.text for part in parts)}


class ChatRequest(Generation):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=TOP_LOGPROBS)

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("`top_logprobs` needs `logprobs`: true")
        return self


class CompletionRequest(Generation):
    """POST /v1/completions. return_tokens_as_token_ids: tokens appear as `token_id:NUMBER`, which no two share."""

    prompt: str | Ids | Annotated[list[str | Ids], Field(min_length=1, max_length=1)]
    max_tokens: int | None = Field(None, ge=0)
    logprobs: int | None = Field(None, ge=0, le=TOP_LOGPROBS)
    echo: bool | None = None
    return_tokens_as_token_ids: bool | None = None

    def string(self) -> str:
        """The prompt where it is text, else nothing."""
        first = self._first()
        return first if isinstance(first, str) else ""

    def ids(self) -> list[int]:
        """The prompt where it is token ids, else nothing."""
        first = self._first()
        return first if isinstance(first, list) else []

    def _first(self) -> str | list[int]:
        """One prompt may come in a list."""
        alone = self.prompt[0] if len(self.prompt) == 1 and isinstance(self.prompt, list) else self.prompt
        return self.prompt if isinstance(alone, int) else alone  # type: ignore[return-value]


class Usage(BaseModel):
    """Tokens of one answer."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    def shape(self) -> dict[str, Any]:
        """As OpenAI writes it."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


def envelope(kind: str, model: str, version: str) -> dict[str, Any]:
    """What every answer, and every chunk of a stream, begins with; kind: `chat.completion`, `text_completion`, ..."""
    name = "chatcmpl" if kind.startswith("chat") else "cmpl"
    head = {"id": f"{name}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}
    return head | {"system_fingerprint": f"version-{version}"}
