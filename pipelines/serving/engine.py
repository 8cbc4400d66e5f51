"""Many requests decoded together: a thread of its own around `model/decoding.py`.

Requests wait in a queue; each step of the running rows also reads one chunk of newcomers' prompts, so that nobody
stalls long; an answer goes to its request's `emit`, piece by piece, in the engine's thread.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from moe_kernels import device as devices
from torch import Tensor

from model import decoding
from model.decoding import Batch, Reading, Sampler
from model.transformer import MoETransformer
from pipelines import models, stage
from pipelines.machine import environment
from pipelines.params import Serve
from pipelines.serving.prefixes import Prefixes
from pipelines.serving.text import Answer, Text

SPEED_WINDOW_S = 10.0  # tokens/s are of the last seconds
FIRST_ANSWER_S = 600.0  # kernels are built before it
PROMPT_LOGITS = 1 << 25  # numbers of prompt logits at a time


class QueueFull(Exception):
    """No more requests can wait."""


class Closed(Exception):
    """The engine takes no more requests."""


@dataclass(frozen=True)
class Scored:
    """A token, its log-probability (None for the first of a prompt) and the best ones in its place, best first."""

    token: int
    logprob: float | None
    top: list[tuple[int, float]]


@dataclass
class Piece:
    """What a request gets: text and scored tokens; the last piece has a finish reason, or an error."""

    text: str = ""
    scored: list[Scored] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None  # "stop", "length" or "error"

    def add(self, piece: Piece) -> None:
        """What comes after it; an error comes alone."""
        self.text = piece.text if piece.finish_reason == "error" else self.text + piece.text
        self.scored += piece.scored
        self.tokens += piece.tokens
        self.finish_reason = piece.finish_reason


@dataclass
class Request:
    """A prompt and how to go on from it. max_new_tokens 0 only reads; score_prompt: a first piece scores the prompt.

    logprobs: that many best tokens in each place, None: no scores. emit takes each `Piece` in the engine's thread.
    """

    prompt: list[int]
    max_new_tokens: int
    emit: Callable[[Piece], None]
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stops: Sequence[str] = ()
    logprobs: int | None = None
    score_prompt: bool = False
    cancelled: bool = False
    arrived_s: float = field(default_factory=time.monotonic)
    first_token_s: float | None = None
    ended_s: float | None = None
    cached_tokens: int = 0
    completion_tokens: int = 0

    def cancel(self) -> None:
        """The engine drops it at its next step."""
        self.cancelled = True


@dataclass
class _Row:
    """A request that is being read or decoded."""

    request: Request
    answer: Answer
    scored: list[Scored] = field(default_factory=list)


class Engine:
    """One loaded model that answers requests until it is closed."""

    def __init__(self, net: MoETransformer, text: Text, name: str, version: str, params: Serve) -> None:
        self.net, self.text, self.name, self.version = net.eval(), text, name, version
        self.max_batch, self.max_queue = params.max_batch, params.max_queue
        self.context = net.config.max_position_embeddings
        self.vocab_size, self.loaded_at = net.config.vocab_size, int(time.time())
        self.stop_tokens = _stop_tokens(net.config.eos_token_id)
        self._waiting: deque[Request] = deque()
        self._rows: list[_Row] = []  # in the order of the batch
        self._reading: list[tuple[_Row, Reading]] = []
        self._batch = Batch(net)
        self._prefixes = Prefixes(params.max_prefixes)
        self._closing = False
        self._changed = threading.Condition()
        self._recent: deque[tuple[float, int]] = deque()
        self._thread = threading.Thread(target=self._run, name=f"engine {name} {version}", daemon=True)
        self._thread.start()

    @classmethod
    def load(cls, folder: Path, name: str, version: str, params: Serve) -> Engine:
        """From an exported folder, on this machine's device, after a first answer; raises `UserError`."""
        stage.say(f"serve      loading {name} version {version} from {folder}")
        devices.prepare()
        device = devices.default()
        environment.require_passport(device)
        net = models.load(folder, made_by="export").to(device)
        engine = cls(net, Text(folder), name, version, params)
        try:
            engine.complete([0], 4, timeout_s=FIRST_ANSWER_S)
        except Exception:
            engine.close()
            raise
        return engine

    @property
    def alive(self) -> bool:
        """Whether it takes requests."""
        return self._thread.is_alive() and not self._closing

    @property
    def waiting(self) -> int:
        """Requests in the queue, without those that were cancelled there."""
        return sum(not request.cancelled for request in list(self._waiting))

    @property
    def running(self) -> int:
        """Requests that are read or decoded."""
        return len(self._rows) + len(self._reading)

    @property
    def tokens_per_s(self) -> float:
        """New tokens over the last seconds."""
        since = time.monotonic() - SPEED_WINDOW_S
        return sum(count for at, count in list(self._recent) if at >= since) / SPEED_WINDOW_S

    def submit(self, request: Request) -> None:
        """Queue a request; raises `QueueFull`, and `Closed` for an engine that drains."""
        with self._changed:
            if self._closing:
                raise Closed
            if self.waiting >= self.max_queue:
                raise QueueFull
            self._waiting.append(request)
            self._changed.notify()

    def complete(self, prompt: list[int], max_new_tokens: int, timeout_s: float = 60.0, **options: Any) -> list[Piece]:
        """The pieces of one answer, waited for; raises `TimeoutError`, and `RuntimeError` when the engine failed."""
        pieces: queue.Queue[Piece] = queue.Queue()
        request = Request(prompt, max_new_tokens, pieces.put, **options)
        self.submit(request)
        got: list[Piece] = []
        end = time.monotonic() + timeout_s
        while not got or got[-1].finish_reason is None:
            try:
                got.append(pieces.get(timeout=max(end - time.monotonic(), 0)))
            except queue.Empty:
                request.cancel()
                raise TimeoutError(f"no answer within {timeout_s:.0f} s") from None
        if got[-1].finish_reason == "error":
            raise RuntimeError(got[-1].text)
        return got

    def close(self) -> None:
        """Take no more requests, answer those that are here, end. Waits."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self.running or self._closing)
                if self._closing and not self._waiting and not self.running:
                    return
            try:
                self._drop_cancelled()
                self._admit()
                self._step()
            except Exception as error:  # noqa: BLE001  one bad step must not end the server
                self._fail(error)

    def _admit(self) -> None:
        """Requests that wait are read where there is room: as many prompts at a time as have a chunk's tokens."""
        read = sum(min(decoding.CHUNK, reading.length - reading.at) for _, reading in self._reading)
        while self._waiting and self.running < self.max_batch:
            if self._reading and read + len(self._waiting[0].prompt) > decoding.CHUNK:
                return
            with self._changed:
                request = self._waiting.popleft()
            row = _Row(request, Answer(self.text, request.stops))
            try:
                self._reading.append((row, self._opened(request)))
            except Exception as error:  # noqa: BLE001  memory, say; the others go on
                self._tell(error, [row])
            else:
                read += len(request.prompt)

    def _opened(self, request: Request) -> Reading:
        """Its prompt, whose beginning may be known."""
        sampler = Sampler(request.temperature, request.top_p, request.seed)
        reading = Reading(self.net, [request.prompt], [sampler], self._batch.drafts, request.score_prompt)
        if not request.score_prompt:
            request.cached_tokens = self._prefixes.resume(reading, request.prompt)
        return reading

    def _step(self) -> None:
        """The next tokens of the running rows, and the next chunk of each prompt that is read."""
        if not self.running:
            return
        starts = [reading.at for _, reading in self._reading]
        tokens, logits_BSV = self._batch.step([reading for _, reading in self._reading]), self._batch.logits_BSV
        self._leave([p for p, row in enumerate(self._rows) if self._take(row, tokens[p], logits_BSV[p])])
        for (row, reading), start in zip(self._reading, starts, strict=True):
            self._has_read(row, reading, start)
        self._reading = [(row, reading) for row, reading in self._reading if not reading.done]

    def _has_read(self, row: _Row, reading: Reading, start: int) -> None:
        """A chunk from that token on: it is scored and remembered; after the last one the row joins the others."""
        if reading.chunk_RCV is not None:
            self._score_prompt(row, reading.chunk_RCV[0], start)
        self._prefixes.remember(reading, row.request.prompt)
        if reading.done:
            self._begin(row, reading)

    def _begin(self, row: _Row, reading: Reading) -> None:
        """The prompt is read: its score goes out, its first token counts, and its row joins the others."""
        request = row.request
        if request.score_prompt:
            request.emit(Piece(scored=row.scored))
        if request.max_new_tokens == 0:
            self._end(row, Piece(finish_reason="length"))
            return
        self._rows.append(row)
        self._batch.join(reading)
        if self._take(row, reading.tokens, reading.logits_RV):
            self._leave([len(self._rows) - 1])

    def _take(self, row: _Row, tokens: list[int], logits_SV: Tensor) -> bool:
        """New tokens of a row, each chosen from its logits; sends them and says whether the answer is complete."""
        request, piece = row.request, Piece()
        for place, token in enumerate(tokens):
            request.completion_tokens += 1
            ended = token in self.stop_tokens
            piece.tokens.append(token)
            if request.logprobs is not None:
                piece.scored += scores(logits_SV[place : place + 1], [token], request.logprobs)
            piece.text += "" if ended else row.answer.push(token)
            if ended or row.answer.stopped:
                piece.finish_reason = "stop"
            elif request.completion_tokens == request.max_new_tokens:
                piece.finish_reason = "length"
            if piece.finish_reason:
                break
        self._recent.append((time.monotonic(), len(piece.tokens)))
        while self._recent[0][0] < time.monotonic() - SPEED_WINDOW_S:
            self._recent.popleft()
        request.first_token_s = request.first_token_s or time.monotonic()
        if piece.finish_reason:
            piece.text += row.answer.finish()
            self._end(row, piece)
        else:
            request.emit(piece)
        return piece.finish_reason is not None

    def _end(self, row: _Row, piece: Piece) -> None:
        """The last piece of a request; what has ended before hears no more."""
        if row.request.ended_s is None:
            row.request.ended_s = time.monotonic()
            row.request.emit(piece)

    def _leave(self, places: Iterable[int]) -> None:
        """Those rows leave, and the last ones take their places."""
        order = list(range(len(self._rows)))
        for place in sorted(places, reverse=True):
            order[place] = order[-1]
            order.pop()
        if len(order) < len(self._rows):
            self._rows = [self._rows[place] for place in order]
            self._batch.keep(order)

    def _drop_cancelled(self) -> None:
        with self._changed:
            self._waiting = deque(request for request in self._waiting if not request.cancelled)
        self._reading = [(row, reading) for row, reading in self._reading if not row.request.cancelled]
        self._leave(place for place, row in enumerate(self._rows) if row.request.cancelled)

    def _fail(self, error: Exception) -> None:
        """Everything in flight ends with an error; the queue goes on."""
        rows = [*self._rows, *(row for row, _ in self._reading)]
        self._rows, self._reading, self._batch = [], [], Batch(self.net)
        self._tell(error, rows)

    def _tell(self, error: Exception, rows: Iterable[_Row]) -> None:
        """Those rows end with an error."""
        for row in rows:
            self._end(row, Piece(text="the engine failed; try again", finish_reason="error"))
        stage.say(f"serve      a step failed: {type(error).__name__}: {error}")

    def _score_prompt(self, row: _Row, logits_CV: Tensor, start: int) -> None:
        """Scores of the prompt's tokens that a chunk's logits foretell: those from start + 1 on."""
        request = row.request
        if not row.scored:
            row.scored.append(Scored(request.prompt[0], None, []))
        tokens = request.prompt[start + 1 : start + 1 + len(logits_CV)]
        part = max(1, PROMPT_LOGITS // logits_CV.shape[1])
        for at in range(0, len(tokens), part):
            row.scored += scores(logits_CV[at : at + part], tokens[at : at + part], request.logprobs or 0)


def scores(logits_SV: Tensor, tokens: list[int], top: int) -> list[Scored]:
    """Log-probabilities of tokens under the logits in their places, and the `top` best ones there."""
    logprobs_SV = logits_SV[: len(tokens)].log_softmax(dim=-1)
    best, ids = (x.tolist() for x in logprobs_SV.topk(min(top, logits_SV.shape[1]), dim=-1))
    own = logprobs_SV.gather(1, torch.tensor(tokens, device=logits_SV.device)[:, None])[:, 0].tolist()
    return [Scored(t, lp, list(zip(i, b, strict=True))) for t, lp, i, b in zip(tokens, own, ids, best, strict=True)]


def _stop_tokens(eos: int | Sequence[int] | None) -> set[int]:
    return set() if eos is None else {eos} if isinstance(eos, int) else set(eos)
