"""A training's losses with kernels and without."""

from __future__ import annotations

from collections.abc import Iterator

import moe_kernels
import torch

from model import ModelConfig, build
from model.data import Batch
from model.losses import losses_of
from model.optim import muon
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
