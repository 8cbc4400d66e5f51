"""What the installed wheel asks of CANN at link time, read from its files, against what kernels/fakecann defines."""

import os
import re
import subprocess
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
from moe_kernels import device

pytestmark = pytest.mark.skipif(not device.emulated(), reason="CANN itself is installed")

CANN = re.compile(r"(acl[A-Z]|aclrt|aclop|aclmdl|acltdt|rt[A-Z]|Msprof|Hccl|hccl|ge[A-Z])\w*")
LINKED = ["lib/libtorch_npu.so", "lib/libtensorpipe.so", "lib/libnpu_profiler.so", "_C.*.so"]


def names(path: Path, *options: str) -> dict[str, str]:
    """Symbol -> kind, as nm prints them."""
    lines = subprocess.run(["nm", "-D", *options, path], capture_output=True, text=True, check=True).stdout.splitlines()
    return {words[-1].split("@")[0]: words[-2] for words in map(str.split, lines) if len(words) >= 2}


def wanted() -> set[str]:
    folder = Path(find_spec("torch_npu").origin).parent
    files = [path for pattern in LINKED for path in folder.glob(pattern)]
    assert len(files) >= 4, files
    undefined = [item for path in files for item in names(path, "--undefined-only").items()]
    return {name for name, kind in undefined if CANN.fullmatch(name) and kind == "U"}


def defined() -> set[str]:
    folder = Path(os.environ["LD_LIBRARY_PATH"].split(os.pathsep)[0])
    return {name for path in folder.glob("*.so") for name in names(path, "--defined-only")}


def test_every_symbol_that_the_wheel_links_against_is_defined() -> None:
    missing = sorted(wanted() - defined())
    assert not missing, (
        f"torch-npu {version('torch-npu')} links against {len(missing)} symbols of CANN that kernels/fakecann lacks; "
        f"define them in runtime.cpp, or in refused.cpp if they cannot be emulated: {', '.join(missing)}"
    )


def test_the_reading_finds_what_is_known_to_be_there() -> None:
    assert {"aclrtMalloc", "aclInit", "rtKernelLaunch", "aclopCompileAndExecute", "MsprofReportApi"} <= wanted()
    assert len(wanted()) > 70
