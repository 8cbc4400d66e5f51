"""Muon against torch's and against a float64 loop, the split of the parameters, resuming, and the schedules."""

import io
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_kernels import newton_schulz
from moe_kernels.reference.newton_schulz import COEFFICIENTS, POLAR_EXPRESS
from torch import Tensor, nn
from torch.nn import functional as F

from model.lora import add_lora
from model.optim import Muon, adamw, muon, role
from model.schedule import batch_rows, first_row, learning_rate, mtp_weight

TABLES = {"model.embed_tokens.weight": (96, 16), "lm_head.weight": (96, 16)}
VECTORS = {
    "model.norm.weight": (16,), "model.hc_head.hc_base": (4,), "model.hc_head.hc_scale": (1,),
    "model.layers.0.input_layernorm.weight": (16,), "model.layers.0.attn_hc.base": (24,),
    "model.layers.0.attn_hc.scale": (3,), "model.layers.0.self_attn.sinks": (4,),
    "model.layers.0.self_attn.q_a_norm.weight": (8,), "model.layers.0.self_attn.compressor.position_bias": (4, 16),
    "model.layers.0.self_attn.compressor.indexer.position_bias": (4, 8), "model.mtp.0.enorm.weight": (16,),
}  # fmt: skip
MATRICES = {
    "model.hc_head.hc_fn": (4, 64), "model.layers.0.attn_hc.fn": (24, 64),
    "model.layers.0.self_attn.q_a_proj.weight": (8, 16), "model.layers.0.self_attn.q_b_proj.weight": (32, 8),
    "model.layers.0.self_attn.kv_proj.weight": (8, 16), "model.layers.0.self_attn.o_a_proj.weight": (8, 16),
    "model.layers.0.self_attn.o_b_proj.weight": (16, 8),
    "model.layers.0.self_attn.compressor.kv_proj.weight": (16, 16),
    "model.layers.0.self_attn.compressor.gate_proj.weight": (16, 16),
    "model.layers.0.self_attn.compressor.indexer.q_b_proj.weight": (16, 8),
    "model.layers.0.self_attn.compressor.indexer.scorer.weights_proj.weight": (4, 16),
    "model.layers.0.mlp.gate.weight": (6, 16), "model.layers.0.mlp.experts.gate_up_proj": (6, 24, 16),
    "model.layers.0.mlp.experts.down_proj": (6, 16, 12), "model.layers.0.mlp.shared_experts.up_proj.weight": (12, 16),
    "model.mtp.0.e_proj.weight": (16, 16), "model.mtp.0.h_proj.weight": (16, 16),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def v4_parameters(seed: int = 0) -> nn.Module:
    """A module with the parameter names of DeepSeek-V4, two groups in `o_a_proj`, and nothing else."""
    generator = torch.Generator().manual_seed(seed)
    net = nn.Module()
    net.config = SimpleNamespace(o_groups=2)
    for path, shape in (TABLES | MATRICES | VECTORS).items():
        *owners, name = path.split(".")
        owner = net
        for part in owners:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        owner.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))
    return net


def set_gradients(net: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in net.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def matrix_group(*weights: Tensor, parts: int = 1, weight_decay: float = 0.1, rms: float = 0.18) -> dict:
    return {"params": list(weights), "weight_decay": weight_decay, "momentum": 0.95, "rms": rms, "parts": parts}


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def spread(n: int, rows: int, columns: int, seed: int = 0) -> Tensor:
    """Random matrices whose singular values fall from 1 to 0.01."""
    x_Nrc = torch.randn(n, rows, columns, generator=torch.Generator().manual_seed(seed))
    u, s, v = torch.linalg.svd(x_Nrc, full_matrices=False)
    return (u * torch.logspace(0, -2, s.shape[1])) @ v


def five_steps(optimizer: torch.optim.Optimizer, weight: nn.Parameter) -> Tensor:
    """The path of `weight` under seeded gradients and a falling rate."""
    generator = torch.Generator().manual_seed(1)
    start = weight.detach().clone()
    for step in range(5):
        optimizer.param_groups[0]["lr"] = 0.02 / (step + 1)
        weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
    return weight.detach() - start


def paths(shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(ours, torch's) with five steps of the one set of coefficients and the same rms."""
    mine, theirs = (nn.Parameter(torch.linspace(-1, 1, shape[0] * shape[1]).view(shape)) for _ in range(2))
    ours = Muon([matrix_group(mine, rms=0.2)], 0.02, coefficients=COEFFICIENTS[:5], dtype=dtype)
    other = torch.optim.Muon([theirs], lr=0.02, adjust_lr_fn="match_rms_adamw")
    return five_steps(ours, mine), five_steps(other, theirs)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32), (1, 16)])
