"""Wrong uses of the fused operators, each planted on purpose, each must be noticed.

Meta kernels let most of them pass. Here a mistake ends in an error of torch_npu, in an error of the emulator that names
the limit, or in values or gradients that the parity test tells apart.
"""

from __future__ import annotations

from collections.abc import Callable

import moe_kernels
import pytest
import torch
from cases import NPU, Case, angles, chosen_experts, distance, outputs_and_gradients, random
from moe_kernels import numerics
from moe_kernels.npu import grouped_matmul as products
from moe_kernels.npu import permute as rows
from torch import Tensor

ops = torch.ops.npu
VISIBLE = 1e-2  # distance that no rounding in fp32 explains
TOKENS, TOP_K, EXPERTS = 33, 2, 7


def experts_case() -> Case:
    gate_up, down = random(EXPERTS, 16, 12) * 0.3, random(EXPERTS, 12, 8) * 0.3
    weights = random(TOKENS, TOP_K).abs()
    return Case([random(TOKENS, 12), chosen_experts(TOKENS, TOP_K, used=6), weights, gate_up, down])


def experts_differ() -> float:
    """Largest distance of outputs and gradients of the expert layer between `npu` and the CPU."""
    ours, theirs = (outputs_and_gradients(moe_kernels.experts, experts_case(), d) for d in (NPU, torch.device("cpu")))
    return max(distance(mine, other) for mine, other in zip(ours, theirs, strict=True))


def grouped(x: Tensor, weight: Tensor, counts: Tensor, **changes: int) -> Tensor:
    keywords = {"split_item": 2, "group_type": 0, "group_list_type": 1} | changes
    return ops.npu_grouped_matmul([x.to(NPU)], [weight.to(NPU)], group_list=counts.to(NPU), **keywords)[0].cpu()


COUNTS = torch.tensor([3, 0, 5, 1])


def test_without_a_mistake_nothing_is_reported() -> None:
    assert experts_differ() < 2e-5
    assert grouped(random(9, 8), random(4, 8, 6), COUNTS).shape == (9, 6)


def test_1_sizes_of_groups_passed_as_running_ends() -> None:
    with pytest.raises(RuntimeError, match="group_list must not decrease"):
        grouped(random(9, 8), random(4, 8, 6), COUNTS, group_list_type=0)


def test_2_running_ends_passed_as_sizes() -> None:
    with pytest.raises(RuntimeError, match="group_list covers 23 of 9 rows"):
        grouped(random(9, 8), random(4, 8, 6), COUNTS.cumsum(0))


def test_3_counts_in_int32() -> None:
    with pytest.raises(RuntimeError, match="group_list is of type Int"):
        grouped(random(9, 8), random(4, 8, 6), COUNTS.int())


def test_4_counts_that_forget_a_row() -> None:
    with pytest.raises(RuntimeError, match="group_list covers 8 of 9 rows"):
        grouped(random(9, 8), random(4, 8, 6), COUNTS - torch.tensor([1, 0, 0, 0]))


def test_5_weight_gradient_with_groups_along_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "INNER", products.ROWS)
    with pytest.raises(RuntimeError, match="weight is|inner axes"):
        experts_differ()


def test_6_weight_not_transposed() -> None:
    with pytest.raises(RuntimeError, match="inner axes differ"):
        grouped(random(9, 8), random(4, 6, 8), COUNTS)


def test_7_rotary_mode_that_pairs_halves() -> None:
    cosine, sine = (table.repeat_interleave(2, dim=-1) for table in angles(1, 5, 8))
    x = random(1, 5, 2, 8)
    wrong = ops.npu_rotary_mul(x.to(NPU), cosine.to(NPU), sine.to(NPU), rotary_mode="half")
    assert distance(wrong, moe_kernels.rotate(x, cosine[..., ::2], sine[..., ::2])) > VISIBLE


def test_8_rotary_table_with_each_pair_of_angles_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_kernels.npu import rope

    monkeypatch.setattr(rope, "_table", lambda angles, batch: torch.cat([angles, angles], -1).flatten(0, 1)[None])
    cosine, sine = angles(1, 5, 8)
    wrong = moe_kernels.rotate(random(1, 5, 2, 8).to(NPU), cosine.to(NPU), sine.to(NPU))
    assert distance(wrong, moe_kernels.rotate(random(1, 5, 2, 8), cosine, sine)) > VISIBLE


