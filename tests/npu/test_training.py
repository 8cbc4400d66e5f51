"""Training of a small V3 and V4 on `npu`: the curves of the CPU, fused operators in each step, and no lost run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import moe_kernels
import pytest
import torch
import training
from moe_kernels import device

HERE = Path(__file__).parent
emulated = pytest.mark.skipif(not device.emulated(), reason="reads the trace of the emulator or provokes its faults")


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return training.run("cpu", tmp_path_factory.mktemp("cpu"))


@pytest.fixture
def launch(python: Callable[..., CompletedProcess[str]]) -> Callable[..., CompletedProcess[str]]:
    """The training program in a process of its own, through torch_npu's asynchronous queue."""
    code = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    program = str(HERE / "training.py")
    return lambda *words, **more: python(code, program, *map(str, words), ASCEND_LAUNCH_BLOCKING="0", **more)


def losses(done: CompletedProcess[str]) -> list[float]:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_deepseek_v3_learns_as_on_the_cpu(on_cpu: list[float], tmp_path: Path) -> None:
    assert training.run("npu", tmp_path) == pytest.approx(on_cpu, rel=1e-4)
    assert on_cpu[-1] < 0.6 * on_cpu[0]


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [({}, 1e-5), ({"optimizer": "muon"}, 2e-3), ({"dense_attention_steps": 5}, 1e-3)],
    ids=["sparse", "muon", "dense first"],
)
def test_deepseek_v4_learns_as_on_the_cpu(
    settings: dict, tolerance: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every loss, under the references alone on the CPU. What differs in the last bit grows where a top-k can tip, and
    would grow in Muon's products if they were in bfloat16, which is what both devices multiply fastest."""
    monkeypatch.setattr(device, "matmul_dtype", lambda device: torch.float32)
    ours = training.records("npu", tmp_path / "npu", "v4", **settings)
    with moe_kernels.reference_only():
        theirs = training.records("cpu", tmp_path / "cpu", "v4", **settings)
    for name in ("loss", "mtp_loss", "balance_loss", "indexer_loss", "gradient_norm"):
        found, expected = ([record[name] for record in records[:5]] for records in (ours, theirs))
        assert found == pytest.approx(expected, rel=2e-4), name
    found, expected = ([record["loss"] for record in records] for records in (ours, theirs))
    assert found == pytest.approx(expected, rel=tolerance)
    assert expected[-1] < 0.65 * expected[0]


@pytest.mark.parametrize(("model", "optimizer"), [("v3", "adamw"), ("v4", "adamw"), ("v4", "muon")])
def test_bfloat16_stays_near_the_cpu_in_bfloat16(model: str, optimizer: str, tmp_path: Path) -> None:
    """Products of Muon's Newton-Schulz steps included, which the device multiplies in bfloat16, too."""
    assert device.matmul_dtype(torch.device("npu")) == torch.bfloat16
    settings = {"precision": "bfloat16", "optimizer": optimizer}
    ours = training.run("npu", tmp_path / "npu", model, **settings)
    with moe_kernels.reference_only():
        theirs = training.run("cpu", tmp_path / "cpu", model, **settings)
    assert ours == pytest.approx(theirs, rel=0.02)
    assert theirs[-1] < 0.7 * theirs[0]


@pytest.mark.parametrize("model", ["v3", "v4"])
def test_another_seed_gives_another_curve(model: str, on_cpu: list[float], tmp_path: Path) -> None:
    """The comparisons above can fail."""
    ours, theirs = (training.run("npu", tmp_path / str(seed), model, seed=seed) for seed in (0, 1))
    assert ours != pytest.approx(theirs, rel=1e-2)


def test_a_training_asks_for_reproducible_operators(python: Callable[..., CompletedProcess[str]]) -> None:
    """PyTorch is told, and HCCL through the environment; what the user set there stays."""
    code = (
        "import os, pathlib, tempfile, torch, training\n"
        "training.records('npu', pathlib.Path(tempfile.mkdtemp()), steps=1)\n"
        "print(torch.are_deterministic_algorithms_enabled(), os.environ['HCCL_DETERMINISTIC'])"
    )
    for own, expected in ({}, "True true"), ({"HCCL_DETERMINISTIC": "strict"}, "True strict"):
        done = python(code, **own)
        assert done.stdout.splitlines()[-1:] == [expected], done.stdout + done.stderr


@emulated
def test_cann_is_told_before_the_first_operator_of_a_training(launch: Callable, tmp_path: Path) -> None:
    """Before each operator torch_npu hands the mode of PyTorch to CANN as ACL_OPT_DETERMINISTIC, of the process
    (aclrtSetSysParamOpt) and of the context (aclrtCtxSetSysParamOpt), where the runtime is 8.5 or newer; the emulator
    writes every change down."""
    calls, done = traced(launch, tmp_path, "v3")
    losses(done)
    lines = (tmp_path / "trace").read_text().split()
    assert lines[0] == "deterministic=1" and calls["deterministic=1"] == 1 and "deterministic=0" not in lines


@emulated
def test_cann_is_not_told_where_nobody_asked(python: Callable[..., CompletedProcess[str]], tmp_path: Path) -> None:
    """The comparison above can fail."""
    done = python("import torch; torch.ones(3, device='npu').sum().item()", FAKECANN_TRACE=str(tmp_path / "trace"))
    assert done.returncode == 0, done.stderr
    assert "deterministic" not in (tmp_path / "trace").read_text()


@emulated
def test_a_step_of_deepseek_v3_is_made_of_fused_operators(
    on_cpu: list[float], launch: Callable, tmp_path: Path
) -> None:
    calls, done = traced(launch, tmp_path, "v3")
    assert losses(done) == pytest.approx(on_cpu, rel=1e-4)
    config, steps = training.V3, training.STEPS
    layers = config.num_hidden_layers
    moe, norms = layers - config.first_k_dense_replace, 4 * layers + 1
    per_step = {
        "aclnnRmsNorm": norms, "aclnnRmsNormGrad": norms,
        "aclnnRotaryPositionEmbedding": 2 * layers, "aclnnRotaryPositionEmbeddingGrad": 2 * layers,
        "aclnnFlashAttentionVarLenScore": layers, "aclnnFlashAttentionUnpaddingScoreGrad": layers,
        "aclnnSwiGlu": layers + moe, "aclnnSwiGluGrad": layers + moe,
        "aclnnMoeTokenPermute": moe, "aclnnMoeTokenUnpermute": moe,
        "aclnnGroupedMatmulV5": 6 * moe, "aclnnCrossEntropyLoss": 1, "aclnnCrossEntropyLossGrad": 1,
        "aclnnApplyAdamWV2": len([*training.build(config).parameters()]),
    }  # fmt: skip
    assert {name: calls[name] for name in per_step} == {name: steps * count for name, count in per_step.items()}
    projections = 5 * layers + 3 * layers + moe + 1  # attention, feed-forward (shared experts), router, head
    assert calls["aclnnMatmul"] + calls["aclnnMm"] <= 3 * projections * steps


@emulated
def test_a_step_of_deepseek_v4_is_made_of_fused_operators(launch: Callable, tmp_path: Path) -> None:
    """No matrix product by expert, no step of Sinkhorn-Knopp on its own, and nothing on the host."""
    calls, done = traced(launch, tmp_path, "v4")
    losses(done)
    blocks = training.V4.num_hidden_layers + 1  # with the one that predicts further ahead
    per_step = {
        "aclnnMoeTokenPermute": blocks, "aclnnMoeTokenUnpermute": blocks, "aclnnGroupedMatmulV5": 6 * blocks,
        "aclnnFlashAttentionScoreV3": blocks, "aclnnFlashAttentionScoreGradV3": blocks,
        "aclnnMhcSinkhorn": 4 * blocks, "aclnnMhcSinkhornBackward": 2 * blocks,  # forwards, and again to go backwards
        "aclnnCrossEntropyLoss": 2, "aclnnCrossEntropyLossGrad": 2,
    }  # fmt: skip
    assert {name: calls[name] for name in per_step} == {name: training.STEPS * n for name, n in per_step.items()}
    assert calls["aclnnRmsNorm"] > 4 * blocks * training.STEPS


def traced(launch: Callable, folder: Path, model: str) -> tuple[Counter[str], CompletedProcess[str]]:
    """(calls of each operator in a training, its process); torch_npu must have computed nothing on the host."""
    trace = folder / "trace"
    done = launch("npu", folder / "run", model, FAKECANN_TRACE=str(trace))
    fallbacks = [line for line in done.stderr.splitlines() if "on the CPU" in line or "running on CPU" in line]
    assert not fallbacks, fallbacks
    return Counter(trace.read_text().split()), done


@emulated
def test_the_readme_lists_the_operators_of_a_step(python: Callable[..., CompletedProcess[str]]) -> None:
    program = training.ROOT / "kernels" / "bench" / "npu_step.py"
    code = f"import runpy; bench = runpy.run_path({str(program)!r}); print(bench['table'](bench['one_step']()))"
    found = python(code, ASCEND_LAUNCH_BLOCKING="0")
    assert found.returncode == 0, found.stderr
    table = found.stdout[found.stdout.index("| calls") :].strip()
    assert table in (training.ROOT / "kernels" / "README.md").read_text(), "run kernels/bench/npu_step.py"
