"""A training's losses with kernels and without."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from typing import Any

import moe_kernels
import pytest
import torch
from torch import Tensor

from model import ModelConfig, build, compressed_attention, moe
from model.data import TokenBatch
from model.losses import losses_of
from model.optim import adamw, muon
from model.train import TrainConfig, take_step

CPU = torch.device("cpu")


def batches(count: int, vocabulary: int) -> Iterator[TokenBatch]:
    """Every other word follows from the one before; documents of 50."""
    for step in range(count):
        ids = torch.randint(0, vocabulary, (1, 129), generator=torch.Generator().manual_seed(step))
        ids[:, 1::2] = (7 * ids[:, :-1:2] + 3) % vocabulary
        yield TokenBatch(ids[:, :-1], ids[:, 1:], (torch.arange(128) // 50)[None], [0])


class Choices:
    """The experts and entries that layers chose, in order, for another forward pass to take them too: where two are
    equal but for the last bit, either is right."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kept: deque[Tensor] = deque()
        self.given = False
        self.route, self.top_k_mask = moe.route, compressed_attention.top_k_mask
        monkeypatch.setattr(moe, "route", self._route)
        monkeypatch.setattr(compressed_attention, "top_k_mask", self._top_k_mask)

    def _route(self, *args: Tensor, chosen_TK: Tensor | None, **rule: Any) -> tuple[Tensor, Tensor, Tensor]:
        if chosen_TK is not None:  # by a table
            return self.route(*args, chosen_TK=chosen_TK, **rule)
        found = self.route(*args, chosen_TK=self.kept.popleft() if self.given else None, **rule)
        if not self.given:
            self.kept.append(found[0])
        return found

    def _top_k_mask(self, *args: Any) -> Tensor:
        if self.given:
            return self.kept.popleft()
        self.kept.append(self.top_k_mask(*args))
        return self.kept[-1]


def test_each_step_of_a_training_has_the_losses_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fifty steps of the demo's kinds of layers at the demo's rate, in float32, the reference on the same weights: two
    trainings part by more than their rounding within a few steps, kernels or not."""
    model = ModelConfig.preset("demo").replace(hidden_size=64, moe_intermediate_size=32, vocab_size=512)
    config = TrainConfig(50, 128, 128, 5e-3, optimizer="muon", warmup_steps=5, dense_attention_steps=20)
    net, losses, choices = build(model, seed=0).train(), [], Choices(monkeypatch)
    optimizer = muon(net, config.learning_rate, config.weight_decay)
    for step, data in enumerate(batches(config.steps, model.vocab_size)):
        before, choices.given = copy.deepcopy(net), False
        ours = take_step(net, optimizer, data, step, config, CPU)
        choices.given = True
        with torch.no_grad(), moe_kernels.reference_only():
            sparse = step >= config.dense_attention_steps
            theirs, _ = losses_of(before, data.input_ids, data.targets, data.document_ids, sparse)
        assert not choices.kept and all(abs(ours[name] - loss.item()) <= 1e-5 for name, loss in theirs.items())
        losses.append(ours["loss"])
    assert losses[-1] < losses[0] - 0.3


def test_a_training_keeps_its_losses() -> None:
    """Twenty steps, each training on weights of its own, so gradients count too; at a rate that lets no rounding grow
    past 1e-5."""
    config = ModelConfig.preset("demo").replace(hidden_size=64, moe_intermediate_size=32, vocab_size=512)
    ids = torch.randint(0, 512, (1, 129), generator=torch.Generator().manual_seed(0))
    documents = (torch.arange(128) // 50)[None]

    def losses() -> list[float]:
        net = build(config, seed=0).train()
        optimizer, found = adamw(net, 1e-4, 0.1), []
        for _ in range(20):
            loss = sum(losses_of(net, ids[:, :-1], ids[:, 1:], documents, sparse=True)[0].values())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    ours = losses()
    with moe_kernels.reference_only():
        theirs = losses()
    assert theirs[-1] < theirs[0]
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) <= 1e-5
