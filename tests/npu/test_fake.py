"""Full-size layers on fake tensors of device `npu`: shapes and gradients through fused operators, without memory."""

from __future__ import annotations

import moe_kernels
import pytest
import torch
import training
from torch._subclasses.fake_tensor import FakeTensorMode

import model.attention
import model.moe
import model.norm
import model.train
import model.transformer
from model import ModelConfig

PATCHED = [
    (model.norm.RMSNorm, "forward"), (model.moe.SwiGLU, "forward"), (model.moe.Router, "forward"),
    (model.moe.MixtureOfExperts, "forward"),
    (model.attention, "rotate"), (model.attention, "_attend"), (model.transformer, "_mask"),
    (model.train, "cross_entropy"),
]  # fmt: skip


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in PATCHED:
        monkeypatch.setattr(owner, name, getattr(owner, name))  # so that they come back after the test
    training.use_fused_operations()


def test_a_full_size_layer_of_deepseek_v3_runs_both_ways(fused: None) -> None:
    """256 experts, 11.5 billion parameters, 4,096 tokens in bfloat16."""
    config, tokens = ModelConfig.preset("v3-671b"), 4096
    with FakeTensorMode(allow_non_fake_inputs=True):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device("npu"):
                block = model.transformer.Block(config, layer=config.first_k_dense_replace)
        finally:
            torch.set_default_dtype(before)
        assert sum(parameter.numel() for parameter in block.parameters()) == pytest.approx(11.5e9, rel=0.01)
        x = torch.empty(1, tokens, config.hidden_size, dtype=torch.bfloat16, device="npu", requires_grad=True)
        angles = torch.empty(1, tokens, 1, config.qk_rope_head_dim // 2, device="npu")
        documents = torch.empty(1, tokens, dtype=torch.int64, device="npu")
        y, load_E = block(x, (angles, angles), documents, None)
        y.sum().backward()
    assert (y.shape, y.dtype, y.device.type) == (x.shape, torch.bfloat16, "npu")
    assert load_E.shape == (config.n_routed_experts,)
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None and parameter.grad.shape == parameter.shape, name
    assert torch.accelerator.memory_allocated() < 1 << 20


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_expert_layer_is_one_graph_for_the_compiler(backend: str) -> None:
    from cases import NPU, chosen_experts, distance, random

    inputs = [random(9, 12), chosen_experts(9, 2, used=7), random(9, 2).abs(), random(7, 16, 12), random(7, 12, 8)]
    moved = [tensor.to(NPU) for tensor in inputs]
    compiled = torch.compile(moe_kernels.experts, fullgraph=True, backend=backend)
    assert distance(compiled(*moved), moe_kernels.experts(*inputs)) < 2e-5
