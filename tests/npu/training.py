"""A small model, rows of two documents each, and a training run, for the tests on `npu`; also run as a program.

`python training.py DEVICE FOLDER [steps]` trains with a checkpoint every four steps and prints the losses as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import moe_kernels
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import model.attention
import model.moe
import model.norm
import model.train
import model.transformer
from model import ModelConfig, build
from model.checkpoint import CheckpointStore
from model.train import TrainConfig, train

SMALL = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=3,
    num_attention_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
    n_routed_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2, initializer_range=0.1,
)  # fmt: skip
ROOT = Path(__file__).parents[2]
LENGTH, STEPS = 32, 20


class Documents:
    """Endless rows of slowly rising ids; the second document of a row starts at a place that depends on the row."""

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        generator = np.random.default_rng(index)
        ids = np.cumsum(generator.integers(0, 3, LENGTH + 1)) % SMALL.vocab_size
        return ids[:-1], ids[1:], (np.arange(LENGTH) >= 5 + index % 20).astype(np.int64)


def run(device: str, folder: Path, steps: int = STEPS, precision: str = "float32", seed: int = 0) -> list[float]:
    """Loss of each step."""
    config = TrainConfig(
        steps=steps,
        batch_tokens=4 * LENGTH,
        sequence_length=LENGTH,
        learning_rate=1e-2,
        precision=precision,
        checkpoint_every=4,
        seed=seed,
    )
    net = build(SMALL, seed=seed)
    history = train(net, Documents(), config, CheckpointStore(folder), torch.device(device), lambda *_: None)
    return [record["loss"] for record in history]


def use_fused_operations() -> None:
    """Make the model call moe_kernels for everything that has an operation there."""
    model.norm.RMSNorm.forward = lambda self, x: moe_kernels.rms_norm(x, self.weight, self.eps)
    model.moe.SwiGLU.forward = lambda self, x: self.down_proj(
        moe_kernels.swiglu(torch.cat([self.gate_proj(x), self.up_proj(x)], dim=-1))
    )
    model.moe.Router.forward = _route
    model.moe.MixtureOfExperts.forward = _mixture
    model.attention.rotate = moe_kernels.rotate
    model.attention._attend = lambda q, k, v, document_ids, scale: moe_kernels.attention(q, k, v, scale, document_ids)
    model.transformer._mask = lambda input_ids, document_ids, start: document_ids
    model.train.cross_entropy = _mean_cross_entropy


def _route(self: model.moe.Router, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    c = self.config
    keywords = {"groups": c.n_group, "top_groups": c.topk_group, "scale": c.routed_scaling_factor}
    bias_E = self.e_score_correction_bias
    return moe_kernels.route(x_TD, self.weight, bias_E, c.num_experts_per_tok, normalise=c.norm_topk_prob, **keywords)


def _mixture(self: model.moe.MixtureOfExperts, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
    x_TD = x_BSD.flatten(0, 1)
    indices_TK, weights_TK = self.gate(x_TD)
    routed_TD = moe_kernels.experts(x_TD, indices_TK, weights_TK, self.experts.gate_up_proj, self.experts.down_proj)
    load_E = moe_kernels.expert_load(indices_TK, len(self.gate.weight))
    return self.shared_experts(x_BSD) + routed_TD.view_as(x_BSD), load_E


def _mean_cross_entropy(hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor) -> Tensor:
    losses_T = moe_kernels.cross_entropy(F.linear(hidden_TD, head_VD), targets_T)
    return losses_T.sum() / (targets_T != -100).sum().clamp(min=1)


if __name__ == "__main__":
    use_fused_operations()
    print(json.dumps(run(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:]))))
