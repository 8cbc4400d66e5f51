"""A small V3 and a small V4, rows of two documents each, and a training run, for tests on `npu`; also run as a program.

`python training.py DEVICE FOLDER [MODEL]` trains with a checkpoint every four steps, prints the losses as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model import ModelConfig, build
from model.checkpoint import CheckpointStore
from model.config import HEAVY, SLIDING, SPARSE
from model.train import Record, TrainConfig, train

V3 = ModelConfig(
    model_type="deepseek_v3",
    vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=3,
    num_attention_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
    n_routed_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2, initializer_range=0.1,
)  # fmt: skip
V4 = ModelConfig(
    vocab_size=64, hidden_size=32, moe_intermediate_size=16, num_hidden_layers=4, num_attention_heads=2, q_lora_rank=16,
    head_dim=16, qk_rope_head_dim=8, n_routed_experts=8, num_experts_per_tok=2, o_lora_rank=8, sliding_window=8,
    layer_types=[SLIDING, SPARSE, HEAVY, SPARSE], compress_rates={SPARSE: 4, HEAVY: 8}, index_n_heads=2,
    index_head_dim=8, index_topk=3, hc_mult=4, hc_sinkhorn_iters=3, num_nextn_predict_layers=1, initializer_range=0.1,
)  # fmt: skip
MODELS = {"v3": V3, "v4": V4}
ROOT = Path(__file__).parents[2]
LENGTH, STEPS = 32, 20


class Documents:
    """Endless rows of slowly rising ids; the second document of a row starts at a place that depends on the row."""

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        generator = np.random.default_rng(index)
        ids = np.cumsum(generator.integers(0, 3, LENGTH + 1)) % V3.vocab_size
        return ids[:-1], ids[1:], (np.arange(LENGTH) >= 5 + index % 20).astype(np.int64)


def records(device: str, folder: Path, model: str = "v3", seed: int = 0, **settings: Any) -> list[Record]:
    """What a training tells of each step. settings: of `TrainConfig`."""
    usual = {"steps": STEPS, "batch_tokens": 4 * LENGTH, "sequence_length": LENGTH, "learning_rate": 1e-2}
    config = TrainConfig(**usual | {"checkpoint_every": 4, "seed": seed} | settings)
    net = build(MODELS[model], seed=seed)
    return train(net, Documents(), config, CheckpointStore(folder), torch.device(device), lambda *_: None)


def run(device: str, folder: Path, model: str = "v3", seed: int = 0, **settings: Any) -> list[float]:
    """Loss of each step."""
    return [record["loss"] for record in records(device, folder, model, seed, **settings)]


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])))
