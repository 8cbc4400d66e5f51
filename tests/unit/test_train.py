"""The training loop on a tiny V4 with everything on: Muon, batch ramp, micro-batches, all losses, exact resume."""

import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from moe_kernels.reference.newton_schulz import SCHEDULES

from model import ModelConfig, build
from model.checkpoint import CheckpointStore
from model.config import HEAVY, SLIDING, SPARSE
from model.data import IGNORED, Rows, TokenBatch
from model.optim import adamw
from model.train import DivergedError, Record, TrainConfig, take_step, train
from model.transformer import MoETransformer

TINY = ModelConfig(
    vocab_size=64, hidden_size=32, moe_intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, q_lora_rank=16,
    head_dim=16, qk_rope_head_dim=8, n_routed_experts=4, num_nextn_predict_layers=1, o_lora_rank=8, sliding_window=8,
    layer_types=[SLIDING, SPARSE, HEAVY], compress_rates={SPARSE: 4, HEAVY: 8}, index_n_heads=2, index_head_dim=8,
    index_topk=3, hc_mult=2, hc_sinkhorn_iters=3,
)  # fmt: skip
CONFIG = TrainConfig(
    steps=9, batch_tokens=128, sequence_length=32, learning_rate=3e-3, optimizer="muon", warmup_steps=2,
    decay_fraction=0.5, decay="cosine", final_fraction=0.1, start_batch_tokens=64, batch_ramp_steps=4,
    dense_attention_steps=3, checkpoint_every=2,
)  # fmt: skip
CPU = torch.device("cpu")


class Counting:
    """Rows of two documents that count upwards; a row says its own number."""

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        ids = (np.arange(33) * 3 + index) % 64
        owner = np.repeat([2 * index, 2 * index + 1], [20, 12])
        targets = np.where(owner == np.append(owner[1:], -1), ids[1:], IGNORED)
        return ids[:-1], targets, owner


def run(
    folder: Path, config: TrainConfig = CONFIG, stop_after: int | None = None, rows: Rows | None = None
) -> tuple[MoETransformer, list]:
    net, records = build(TINY, seed=0), []

    def report(step: int, record: Record) -> None:
        records.append(record)
        if step == stop_after:
            raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        train(net, rows or Counting(), config, CheckpointStore(folder), CPU, report)
    return net, records


def test_every_loss_and_figure_is_reported_and_the_batch_grows(tmp_path: Path) -> None:
    _, records = run(tmp_path)
    assert [record["tokens"] for record in records] == [64, 64, 96, 96, *[128] * 5]
    assert records[-1]["loss"] < records[0]["loss"]
    expected = {"loss", "mtp_loss", "balance_loss", "indexer_loss", "learning_rate", "gradient_norm", "bias_range"}
    expected |= {"max_load_over_mean", "min_load_over_mean", "router_entropy", "sinkhorn_error", "tokens"}
    assert all(expected <= record.keys() for record in records)
    assert ["indexer_recall" in record for record in records] == [True] * 3 + [False] * 6
    assert records[-1]["bias_range"] > 0
    rates = [record["learning_rate"] for record in records]
    assert rates[0] == pytest.approx(1e-3) and max(rates) == 3e-3 and 3e-4 < rates[-1] < 1e-3


@pytest.mark.parametrize("stop_after", [0, 3, 6])
def test_a_stopped_training_ends_with_the_same_bits(tmp_path: Path, stop_after: int) -> None:
    whole, records = run(tmp_path / "whole")
    run(tmp_path / "broken", stop_after=stop_after)
    resumed, again = run(tmp_path / "broken")
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )
    drop = {"tokens_per_s"}
    assert [{k: v for k, v in r.items() if k not in drop} for r in again] == [
        {k: v for k, v in r.items() if k not in drop} for r in records
    ]