def test_muon_with_one_set_of_coefficients_is_that_of_torch(monkeypatch, shape: tuple[int, int]) -> None:
    """In bfloat16 both are about as near to fp32; in fp32, where torch's cast is taken away, they are equal."""
    ours_bf16, theirs_bf16 = paths(shape, torch.bfloat16)
    monkeypatch.setattr(Tensor, "bfloat16", Tensor.clone)
    ours, theirs = paths(shape, torch.float32)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)
    assert (ours_bf16 - ours).norm() < 1.5 * (theirs_bf16 - ours).norm() < 0.03 * ours.norm()


@pytest.mark.parametrize(("batch_elements", "parts"), [(2**20, 1), (3 * 12 * 20, 2), (1, 3)])
def test_batched_muon_equals_a_float64_loop_over_matrices(batch_elements: int, parts: int) -> None:
    shapes = [(5, 12 * parts, 20), (12 * parts, 20), (2, 12 * parts, 20), (4, 20 * parts, 12)]
    weights = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = Muon([matrix_group(*weights, parts=parts)], 0.03, dtype=torch.float32)
    optimizer.batch_elements = batch_elements
    expected = [weight.detach().double().clone() for weight in weights]
    momenta = [torch.zeros_like(weight) for weight in expected]
    for _ in range(3):
        for weight, wanted, momentum in zip(weights, expected, momenta, strict=True):
            weight.grad = torch.randn(weight.shape)
            momentum.mul_(0.95).add_(weight.grad)
            wanted.mul_(1 - 0.03 * 0.1)
            nesterov = weight.grad + 0.95 * momentum
            matrices = (tensor.view(-1, tensor.shape[-2] // parts, tensor.shape[-1]) for tensor in (wanted, nesterov))
            for target, x in zip(*matrices, strict=True):
                target -= 0.03 * 0.18 * max(x.shape) ** 0.5 * orthogonal(x)
        optimizer.step()
    for weight, wanted in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.double(), wanted, rtol=0, atol=1e-5)


def orthogonal(x: Tensor) -> Tensor:
    x = x / x.norm()
    for a, b, c in [(3.4445, -4.7750, 2.0315)] * 8 + [(2, -1.5, 0.5)] * 2:
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 3), rows=st.integers(1, 70), columns=st.integers(1, 70), scale=st.sampled_from([1e-9, 1, 1e9]))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 0.005), (torch.bfloat16, 0.05)])
def test_singular_values_become_one(dtype: torch.dtype, tolerance: float, n, rows, columns, scale: float) -> None:
    y_Nrc = newton_schulz(scale * spread(n, rows, columns), dtype=dtype)
    assert y_Nrc.dtype is torch.float32 and y_Nrc.shape == (n, rows, columns)
    assert (torch.linalg.svdvals(y_Nrc) - 1).abs().max() < tolerance


def test_polar_express_brings_every_singular_value_from_a_thousandth_on_near_one() -> None:
    """And they stay bounded where rounding makes them 2 % larger or smaller at each step."""
    for error, least, most in ((1.0, 0.82, 1.13), (0.98, 0.76, 1.13), (1.02, 0.82, 1.22)):
        x = torch.logspace(-3, 0, 10_000, dtype=torch.float64)
        for a, b, c in POLAR_EXPRESS:
            x = error * x
            x = a * x + b * x**3 + c * x**5
        assert least < x.min() < x.max() < most


def test_five_steps_of_polar_express_move_weights_as_far_as_the_ten_of_deepseek_v4() -> None:
    moved = []
    for steps in (COEFFICIENTS, POLAR_EXPRESS):
        weight = nn.Parameter(torch.zeros(48, 96))
        weight.grad = spread(1, 48, 96)[0]
        Muon([matrix_group(weight)], 0.01, steps, torch.bfloat16).step()
        moved.append(weight.detach())
    assert rms(moved[1]) == pytest.approx(rms(moved[0]), rel=0.06)
    assert F.cosine_similarity(*(weight.flatten() for weight in moved), dim=0) > 0.99


def test_bfloat16_is_the_default_only_where_the_device_has_it(monkeypatch) -> None:
    for capabilities, dtype in (({"amx_bf16": True}, torch.bfloat16), ({"avx512_bf16": False}, torch.float32)):
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda held=capabilities: held)
        assert Muon([matrix_group(nn.Parameter(torch.ones(2, 2)))], 1.0).dtype is dtype