def test_9_one_rotary_table_per_row_in_interleaved_mode() -> None:
    cosine, sine = (table.repeat_interleave(2, dim=-1).to(NPU) for table in angles(2, 5, 8))
    with pytest.raises(RuntimeError, match="one table for the whole batch"):
        ops.npu_rotary_mul(random(2, 5, 2, 8).to(NPU), cosine, sine, rotary_mode="interleave")


def attend(**changes: object) -> Tensor:
    q, k, v = (random(2, 6, 3, 8, seed=n).to(NPU) for n in range(3))
    mask = torch.ones(2048, 2048, dtype=torch.bool, device=NPU).triu(1)
    keywords = {"atten_mask": mask, "scale": 0.3, "sparse_mode": 3} | changes
    return ops.npu_fusion_attention(q, k, v, 3, "BSND", **keywords)[0].cpu()


def attention_reference() -> Tensor:
    return moe_kernels.attention(*(random(2, 6, 3, 8, seed=n) for n in range(3)), scale=0.3)


def test_10_attention_without_its_mask() -> None:
    assert distance(attend(), attention_reference()) < 2e-5
    assert distance(attend(atten_mask=None, sparse_mode=0), attention_reference()) > VISIBLE


def test_11_mask_with_true_for_what_may_be_seen() -> None:
    seen = torch.ones(6, 6, dtype=torch.bool, device=NPU).tril()
    assert distance(attend(atten_mask=~seen, sparse_mode=1), attention_reference()) < 2e-5
    assert distance(attend(atten_mask=seen, sparse_mode=1), attention_reference()) > VISIBLE


def test_12_small_mask_in_a_compressed_mode() -> None:
    small = torch.ones(6, 6, dtype=torch.bool, device=NPU).triu(1)
    with pytest.raises(RuntimeError, match="needs an atten_mask of 2048 by 2048"):
        attend(atten_mask=small)


def test_13_additive_mask_in_floating_point() -> None:
    with pytest.raises(RuntimeError, match="atten_mask is of type Float"):
        attend(atten_mask=torch.zeros(2048, 2048, device=NPU))


def test_14_layout_that_does_not_exist() -> None:
    x = random(2, 6, 3, 8).to(NPU)
    with pytest.raises(RuntimeError, match="BSDN|layout"):
        ops.npu_fusion_attention(x, x, x, 3, "BSDN", scale=0.3)


def test_15_scale_forgotten() -> None:
    assert distance(attend(scale=1.0), attention_reference()) > VISIBLE


def replaced(monkeypatch: pytest.MonkeyPatch, change: Callable[..., tuple]) -> float:
    """The expert layer with the arguments of `unpermute` changed."""
    from moe_kernels.npu import experts

    original = rows.unpermute
    monkeypatch.setattr(experts, "unpermute", lambda *arguments: original(*change(*arguments)))
    return experts_differ()


def test_16_weights_of_the_choices_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    assert replaced(monkeypatch, lambda y, places, weights: (y, places, weights.flip(1))) > VISIBLE


def test_17_stale_sorted_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert replaced(monkeypatch, lambda y, places, weights: (y, torch.cat([places[1:], places[:1]]), weights)) > VISIBLE


def test_18_order_of_rows_passed_as_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    order = lambda places: places.flatten().argsort().int().view_as(places)  # noqa: E731
    assert replaced(monkeypatch, lambda y, places, weights: (y, order(places), weights)) > VISIBLE


def test_19_sorted_indices_in_int64() -> None:
    places = torch.arange(6, device=NPU)
    with pytest.raises(RuntimeError, match="sorted_indices is of type Long"):
        ops.npu_moe_token_unpermute(random(6, 4).to(NPU), places, probs=random(3, 2).to(NPU))


def test_20_rows_brought_back_without_weights() -> None:
    places = torch.arange(6, dtype=torch.int32, device=NPU)
    assert ops.npu_moe_token_unpermute(random(6, 4).to(NPU), places).shape == (6, 4)  # one row a token, not three
    with pytest.raises(AssertionError):
        distance(ops.npu_moe_token_unpermute(random(6, 4).to(NPU), places), random(3, 4))


