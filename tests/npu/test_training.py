"""Training of a small DeepSeek-V3 on `npu`: the curve of the CPU, fused operators in each step, and no lost run."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import training
from moe_kernels import device

HERE = Path(__file__).parent
emulated = pytest.mark.skipif(not device.emulated(), reason="reads the trace of the emulator or provokes its faults")


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return training.run("cpu", tmp_path_factory.mktemp("cpu"))


@pytest.fixture
def launch(python: Callable[..., CompletedProcess[str]]) -> Callable[..., CompletedProcess[str]]:
    """The training program with fused operators, in a process of its own, through torch_npu's asynchronous queue."""
    code = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    program = str(HERE / "training.py")
    return lambda *words, **more: python(code, program, *map(str, words), ASCEND_LAUNCH_BLOCKING="0", **more)


def losses(done: CompletedProcess[str]) -> list[float]:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_model_as_it_is_learns_as_on_the_cpu(on_cpu: list[float], tmp_path: Path) -> None:
    assert training.run("npu", tmp_path) == pytest.approx(on_cpu, rel=1e-4)
    assert on_cpu[-1] < 0.6 * on_cpu[0]


def test_bfloat16_stays_near_the_cpu_in_bfloat16(tmp_path: Path) -> None:
    ours, theirs = (training.run(name, tmp_path / name, precision="bfloat16") for name in ("npu", "cpu"))
    assert ours == pytest.approx(theirs, rel=0.02)


def test_another_seed_gives_another_curve(on_cpu: list[float], tmp_path: Path) -> None:
    """The comparison above can fail."""
    assert training.run("npu", tmp_path, seed=1) != pytest.approx(on_cpu, rel=1e-2)


@emulated
def test_a_step_is_made_of_fused_operators(on_cpu: list[float], launch: Callable, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    done = launch("npu", tmp_path / "run", FAKECANN_TRACE=str(trace))
    assert losses(done) == pytest.approx(on_cpu, rel=1e-4)
    assert "running on CPU" not in done.stderr  # what torch_npu says when it computes an operator on the host
    calls = Counter(trace.read_text().split())
    config, steps = training.SMALL, training.STEPS
    layers, moe = config.num_hidden_layers, config.num_hidden_layers - config.first_k_dense_replace
    norms = 4 * layers + 1
    per_step = {
        "aclnnRmsNorm": norms, "aclnnRmsNormGrad": norms,
        "aclnnRotaryPositionEmbedding": 2 * layers, "aclnnRotaryPositionEmbeddingGrad": 2 * layers,
        "aclnnFlashAttentionScore": layers, "aclnnFlashAttentionScoreGrad": layers,
        "aclnnSwiGlu": layers + moe, "aclnnSwiGluGrad": layers + moe,
        "aclnnMoeTokenPermute": moe, "aclnnMoeTokenUnpermute": moe,
        "aclnnGroupedMatmulV5": 6 * moe,
        "aclnnCrossEntropyLoss": 1, "aclnnCrossEntropyLossGrad": 1,
        "aclnnApplyAdamWV2": len([*training.build(config).parameters()]),
    }  # fmt: skip
    assert {name: calls[name] for name in per_step} == {name: steps * count for name, count in per_step.items()}
    projections = 5 * layers + 3 * layers + moe + 1  # attention, feed-forward (shared experts), router, head
    assert calls["aclnnMatmul"] + calls["aclnnMm"] <= 3 * projections * steps


@emulated
@pytest.mark.parametrize("fault", ["lost:4000", "async:aclnnGroupedMatmulV5:100", "operator:aclnnRmsNorm:120"])
def test_a_fault_ends_in_one_message_and_the_run_goes_on(
    fault: str, on_cpu: list[float], launch: Callable, tmp_path: Path
) -> None:
    broken = launch("npu", tmp_path, FAKECANN_FAULT=fault)
    assert broken.returncode != 0
    assert [line for line in broken.stderr.splitlines() if "fakecann:" in line], broken.stderr
    assert 0 < max(int(path.name.split("-")[1]) for path in tmp_path.glob("step-*")) < training.STEPS
    resumed = losses(launch("npu", tmp_path))
    assert len(resumed) == training.STEPS and all(map(math.isfinite, resumed))
    assert resumed == pytest.approx(on_cpu, rel=1e-4)


@emulated
def test_the_readme_lists_the_operators_of_a_step(python: Callable[..., CompletedProcess[str]]) -> None:
    program = training.ROOT / "kernels" / "bench" / "operators.py"
    code = f"import runpy; bench = runpy.run_path({str(program)!r}); print(bench['table'](bench['one_step']()))"
    found = python(code, ASCEND_LAUNCH_BLOCKING="0")
    assert found.returncode == 0, found.stderr
    table = found.stdout[found.stdout.index("| calls") :].strip()
    assert table in (training.ROOT / "kernels" / "README.md").read_text(), "run kernels/bench/operators.py"
