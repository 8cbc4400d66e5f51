"""Muon and AdamW behind one optimiser, which parameter is whose, and the router-bias rule of DeepSeek-V3.

Shapes: N matrices of r rows and c columns, E experts, M layers with experts.

Muon (arXiv 2502.16982) moves a matrix by its orthogonalised momentum: M = mu M + G, O = NewtonSchulz(mu M + G),
W <- (1 - lr wd) W - lr 0.18 sqrt(max(r, c)) O. A semi-orthogonal O has root mean square 1 / sqrt(max(r, c)), so every
update has 0.18, near that of AdamW, whose learning rates carry over (DeepSeek-V4, arXiv 2606.19348, section 2.4).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from moe_kernels import device as devices
from moe_kernels import newton_schulz
from moe_kernels.reference.newton_schulz import COEFFICIENTS, Coefficients
from torch import Tensor, nn

from model.moe import HashRouter, Router

TABLES = ("embed_tokens", "lm_head")
Stacks = tuple[Tensor, Tensor, Tensor]


class Muon(torch.optim.Optimizer):
    """Muon on the groups that have a `momentum`, fused AdamW on the others; both read their group's `lr`.

    Keys of a Muon group besides `lr` and `weight_decay`: momentum (mu), rms (of an update of rate 1) and parts: the
    equal blocks of rows of each parameter that are matrices of their own. A parameter [E, r, c] holds E matrices, each
    of `parts`. The state of a parameter is one momentum of its shape; a parameter without gradient is left alone.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        learning_rate: float,
        coefficients: Coefficients = COEFFICIENTS,
        dtype: torch.dtype | None = None,
    ) -> None:
        """coefficients, dtype: of `newton_schulz`; dtype None: the one that the device multiplies fastest."""
        self._adamw = torch.optim.AdamW([{"params": []}], betas=(0.9, 0.95), eps=1e-20, fused=True)
        super().__init__(groups, self._adamw.defaults | {"lr": learning_rate})
        self.coefficients = coefficients
        device = self.param_groups[0]["params"][0].device
        self.dtype = dtype or devices.matmul_dtype(device)
        one = 2**19 * torch.get_num_threads()  # what the caches of the threads hold
        self.batch_elements = one if device.type == "cpu" else 2**26  # what fills other devices

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient; returns the closure's value."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        self._adamw.param_groups = [group for group in self.param_groups if "momentum" not in group]
        self._adamw.state = self.state
        self._adamw.step()
        for group in self.param_groups:
            for batch in self._batches(group) if "momentum" in group else ():
                self._update(batch, group)
        return loss

    def _batches(self, group: dict[str, Any]) -> Iterator[list[Stacks]]:
        """Weights, gradients and momenta [n, r, c] of equal r and c, in lists of bounded size."""
        by_shape: dict[torch.Size, list[Stacks]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            shape_Nrc = (-1, parameter.shape[-2] // group["parts"], parameter.shape[-1])
            weight_Nrc, momentum_Nrc = parameter.view(shape_Nrc), state["momentum"].view(shape_Nrc)
            stacks = (weight_Nrc, parameter.grad.reshape(shape_Nrc), momentum_Nrc)
            by_shape[weight_Nrc.shape[1:]].append(stacks)
        for shape_rc, stacks in by_shape.items():
            yield from _pack(stacks, max(1, self.batch_elements // shape_rc.numel()))

    def _update(self, batch: list[Stacks], group: dict[str, Any]) -> None:
        weights, grads, momenta = (list(column) for column in zip(*batch, strict=True))
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, grads)
        nesterov_Nrc = torch.cat(torch._foreach_add(grads, momenta, alpha=group["momentum"]))
        update_Nrc = newton_schulz(nesterov_Nrc, self.coefficients, self.dtype)
        rate = group["lr"] * group["rms"] * math.sqrt(max(update_Nrc.shape[1:]))
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, update_Nrc.split([len(weight) for weight in weights]), alpha=-rate)


def _pack(stacks: list[Stacks], most: int) -> Iterator[list[Stacks]]:
    """Cut stacks of matrices and lay them together again, at most `most` matrices a list."""
    batch: list[Stacks] = []
    for weight, grad, momentum in stacks:
        for piece in zip(weight.split(most), grad.split(most), momentum.split(most), strict=True):
            if sum(len(other[0]) for other in batch) + len(piece[0]) > most:
                yield batch
                batch = []
            batch.append(piece)
    yield batch


def muon(
    net: nn.Module,
    learning_rate: float,
    weight_decay: float,
    dtype: torch.dtype | None = None,
    coefficients: Coefficients = COEFFICIENTS,
) -> Muon:
    """Muon for the matrices; AdamW (eps 1e-20) for embeddings, head and vectors (DeepSeek-V4, sections 2.4 and 4.2.2).

    Fused parameters are split: `gate_up_proj` holds two matrices an expert, the grouped `o_a_proj` one a group.
    """
    matrices: dict[int, list[Tensor]] = defaultdict(list)
    for name, parameter in _trained(net, "matrix"):
        matrices[_parts(net, name)].append(parameter)
    recipe = {"weight_decay": weight_decay, "momentum": 0.95, "rms": 0.18}
    groups: list[dict[str, Any]] = [recipe | {"params": params, "parts": parts} for parts, params in matrices.items()]
    groups += [
        {"params": [parameter for _, parameter in _trained(net, "table")], "weight_decay": weight_decay},
        {"params": [parameter for _, parameter in _trained(net, "vector")], "weight_decay": 0.0},
    ]
    return Muon([group for group in groups if group["params"]], learning_rate, coefficients, dtype)


def adamw(net: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """Fused AdamW (arXiv 1711.05101), betas 0.9 and 0.95 (arXiv 2412.19437, section 4.2); vectors do not decay."""
    groups = [
        {"params": [p for _, p in _trained(net, "matrix", "table")], "weight_decay": weight_decay},
        {"params": [p for _, p in _trained(net, "vector")], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, betas=(0.9, 0.95), fused=True)


def role(name: str, parameter: Tensor) -> str:
    """What a parameter is to the optimiser, by its Hugging Face name: `vector`, `table` or `matrix`.

    Vectors: norms, sinks, biases, scales, and `position_bias`, a row of biases a position. Tables: embeddings and head.
    """
    if parameter.ndim < 2 or name.endswith("position_bias"):
        return "vector"
    return "table" if name.split(".")[-2] in TABLES else "matrix"


def _trained(net: nn.Module, *roles: str) -> list[tuple[str, Tensor]]:
    """Trainable parameters of these roles, in the order of the net."""
    named = [(name, parameter) for name, parameter in net.named_parameters() if parameter.requires_grad]
    return [(name, parameter) for name, parameter in named if role(name, parameter) in roles]


def _parts(net: nn.Module, name: str) -> int:
    """Matrices that lie one below the other in the rows of a parameter."""
    if name.endswith("gate_up_proj"):
        return 2
    return net.config.o_groups if name.endswith("o_a_proj.weight") else 1


@torch.no_grad()
def balance_experts(net: nn.Module, expert_load_ME: Tensor, speed: float) -> None:
    """Raise the selection bias of experts below the mean load by `speed`, lower the others (section 2.1.2).

    expert_load_ME: tokens that each expert of each layer took in the whole batch. Hash-routed layers have no bias.
    """
    for router, load_E in zip(_routers(net), expert_load_ME.float(), strict=True):
        if not isinstance(router, HashRouter):
            router.e_score_correction_bias += speed * (load_E.mean() - load_E).sign()


def bias_range(net: nn.Module) -> Tensor:
    """Largest minus smallest selection bias, of the layer where they are farthest apart; a scalar."""
    biases = [router.e_score_correction_bias for router in _routers(net) if not isinstance(router, HashRouter)]
    ranges = [bias.max() - bias.min() for bias in biases]
    return torch.stack(ranges).max() if ranges else next(net.parameters()).new_zeros(())


def _routers(net: nn.Module) -> list[Router]:
    return [module for module in net.modules() if isinstance(module, Router)]
