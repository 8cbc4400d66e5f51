"""One expression for each operator that the emulator has, for test_emulator.py; also run as a program.

`python expressions.py` evaluates each on the CPU and on `npu` and prints JSON: expression -> distance of the results.
`x`, `y`, `z` are fp32 [4, 6], `p` is positive, `i` int64 [4, 6], `m` and `n` are bool; `k` is a list of tensors.
"""

from __future__ import annotations

import json

import torch
from cases import NPU, distance, random
from torch import Tensor
from torch.nn import functional as F

UNARY = "abs neg exp expm1 log log1p sqrt rsqrt square reciprocal sin cos tanh erf sigmoid relu floor ceil round sign"
IN_PLACE = (
    "abs_ neg_ exp_ expm1_ log_ log1p_ sqrt_ rsqrt_ reciprocal_ sin_ cos_ tanh_ erf_ sigmoid_ relu_ floor_ ceil_ "
    "round_ sign_"
)
BINARY = (
    "mul div floor_divide remainder pow maximum minimum eq ne lt le gt ge logical_and logical_or logical_xor add sub"
)
WITH_NUMBER = "mul div floor_divide remainder pow eq ne lt le gt ge add sub"
EXPRESSIONS = [
    *(f"p.{name}()" for name in UNARY.split()),
    *(f"p.clone().{name}()" for name in IN_PLACE.split()),
    *(f"torch.{name}(p, y.abs() + 1)" for name in BINARY.split()),
    *(f"torch.{name}(p, 1.5)" for name in WITH_NUMBER.split()),
    *(f"x.clone().{name}(y)" for name in ("mul_", "div_", "add_", "sub_", "copy_")),
    *(f"x.clone().{name}(1.5)" for name in ("mul_", "div_", "add_", "sub_", "fill_", "floor_divide_")),
    "x.clone().fill_(y[0, 0])", "x.clone().zero_()", "torch.ones_like(x)", "x.clone().copy_(y.bfloat16())",
    "torch.isfinite(x / 0)", "torch.isinf(x / 0)", "~m", "~i", "m.logical_not()", "x.logical_not()",
    "i & 3", "i | 3", "i ^ 3", "i & i.t().reshape(4, 6)", "i | i.flip(0)", "i ^ i.flip(0)", "m & n", "m | n", "m ^ n",
    "m.clone().logical_and_(n)", "m.clone().logical_or_(n)", "m.clone().logical_not_()", "i.clone().bitwise_not_()",
    "i.clone().bitwise_and_(i.flip(0))", "i.clone().bitwise_and_(3)", "i.clone().bitwise_or_(3)",
    "x.clone().floor_divide_(p)", "p.clone().pow_(1.5)", "torch.xlogy(p, p)", "i.clone().bitwise_or_(i.flip(0))",
    "2.0 ** x", "1 - x", "torch.rsub(x, 2.0, alpha=0.5)", "torch.lerp(x, y, 0.3)", "torch.lerp(x, y, z)",
    "x.clone().lerp_(y, 0.3)", "x.clone().lerp_(y, z)",
    "torch.addcmul(x, y, z, value=0.5)", "torch.addcdiv(x, y, p, value=0.5)", "x.clone().addcmul_(y, z, value=0.5)",
    "x.clone().addcdiv_(y, p, value=0.5)", "x.clamp(-0.5, 0.5)", "x.clamp(min=0.1)", "x.clamp(max=0.1)",
    "x.clamp_min(0.1)", "x.clamp_max(0.1)", "torch.clamp(x, y.minimum(z), y.maximum(z))",
    "torch.where(m, x, y)", "x.masked_fill(m, 2.0)", "x.clone().masked_fill_(m, y[0, 0])", "torch.isclose(x, x + 1e-9)",
    "torch.allclose(x, x) + x",
    "F.silu(x)", "F.silu(x.clone(), inplace=True)", "gradient(F.silu, x)", "gradient(torch.sigmoid, x)",
    "gradient(torch.tanh, x)", "gradient(torch.relu, x)", "F.softplus(x)", "gradient(F.softplus, x)",
    "x.bfloat16().float()", "i.float()", "x.contiguous()", "x.t().contiguous()", "x[1:, ::2].contiguous()",
    "torch.arange(0, 12, 2, device=d)", "torch.arange(5.0, device=d)", "torch.range(0, 6, 2, device=d)",
    "torch.eye(4, device=d)", "torch.full((3,), 2.5, device=d)", "torch.zeros(3, device=d)", "x.triu()", "x.tril(1)",
    "torch.cat([x, y], 1)", "torch.stack([x, y])", "x.repeat(2, 3)", "x.flip(1)", "x.roll(2, 1)", "F.pad(x, (1, 2))",
    "x.flatten().repeat_interleave(3)", "x[0].repeat_interleave(i[0].remainder(3))",
    "x.sum()", "x.sum(1)", "x.mean()", "x.mean(0, keepdim=True)", "p.prod()", "x.max()", "x.min()", "x.amax(1)",
    "x.amin(1)",
    "m.all()", "m.any()", "m.all(1)", "m.any(1)", "torch.equal(x, x) + x", "x.argmax(1)", "x.argmin(1)",
    "x.logsumexp(1)", "x.norm()", "torch.linalg.vector_norm(x, 2, 1)", "x.norm(2, 1)", "x.max(1).values",
    "x.min(1).indices",
    "x.cummax(1).values", "x.cumsum(1)", "x.cumprod(1)", "x.topk(3, 1).values", "x.sort(1).values", "x.argsort(1)",
    "x.sort(stable=True, dim=1).indices", "torch.histc(x, 5, -2, 2)", "torch.bincount(i.flatten(), minlength=9)",
    "x.gather(1, i.remainder(6))", "x.index_select(0, i[0].remainder(4))", "F.embedding(i, table)",
    "gradient(lambda t: F.embedding(i, t), table)", "x[i[0].remainder(4)]", "x[m]", "m.nonzero()", "x.masked_select(m)",
    "put(x, i)", "put(x, i, True)", "x.scatter(1, i.remainder(6), y)", "x.scatter(1, i[:, :1].remainder(6), 3.0)",
    "x.clone().scatter_(1, i[:, :1].remainder(6), y)", "x.clone().scatter_(1, i[:, :1].remainder(6), 3.0)",
    "x.scatter_add(1, i.remainder(6), y)", "x.index_add(0, i[0, :4].remainder(4), y, alpha=0.5)",
    "x.index_copy(0, torch.tensor([2, 0], device=d), y[:2])", "F.one_hot(i, 9)",
    "x @ y.t()", "torch.mm(x, y.t())", "x @ y[0]", "x[0] @ y[0]", "torch.mv(x, y[0])", "torch.dot(x[0], y[0])",
    "torch.bmm(x[None], y.t()[None])", "torch.addmm(x[:, :4], x, y.t(), beta=0.5, alpha=2)",
    "x[:, :4].clone().addmm_(x, y.t())", "torch.baddbmm(x[None, :, :4], x[None], y.t()[None])",
    "F.linear(x, y, x[0, :4])",
    "x.softmax(1)", "gradient(lambda t: t.softmax(1), x)", "x.log_softmax(1)",
    "gradient(lambda t: t.log_softmax(1), x)",
    "F.nll_loss(x.log_softmax(1), i[:, 0].remainder(6))",
    "gradient(lambda t: F.cross_entropy(t, i[:, 0].remainder(6), reduction='none'), x)",
    "first(torch._foreach_add(k, 2.0))", "first(torch._foreach_add(k, k))",
    "first(torch._foreach_sub(k, k, alpha=0.5))",
    "first(torch._foreach_mul(k, 2.0))", "first(torch._foreach_mul(k, k))", "first(torch._foreach_mul(k, [2.0, 3.0]))",
    "first(torch._foreach_div(k, 2.0))", "first(torch._foreach_div(k, k))", "first(torch._foreach_div(k, [2.0, 3.0]))",
    "first(torch._foreach_addcmul(k, k, k, 0.5))", "first(torch._foreach_addcdiv(k, k, k, 0.5))",
    "first(torch._foreach_addcdiv(k, k, k, [0.5, 0.1]))", "first(torch._foreach_lerp(k, list(reversed(k)), 0.3))",
    "first(torch._foreach_neg(k))", "first(torch._foreach_sqrt(k))", "first(torch._foreach_norm(k))",
    "in_place(torch._foreach_zero_, k)", "in_place(torch._foreach_copy_, k, list(reversed(k)))", "unscaled(k)",
]  # fmt: skip
RANDOM = [  # their values differ from the CPU's; same shape and type, and the same again from the same seed
    "torch.randn(50, device=d)", "torch.rand(50, device=d)", "torch.randint(0, 9, (50,), device=d)",
    "torch.randperm(50, device=d)", "torch.multinomial(torch.ones(50, device=d), 9)",
    "torch.empty(50, device=d).uniform_(2, 3)",
]  # fmt: skip


