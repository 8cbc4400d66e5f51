"""What a decoding step on the CPU is made of: the passport's cases, odd sizes, threads, and no row touches another.

The cases of `moe_kernels.numerics` compare each operation with the reference in float64; here are the sizes that tiles
and vectors of a processor divide badly, and the whole step against transformers' `generate`.
"""

from __future__ import annotations

from collections.abc import Callable

import moe_kernels
import pytest
import torch
from moe_kernels import numerics
from torch import Tensor

from model import ModelConfig, build, generate
from model.cache import Cache
from model.config import HEAVY, SLIDING, SPARSE
from model.transformer import MoETransformer

CPU = torch.device("cpu")
DECODING = ["decode_compressed_attention", "decode_experts", "decode_latent_attention", "hyper_head", "skinny_linear"]
SHARED = {
    "vocab_size": 90, "hidden_size": 36, "moe_intermediate_size": 20, "num_attention_heads": 3, "q_lora_rank": 18,
    "qk_rope_head_dim": 6, "n_routed_experts": 6, "num_experts_per_tok": 2, "initializer_range": 0.15,
}  # fmt: skip
V3 = ModelConfig(
    model_type="deepseek_v3", num_hidden_layers=3, intermediate_size=50, kv_lora_rank=14, qk_nope_head_dim=10,
    v_head_dim=9, n_group=3, topk_group=2, n_shared_experts=2, routed_scaling_factor=1.7, **SHARED,
)  # fmt: skip
V4 = ModelConfig(  # so many heads of the indexer that no two entries have a score of zero
    num_hidden_layers=4, head_dim=22, o_groups=3, o_lora_rank=5, sliding_window=9, hc_mult=3,
    layer_types=[SLIDING, SPARSE, HEAVY, SPARSE], mlp_layer_types=["hash_moe", "moe", "moe", "moe"],
    compress_rates={SPARSE: 3, HEAVY: 5}, index_n_heads=21, index_head_dim=10, index_topk=4, swiglu_limit=0.6, **SHARED,
)  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
        "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.7}  # fmt: skip
CONFIGS = {
    "v3": V3,
    "v3 queries of one matrix, far": V3.replace(q_lora_rank=None, rope_parameters=YARN, norm_topk_prob=False),
    "v4": V4,
    "v4 one stream": V4.replace(hc_mult=1, o_groups=1, compress_rates={SPARSE: 2, HEAVY: 1}),
}


@pytest.fixture(params=list(CONFIGS), scope="module")
def net(request: pytest.FixtureRequest) -> MoETransformer:
    """With vectors away from their start, so that sinks, biases and norms matter."""
    made, random = build(CONFIGS[request.param], seed=3).eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in made.named_parameters():
            if tensor.ndim < 2 or name.endswith("position_bias"):
                tensor.add_(torch.randn(tensor.shape, generator=random) * 0.3)
    return made


@pytest.mark.parametrize("operation", DECODING)
def test_operations_are_those_of_this_processor_and_near_the_reference(operation: str) -> None:
    assert moe_kernels.chosen(CPU)[operation] == "cpu" and moe_kernels.decodes("cpu")
    assert numerics.compare(operation, torch.float32, CPU)[0].error <= 1e-5


@pytest.mark.parametrize("operation", DECODING)
def test_the_same_bits_with_two_threads(operation: str, threads: Callable[[int], None]) -> None:
    runs = []
    for count in (1, 2):
        threads(count)
        runs.append([numerics.results(case.call, case.inputs) for case in numerics.CASES[operation]()])
    for one, two in zip(*runs, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 16, 33])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (15, 17), (64, 130), (200, 3)])
def test_a_row_of_a_linear_layer_has_the_bits_that_it_has_alone(rows: int, inputs: int, outputs: int) -> None:
    x, weight = numerics.random(rows, inputs), numerics.random(outputs, inputs)
    with torch.no_grad():
        y = moe_kernels.skinny_linear(x, weight)
        alone = torch.cat([moe_kernels.skinny_linear(row[None], weight) for row in x])
    assert torch.equal(y, alone)
    torch.testing.assert_close(y.double(), x.double() @ weight.double().T, rtol=1e-5, atol=1e-5)


def steps(net: MoETransformer, ids: Tensor, start: int) -> Tensor:
    """Logits of all but the first tokens, which are read at once, one at a time."""
    cache, found = Cache(len(ids)), []
    for part in (ids[:, :start], *ids[:, start:].split(1, dim=1)):
        if part.shape[1]:
            found.append(net(part, cache=cache).logits)
            cache.settle(cache.lengths_B + part.shape[1])
    return torch.cat(found[1:] if start else found, dim=1)


@pytest.mark.parametrize("start", [0, 31])
def test_steps_give_the_full_forward_and_a_row_its_own_bits(net: MoETransformer, start: int) -> None:
    """From an empty cache, and after a prompt that fills the window and more entries than are chosen."""
    ids = torch.randint(0, 90, (3, start + 26), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert net.decodes()
        full, found = net(ids).logits[:, start:], steps(net, ids, start)
        torch.testing.assert_close(found, full, rtol=0, atol=1e-4)
        if not start:
            assert torch.equal(steps(net, ids[1:2], start)[0], found[1])


def test_weights_that_change_are_seen_at_the_next_step(net: MoETransformer) -> None:
    """Nothing keeps a copy: a training goes on with the parameters that decoding reads."""
    ids = torch.randint(0, 90, (1, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = [tensor.clone() for tensor in net.parameters()]
        first = steps(net, ids, 8)
        for tensor in net.parameters():
            tensor.mul_(1.02)
        moved = steps(net, ids, 8)
        torch.testing.assert_close(moved, net(ids).logits[:, 8:], rtol=0, atol=1e-4)
        for tensor, old in zip(net.parameters(), before, strict=True):
            tensor.copy_(old)
    assert not torch.equal(moved, first)


def test_other_precisions_decode_without_these_kernels(net: MoETransformer) -> None:
    ids = torch.randint(0, 90, (2, 9), generator=torch.Generator().manual_seed(2))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert not net.decodes()
        assert generate(net, ids, 4, speculate=False).shape == (2, 13)
    assert not net.decodes(), "gradients are on"


def test_greedy_tokens_are_those_of_transformers(net: MoETransformer) -> None:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DeepseekV4Config, DeepseekV4ForCausalLM

    content = net.config.to_dict()
    if net.config.is_v4:
        theirs = DeepseekV4ForCausalLM._from_config(DeepseekV4Config(**content), attn_implementation="eager")
    else:
        theirs = DeepseekV3ForCausalLM._from_config(DeepseekV3Config(**content), attn_implementation="eager")
    theirs.load_state_dict(net.state_dict())
    theirs.eval().generation_config.eos_token_id = None
    ids = torch.randint(0, 90, (2, 13), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False, pad_token_id=0
        )
    assert torch.equal(generate(net, ids, 16), expected)
