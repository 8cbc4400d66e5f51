"""The training loop, for pretraining and fine-tuning alike: forward, backward, clip, step, balance, checkpoint.

A run that was killed and started again continues from its last checkpoint and ends with the same bits as one that was
never interrupted: the state holds weights, optimiser, random generator and history; batches depend on the step alone.
The next batch is made and the last checkpoint is written in threads meanwhile; figures leave the device twice a step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from moe_kernels import device as devices
from moe_kernels.reference.newton_schulz import SCHEDULES
from torch import Tensor

from model.checkpoint import CheckpointStore, CheckpointWriter
from model.data import Rows, TokenBatch, batch
from model.losses import IGNORED, later_targets, losses_of
from model.optim import adamw, balance_experts, bias_range, muon
from model.precision import autocast
from model.schedule import batch_rows, first_row, learning_rate, mtp_weight
from model.transformer import MoETransformer

Record = dict[str, float]


@dataclass(frozen=True)
class TrainConfig:
    """Numbers of one training; units as in params.yaml."""

    steps: int
    batch_tokens: int
    sequence_length: int
    learning_rate: float
    optimizer: str = "adamw"
    newton_schulz: str = "deepseek-v4"
    warmup_steps: int = 0
    decay_fraction: float = 1.0
    decay: str = "linear"
    final_fraction: float = 0.0
    start_batch_tokens: int | None = None
    batch_ramp_steps: int = 0
    micro_batch_tokens: int | None = None
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    mtp_weights: tuple[float, float] = (0.3, 0.1)
    balance_weight: float = 1e-4
    indexer_weight: float = 1.0
    dense_attention_steps: int = 0
    balance_speed: float = 1e-3
    precision: str = "float32"
    seed: int = 0
    checkpoint_every: int = 50

    def rows(self, step: int) -> tuple[int, int]:
        """(global index of the first row of a step's batch, how many rows it has)."""
        full = self.batch_tokens // self.sequence_length
        ramp = (full, (self.start_batch_tokens or self.batch_tokens) // self.sequence_length, self.batch_ramp_steps)
        return first_row(step, *ramp), batch_rows(step, *ramp)


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

    report(step, record) is called after each step with each loss (nats a token), learning_rate, gradient_norm, load and
    health figures of the layers, tokens and tokens_per_s; after a resume it first gets the records of the steps before.
    Raises `DivergedError` when the loss or the gradient is not finite; nothing of that step is kept.
    """
    devices.be_deterministic(device)
    torch.manual_seed(config.seed)
    net.to(device).train()
    optimizer = _optimizer(net, config)
    history = _resume(net, optimizer, store, device)
    for step, record in enumerate(history):
        report(step, record)
    first = len(history)
    with CheckpointWriter(store) as writer:
        for step, data in enumerate(_batches(rows, config, first), first):
            start = time.perf_counter()
            record = take_step(net, optimizer, data, step, config, device)
            if not math.isfinite(record["loss"]) or not math.isfinite(record["gradient_norm"]):
                writer.wait()
                raise DivergedError(step, data.documents, store.latest_path())
            record |= {"tokens": data.input_ids.numel()}
            record["tokens_per_s"] = record["tokens"] / (time.perf_counter() - start)
            history.append(record)
            report(step, record)
            if (step + 1) % config.checkpoint_every == 0 and step + 1 < config.steps:
                writer.save(step + 1, _state(net, optimizer, history, device))
    return history


def _optimizer(net: MoETransformer, config: TrainConfig) -> torch.optim.Optimizer:
    rates = (config.learning_rate, config.weight_decay)
    if config.optimizer == "muon":
        return muon(net, *rates, coefficients=SCHEDULES[config.newton_schulz])
    return adamw(net, *rates)


def _batches(rows: Rows, config: TrainConfig, first: int) -> Iterator[TokenBatch]:
    """The batches of the steps from `first` on; each is made while the one before is in use."""
    with ThreadPoolExecutor(1) as pool:
        coming = [pool.submit(batch, rows, *config.rows(step)) for step in range(first, min(first + 1, config.steps))]
        for step in range(first + 1, config.steps + 1):
            data = coming.pop().result()
            if step < config.steps:
                coming.append(pool.submit(batch, rows, *config.rows(step)))
            yield data


def take_step(
    net: MoETransformer,
    optimizer: torch.optim.Optimizer,
    data: TokenBatch,
    step: int,
    config: TrainConfig,
    device: torch.device,
) -> Record:
    """One optimiser step; leaves the weights alone when loss or gradient is not finite."""
    c = config
    rate = learning_rate(step, c.steps, c.learning_rate, c.warmup_steps, c.decay_fraction, c.decay, c.final_fraction)
    for group in optimizer.param_groups:
        group["lr"] = rate
    losses, statistics = _backward(net, data, step, config, device)
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), config.clip_norm)
    record = _fetched(losses | {"gradient_norm": norm})
    if math.isfinite(record["gradient_norm"]) and math.isfinite(record["loss"]):
        optimizer.step()
        balance_experts(net, statistics["expert_load"], config.balance_speed)
    optimizer.zero_grad(set_to_none=True)
    return record | {"learning_rate": rate} | _fetched(_health(net, statistics))


def _fetched(figures: dict[str, Tensor]) -> Record:
    """Scalars of one device in one transfer."""
    return dict(zip(figures, torch.stack([figure.float() for figure in figures.values()]).tolist(), strict=True))


def _backward(
    net: MoETransformer, data: TokenBatch, step: int, config: TrainConfig, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of the whole batch, one part of it after the other; (mean losses, statistics over the batch)."""
    ahead = mtp_weight(step, config.steps, config.decay_fraction, *config.mtp_weights)
    weights = {"loss": 1.0, "mtp_loss": ahead}
    weights |= {"balance_loss": config.balance_weight, "indexer_loss": config.indexer_weight}
    parts = data.split(max(1, (config.micro_batch_tokens or data.input_ids.numel()) // data.input_ids.shape[1]))
    counted = [_counted(part) for part in parts]
    means: dict[str, Tensor] = {}
    statistics: dict[str, list[Tensor]] = {}
    for part, counts in zip(parts, counted, strict=True):
        with autocast(config.precision, device):
            tensors = (part.input_ids.to(device), part.targets.to(device), part.document_ids.to(device))
            losses, seen = losses_of(net, *tensors, sparse=step >= config.dense_attention_steps)
        share = {name: counts[name] / max(sum(each[name] for each in counted), 1) for name in losses}
        torch.stack([weights[name] * share[name] * loss for name, loss in losses.items()]).sum().backward()
        means = {name: means.get(name, 0.0) + share[name] * loss.detach() for name, loss in losses.items()}
        for name, value in seen.items():
            statistics.setdefault(name, []).append(value)
    joined = {"expert_load": Tensor.sum, "sinkhorn_error": Tensor.amax}
    return means, {
        name: joined.get(name, Tensor.mean)(torch.stack(values), dim=0) for name, values in statistics.items()
    }


def _counted(part: TokenBatch) -> dict[str, int]:
    """What each loss is a mean over; the indexer's counts a few tokens less, those that see no entry yet."""
    real = int((part.document_ids >= 0).sum())
    targets = {"loss": part.targets, "mtp_loss": later_targets(part.targets, part.document_ids)}
    counts = {name: int((values != IGNORED).sum()) for name, values in targets.items()}
    return counts | {"balance_loss": real, "indexer_loss": real}


def _health(net: MoETransformer, statistics: dict[str, Tensor]) -> dict[str, Tensor]:
    """Figures that say whether the layers work: of the worst layer, except for means of entropy and recall."""
    load_ME = statistics["expert_load"].float()
    figures = {"bias_range": bias_range(net)}
    if len(load_ME):
        over_mean_ME = load_ME / load_ME.mean(dim=1, keepdim=True).clamp(min=1e-9)  # 0: a batch of padding
        figures |= {"max_load_over_mean": over_mean_ME.max(), "min_load_over_mean": over_mean_ME.min()}
        figures["router_entropy"] = statistics["router_entropy"].mean()
    if "sinkhorn_error" in statistics:
        figures["sinkhorn_error"] = statistics["sinkhorn_error"].max()
    if "indexer_recall" in statistics:
        figures["indexer_recall"] = statistics["indexer_recall"].mean()
    return figures


def _state(
    net: MoETransformer, optimizer: torch.optim.Optimizer, history: list[Record], device: torch.device
) -> dict[str, Any]:
    return {
        "net": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "history": history,
        "random": devices.random_state(device),
    }


def _resume(
    net: MoETransformer, optimizer: torch.optim.Optimizer, store: CheckpointStore, device: torch.device
) -> list[Record]:
    """Load the newest sound checkpoint; returns the records of the steps it has behind it."""
    state = store.latest()
    if state is None:
        return []
    net.load_state_dict(state["net"])
    optimizer.load_state_dict(state["optimizer"])
    devices.restore_random_state(device, state["random"])
    return state["history"]


def share_of_peak(flops_per_token: float, tokens_per_s: float, precision: str, device: torch.device) -> float:
    """Model FLOP/s over those of the best matmul measured in this process, between 0 and 1."""
    return flops_per_token * tokens_per_s / devices.measured_peak_flops(device, getattr(torch, precision))
