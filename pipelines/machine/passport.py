"""The numerics passport: are the numbers of this device right? Each operation, each type of block, a training curve.

    shovel passport                     -> reports/passport.json, reports/passport.html

`pretrain`, `finetune`, `evaluate` and `export` make it by themselves where this stack (device, versions, kernels) has
none, and keep it below ~/.cache/shovel/passports; there `python -m pipelines.machine.passport DEVICE FILE` runs. What
does not pass is left to the reference, in the rest of the comparison too.

Operations are compared with the reference in fp64, blocks and the curve of 50 steps with the references in fp32 on the
CPU; `moe_kernels.numerics` and the tolerances below say how near is near enough. The digest of the JSON is the tag
`passport` of runs and versions that were computed by the very stack which it describes.
"""

from __future__ import annotations

import copy
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import moe_kernels
import numpy as np
import torch
from matplotlib.figure import Figure
from moe_kernels import device as devices
from moe_kernels import numerics
from moe_kernels.numerics import BF16, DTYPES, FP32, Worst
from torch import Tensor, nn

from model.checkpoint import CheckpointStore
from model.config import HEAVY, SLIDING, SPARSE, ModelConfig
from model.context import Context
from model.precision import autocast
from model.train import TrainConfig, train
from model.transformer import build
from pipelines import pages, stage
from pipelines.machine import environment

STEPS, LENGTH, ROWS = 50, 32, 4
NAMES = {FP32: "float32", BF16: "bfloat16"}
BLOCK = {FP32: 1e-5, BF16: 4e-2}  # of the norm of the difference over the norm of the reference
CURVE = {FP32: 1e-3, BF16: 3e-2}  # of the loss of any step; what differs in the last bit grows where a top-k can tip
SMALL = {"vocab_size": 64, "hidden_size": 32, "moe_intermediate_size": 16, "num_attention_heads": 2, "q_lora_rank": 16,
         "n_routed_experts": 8, "num_experts_per_tok": 2, "initializer_range": 0.1}  # fmt: skip
