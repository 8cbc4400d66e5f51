"""Sequences that are decoded together, and join and leave between steps (continuous batching, Orca, OSDI 2022).

A prompt is read alone or with prompts of its length, a chunk a pass (`Reading`: chunked prefill); then its rows join a
`Batch`, each of whose steps gives a row its next tokens. A model with multi-token prediction speculates: the MTP block
drafts one token ahead, the next pass checks the draft along with its own token, and a right one saves a pass
(DeepSeek-V3, arXiv 2412.19437, section 5.4.3). With a temperature, a draft is right if it is the token that was drawn.

What a row gets does not depend on its neighbours, and each row draws from a generator of its own. Where there are
kernels for it, a pass takes every token on its own (`MoETransformer.decodes`): then neither neighbours nor drafts
change a bit. Elsewhere the tokens of a pass are filled up to where products and elementary functions round alike for
every number of them (`tokens_of_a_pass`), and sums over the past are taken in parts of fixed size: the same bits on a
CPU for the presets' sizes, the same but for rounding for odd ones.

Shapes: B rows (real ones, then copies of the first where they are filled up), R rows of a reading, S tokens, C tokens
of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from moe_kernels import skinny_linear
from torch import Tensor
from torch.nn import functional as F

from model.cache import Cache, Part

if TYPE_CHECKING:
    from model.config import ModelConfig
    from model.transformer import MoETransformer, Output

CHUNK = 256  # prompt tokens a pass
COST = 1.55  # of a step with drafts, in steps without: 1.4 to 1.8 were measured, for 1 to 16 rows
PATIENCE = 2.5  # steps that drafting may be behind
MULTIPLE = 4  # rows of a product
VECTORS = 32  # numbers that a processor's vector unit takes at a time; what is left over is rounded otherwise


class Sampler:
    """Chooses the tokens of one row: temperature 0 is greedy, top_p keeps the smallest set of tokens with that
    probability (nucleus sampling, arXiv 1904.09751). Draws happen on the CPU: a seed means the same on every device.
    """

    def __init__(self, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0) -> None:
        if not 0 <= temperature < float("inf") or not 0 < top_p <= 1:
            raise ValueError("temperature must be >= 0 and finite, and 0 < top_p <= 1")
        self.temperature, self.top_p = temperature, top_p
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, logits_V: Tensor) -> int:
        """The next token of a row that is not greedy: where a uniform number falls among the sums of probabilities."""
        p_V = ((logits_V - logits_V.max()).cpu().double() / self.temperature).softmax(dim=-1)
        uniform = torch.rand((), dtype=torch.float64, generator=self.generator)
        if self.top_p == 1:
            return _place(p_V.cumsum(dim=-1), uniform)
        kept_K, order_K = self._nucleus(p_V)
        return int(order_K[_place(kept_K.cumsum(dim=-1), uniform)])

    def _nucleus(self, p_V: Tensor) -> tuple[Tensor, Tensor]:
        """(probabilities, tokens) of the smallest set with probability top_p, best first."""
        count, whole = 64, len(p_V)
        while True:
            p_K, order_K = p_V.topk(min(count, whole))
            kept = int((p_K.cumsum(dim=-1) - p_K < self.top_p).sum())
            if kept < len(p_K) or len(p_K) == whole:
                return p_K[:kept], order_K[:kept]
            count *= 8


def _place(sums_V: Tensor, uniform: Tensor) -> int:
    """The first place whose sum is above that share of the whole; one of probability zero is never it."""
    return min(int(torch.searchsorted(sums_V, uniform * sums_V[-1], right=True)), len(sums_V) - 1)


def choose(logits_RV: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """One token a row."""
    best = logits_RV.argmax(dim=-1).tolist()
    return [sampler.draw(logits_RV[row]) if sampler.temperature else best[row] for row, sampler in enumerate(samplers)]


class Reading:
    """Prompts of one length on their way into a batch: `advance` until `done`, then `tokens` has the first new ones.

    with_logits: `chunk_RCV` has those of the last chunk, [R, C, V] fp32.
    """

    def __init__(
        self,
        net: MoETransformer,
        prompts: Sequence[Sequence[int]],
        samplers: Sequence[Sampler],
        speculate: bool = True,
        with_logits: bool = False,
    ) -> None:
        self.net, self.samplers, self.length, self.at = net, list(samplers), len(prompts[0]), 0
        device = net.lm_head.weight.device
        self.ids_RS = torch.tensor([list(prompt) for prompt in prompts], dtype=torch.int64, device=device)
        self.cache = Cache(len(prompts), device)
        self.mtp_cache = Cache(len(prompts), device) if speculate and net.config.num_nextn_predict_layers else None
        self.tokens: list[int] = []
        self.drafts: list[int] = []
        self.with_logits = with_logits
        self.chunk_RCV: Tensor | None = None

    @property
    def done(self) -> bool:
        """Whether all is read."""
        return self.at == self.length

    def state(self) -> tuple[Cache, Cache | None]:
        """Copies of what the trunk and the MTP block have seen, for `resume` of a reading with the same tokens so far
        and the same one after them."""
        return self.cache.copy(), None if self.mtp_cache is None else self.mtp_cache.copy()

    def resume(self, at: int, state: tuple[Cache, Cache | None]) -> None:
        """Go on after `at` tokens, a multiple of `CHUNK`, as if they had been read here."""
        self.at, self.cache = at, state[0].copy()
        self.mtp_cache = None if state[1] is None or self.mtp_cache is None else state[1].copy()

    @torch.inference_mode()
    def advance(self) -> None:
        """Read the next chunk by itself."""
        self.take(self.net.forward_parts([self.part()])[0])

    def part(self) -> Part:
        """The next chunk, filled up to what a pass needs."""
        part_RC = self.ids_RS[:, self.at : self.at + CHUNK]
        return Part(self._filled(part_RC), self.cache, torch.full_like(self.cache.lengths_B, part_RC.shape[1]))

    def take(self, out: Output) -> None:
        """What came of it."""
        count = min(CHUNK, self.length - self.at)
        self.cache.settle(self.cache.lengths_B + count)
        self.at += count
        next_RC = self.ids_RS[:, self.at - count + 1 : self.at + 1]
        if self.done:
            self.logits_RV = _head(self.net, out.hidden[:, count - 1])
            self.tokens = choose(self.logits_RV, self.samplers)
            next_RC = torch.cat([next_RC, next_RC.new_tensor(self.tokens)[:, None]], dim=1)
        if self.mtp_cache is not None:
            counts_R = torch.full_like(self.mtp_cache.lengths_B, count)
            hidden = self.net.mtp_hidden(out.state, self._filled(next_RC), self.mtp_cache, counts_R)
            self.mtp_cache.settle(self.mtp_cache.lengths_B + count)
            self.drafts = _head(self.net, hidden[:, count - 1]).argmax(dim=-1).tolist()
        self.chunk_RCV = _head(self.net, out.hidden)[:, :count] if self.with_logits else None

    def _filled(self, ids_RC: Tensor) -> Tensor:
        count = ids_RC.shape[1]
        return ids_RC if self.net.decodes(count) else F.pad(ids_RC, (0, -count % tokens_of_a_pass(self.net.config)))


class DraftMonitor:
    """Whether drafting pays, judged by how many tokens its steps bring: given up once they are behind by a few steps.

    A sum of what the steps lack, never below zero (CUSUM, Page 1954): a model that drafts well may miss at times. No
    clock is asked, so what is decoded follows from the model and the prompts alone.
    """

    def __init__(self) -> None:
        self.behind = 0.0

    def note(self, tokens: float) -> None:
        """A step with drafts has brought so many tokens a row."""
        self.behind = max(0.0, self.behind + COST - tokens)

    @property
    def pays(self) -> bool:
        """Whether to go on drafting."""
        return self.behind <= PATIENCE


class Batch:
    """The state of the rows: what the trunk and the MTP block have seen, and the token and the draft that come next."""

    def __init__(self, net: MoETransformer) -> None:
        self.net, self.monitor = net, DraftMonitor()
        self.samplers: list[Sampler] = []
        self.logits_BSV: Tensor | None = None  # of the last step: those of row r's tokens are the first ones of [r]

    def __len__(self) -> int:
        return len(self.samplers)

    @property
    def drafts(self) -> bool:
        """Whether a reading for it needs drafts; it does for an empty batch, which tries anew whether they pay."""
        return not len(self) or self.mtp_cache is not None

    @torch.inference_mode()
    def join(self, reading: Reading) -> None:
        """The rows of a reading that is done come last."""
        assert reading.done
        new = list(zip(reading.tokens, reading.drafts or reading.tokens, strict=True))
        if not len(self):
            self.next, self.cache, self.mtp_cache, self.monitor = new, reading.cache, reading.mtp_cache, DraftMonitor()
        else:
            self._take_rows(range(len(self)))
            self.next += new
            rows = range(len(reading.samplers))
            self.cache.extend(reading.cache, rows)
            if self.mtp_cache is None or reading.mtp_cache is None:
                self.mtp_cache = None
            else:
                self.mtp_cache.extend(reading.mtp_cache, rows)
        self.samplers += reading.samplers
        self._fill_up()

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """All other rows leave; these stay, in this order. None comes before its place: `rows[i] >= i`."""
        self.samplers = [self.samplers[row] for row in rows]
        if rows:
            self._take_rows(rows)
            self._fill_up()

    @torch.inference_mode()
    def step(self, readings: Sequence[Reading] = ()) -> list[list[int]]:
        """The next tokens of each row: one, or two where a draft was right. Beside it each reading takes its next chunk
        (piggybacked on the step's weights as in Sarathi-Serve, OSDI 2024)."""
        parts = [reading.part() for reading in readings]
        own = [self._part()] if len(self) else []
        outs = self.net.forward_parts(own + parts)
        for reading, out in zip(readings, outs[len(own) :], strict=True):
            reading.take(out)
        return self._take(outs[0]) if own else []

    def _part(self) -> Part:
        width = 1 if self.mtp_cache is None else 2
        return Part(torch.tensor(self.next, device=self.cache.lengths_B.device)[:, :width], self.cache)

    def _take(self, out: Output) -> list[list[int]]:
        width = out.hidden.shape[1]
        self.logits_BSV = logits_BSV = _head(self.net, out.hidden)
        tokens = [[token] for token in choose(logits_BSV[: len(self), 0], self.samplers)]
        right = [row for row in range(len(self)) if width > 1 and tokens[row][0] == self.next[row][1]]
        if right:
            second = choose(logits_BSV[right, 1], [self.samplers[row] for row in right])
            for row, token in zip(right, second, strict=True):
                tokens[row].append(token)
        if self.mtp_cache is not None and self._may_stop_drafting():
            self.monitor.note(fmean(map(len, tokens)))
            self.mtp_cache = self.mtp_cache if self.monitor.pays else None
        self._settle(out.state, tokens + tokens[:1] * (len(out.hidden) - len(self)))
        return tokens

    def _may_stop_drafting(self) -> bool:
        """Whether that changes no bit of a row; on other devices than a CPU the same bits are not promised."""
        return self.net.decodes(2) or self.cache.lengths_B.device.type != "cpu"

    def _settle(self, state: Tensor, tokens: list[list[int]]) -> None:
        """Go on after those tokens of each row, and draft the ones after."""
        counts_B = torch.tensor([len(row) for row in tokens], device=state.device)
        self.cache.settle(self.cache.lengths_B + counts_B)
        drafts = [row[-1] for row in tokens]
        if self.mtp_cache is not None:
            width = max(map(len, tokens)) if self.net.decodes(2) else state.shape[1]
            next_BS = torch.tensor([(row * 2)[:width] for row in tokens], device=state.device)
            hidden_BSD = self.net.mtp_hidden(state[:, :width], next_BS, self.mtp_cache, counts_B)
            self.mtp_cache.settle(self.mtp_cache.lengths_B + counts_B)
            last_BD = hidden_BSD[torch.arange(len(tokens), device=state.device), counts_B - 1]
            drafts = _head(self.net, last_BD).argmax(dim=-1).tolist()
        self.next = [(row[-1], draft) for row, draft in zip(tokens, drafts, strict=True)]

    def _take_rows(self, rows: Sequence[int]) -> None:
        self.next = [self.next[row] for row in rows]
        for cache in filter(None, (self.cache, self.mtp_cache)):
            cache.keep(rows)

    def _fill_up(self) -> None:
        """Copies of the first row, up to what a pass needs."""
        width = 1 if self.mtp_cache is None else 2
        if self.net.decodes(width):
            return
        copies = [0] * (-len(self) % max(MULTIPLE, tokens_of_a_pass(self.net.config) // width))
        self.next += [self.next[row] for row in copies]
        for cache in filter(None, (self.cache, self.mtp_cache)):
            cache.extend(cache, copies)


def tokens_of_a_pass(config: ModelConfig) -> int:
    """The number that the tokens of a pass are a multiple of: the narrowest tensors, of streams, of experts and of
    rotary channels, then fill whole vectors."""
    widths = (config.n_routed_experts, config.qk_rope_head_dim // 2, config.hc_mult if config.is_v4 else VECTORS)
    return max(MULTIPLE, *(VECTORS // math.gcd(VECTORS, width) for width in widths))


def _head(net: MoETransformer, hidden: Tensor) -> Tensor:
    """Logits [..., V] fp32 of [..., D]."""
    logits_RV = skinny_linear(hidden.flatten(0, -2), net.lm_head.weight).float()
    return logits_RV.unflatten(0, hidden.shape[:-1])