def test_muon_takes_the_polynomials_that_are_asked_for(tmp_path: Path) -> None:
    weights = [run(tmp_path / name, replace(CONFIG, newton_schulz=name))[0].lm_head.weight for name in SCHEDULES]
    assert not torch.equal(*weights) and torch.allclose(*weights, atol=0.02)
    assert torch.equal(weights[list(SCHEDULES).index("deepseek-v4")], run(tmp_path / "default")[0].lm_head.weight)


class Uneven(Counting):
    """Rows that count different numbers of targets, of targets one token later, and of tokens that are no padding."""

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        ids, targets, owner = super().row(index)
        end, alternate = 32 - 7 * (index % 4), np.arange(32) % 2 == index % 2
        owner = np.where(np.arange(32) < end, owner, -1)
        hidden = (owner < 0) | (alternate if index % 4 == 1 else index % 4 == 2 and np.arange(32) < 9)
        return ids, np.where(hidden, IGNORED, targets), owner


@pytest.mark.parametrize("rows", [Counting(), Uneven()], ids=lambda rows: type(rows).__name__)
def test_micro_batches_change_rounding_alone(tmp_path: Path, rows: Counting) -> None:
    config = replace(CONFIG, optimizer="adamw", steps=3, indexer_weight=1.0 if type(rows) is Counting else 0.0)
    _, whole = run(tmp_path / "whole", config, rows=rows)
    _, parts = run(tmp_path / "parts", replace(config, micro_batch_tokens=32), rows=rows)
    same = {"loss", "mtp_loss", "balance_loss", "gradient_norm", "max_load_over_mean", "sinkhorn_error", "tokens"}
    for one, other in zip(whole, parts, strict=True):
        for name in same:
            assert one[name] == pytest.approx(other[name], rel=1e-3), name


def test_a_batch_of_padding_has_figures_and_harms_nothing() -> None:
    net = build(TINY, seed=0).train()
    ids = torch.zeros(1, 8, dtype=torch.int64)
    data = TokenBatch(ids, torch.full_like(ids, IGNORED), torch.full_like(ids, -1), [])
    record = take_step(net, adamw(net, 1e-3, 0.1), data, 0, replace(CONFIG, optimizer="adamw"), CPU)
    assert all(np.isfinite(list(record.values()))) and record["max_load_over_mean"] == 0
    assert all(weight.isfinite().all() for weight in net.parameters())


def test_a_loss_that_is_not_finite_stops_before_it_does_harm(tmp_path: Path) -> None:
    with pytest.raises(DivergedError) as caught:
        net = build(TINY, seed=0)
        with torch.no_grad():
            net.lm_head.weight[3] = torch.inf
        before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        train(net, Counting(), CONFIG, CheckpointStore(tmp_path), CPU, lambda step, record: None)
    assert caught.value.step == 0 and caught.value.documents == [0, 1, 2, 3] and caught.value.checkpoint is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_random_numbers_of_the_device_are_part_of_a_checkpoint(tmp_path: Path) -> None:
    run(tmp_path, stop_after=3)
    state = CheckpointStore(tmp_path).latest()
    assert state is not None and torch.equal(state["random"]["cpu"], torch.get_rng_state())


def test_checkpoints_are_checked_and_a_damaged_one_is_skipped(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "store")
    assert store.latest() is None
    for step in (1, 2, 3):
        store.save(step, {"step": step})
    assert sorted(path.name for path in store.folder.iterdir()) == ["step-00000002", "step-00000003"]
    (store.folder / "step-00000003" / "state.pt").write_bytes(b"half")
    with pytest.warns(UserWarning, match="damaged"):
        assert store.latest() == {"step": 2}
    (store.folder / "step-00000002" / "sha256").write_bytes(b"\xff")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert store.latest() is None
    assert len(caught) == 2


def test_a_failed_save_leaves_no_trace(tmp_path: Path, monkeypatch) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, {"step": 1})
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        store.save(2, {"step": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
