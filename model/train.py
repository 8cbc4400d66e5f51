"""The training loop, for pretraining and fine-tuning alike: forward, backward, clip, step, balance, checkpoint.

A run that was killed and started again continues from its last checkpoint and ends with the same bits as one that was
never interrupted: the state holds weights, optimiser, random generator and history; batches depend on the step alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from moe_kernels import device as devices
from torch import Tensor

from model.checkpoint import CheckpointStore
from model.data import Batch, Rows, batch
from model.losses import cross_entropy
from model.optim import adamw, balance_experts
from model.schedule import learning_rate
from model.transformer import MoETransformer

Record = dict[str, float]


@dataclass(frozen=True)
class TrainConfig:
    """Numbers of one training; units as in params.yaml."""

    steps: int
    batch_tokens: int
    sequence_length: int
    learning_rate: float
    warmup_steps: int = 0
    decay_fraction: float = 1.0
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    balance_speed: float = 1e-3
    precision: str = "float32"
    seed: int = 0
    checkpoint_every: int = 50


class DivergedError(ArithmeticError):
    """The loss or a gradient is not finite."""

    def __init__(self, step: int, documents: list[int], checkpoint: Path | None) -> None:
        self.step, self.documents, self.checkpoint = step, documents, checkpoint
        super().__init__(f"the loss of step {step} is not finite")


def train(
    net: MoETransformer,
    rows: Rows,
    config: TrainConfig,
    store: CheckpointStore,
    device: torch.device,
    report: Callable[[int, Record], None],
) -> list[Record]:
    """Train `net` in place, from the newest checkpoint of `store` where there is one; returns one record a step.

    report(step, record) is called after each step with loss (nats a token), learning_rate, gradient_norm,
    max_load_over_mean and tokens_per_s; after a resume it first gets the records of the steps done before.
    Raises `DivergedError` when the loss or the gradient is not finite; nothing of that step is kept.
    """
    torch.manual_seed(config.seed)
    net.to(device).train()
    optimizer = adamw(net, config.learning_rate, config.weight_decay)
    history = _resume(net, optimizer, store)
    for step, record in enumerate(history):
        report(step, record)
    count = config.batch_tokens // config.sequence_length
    for step in range(len(history), config.steps):
        start = time.perf_counter()
        data = batch(rows, step * count, count)
        record = _step(net, optimizer, data, step, config, device)
        if not math.isfinite(record["loss"]) or not math.isfinite(record["gradient_norm"]):
            raise DivergedError(step, data.documents, store.latest_path())
        record["tokens_per_s"] = config.batch_tokens / (time.perf_counter() - start)
        history.append(record)
        report(step, record)
        if (step + 1) % config.checkpoint_every == 0 and step + 1 < config.steps:
            store.save(step + 1, _state(net, optimizer, history))
    return history


def _step(
    net: MoETransformer,
    optimizer: torch.optim.Optimizer,
    data: Batch,
    step: int,
    config: TrainConfig,
    device: torch.device,
) -> Record:
    """One optimiser step; leaves the weights alone when loss or gradient is not finite."""
    rate = learning_rate(step, config.steps, config.learning_rate, config.warmup_steps, config.decay_fraction)
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss, load_ME = loss_of(net, data, config.precision, device)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), config.clip_norm)
    if torch.isfinite(norm) and torch.isfinite(loss):
        optimizer.step()
        balance_experts(net, load_ME, config.balance_speed)
    optimizer.zero_grad(set_to_none=True)
    return {
        "loss": loss.item(),
        "learning_rate": rate,
        "gradient_norm": norm.item(),
        "max_load_over_mean": _imbalance(load_ME),
    }


def loss_of(net: MoETransformer, data: Batch, precision: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """(mean cross entropy over the batch's targets, expert load [M, E])."""
    with autocast(precision, device):
        out = net(data.input_ids.to(device), data.document_ids.to(device), with_logits=False)
        loss = cross_entropy(out.hidden.flatten(0, 1), net.lm_head.weight, data.targets.flatten().to(device))
    return loss, out.expert_load


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """bfloat16 matrix products over fp32 weights, or nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bfloat16" else nullcontext()


def _imbalance(load_ME: Tensor) -> float:
    """Largest load over mean load, worst layer; 1 is perfect balance, 0 where no layer has experts."""
    return (load_ME.max(dim=1).values / load_ME.float().mean(dim=1)).max().item() if len(load_ME) else 0.0


def _state(net: MoETransformer, optimizer: torch.optim.Optimizer, history: list[Record]) -> dict[str, Any]:
    return {
        "net": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "history": history,
        "random": torch.get_rng_state(),
    }


def _resume(net: MoETransformer, optimizer: torch.optim.Optimizer, store: CheckpointStore) -> list[Record]:
    """Load the newest sound checkpoint; returns the records of the steps it has behind it."""
    state = store.latest()
    if state is None:
        return []
    net.load_state_dict(state["net"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"])
    return state["history"]


def share_of_peak(flops_per_token: float, tokens_per_s: float, precision: str, device: torch.device) -> float:
    """Model FLOP/s over those of the best matmul measured in this process, between 0 and 1."""
    return flops_per_token * tokens_per_s / devices.measured_peak_flops(device, getattr(torch, precision))
