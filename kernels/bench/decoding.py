"""Greedy decoding with a cache against transformers' `generate`, and drafting by the MTP block against none.

    python kernels/bench/decoding.py --rounds 3 --output decoding.json

Ours and transformers have the same weights and must give the same tokens. Drafting is measured on the trained model of
data/models/base, where there is one, and on random weights, whose drafts are never right: there it must give itself up.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median

import peers
import torch
from measure import Row, Settings, Unequal, in_turn, main, ratio
from shapes import SHAPES
from torch import Tensor, nn

from model import build, generate, load_pretrained
from model.transformer import MoETransformer
from pipelines.encode import TOKENS

BASE = Path("data/models/base")
PROMPT, DRAFT_TOKENS = 64, 128
DRAFT_PROMPTS, DRAFT_ROUNDS = 12, 5  # a tenth to nine tenths of the drafts are right, by the text
TARGET, TARGET_DRAFTS, GIVEN_UP = 3.0, 1.0, 0.95  # the last: what finding out may cost


def measure(settings: Settings, _: argparse.Namespace) -> list[Row]:
    """Four rows against transformers, two about drafts."""
    count = 8 if settings.quick else 64
    rows = [against_transformers(family, batch, count, settings) for family in ("v4", "v3") for batch in (1, 16)]
    return [*rows, *drafting(settings)]


def against_transformers(family: str, batch: int, count: int, settings: Settings) -> Row:
    """Tokens a second of both, the prompt's reading included."""
    net = build(SHAPES[family], seed=0).to(settings.device).eval()
    theirs = peers.transformers_model(net)
    ids = prompts(net, batch)
    sides = {"ours": lambda: generate(net, ids, count), "transformers": lambda: their_tokens(theirs, ids, count)}
    times = in_turn(sides, settings.rounds, settings.device, check=require_equal_tokens)
    value, spread = ratio(times["transformers"], times["ours"])
    speeds = {name: batch * count / median(seconds) for name, seconds in times.items()}
    return Row(
        f"decoding-{family}-{batch}",
        f"{family.upper()} greedy decoding, batch {batch}: over transformers' generate",
        TARGET,
        value,
        unit="x",
        spread=spread,
        ours=f"{speeds['ours']:,.0f} tokens/s",
        peer=f"{speeds['transformers']:,.0f} tokens/s",
        figures={"tokens_per_s": speeds, "new_tokens": count},
    )


def prompts(net: MoETransformer, batch: int) -> Tensor:
    """Random ids, [batch, PROMPT], from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, net.config.vocab_size, (batch, PROMPT), generator=generator)
    return ids.to(net.lm_head.weight.device)


@torch.no_grad()
def their_tokens(net: nn.Module, ids: Tensor, count: int) -> Tensor:
    """transformers' greedy continuation, no token ends it."""
    net.generation_config.eos_token_id = None
    mask = torch.ones_like(ids)
    return net.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0)


def require_equal_tokens(found: dict[str, Tensor]) -> None:
    """Raises `Unequal` unless all sides gave the same tokens."""
    first, *others = found.items()
    for name, tokens in others:
        if not torch.equal(tokens, first[1]):
            off = (tokens != first[1]).sum().item()
            raise Unequal(f"{name} and {first[0]} differ in {off} of {tokens.numel()} tokens; nothing was compared")


def drafting(settings: Settings) -> list[Row]:
    """With drafts over without: of a model whose drafts are good, and of one whose drafts never are."""
    random = build(SHAPES["v4"].replace(num_nextn_predict_layers=1), seed=0).to(settings.device).eval()
    what = "drafts that are never right"
    rows = [_drafts("decoding-drafts-useless", what, random, prompts(random, 1), GIVEN_UP, settings)]
    what = "drafts of the trained model"
    if not (BASE / "config.json").exists():
        note = f"{BASE} is missing; make demo makes it"
        return [Row("decoding-drafts", f"Greedy decoding, {what}", TARGET_DRAFTS, None, unit="x", note=note), *rows]
    trained = load_pretrained(BASE).to(settings.device)
    return [_drafts("decoding-drafts", what, trained, held_out(trained), TARGET_DRAFTS, settings), *rows]


def _drafts(key: str, what: str, net: MoETransformer, ids: Tensor, target: float, settings: Settings) -> Row:
    count = 32 if settings.quick else DRAFT_TOKENS

    def side(speculate: bool) -> Tensor:
        return torch.cat([generate(net, row, count, speculate=speculate) for row in ids.split(1)])

    sides = {"with drafts": lambda: side(True), "without": lambda: side(False)}
    rounds = settings.rounds if settings.quick else DRAFT_ROUNDS
    times = in_turn(sides, rounds, settings.device, check=require_equal_tokens)
    value, spread = ratio(times["without"], times["with drafts"])
    speeds = [len(ids) * count / median(times[name]) for name in sides]
    return Row(
        key,
        f"Greedy decoding, batch 1, {what}: over decoding without drafts",
        target,
        value,
        unit="x",
        spread=spread,
        ours=f"{speeds[0]:,.0f} tokens/s",
        peer=f"{speeds[1]:,.0f} tokens/s",
    )


def held_out(net: MoETransformer) -> Tensor:
    """Prompts that the model may know the like of, [DRAFT_PROMPTS, PROMPT]: held-out tokens, from places evenly apart.

    Random ones where there are no tokens that fit the model.
    """
    import numpy as np

    file = TOKENS / "heldout-00000.bin"
    ids = np.fromfile(file, np.uint16).astype(np.int64) if file.exists() else np.zeros(0, np.int64)
    if len(ids) < DRAFT_PROMPTS * PROMPT or ids.max() >= net.config.vocab_size:
        return prompts(net, DRAFT_PROMPTS)
    places = np.arange(DRAFT_PROMPTS)[:, None] * (len(ids) // DRAFT_PROMPTS) + np.arange(PROMPT)
    return torch.from_numpy(ids[places]).to(net.lm_head.weight.device)


if __name__ == "__main__":
    main("Greedy decoding.", measure)