@pytest.mark.parametrize("shape", [(64, 64), (16, 96), (96, 16), (4, 128), (3, 32, 48)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rms_of_every_update_is_the_recipe_s(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.zeros(shape))
    weight.grad = 1e-3 * spread(3, *shape[-2:])[: shape[0] if len(shape) == 3 else 1].view(shape)
    Muon([matrix_group(weight)], 0.01, dtype=dtype).step()
    assert rms(weight) == pytest.approx(0.01 * 0.18, rel=0.01)


def test_adamw_s_learning_rate_carries_over() -> None:
    """On noise, AdamW's update has a root mean square near sqrt((1 - 0.9) / (1 + 0.9)) = 0.23 of the rate."""
    moved = {}
    for name, kind in (("muon", muon), ("adamw", adamw)):
        net = v4_parameters()
        optimizer = kind(net, 1e-3, weight_decay=0.0)
        for step in range(60):
            set_gradients(net, step)
            before = [parameter.detach().clone() for parameter in net.parameters()]
            optimizer.step()
        paths = [path for path, _ in net.named_parameters()]
        moved[name] = {p: rms(w - b) for p, w, b in zip(paths, net.parameters(), before, strict=True)}
    for path in MATRICES:
        assert moved["muon"][path] == pytest.approx(0.18e-3, rel=0.02)
        assert 0.5 < moved["muon"][path] / moved["adamw"][path] < 1.5


def test_halves_and_groups_of_fused_parameters_move_as_if_alone() -> None:
    net = v4_parameters()
    layer = getattr(net.model.layers, "0")
    fused = {"gate_up": layer.mlp.experts.gate_up_proj, "o_a": layer.self_attn.o_a_proj.weight}
    alone = {
        "gate_up": [nn.Parameter(half.detach().clone()) for half in fused["gate_up"].chunk(2, dim=1)],
        "o_a": [nn.Parameter(half.detach().clone()) for half in fused["o_a"].chunk(2, dim=0)],
    }
    optimizer = muon(net, 0.02, 0.1, dtype=torch.float32)
    separate = Muon([matrix_group(*alone["gate_up"], *alone["o_a"])], 0.02, dtype=torch.float32)
    for step in range(3):
        set_gradients(net, step)
        for name, dim in (("gate_up", 1), ("o_a", 0)):
            for half, grad in zip(alone[name], fused[name].grad.chunk(2, dim=dim), strict=True):
                half.grad = grad.clone()
        optimizer.step(), separate.step()
    torch.testing.assert_close(fused["gate_up"], torch.cat(alone["gate_up"], dim=1), rtol=0, atol=1e-6)
    torch.testing.assert_close(fused["o_a"], torch.cat(alone["o_a"], dim=0), rtol=0, atol=1e-6)


def test_an_expert_without_tokens_only_decays_and_one_without_gradient_rests() -> None:
    idle, absent = (nn.Parameter(torch.randn(2, 6, 8)) for _ in range(2))
    idle.grad = torch.randn(2, 6, 8)
    idle.grad[1] = 0
    before, resting = idle.detach().clone(), absent.detach().clone()
    optimizer = Muon([matrix_group(idle, absent)], 0.1)
    optimizer.step()
    torch.testing.assert_close(idle[1], before[1] * (1 - 0.1 * 0.1))
    assert torch.equal(absent, resting) and absent not in optimizer.state


def test_tables_and_vectors_follow_torch_s_adamw_to_the_bit() -> None:
    net, twin = v4_parameters(), v4_parameters()
    optimizer = muon(net, 0.01, 0.1)
    named = dict(twin.named_parameters())
    groups = [
        {"params": [named[path] for path in TABLES], "weight_decay": 0.1},
        {"params": [named[path] for path in VECTORS], "weight_decay": 0.0},
    ]
    theirs = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-20, fused=True)
    for step in range(4):
        set_gradients(net, step), set_gradients(twin, step)
        optimizer.step(), theirs.step()
    for path, parameter in net.named_parameters():
        assert torch.equal(parameter, named[path]) == (path in TABLES | VECTORS)


def test_every_parameter_is_in_exactly_one_group_and_the_right_one() -> None:
    net = v4_parameters()
    names = {parameter: path for path, parameter in net.named_parameters()}
    optimizer = muon(net, 1e-3, 0.1)
    grouped = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(names.values())
    of = {names[p]: group for group in optimizer.param_groups for p in group["params"]}
    assert {path for path, group in of.items() if "momentum" in group} == set(MATRICES)
    assert {path for path, group in of.items() if group["weight_decay"] == 0} == set(VECTORS)
    assert {path: group["parts"] for path, group in of.items() if group.get("parts", 1) > 1} == {
        "model.layers.0.mlp.experts.gate_up_proj": 2, "model.layers.0.self_attn.o_a_proj.weight": 2,
    }  # fmt: skip
    assert {group["eps"] for group in optimizer.param_groups} == {1e-20}
    plain = adamw(net, 1e-3, 0.1)
    assert [group["weight_decay"] for group in plain.param_groups] == [0.1, 0.0]
    assert [names[p] for p in plain.param_groups[1]["params"]] == [p for p in names.values() if p in VECTORS]
    assert {group["eps"] for group in plain.param_groups} == {1e-8}


def test_low_rank_updates_train_with_either_optimiser() -> None:
    for kind in (adamw, muon):
        net = v4_parameters()
        add_lora(net, rank=2, alpha=4.0, seed=0)
        trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
        optimizer = kind(net, 0.01, 0.1)
        assert {p for group in optimizer.param_groups for p in group["params"]} == set(trained)
        set_gradients(net, 0)
        before = [parameter.detach().clone() for parameter in trained]
        optimizer.step()
        assert not any(torch.equal(a, b) for a, b in zip(before, trained, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_optimiser_ends_with_the_same_bits(dtype: torch.dtype) -> None:
    def steps(net: nn.Module, optimizer: Muon, first: int, last: int) -> None:
        for step in range(first, last):
            for group in optimizer.param_groups:
                group["lr"] = 0.01 / (step + 1)
            set_gradients(net, step)
            optimizer.step()
            optimizer.zero_grad()

    whole = v4_parameters()
    steps(whole, muon(whole, 0.01, 0.1, dtype), 0, 7)
    half = v4_parameters()
    optimizer = muon(half, 0.01, 0.1, dtype)
    steps(half, optimizer, 0, 4)
    file = io.BytesIO()
    torch.save({"net": half.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed = v4_parameters(seed=1)
    resumed.load_state_dict(state["net"])
    fresh = muon(resumed, 0.5, 0.3, dtype)
    fresh.load_state_dict(state["optimizer"])
    steps(resumed, fresh, 4, 7)
    for ours, theirs in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_closure_is_evaluated_with_gradients() -> None:
    weight = nn.Parameter(torch.randn(4, 6))

    def closure() -> Tensor:
        loss = weight.square().sum()
        loss.backward()
        return loss

    before = weight.detach().clone()
    assert Muon([matrix_group(weight)], 0.01).step(closure) == before.square().sum()
    assert weight.square().sum() < before.square().sum()


def test_roles_go_by_name_where_the_shape_does_not_tell() -> None:
    assert role("model.layers.3.self_attn.compressor.position_bias", torch.ones(4, 8)) == "vector"
    assert role("model.embed_tokens.weight", torch.ones(4, 8)) == "table"
    assert role("model.hc_head.hc_fn", torch.ones(4, 8)) == "matrix"


def test_schedule_warms_up_stays_and_decays() -> None:
    rates = [learning_rate(step, 100, 2.0, warmup_steps=9, decay_fraction=0.5) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9:51] == [2.0] * 42
    assert rates[-1] == pytest.approx(0.04)
    assert all(b < a for a, b in zip(rates[50:], rates[51:], strict=False))


def test_cosine_tail_ends_at_its_fraction_of_the_peak() -> None:
    rates = [learning_rate(step, 1000, 2.0, 9, 0.5, tail="cosine", final_fraction=0.1) for step in range(1000)]
    assert rates[9:501] == [2.0] * 492
    assert rates[750] == pytest.approx(2.0 * 0.55)
    assert rates[-1] == pytest.approx(0.2, rel=1e-3) and rates[-1] > 0.2
    assert all(b < a for a, b in zip(rates[500:], rates[501:], strict=False))
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD([torch.ones(1)], lr=2.0), 500, eta_min=0.2)
    for rate in rates[500:]:
        assert rate == pytest.approx(theirs.get_last_lr()[0], rel=1e-6)
        theirs.optimizer.step(), theirs.step()


def test_mtp_weight_drops_when_the_decay_starts() -> None:
    weights = [mtp_weight(step, 100, 0.4) for step in range(100)]
    assert weights == [0.3] * 61 + [0.1] * 39
    rates = [learning_rate(step, 100, 1.0, 0, 0.4, "cosine", 0.1) for step in range(100)]
    assert [rate < 1 for rate in rates] == [weight == 0.1 for weight in weights]
    assert mtp_weight(99, 100, 0.0, before=0.5, during=0.2) == 0.5


@given(rows=st.integers(1, 200), start=st.integers(1, 200), ramp=st.integers(0, 60), step=st.integers(0, 90))
def test_a_ramp_grows_in_whole_rows_and_uses_each_row_once(rows: int, start: int, ramp: int, step: int) -> None:
    start = min(start, rows)
    sizes = [batch_rows(s, rows, start, ramp) for s in range(step + 1)]
    assert sizes == sorted(sizes) and sizes[0] == (start if ramp else rows) and sizes[-1] <= rows
    assert sum(sizes) == first_row(step + 1, rows, start, ramp) and first_row(0, rows, start, ramp) == 0
    assert batch_rows(ramp, rows, start, ramp) == rows
    assert all(abs(size - (start + (rows - start) * s / ramp)) < 1 for s, size in enumerate(sizes[:ramp]))
