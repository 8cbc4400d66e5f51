"""The compiled kernels of the CPU: built once, and what is said where they cannot be."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from moe_kernels.cpu import library

ROOT = Path(__file__).parents[2]
PROBE = """
import torch, moe_kernels, warnings
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    chosen = {moe_kernels.chosen(torch.device("cpu"))["hyper_read"] for _ in range(2)}
    moe_kernels.hyper_write(torch.ones(2, 4, 3), torch.ones(2, 3), torch.ones(2, 4), torch.ones(2, 4, 4))
print(chosen, [str(w.message) for w in said])
"""


def probe(folder: Path, **environment: str) -> subprocess.Popen[str]:
    path = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    variables = {**os.environ, "PYTHONPATH": path, "XDG_CACHE_HOME": str(folder), "TMPDIR": str(folder), **environment}
    return subprocess.Popen(
        [sys.executable, "-c", PROBE], env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_without_a_compiler_the_reference_computes_and_one_warning_says_so(tmp_path: Path) -> None:
    said, trouble = probe(tmp_path, PATH="").communicate(timeout=120)
    assert said.startswith("{'reference'} ['The CPU kernels are not in use, PyTorch computes instead: no C++ compiler")
    assert said.count("not in use") == 1
    assert "Traceback" not in trouble


def compiler(folder: Path, text: str) -> str:
    """A search path on which g++ is this shell script."""
    script = folder / "bin" / "g++"
    script.parent.mkdir()
    script.write_text(f"#!/bin/sh\n{text}\n")
    script.chmod(0o755)
    return f"{script.parent}{os.pathsep}/bin"


def test_a_compiler_that_fails_is_reported_in_one_sentence(tmp_path: Path) -> None:
    path = compiler(tmp_path, "echo 'fatal error: out of stars' >&2; exit 1")
    said, trouble = probe(tmp_path, PATH=path).communicate(timeout=120)
    assert said.startswith("{'reference'}")
    assert "out of stars" in said
    assert "Traceback" not in trouble


@pytest.mark.skipif(not any(map(shutil.which, library.COMPILERS)), reason="needs a C++ compiler")
def test_of_two_processes_one_builds_and_where_the_cache_cannot_be_written_among_temporary_files(
    tmp_path: Path,
) -> None:
    """A file stands where the folder of the cache would be. The compiler takes 0.2 s, and copies what is built."""
    blocked, calls = tmp_path / "blocked", tmp_path / "calls"
    blocked.write_text("")
    copy = f'sleep 0.2; echo >> {calls}; while [ "$1" != -o ]; do shift; done; cp {library.library()} "$2"'
    path = compiler(tmp_path, copy)
    both = [probe(tmp_path, XDG_CACHE_HOME=str(blocked), PATH=path) for _ in range(2)]
    for process in both:
        said, trouble = process.communicate(timeout=300)
        assert said.strip() == "{'cpu'} []", trouble
    assert len(list(tmp_path.glob("shovel-kernels-*/*.so"))) == 1
    sources = list(library.HERE.glob("*.cpp"))
    assert calls.read_text().count("\n") == len(sources) + 1