V3 = ModelConfig(
    model_type="deepseek_v3", intermediate_size=48, num_hidden_layers=2, kv_lora_rank=16, qk_nope_head_dim=8,
    qk_rope_head_dim=8, v_head_dim=8, n_group=4, topk_group=2, **SMALL,
)  # fmt: skip
V4 = ModelConfig(
    num_hidden_layers=4, head_dim=16, qk_rope_head_dim=8, o_lora_rank=8, sliding_window=8,
    layer_types=[SLIDING, SPARSE, HEAVY, SLIDING], mlp_layer_types=["hash_moe", "moe", "moe", "moe"],
    compress_rates={SPARSE: 4, HEAVY: 8}, index_n_heads=2, index_head_dim=8, index_topk=3, hc_mult=4,
    hc_sinkhorn_iters=3, num_nextn_predict_layers=1, **SMALL,
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One comparison: its part (operation, block or curve), who computed, the error and where it is worst.

    losses: of each step of a curve, (the device's, the reference's).
    """

    part: str
    name: str
    backend: str
    dtype: str
    cases: int
    tolerance: float
    worst: Worst
    losses: tuple[list[float], list[float]] | None = None

    @property
    def passed(self) -> bool:
        return self.worst.error <= self.tolerance


def passport(device: torch.device, file: Path, page: Path) -> dict[str, Any]:
    """Compare everything on `device`; writes the JSON `file` and the page, returns what the JSON holds."""
    entries = []
    total = sum(len(numerics.dtypes(name)) for name in numerics.CASES) + len(DTYPES) * (len([*block_types()]) + 2)
    with stage.progress("passport", total) as advance:
        for part in (operations, blocks, curves):
            for entry in part(device):
                entries.append(entry)
                advance(1, f"{entry.name}, {entry.dtype}")
            moe_kernels.withhold(suspect(entries), device.type)
    content = {
        "stack": environment.stack(device),
        "passed": all(entry.passed for entry in entries),
        "entries": [_plain(entry) for entry in entries],
    }
    stage.write_json(file, content)
    figures = [(f"{entry.name}, {entry.dtype}", figure(entry)) for entry in entries if entry.losses]
    pages.write(page, "passport.html.j2", digest=environment.digest(file), figures=figures, **content)
    return content


def suspect(entries: list[Entry]) -> list[str]:
    """Operations of which a kernel does not pass."""
    return [e.name for e in entries if e.part == "operation" and e.backend != "reference" and not e.passed]


def _plain(entry: Entry) -> dict[str, Any]:
    """JSON has no infinity; what is infinitely wrong has no error there, and no losses."""
    content = asdict(entry) | {"passed": entry.passed}
    if content["losses"] and not all(map(math.isfinite, entry.losses[0])):
        content["losses"] = None
    for key in ("error", "found", "expected"):
        value = content["worst"][key]
        content["worst"][key] = value if math.isfinite(value) else None
    return content


def operations(device: torch.device) -> Iterator[Entry]:
    """Each operation in each dtype that it is used in."""
    chosen = moe_kernels.chosen(device)
    for name in numerics.CASES:
        for dtype in numerics.dtypes(name):
            worst, cases = numerics.compare(name, dtype, device)
            yield Entry("operation", name, chosen[name], NAMES[dtype], cases, numerics.tolerance(name, dtype), worst)


def blocks(device: torch.device) -> Iterator[Entry]:
    """A small block of each type: its output, and the gradients of its input and of every parameter."""
    for name, config, layer in block_types():
        for dtype, limit in BLOCK.items():
            block, x = build(config, seed=0).model.layers[layer], _state(config)
            ours = block_results(block, x, config, device, NAMES[dtype])
            with moe_kernels.reference_only():
                theirs = block_results(block, x, config, torch.device("cpu"), "float32")
            found = [numerics.worst("two documents of 32 tokens", key, ours.get(key), theirs[key]) for key in theirs]
            yield Entry("block", name, "all", NAMES[dtype], 1, limit, max(found, key=lambda one: one.error))


def block_types() -> Iterator[tuple[str, ModelConfig, int]]:
    """(what it is called, its model, its layer)."""
    yield "V3, latent attention, dense", V3, 0
    yield "V3, latent attention, experts", V3, 1
    for layer, kinds in enumerate(zip(V4.layer_types, V4.mlp_layer_types, strict=True)):
        yield f"V4, {', '.join(kinds).replace('_', ' ')}", V4, layer


def _state(config: ModelConfig) -> Tensor:
    return numerics.random(1, LENGTH, *([config.hc_mult] if config.is_v4 else []), config.hidden_size)


def block_results(
    block: nn.Module, x: Tensor, config: ModelConfig, device: torch.device, precision: str
) -> dict[str, Tensor]:
    """Output and gradients by name, of one row of two documents."""
    block = copy.deepcopy(block).to(device)
    x = x.to(device).requires_grad_()
    ids = torch.arange(LENGTH, device=device)[None]
    with autocast(precision, device):
        y = block(x, Context(config, ids, (ids > 11).long()), "layer")
    y.backward(numerics.random(*y.shape, seed=7).to(y))
    gradients = {name: weight.grad for name, weight in block.named_parameters() if weight.grad is not None}
    return {"output": y, "gradient of the input": x.grad} | {f"gradient of {n}": g for n, g in gradients.items()}


class Documents:
    """Endless rows of slowly rising ids; the second document of a row starts at a place that depends on the row."""

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        ids = np.cumsum(np.random.default_rng(index).integers(0, 3, LENGTH + 1)) % SMALL["vocab_size"]
        return ids[:-1], ids[1:], (np.arange(LENGTH) >= 5 + index % 20).astype(np.int64)


def curves(device: torch.device) -> Iterator[Entry]:
    """The loss of a small model of each family over 50 steps."""
    for name, config in (("V3", V3), ("V4", V4)):
        with moe_kernels.reference_only():
            theirs = losses(config, torch.device("cpu"), "float32")
        for dtype, limit in CURVE.items():
            ours = losses(config, device, NAMES[dtype])
            errors = [abs(a - b) / abs(b) if math.isfinite(a) else math.inf for a, b in zip(ours, theirs, strict=True)]
            step = max(range(STEPS), key=errors.__getitem__)
            worst = Worst(errors[step], f"step {step}", "loss", [STEPS], [step], ours[step], theirs[step])
            yield Entry("curve", f"{name}, {STEPS} steps", "all", NAMES[dtype], STEPS, limit, worst, (ours, theirs))


def figure(entry: Entry) -> str:
    """Both curves of an entry, and below how far they are apart at each step, as an image for the page."""
    ours, theirs = entry.losses
    picture = Figure(figsize=(4.6, 3.2), layout="constrained")
    above, below = picture.subplots(2, sharex=True, height_ratios=(3, 2))
    above.plot(theirs, color="#c9d3de", linewidth=5, label="reference")
    above.plot(ours, color="#245a8d", linewidth=1.4, label=entry.dtype)
    above.set_ylabel("loss, nats")
    above.legend(frameon=False)
    least = 1e-6 * entry.tolerance  # where equal losses are drawn
    below.semilogy([max(abs(a - b) / abs(b), least) for a, b in zip(ours, theirs, strict=True)], color="#245a8d")
    below.axhline(entry.tolerance, color="#b3261e", linestyle="--", linewidth=1)
    below.text(0, 1.5 * entry.tolerance, "tolerance", fontsize=8, color="#b3261e")
    below.set(xlabel="step", ylabel="difference", ylim=(least, 30 * entry.tolerance))
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    return pages.inline_svg(picture)


def losses(config: ModelConfig, device: torch.device, precision: str) -> list[float]:
    """Of each step of a training with AdamW."""
    settings = TrainConfig(
        steps=STEPS, batch_tokens=ROWS * LENGTH, sequence_length=LENGTH, learning_rate=3e-3, precision=precision
    )
    with tempfile.TemporaryDirectory() as folder:
        history = train(
            build(config, seed=0), Documents(), settings, CheckpointStore(Path(folder)), device, lambda *_: None
        )
    return [record["loss"] for record in history]


def failed(content: dict[str, Any]) -> list[str]:
    """Names of the entries that do not pass."""
    return [f"{entry['name']} ({entry['dtype']})" for entry in content["entries"] if not entry["passed"]]


def main(kind: str, file: Path) -> None:
    """Make the passport of a device of this kind and say how it went."""
    device = devices.default() if kind != "cpu" else torch.device("cpu")
    stage.say(f"passport   comparing {devices.name(device)} with the reference, once for this stack")
    content = passport(device, file, file.with_suffix(".html"))
    wrong, number = failed(content), len(content["entries"])
    stage.say(f"passport   {number - len(wrong)} of {number} comparisons pass")
    if wrong:
        stage.say(f"passport   outside the tolerance: {', '.join(wrong)}; see {file.with_suffix('.html')}")


if __name__ == "__main__":
    with stage.exits("passport"):
        main(sys.argv[1], Path(sys.argv[2]))
    sys.stderr.flush()
    os._exit(0)  # an operator that failed on the way would keep torch_npu's exit handler waiting
