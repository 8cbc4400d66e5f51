"""Sampling from a model, with a cache: each new token costs one forward pass of one position, or less.

The passes are those of `model/decoding.py`. Shapes: B rows, S tokens of the longest prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.decoding import Batch, Reading, Sampler

if TYPE_CHECKING:
    from model.transformer import MoETransformer


@torch.no_grad()
def generate(
    net: MoETransformer,
    input_ids: Tensor | Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_token_id: int | Sequence[int] | None = None,
    speculate: bool = True,
) -> Tensor:
    """Continue each row: [B, S] int64 -> [B, S + at most max_new_tokens], in evaluation mode.

    input_ids may also be a list of prompts of different lengths. A row that met a stop token (`eos_token_id`), and a
    shorter prompt's row, is filled up on the right with the stop token, or with 0 where none is given. temperature 0
    is greedy; top_p keeps the smallest set of tokens with that probability (nucleus sampling, arXiv 1904.09751). Row b
    draws with seed + b. On a CPU a row's tokens do not depend on the other rows. speculate: with the MTP block.
    Raises `ValueError` for impossible arguments.
    """
    if max_new_tokens < 0:
        raise ValueError("max_new_tokens must be >= 0")
    prompts = _prompts(input_ids)
    stops = [] if eos_token_id is None else [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    samplers = [Sampler(temperature, top_p, seed + row) for row in range(len(prompts))]
    training = net.training
    net.eval()
    rows = (
        _continue(net, prompts, samplers, max_new_tokens, stops, speculate) if max_new_tokens else [[] for _ in prompts]
    )
    net.train(training)
    device, filler = net.lm_head.weight.device, stops[0] if stops else 0
    whole = [torch.tensor(prompt + row) for prompt, row in zip(prompts, rows, strict=True)]
    return torch.nn.utils.rnn.pad_sequence(whole, batch_first=True, padding_value=filler).to(device)


def _prompts(input_ids: Tensor | Sequence[Sequence[int]]) -> list[list[int]]:
    prompts = [torch.as_tensor(row, dtype=torch.int64, device="cpu") for row in input_ids]
    if not prompts or any(prompt.ndim != 1 or not len(prompt) for prompt in prompts):
        raise ValueError("input_ids must be [batch, tokens], or a list of prompts, each with at least one token")
    return [prompt.tolist() for prompt in prompts]


def _continue(
    net: MoETransformer,
    prompts: list[list[int]],
    samplers: list[Sampler],
    max_new_tokens: int,
    stops: list[int],
    speculate: bool,
) -> list[list[int]]:
    """The new tokens of each row, up to a stop token or `max_new_tokens`."""
    rows: list[list[int]] = [[] for _ in prompts]
    batch, order = Batch(net), []
    for length in sorted({len(prompt) for prompt in prompts}):
        group = [row for row, prompt in enumerate(prompts) if len(prompt) == length]
        reading = Reading(net, [prompts[row] for row in group], [samplers[row] for row in group], speculate)
        while not reading.done:
            reading.advance()
        batch.join(reading)
        order += group
        for row, token in zip(group, reading.tokens, strict=True):
            rows[row].append(token)
    while left := [
        at for at, row in enumerate(order) if len(rows[row]) < max_new_tokens and rows[row][-1] not in stops
    ]:
        if len(left) < len(order):
            batch.keep(left)
            order = [order[at] for at in left]
        for row, tokens in zip(order, batch.step(), strict=True):
            rows[row] += _until(tokens, stops)[: max_new_tokens - len(rows[row])]
    return rows


def _until(tokens: list[int], stops: list[int]) -> list[int]:
    """Up to the first stop token, that one included."""
    return next((tokens[: at + 1] for at, token in enumerate(tokens) if token in stops), tokens)
