"""Rows that join and leave a batch: what each gets is what it gets alone, to the last bit."""

from random import Random

import pytest
import torch
from small_models import V3, V4
from torch import Tensor

from model import generate
from model.decoding import CHUNK, Batch, Reading, Sampler
from model.transformer import MoETransformer, build
from pipelines.serving.prefixes import Prefixes

CONFIGS = {"v3": V3, "v4": V4, "v4 without MTP": V4.replace(num_nextn_predict_layers=0)}
Asked = tuple[list[int], dict, int]  # prompt, sampling, new tokens


@pytest.fixture(params=list(CONFIGS), scope="module")
def net(request: pytest.FixtureRequest) -> MoETransformer:
    return build(CONFIGS[request.param], seed=3).eval()


def read(net: MoETransformer, prompt: list[int], sampling: dict) -> Reading:
    reading = Reading(net, [prompt], [Sampler(**sampling)])
    while not reading.done:
        reading.advance()
    return reading


def served(net: MoETransformer, asked: list[Asked], most: int, random: Random) -> list[tuple[list[int], Tensor]]:
    """(new tokens, the logits they were chosen from) of each; up to `most` at once, and they come when they come.

    Prompts are read beside the steps of the others, some two at a time.
    """
    batch, running, waiting = Batch(net), [], list(range(len(asked)))
    readings: dict[int, Reading] = {}
    got: list[tuple[list[int], list[Tensor]]] = [([], []) for _ in asked]
    while waiting or running or readings:
        while waiting and len(running) + len(readings) < most and (not running or random.random() < 0.5):
            prompt, sampling, _ = asked[waiting[0]]
            readings[waiting.pop(0)] = Reading(net, [prompt], [Sampler(**sampling)], batch.drafts)
        for place, tokens in enumerate(batch.step(list(readings.values()))):
            got[running[place]][0].extend(tokens)
            got[running[place]][1].extend(batch.logits_BSV[place, : len(tokens)])
        for number in [number for number, reading in readings.items() if reading.done]:
            reading = readings.pop(number)
            batch.join(reading)
            running.append(number)
            got[number] = (list(reading.tokens), [reading.logits_RV[0]])
        left = list(range(len(running)))
        for place in reversed(range(len(running))):
            if len(got[running[place]][0]) >= asked[running[place]][2]:
                left[place] = left[-1]  # the last row takes the place of one that leaves
                left.pop()
        running = [running[place] for place in left]
        batch.keep(left)
    return [(tokens[:n], torch.stack(logits[:n])) for (tokens, logits), (_, _, n) in zip(got, asked, strict=True)]


def test_neighbours_change_nothing(net: MoETransformer) -> None:
    random = Random(0)
    asked: list[Asked] = []
    for number in range(16):
        length = random.choice([1, 2, 3, 30, random.randint(1, 150), CHUNK + 70 if number % 7 == 0 else 9])
        sampling = {} if number % 3 else {"temperature": 0.8, "top_p": 0.9, "seed": number}
        asked.append(([random.randrange(64) for _ in range(length)], sampling, random.randint(2, 20)))
    together, alone = served(net, asked, 10, random), [served(net, [one], 1, random)[0] for one in asked]
    for (prompt, sampling, count), (tokens, logits), (own, own_logits) in zip(asked, together, alone, strict=True):
        assert tokens == own and torch.equal(logits, own_logits)
        assert generate(net, [prompt], count, **sampling)[0, len(prompt) :].tolist() == tokens


def test_drawing_follows_the_distribution(net: MoETransformer) -> None:
    """With drafts or without: frequencies of the first two tokens after one prompt, 2,000 times."""
    prompt, rows = [5, 6, 7], 2000
    drawn = generate(net, [prompt] * rows, 2, temperature=1.0)[:, 3:]
    with torch.no_grad():
        first = net(torch.tensor([prompt])).logits[0, -1].softmax(-1)
        best = int(first.argmax())
        second = net(torch.tensor([[*prompt, best]])).logits[0, -1].softmax(-1)
    after = drawn[drawn[:, 0] == best, 1]
    for tokens, p in ((drawn[:, 0], first), (after, second)):
        counts, n = tokens.bincount(minlength=64), len(tokens)
        chi2 = ((counts - n * p) ** 2 / (n * p)).sum().item()
        assert chi2 < 63 + 4 * (2 * 63) ** 0.5  # mean and deviation of chi-squared with 63 degrees of freedom


def test_a_nucleus_is_the_smallest_set_with_that_probability() -> None:
    sampler = Sampler(temperature=1.0, top_p=0.7)
    drawn = torch.tensor([sampler.draw(torch.tensor([0.05, 0.3, 0.5, 0.15]).log()) for _ in range(4000)])
    share = drawn.bincount(minlength=4) / len(drawn)
    torch.testing.assert_close(share, torch.tensor([0.0, 0.375, 0.625, 0.0]), rtol=0, atol=0.03)
    many = Sampler(temperature=2.0, top_p=0.5)  # more than are looked at first
    assert 400 < len({many.draw(torch.zeros(1000)) for _ in range(4000)}) <= 501


def test_a_reading_goes_on_where_another_stopped(net: MoETransformer) -> None:
    prompt = [Random(1).randrange(64) for _ in range(2 * CHUNK + 10)]
    whole, first = read(net, prompt, {}), Reading(net, [prompt], [Sampler()])
    first.advance()
    state = first.state()
    first.advance()
    resumed = Reading(net, [prompt], [Sampler()])
    resumed.resume(CHUNK, state)
    while not resumed.done:
        resumed.advance()
    assert torch.equal(resumed.logits_RV, whole.logits_RV) and resumed.drafts == whole.drafts


def test_a_beginning_read_without_drafts_is_replaced_by_one_with_them(net: MoETransformer) -> None:
    prompt, known = [7] * (CHUNK + 10), Prefixes(4)
    for speculate, cached in ((False, 0), (False, CHUNK), (True, 0 if net.config.num_nextn_predict_layers else CHUNK)):
        reading = Reading(net, [prompt], [Sampler()], speculate)
        assert known.resume(reading, prompt) == cached
        while not reading.done:
            reading.advance()
            known.remember(reading, prompt)
    for speculate in (True, False):
        reading = Reading(net, [prompt], [Sampler()], speculate)
        assert known.resume(reading, prompt) == CHUNK
        assert (reading.mtp_cache is not None) == (speculate and net.config.num_nextn_predict_layers > 0)


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 2}])
def test_impossible_sampling_is_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="temperature must be >= 0 and finite, and 0 < top_p <= 1"):
        Sampler(**wrong)
