"""A training's losses with kernels and without."""

from __future__ import annotations

from collections.abc import Iterator

import moe_kernels
import torch

from model import ModelConfig, build
from model.data import Batch
from model.losses import losses_of
from model.optim import adamw, muon
from model.train import TrainConfig, take_step

CPU = torch.device("cpu")


def batches(count: int, vocabulary: int) -> Iterator[Batch]:
    """Every other word follows from the one before; documents of 50."""
    for step in range(count):
        ids = torch.randint(0, vocabulary, (1, 129), generator=torch.Generator().manual_seed(step))
        ids[:, 1::2] = (7 * ids[:, :-1:2] + 3) % vocabulary
        yield Batch(ids[:, :-1], ids[:, 1:], (torch.arange(128) // 50)[None], [0])


def test_each_step_of_a_training_has_the_losses_of_the_reference() -> None:
    """Fifty steps of the demo's kinds of layers at the demo's rate, in float32, the reference on the same weights: two
    trainings part by more than their rounding within a few steps, kernels or not. One step may differ by a tie: an
    expert or an entry that one of the two has chosen by the last bit."""
    model = ModelConfig.preset("demo").replace(hidden_size=64, moe_intermediate_size=32, vocab_size=512)
    config = TrainConfig(50, 128, 128, 5e-3, optimizer="muon", warmup_steps=5, dense_attention_steps=20)
    net, losses, apart = build(model, seed=0).train(), [], []
    optimizer = muon(net, config.learning_rate, config.weight_decay)
    for step, data in enumerate(batches(config.steps, model.vocab_size)):
        with torch.no_grad(), moe_kernels.reference_only():
            sparse = step >= config.dense_attention_steps
            theirs, _ = losses_of(net, data.input_ids, data.targets, data.document_ids, sparse)
        ours = take_step(net, optimizer, data, step, config, CPU)
        apart.append(max(abs(ours[name] - loss.item()) for name, loss in theirs.items()))
        losses.append(ours["loss"])
    assert losses[-1] < losses[0] - 0.3
    *others, most = sorted(apart)
    assert others[-1] <= 1e-5 and most <= 1e-2


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
