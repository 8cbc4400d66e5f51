"""The emulator's operators, each called through torch_npu and compared with the CPU: order and types of arguments."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import moe_kernels
import pytest
import torch
from cases import NPU, distance, random
from expressions import EXPRESSIONS, RANDOM
from moe_kernels import device

pytestmark = pytest.mark.skipif(not device.emulated(), reason="about the emulator")

ELSEWHERE = {  # fused operators, which test_parity.py and test_training.py compare
    "ApplyAdamWV2", "CrossEntropyLoss", "CrossEntropyLossGrad", "FlashAttentionScore", "FlashAttentionScoreGrad",
    "FlashAttentionScoreV3", "FlashAttentionScoreGradV3", "FlashAttentionVarLenScore",
    "FlashAttentionUnpaddingScoreGrad", "GroupedMatmulV4", "GroupedMatmulV5", "MhcSinkhorn", "MhcSinkhornBackward",
    "MoeTokenPermute", "MoeTokenPermuteGrad", "MoeTokenUnpermute", "MoeTokenUnpermuteGrad", "RmsNorm", "RmsNormGrad",
    "RotaryPositionEmbedding", "RotaryPositionEmbeddingGrad", "SwiGlu", "SwiGluGrad",
}  # fmt: skip


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulator") / "trace"


@pytest.fixture(scope="module")
def distances(trace: Path, python: Callable[..., CompletedProcess[str]]) -> dict[str, float | str]:
    code = "import runpy; runpy.run_module('expressions', run_name='__main__')"
    done = python(code, FAKECANN_TRACE=str(trace), ASCEND_LAUNCH_BLOCKING="1")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("expression", [*EXPRESSIONS, *RANDOM])
def test_the_same_as_on_the_cpu(distances: dict[str, float | str], expression: str) -> None:
    assert isinstance(distances[expression], float), distances[expression]
    assert distances[expression] <= 1e-5


def test_every_operator_of_the_emulator_is_called_by_a_test(distances: dict[str, float | str], trace: Path) -> None:
    library = Path(os.environ["LD_LIBRARY_PATH"].split(os.pathsep)[0]) / "libopapi.so"
    symbols = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    named = [line.split()[-1] for line in symbols.splitlines() if line.endswith("GetWorkspaceSize")]
    defined = {name.removeprefix("aclnn").removesuffix("GetWorkspaceSize") for name in named}
    assert len(defined) > 200
    assert defined - ELSEWHERE == defined & {name.removeprefix("aclnn") for name in trace.read_text().split()}


def test_attention_over_sequences_end_to_end_is_attention_over_each() -> None:
    """Layout TND, with the mask compressed; values and gradients."""
    ends = [4, 5, 11]
    leaves = [random(11, 3, 8, seed=n).to(NPU).requires_grad_() for n in range(3)]
    mask = torch.ones(2048, 2048, dtype=torch.bool, device=NPU).triu(1)
    keywords = {"actual_seq_qlen": ends, "actual_seq_kvlen": ends, "sparse_mode": 2, "scale": 0.3, "atten_mask": mask}
    ours = torch.ops.npu.npu_fusion_attention(*leaves, 3, "TND", **keywords)[0]
    theirs = [random(11, 3, 8, seed=n).requires_grad_() for n in range(3)]
    parts = [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    alone = [moe_kernels.attention(*(x[None, part] for x in theirs), 0.3)[0] for part in parts]
    upstream = random(11, 3, 8, seed=9)
    ours.backward(upstream.to(NPU))
    torch.cat(alone).backward(upstream)
    assert distance(ours, torch.cat(alone)) <= 2e-5
    assert max(distance(mine.grad, other.grad) for mine, other in zip(leaves, theirs, strict=True)) <= 2e-5
