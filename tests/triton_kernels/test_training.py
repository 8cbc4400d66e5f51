"""A whole training step of a small V3 and a small V4 through the Triton kernels: its losses and every gradient."""

from __future__ import annotations

from typing import Any

import moe_kernels
import pytest
import torch
from kernels_of import LEFT_OUT
from torch import Tensor

from model import ModelConfig, build
from model.config import HEAVY, SLIDING, SPARSE
from model.losses import losses_of
from model.optim import adamw
from model.precision import autocast

CPU, LENGTH = torch.device("cpu"), 12
SHARED: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "moe_intermediate_size": 8, "num_attention_heads": 2, "q_lora_rank": 8,
    "qk_rope_head_dim": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "initializer_range": 0.1,
}  # fmt: skip
V3 = ModelConfig(
    model_type="deepseek_v3", intermediate_size=24, num_hidden_layers=2, kv_lora_rank=8, qk_nope_head_dim=4,
    v_head_dim=4, n_group=2, topk_group=1, **SHARED,
)  # fmt: skip
V4 = ModelConfig(
    num_hidden_layers=3, head_dim=8, o_lora_rank=4, sliding_window=4, layer_types=[SLIDING, SPARSE, HEAVY],
    compress_rates={SPARSE: 2, HEAVY: 4}, index_n_heads=2, index_head_dim=4, index_topk=2, hc_mult=2,
    hc_sinkhorn_iters=2, num_nextn_predict_layers=1, **SHARED,
)  # fmt: skip
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}  # of the norm of all gradients


def step(config: ModelConfig, precision: str) -> tuple[float, Tensor, Tensor]:
    """(loss, all gradients, all weights after one step of AdamW) on a row of two documents."""
    net = build(config, seed=0).train()
    ids = torch.randint(0, config.vocab_size, (1, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    documents = (torch.arange(LENGTH) > 6).long()[None]
    optimizer = adamw(net, 1e-3, 0.1)
    with autocast(precision, CPU):
        loss = sum(losses_of(net, ids[:, :-1], ids[:, 1:], documents, sparse=True)[0].values())
    loss.backward()
    gradients = torch.cat([weight.grad.flatten() for weight in net.parameters() if weight.grad is not None])
    optimizer.step()
    return loss.item(), gradients, torch.cat([weight.detach().flatten() for weight in net.parameters()])


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("config", [V3, V4], ids=["v3", "v4"])
def test_a_step_is_that_of_the_reference(config: ModelConfig, precision: str) -> None:
    chosen = moe_kernels.chosen(CPU)
    assert {name for name, backend in chosen.items() if backend != "triton"} == LEFT_OUT
    ours = step(config, precision)
    with moe_kernels.reference_only():
        theirs = step(config, precision)
    limit = TOLERANCE[precision]
    assert ours[0] == pytest.approx(theirs[0], rel=limit / 10)
    for mine, other in zip(ours[1:], theirs[1:], strict=True):
        assert float((mine - other).norm() / other.norm()) <= limit
