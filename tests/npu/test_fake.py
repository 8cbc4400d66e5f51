"""Full-size layers on fake tensors of device `npu`: shapes and gradients through fused operators, without memory."""

from __future__ import annotations

import moe_kernels
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from model import ModelConfig
from model.block import Block
from model.context import Context
from model.precision import autocast

TOKENS = 4096


def both_ways(config: ModelConfig, layer: int) -> None:
    """Forward and backward of a full-size layer of fp32 weights over one row, under autocast to bfloat16."""
    before = torch.accelerator.memory_allocated()
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("npu"):
            block = Block(config, layer)
        experts = 3 * config.n_routed_experts * config.moe_intermediate_size * config.hidden_size
        assert experts < sum(parameter.numel() for parameter in block.parameters()) < 1.1 * experts
        shape = (1, TOKENS, *([config.hc_mult] if config.is_v4 else []), config.hidden_size)
        x = torch.empty(shape, device="npu", requires_grad=True)
        ids = torch.zeros(1, TOKENS, dtype=torch.int64, device="npu")
        context = Context(config, ids, torch.zeros_like(ids))
        with autocast("bfloat16", x.device):
            y = block(x, context, "layer")
        losses = [note[0] for name, note in context.statistics.items() if name.endswith("_loss")]
        (y.float().sum() + sum(losses)).backward()
    assert (y.shape, y.device.type) == (x.shape, "npu")
    assert context.statistics["expert_load"][0].shape == (config.n_routed_experts,)
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None and parameter.grad.shape == parameter.shape, name
    assert torch.accelerator.memory_allocated() == before


def test_a_full_size_layer_of_deepseek_v3_runs_both_ways() -> None:
    """256 experts, 11.5 billion parameters, 4,096 tokens."""
    config = ModelConfig.preset("v3-671b")
    both_ways(config, config.first_moe_layer)


@pytest.mark.parametrize("preset", ["v4-flash", "v4-pro"])
def test_a_full_size_layer_of_each_type_of_deepseek_v4_runs_both_ways(preset: str) -> None:
    """One for each pair of attention and feed-forward that the model has."""
    config = ModelConfig.preset(preset)
    kinds = {pair: n for n, pair in enumerate(zip(config.layer_types, config.mlp_layer_types, strict=True))}
    assert len(kinds) >= 3, kinds
    for layer in kinds.values():
        both_ways(config, layer)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_expert_layer_is_one_graph_for_the_compiler(backend: str) -> None:
    from cases import NPU, chosen_experts, distance, random

    inputs = [random(9, 12), chosen_experts(9, 2, used=7), random(9, 2).abs(), random(7, 16, 12), random(7, 12, 8)]
    moved = [tensor.to(NPU) for tensor in inputs]
    compiled = torch.compile(moe_kernels.experts, fullgraph=True, backend=backend)
    assert distance(compiled(*moved), moe_kernels.experts(*inputs)) < 2e-5
