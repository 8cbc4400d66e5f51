"""The C++ sources of this folder as one shared library, compiled once for a machine at the first use of an operation.

g++ is called directly, one process a source, side by side; only PyTorch's stable ABI is included, so that this takes
seconds. The library lies in the user's cache under the hash of sources, flags, PyTorch and processor: another machine
that shares the folder compiles its own. It is written beside its place and then renamed, under a lock. Where there is
no compiler, where it fails or where nothing can be written, one warning says so, and the reference computes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock

from moe_kernels.cache import folder as cache_folder

HERE = Path(__file__).parent
FLAGS = ("-std=c++20", "-O3", "-march=native", "-fPIC", "-w")
COMPILERS = ("g++", "c++", "clang++")
PATIENCE_S = 2.0  # after which a build says that it is one


class BuildError(RuntimeError):
    """Why there is no library, in one sentence."""


@cache
def load(_device_type: str = "cpu") -> bool:
    """Register the compiled kernels, after compiling them where that is due; False: the reference has to compute."""
    try:
        torch.ops.load_library(str(library()))
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        warnings.warn(f"The CPU kernels are not in use, PyTorch computes instead: {reason}", stacklevel=2)
        return False
    return True


def library() -> Path:
    """The library of this machine, compiled now if there is none."""
    if os.name != "posix":
        raise BuildError("they are made for Linux and macOS")
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    folder = cache_folder("kernels")
    target = folder / f"cpu-{_key()}.so"
    if target.exists():
        return target
    if compiler is None:
        raise BuildError("no C++ compiler is installed; install g++ for faster steps")
    with FileLock(folder / "build.lock"):
        if not target.exists():
            _build(compiler, target)
    return target


def _key() -> str:
    """Changes with whatever the library depends on."""
    able = {name: held for name, held in torch.cpu.get_capabilities().items() if isinstance(held, bool | str)}
    digest = hashlib.sha256(json.dumps([FLAGS, torch.__version__, able], sort_keys=True).encode())
    for source in sorted([*HERE.glob("*.cpp"), *HERE.glob("*.h")]):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def _build(compiler: str, target: Path) -> None:
    say = threading.Timer(PATIENCE_S, print, ("kernels    building once for this machine",), {"file": sys.stderr})
    say.daemon = True
    say.start()
    try:
        with tempfile.TemporaryDirectory(dir=target.parent) as name, ThreadPoolExecutor(os.cpu_count()) as pool:
            folder, torch_folder = Path(name), Path(torch.__file__).parent
            sources = sorted(HERE.glob("*.cpp"))
            objects = [folder / f"{source.stem}.o" for source in sources]
            include = ("-isystem", torch_folder / "include")
            commands = [(compiler, *FLAGS, *include, "-c", s, "-o", o) for s, o in zip(sources, objects, strict=True)]
            list(pool.map(_call, commands))
            _call((compiler, "-shared", *objects, "-o", folder / "all.so", f"-L{torch_folder / 'lib'}", "-ltorch_cpu"))
            (folder / "all.so").replace(target)
    finally:
        say.cancel()


def _call(words: tuple[str | Path, ...]) -> None:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), f"exit status {done.returncode}")
        raise BuildError(f"{words[0]} does not compile them ({said.strip()})")
