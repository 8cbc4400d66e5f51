"""What pretraining and fine-tuning share around `model.train`: device, checkpoints, live display, curves, metrics."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from moe_kernels import device as devices

from model.checkpoint import CheckpointStore
from model.config import ModelConfig
from model.data import Rows
from model.size import count_parameters, flops_per_token
from model.train import DivergedError, Record, TrainConfig, share_of_peak, train
from model.transformer import MoETransformer
from pipelines.machine import environment
from pipelines.machine.energy import JOULES_PER_KWH, Meter
from pipelines.params import Training, UserError
from pipelines.repository import root
from pipelines.stage import progress, replacing, say
from pipelines.tracking import Run
from pipelines.trust.audit import audit

COLUMNS = (
    "loss",
    "mtp_loss",
    "balance_loss",
    "indexer_loss",
    "max_load_over_mean",
    "min_load_over_mean",
    "tokens_per_s",
)
LIVE = ("loss", "mtp_loss", "learning_rate", "tokens_per_s")  # figures that a watcher of the training sees
CODE = ("model", "kernels/moe_kernels")
SOURCES = (".py", ".cpp", ".h")


def fit(
    stage: str,
    net: MoETransformer,
    rows: Rows,
    names: Sequence[str],
    params: Training,
    inputs: dict[str, str],
    curve: Path,
    run: Run,
) -> dict[str, Any]:
    """Train `net` in place, resuming where a killed run of the same inputs stopped.

    names: of the documents in `rows`. inputs: digests of what the weights depend on besides params and code. curve: CSV
    of the loss, one row a step. The checkpoints go when `run` has finished, that is, when the stage has written all it
    makes. Returns the stage's metrics; raises `UserError` when the loss stops being finite.
    """
    devices.prepare()
    device = devices.default()
    environment.require_passport(device)
    key = checkpoint_key(params, inputs)
    store = CheckpointStore(root() / ".checkpoints" / stage / key)
    resumed = store.latest_path()
    if resumed:
        run.resume(key)
        say(f"{stage:<10} continues from {resumed.name}")
    run.tag(checkpoint_key=key, **environment.tags(device))
    if (page := environment.passport_page(device)) is not None:
        run.artifact(page)
    fields = {name: getattr(params, name) for name in TrainConfig.__dataclass_fields__ if hasattr(params, name)}
    config = TrainConfig(**fields)
    behind = _step(resumed) if resumed else 0
    with progress(stage, config.steps) as advance, Meter(device.type) as meter:

        def report(step: int, record: Record) -> None:
            shown = _shown(record, device)
            run.log({f"train/{name}": value for name, value in shown.items()}, step)
            figures = {name: shown[name] for name in LIVE if name in shown} | {"replayed": step < behind}
            advance(1, _live(net.config, config, record, device), step=step, **figures)

        try:
            history = train(net, rows, config, store, device, report)
        except DivergedError as error:
            raise UserError(_advice(stage, error, names)) from None
        except RuntimeError as error:
            if (reason := devices.failure(error)) is None:
                raise
            raise UserError(_after_failure(stage, reason, device, store)) from error
        except KeyboardInterrupt:
            if (path := store.latest_path()) is None:
                raise
            raise KeyboardInterrupt(f"the same command continues from step {_step(path)}") from None
    _write_curve(curve, [_shown(record, device) for record in history])
    run.when_finished(store.clear)
    return _metrics(net.config, config, history, device, meter.watts()) | {"audit": _audit(run)}


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _audit(run: Run) -> dict[str, Any] | None:
    """What of NVIDIA this process has loaded by now, also as a tag; None on a system that does not tell."""
    try:
        found = audit()
    except ValueError:
        return None
    run.tag(**{"audit.nvidia": ", ".join(found.nvidia_libraries) or "none loaded"})
    return asdict(found)


def checkpoint_key(params: Training, inputs: dict[str, str]) -> str:
    """Digest of all that the weights are a function of: parameters, inputs, code and PyTorch's version."""
    code = hashlib.sha256()
    for folder in CODE:
        files = (Path(__file__).parents[1] / folder).rglob("*.*")
        for file in sorted(file for file in files if file.suffix in SOURCES):
            code.update(file.read_bytes())
    settings = params.model_dump(exclude={"checkpoint_every"})
    whole = json.dumps([settings, inputs, code.hexdigest(), torch.__version__], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


def _shown(record: Record, device: torch.device) -> Record:
    """What may be told of a step: no speed where the device is emulated."""
    return {name: value for name, value in record.items() if name != "tokens_per_s" or not environment.emulated(device)}


def _live(model: ModelConfig, config: TrainConfig, record: Record, device: torch.device) -> str:
    if environment.emulated(device):
        return f"loss {record['loss']:.3f}  emulated"
    speed = record["tokens_per_s"]
    share = share_of_peak(flops_per_token(model, config.sequence_length), speed, config.precision, device)
    return f"loss {record['loss']:.3f}  {speed:,.0f} tokens/s  {share:.1%} of peak"


def speed(metrics: dict[str, Any]) -> str:
    """Of a training, in words, from its metrics."""
    return f"on {metrics['device_name']}" if metrics["emulated"] else f"{metrics['tokens_per_s']:,.0f} tokens/s"


def _advice(stage: str, error: DivergedError, names: Sequence[str]) -> str:
    documents = ", ".join(names[number] for number in error.documents[:8])
    documents += f" and {len(error.documents) - 8} more" if len(error.documents) > 8 else ""
    last = f"the last good checkpoint is {error.checkpoint}" if error.checkpoint else "there is no checkpoint yet"
    return (
        f"the loss of step {error.step} is not finite (documents of the batch: {documents}); {last}: "
        f"lower `{stage}.learning_rate` or raise `{stage}.warmup_steps` and run again."
    )


def _after_failure(stage: str, reason: str, device: torch.device, store: CheckpointStore) -> str:
    """Sentence for a person whose device failed: what it said, and where the training will go on."""
    path = store.latest_path()
    start = f"continues from {path.name}" if path else "starts at the first step"
    help_ = f"; lower `{stage}.micro_batch_tokens` if memory is short" if "memory" in reason else ""
    return f"{devices.name(device)} failed: {reason.rstrip('.')}; run again, which {start}{help_}."


def _write_curve(path: Path, history: list[Record]) -> None:
    with replacing(path) as fresh:
        _table(history).rename_axis("step").reset_index().to_csv(fresh, index=False, float_format="%.6g")


def _table(history: list[Record]) -> pd.DataFrame:
    """One row a step; figures that this model does not have are empty columns, so that every plot finds its own."""
    return pd.DataFrame(history, columns=list(dict.fromkeys([*COLUMNS, *history[0], *history[-1]])))


def _metrics(
    model: ModelConfig, config: TrainConfig, history: list[Record], device: torch.device, watts: float | None
) -> dict[str, Any]:
    """First and last of each loss, size, how experts were used, and, on real devices, speed.

    First, last: the mean of ten steps, or of half of them where they are fewer than twenty.
    max_load_over_mean: of the last ten steps, worst layer; balance: see `_balance`.
    """
    table = _table(history)
    few = max(1, min(10, len(table) // 2))
    losses = {name: float(table[name].tail(few).mean()) for name in history[-1] if name.endswith("_loss")}
    total, active = count_parameters(model)
    return {
        "steps": config.steps,
        "tokens": int(table["tokens"].sum()),
        "loss_first": float(table["loss"].head(few).mean()),
        "loss_last": float(table["loss"].tail(few).mean()),
        **losses,
        "max_load_over_mean": float(table["max_load_over_mean"].tail(10).fillna(0).mean()),
        "balance": _balance(table, config),
        "parameters": total,
        "active_parameters": active,
        "device": device.type,
        "device_name": devices.name(device),
        "emulated": environment.emulated(device),
        "passport": environment.passport(device),
        **({} if environment.emulated(device) else _speed(model, config, table, device, watts)),
    }


def _balance(table: pd.DataFrame, config: TrainConfig) -> dict[str, float]:
    """How evenly the experts of the worst layer were used, from the step on at which rate, batch and attention had
    warmed up; empty where no layer has experts or nothing came after.

    Loads are over the mean. above_twice: share of the batches whose busiest expert took more than twice the mean;
    busiest, idlest: of any batch; busiest_ten_steps: worst mean of ten steps; idle: batches that left an expert out.
    """
    start = max(config.warmup_steps, config.batch_ramp_steps, config.dense_attention_steps)
    busiest, idlest = (table[name].iloc[start:].dropna() for name in ("max_load_over_mean", "min_load_over_mean"))
    if busiest.empty:
        return {}
    return {
        "first_step": start,
        "above_twice": float((busiest > 2).mean()),
        "busiest": float(busiest.max()),
        "busiest_ten_steps": float(busiest.rolling(min(10, len(busiest))).mean().max()),
        "idlest": float(idlest.min()),
        "idle": int((idlest == 0).sum()),
    }


def _speed(
    model: ModelConfig, config: TrainConfig, table: pd.DataFrame, device: torch.device, watts: float | None
) -> dict[str, float]:
    """tokens_per_s of the median step, its share of the device's peak, seconds of all steps, also of those before a
    training was killed and resumed; energy_kwh of these seconds at the mean power since, where the machine tells it."""
    speed = float(table["tokens_per_s"].median())
    seconds = float((table["tokens"] / table["tokens_per_s"]).sum())
    return {
        "tokens_per_s": speed,
        "share_of_peak": share_of_peak(flops_per_token(model, config.sequence_length), speed, config.precision, device),
        "seconds": seconds,
        **({} if watts is None else {"energy_kwh": watts * seconds / JOULES_PER_KWH}),
    }
