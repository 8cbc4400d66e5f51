"""Builds the emulator of CANN with g++: `python kernels/fakecann/build.py FOLDER`, run by a Python that has torch_npu.

Three libraries hold code: libascendcl (runtime), libopapi (operators, on ATen) and libhccl (collectives). The others
that torch_npu links against are empty and point to libascendcl, where the loader then finds what it looks for. Sources
are compiled side by side; what is up to date is left alone.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
RUNTIME = ["runtime", "memory", "streams", "refused"]
OPERATORS = ["tensors", "pointwise", "reductions", "matmul", "neural", "routing", "attention", "optimizers"]
COLLECTIVES = ["collectives"]
EMPTY = ["libge_runner", "libgraph", "libacl_tdt_channel", "libacl_op_compiler"]


def package(name: str) -> Path:
    """Folder of an installed package, found without importing it: importing torch here would load torch_npu."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{name} is not installed for {sys.executable}; run `make test-npu`, which installs it")
    return Path(spec.origin).parent


def compile_flags() -> list[str]:
    torch, npu = package("torch") / "include", package("torch_npu") / "include" / "third_party"
    folders = [torch, torch / "torch" / "csrc" / "api" / "include", npu / "acl" / "inc", npu / "hccl" / "inc"]
    outside = [word for folder in [*folders, npu.parent] for word in ("-isystem", str(folder))]
    return ["g++", "-std=c++20", "-O0", "-fPIC", "-Wall", "-Wextra", "-Werror", *outside]


def call(*words: str | Path) -> None:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, words))}\n{done.stderr}")


def newer(target: Path, *sources: Path) -> bool:
    return target.exists() and all(target.stat().st_mtime >= source.stat().st_mtime for source in sources)


def compile_all(folder: Path) -> None:
    """One object per source. Those on ATen start from its header, compiled once: it takes longer than they do."""
    flags, headers = compile_flags(), [HERE / "tensors.h", HERE / "fakecann.h", Path(__file__)]
    aten = folder / "aten.h"
    if not newer(aten.with_suffix(".h.gch"), Path(__file__)):
        aten.write_text("#include <ATen/ATen.h>\n#include <ATen/core/LegacyTypeDispatch.h>\n")
        call(*flags, "-x", "c++-header", aten, "-o", aten.with_suffix(".h.gch"))

    def one(name: str) -> None:
        source, target = HERE / f"{name}.cpp", folder / f"{name}.o"
        if not newer(target, source, *headers):
            call(*flags, *([] if name in RUNTIME else ["-include", aten]), "-c", source, "-o", target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(one, [*COLLECTIVES, *OPERATORS, *RUNTIME]))


def link(folder: Path) -> None:
    def library(name: str, objects: list[str], *more: str | Path) -> None:
        parts = [folder / f"{part}.o" for part in objects]
        if not newer(folder / f"{name}.so", *parts):
            call("g++", "-shared", f"-Wl,-soname,{name}.so", "-o", folder / f"{name}.so", *parts, *more)

    torch = package("torch") / "lib"
    on_torch = ["-L", folder, "-lascendcl", "-L", torch, "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch}"]
    library("libascendcl", RUNTIME)
    library("libopapi", OPERATORS, *on_torch)
    library("libhccl", COLLECTIVES, *on_torch)
    for name in EMPTY:
        library(name, [], "-Wl,--no-as-needed", "-L", folder, "-lascendcl")


def build(folder: Path) -> None:
    """Compile and link what is not up to date, and say how long it took."""
    start = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    compile_all(folder)
    link(folder)
    print(f"emulator   of CANN in {folder}, {time.perf_counter() - start:.0f} s; its speed says nothing about Ascend")


if __name__ == "__main__":
    build(Path(sys.argv[1]).resolve())