def gradient(function, x: Tensor) -> Tensor:
    leaf = x.detach().clone().requires_grad_()
    out = function(leaf)
    return torch.autograd.grad(out, leaf, random(*out.shape).to(x.device))[0]


def put(x: Tensor, i: Tensor, accumulate: bool = False) -> Tensor:
    return x.clone().index_put_((torch.tensor([0, 2], device=x.device),), x[1:3] * 2, accumulate)


def first(tensors: list[Tensor]) -> Tensor:
    return tensors[0]


def in_place(function, tensors: list[Tensor], *rest: list[Tensor]) -> Tensor:
    copies = [tensor.clone() for tensor in tensors]
    function(copies, *rest)
    return copies[0]


def unscaled(tensors: list[Tensor]) -> Tensor:
    """As GradScaler does."""
    copies, found = [tensor.clone() for tensor in tensors], torch.zeros(1, device=tensors[0].device)
    torch._amp_foreach_non_finite_check_and_unscale_(copies, found, torch.full((1,), 0.5, device=tensors[0].device))
    return copies[0] + found


def names(device: torch.device) -> dict[str, object]:
    x, y, z = (random(4, 6, seed=seed).to(device) for seed in range(3))
    integers = torch.arange(24).reshape(4, 6).remainder(7).to(device)
    return {
        "torch": torch, "F": F, "d": device, "x": x, "y": y, "z": z, "p": x.abs() + 0.5, "i": integers,
        "m": x > 0, "n": y > 0, "k": [x.abs() + 1, x.abs() + 2], "table": random(9, 5).to(device), "gradient": gradient,
        "put": put, "first": first, "in_place": in_place, "unscaled": unscaled,
    }  # fmt: skip


def compare(expression: str) -> float | str:
    """Distance of the results on both devices, or the error."""
    try:
        theirs = eval(expression, names(torch.device("cpu")))
        ours = eval(expression, names(NPU))
    except RuntimeError as error:
        return str(error).splitlines()[0]
    if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
        return f"{ours.shape} {ours.dtype}, not {theirs.shape} {theirs.dtype}"
    return distance(ours.float(), theirs.float())


def repeats(expression: str) -> float | str:
    """0 when the same seed gives the same values and another seed others."""
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(eval(expression, names(NPU)).cpu())
    return (
        0.0 if torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2]) else "does not follow its seed"
    )


if __name__ == "__main__":
    found = {expression: compare(expression) for expression in EXPRESSIONS}
    print(json.dumps(found | {expression: repeats(expression) for expression in RANDOM}))
