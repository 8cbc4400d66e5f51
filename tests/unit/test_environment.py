"""What a training says of its device and of its experts, and that nothing about speed leaves an emulated device."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from model import ModelConfig
from model.train import TrainConfig
from pipelines import training
from pipelines.machine import environment

CPU, NPU = torch.device("cpu"), SimpleNamespace(type="npu")  # PyTorch alone knows no device of that name
MODEL = ModelConfig.preset("demo")
CONFIG = TrainConfig(steps=2, batch_tokens=64, sequence_length=32, learning_rate=1e-3)
RECORD = {"loss": 2.0, "max_load_over_mean": 1.0, "min_load_over_mean": 1.0, "tokens": 64, "tokens_per_s": 10.0}
SPEED = {"tokens_per_s", "share_of_peak", "seconds"}


@pytest.fixture
def on_an_emulated_npu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.devices, "emulated", lambda: True)
    monkeypatch.setattr(environment.devices, "name", lambda device: f"{device.type} (emulated)")


def test_a_cpu_is_not_emulated_even_where_npus_are(on_an_emulated_npu: None) -> None:
    assert environment.emulated(NPU) and not environment.emulated(CPU)


def test_tags_name_device_and_kernels() -> None:
    tags = environment.tags(CPU)
    assert (tags["device"], tags["emulated"]) == ("cpu", "false")
    assert json.loads(tags["kernels"])["grouped_matmul"] == "reference"
    assert json.loads(tags["kernels"])["experts"] in ("cpu", "reference")


def test_an_emulated_training_tells_no_speed(on_an_emulated_npu: None) -> None:
    metrics = training._metrics(MODEL, CONFIG, [RECORD] * 12, NPU, 40.0)
    assert metrics["emulated"] and not SPEED & metrics.keys()
    assert training._shown(RECORD, NPU).keys() == RECORD.keys() - {"tokens_per_s"}
    assert training._live(MODEL, CONFIG, RECORD, NPU) == "loss 2.000  emulated"
    assert training.speed(metrics) == "on npu (emulated)"


def test_a_real_training_tells_its_speed() -> None:
    metrics = training._metrics(MODEL, replace(CONFIG, precision="float32"), [RECORD] * 12, CPU, 40.0)
    assert not metrics["emulated"] and metrics.keys() >= SPEED
    assert metrics["energy_kwh"] == pytest.approx(40.0 * metrics["seconds"] / 3.6e6)
    assert "energy_kwh" not in training._metrics(MODEL, CONFIG, [RECORD] * 12, CPU, None)
    assert training._shown(RECORD, CPU) == RECORD and "of peak" in training._live(MODEL, CONFIG, RECORD, CPU)


@pytest.mark.parametrize("schedule", ["warmup_steps", "batch_ramp_steps", "dense_attention_steps"])
def test_balance_is_that_of_the_batches_after_the_warm_up(schedule: str) -> None:
    loads = [(5.0, 0.0)] * 2 + [(1.5, 0.5)] * 18 + [(3.0, 0.0), (1.5, 0.4)]
    table = pd.DataFrame(loads, columns=["max_load_over_mean", "min_load_over_mean"])
    found = training._balance(table, replace(CONFIG, **{schedule: 2}))
    expected = {"above_twice": 0.05, "busiest": 3.0, "busiest_ten_steps": 1.65, "idlest": 0.0, "idle": 1}
    assert found == pytest.approx(expected | {"first_step": 2})
    assert training._balance(table, replace(CONFIG, **{schedule: 22})) == {}
    assert training._balance(table * float("nan"), CONFIG) == {}  # no layer has experts


def test_the_curve_of_an_emulated_training_has_no_speed(on_an_emulated_npu: None, tmp_path) -> None:
    training._write_curve(tmp_path / "curve.csv", [training._shown(RECORD, NPU)])
    assert pd.read_csv(tmp_path / "curve.csv")["tokens_per_s"].isna().all()  # the plot finds an empty column
