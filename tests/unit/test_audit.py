"""The audit finds NVIDIA's parts by name, in a process that has them loaded, and nothing else."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines import audit

NVIDIA = ["libcuda.so.1", "libcudart.so.12", "libcublasLt.so.12", "libcudnn_ops.so.9", "libnccl.so.2", "libnvrtc.so.12",
          "libtorch_cuda.so", "libc10_cuda.so", "libcudart-a7b20f20.so.12"]  # fmt: skip
OTHER = [
    "libc.so.6",
    "libtorch_cpu.so",
    "libascendcl.so",
    "libhccl.so",
    "libtorch_npu.so",
    "libgomp.so.1",
    "libcurl.so.4",
]


@pytest.mark.parametrize("name", NVIDIA)
def test_nvidias_libraries_are_known(name: str) -> None:
    assert audit.LIBRARY.match(name)


@pytest.mark.parametrize("name", OTHER)
def test_others_are_not_taken_for_nvidias(name: str) -> None:
    assert not audit.LIBRARY.match(name)


def test_distributions_are_known_by_name() -> None:
    assert all(
        map(audit.DISTRIBUTION.fullmatch, ["nvidia-cublas-cu12", "cupy-cuda12x", "nvidia-nccl-cu12", "cuda-python"])
    )
    assert not any(map(audit.DISTRIBUTION.fullmatch, ["torch", "torch-npu", "numpy", "triton-ascend", "cudatext"]))


def test_this_process_has_no_nvidia_part() -> None:
    found = audit.audit()
    assert found.free and found.libraries > 5 and found.distributions > 20


def test_a_loaded_library_is_found_in_another_process(tmp_path: Path) -> None:
    """Any library under NVIDIA's name will do."""
    original = next(path for path in audit.loaded_libraries() if Path(path).name.startswith("libm"))
    shutil.copy(original, tmp_path / "libcudart.so.12")
    code = "import ctypes, sys; ctypes.CDLL(sys.argv[1]); print('ready', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path / "libcudart.so.12")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        found = audit.audit(process.pid)
        assert audit.main(["--pid", str(process.pid)]) == 1
        process.communicate("")
    assert found.nvidia_libraries == [str(tmp_path / "libcudart.so.12")] and not found.free


def test_a_process_that_does_not_exist_is_said_so() -> None:
    with pytest.raises(ValueError, match="a process that runs"):
        audit.audit(2**22 + 1)