def test_21_norm_weight_in_another_dtype() -> None:
    with pytest.raises(RuntimeError, match="gamma is of type Float"):
        ops.npu_rms_norm(random(3, 8, dtype=torch.bfloat16).to(NPU), random(8).to(NPU), 1e-6)


def test_22_epsilon_forgotten() -> None:
    small = random(3, 8) * 1e-3
    wrong = ops.npu_rms_norm(small.to(NPU), random(8).to(NPU))[0]
    assert distance(wrong, moe_kernels.rms_norm(small, random(8), 1e-5)) > VISIBLE


def test_23_halves_of_the_activation_swapped() -> None:
    wrong = ops.npu_swiglu(torch.cat(random(9, 24).chunk(2, 1)[::-1], dim=1).to(NPU))
    assert distance(wrong, moe_kernels.swiglu(random(9, 24))) > VISIBLE


def test_24_odd_axis_halved() -> None:
    with pytest.raises(RuntimeError, match="cannot be halved|divisible by 2"):
        ops.npu_swiglu(random(9, 23).to(NPU))


def test_25_indices_of_experts_in_floating_point() -> None:
    with pytest.raises(RuntimeError, match="indices"):
        ops.npu_moe_token_permute(random(3, 8).to(NPU), random(3, 2).to(NPU))


def test_26_experts_product_without_a_gradient() -> None:
    """The operator alone lets no gradient through; the layer must not be built on it directly."""
    x, weight = (tensor.to(NPU).requires_grad_() for tensor in (random(9, 8), random(4, 8, 6)))
    counts = COUNTS.to(NPU)
    out = ops.npu_grouped_matmul([x], [weight], group_list=counts, split_item=2, group_type=0, group_list_type=1)[0]
    out.sum().backward()
    assert x.grad is None and weight.grad is None
    assert products.grouped_matmul(x, weight.transpose(1, 2), counts).requires_grad


def test_27_sink_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert window_differs() < 2e-5
    original = ops.npu_fusion_attention
    monkeypatch.setattr(ops, "npu_fusion_attention", lambda *words, sink, **more: original(*words, **more))
    assert window_differs() > VISIBLE


def test_28_sink_in_half_precision() -> None:
    with pytest.raises(RuntimeError, match="sink is of type BFloat16"):
        attend(sink=torch.zeros(3, dtype=torch.bfloat16, device=NPU))


def test_29_one_sink_for_all_heads() -> None:
    with pytest.raises(RuntimeError, match=r"the sink is \[1\] for 3 heads"):
        attend(sink=torch.zeros(1, device=NPU))


def test_30_documents_given_by_their_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_kernels.npu import attention

    monkeypatch.setattr(attention, "_cut", lambda ends: [(slice(0, 12), [5, 1, 3, 3])])
    documents = torch.tensor([[0] * 5 + [1], [0] * 3 + [1] * 3])
    with pytest.raises(RuntimeError, match="must be running ends that reach 12"):
        moe_kernels.attention(*(random(2, 6, 3, 8, seed=n).to(NPU) for n in range(3)), 0.3, documents.to(NPU))


def test_31_streams_that_the_operator_does_not_take() -> None:
    with pytest.raises(RuntimeError, match="4 by 4, 6 by 6 or 8 by 8"):
        ops.npu_mhc_sinkhorn(random(9, 3, 3).to(NPU))


def test_32_sinkhorn_with_rows_and_columns_swapped() -> None:
    from moe_kernels.reference.sinkhorn import sinkhorn

    logits = random(9, 4, 4) * 3
    right, swapped = (ops.npu_mhc_sinkhorn(x.to(NPU), eps=1e-6, num_iters=3)[0] for x in (logits, logits.mT))
    assert distance(right, sinkhorn(logits, 3, 1e-6)) < 2e-5
    assert distance(swapped.mT, sinkhorn(logits, 3, 1e-6)) > VISIBLE


def window_differs() -> float:
    return numerics.compare("window_attention", torch.float32, NPU)[0].error
