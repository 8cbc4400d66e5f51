"""Is this machine ready? One line per part with ok, warn or fail, and for every fail what to change.

`shovel doctor [--json] [--output FILE]`; as `python -m pipelines.machine.doctor` it needs nothing but Python, so it
works where the installation does not. Exit code 1 when something fails. With --output the result is a file that a DVC
stage can depend on: it holds what was found and no time of day. Which CANN belongs to which torch_npu is data, in
compatibility.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

OK, WARN, FAIL = "ok", "warn", "fail"
ROOT = Path(__file__).parents[2]
CANN_FOLDERS = (
    "/usr/local/Ascend/ascend-toolkit/latest",
    "/usr/local/Ascend/cann/latest",
    "/usr/local/Ascend/nnae/latest",
)
GIB = 1 << 30
LEAST_FILES, LEAST_MEMORY_GIB, LEAST_DISK_GIB = 4096, 4, 10
# The first line of a chip: number, name, health, watts.
CHIP = re.compile(r"^\|\s*(\d+)\s+(\S+)\s*\|\s*(\S+)\s*\|\s*([\d.]+)?")
HBM = re.compile(r"(\d+)\s*/\s*(\d+)\s*\|\s*$")  # end of its second line: used and total MB


@dataclass(frozen=True)
class Line:
    """One part: its state, what was found, and the line to change (empty when there is nothing to do)."""

    part: str
    state: str
    found: str
    mend: str = ""


@dataclass(frozen=True)
class Chip:
    """One chip as npu-smi lists it; memory in MB, power in watts or None where the card does not tell."""

    number: int
    name: str
    health: str
    memory_mb: int
    power_w: float | None


def examine(root: Path = ROOT, environment: Mapping[str, str] = os.environ) -> list[Line]:
    """All lines, in the order in which one depends on the other."""
    cards = bool(list(Path("/dev").glob("davinci[0-9]*")))
    smi = _output("npu-smi", "info") if cards else ""
    npu, stand_in = installed("torch-npu"), None if cards else emulator(environment)
    lines = [python(), *packages(root)]
    if stand_in:
        lines += [emulation(stand_in, npu)]
    else:
        lines += [driver(cards, smi), chips(cards, smi), firmware(cards), cann(cards, environment)]
    lines += [torch_npu(cards or bool(stand_in and npu), installed("torch"), npu, cann_version(environment))]
    lines += [triton(cards), *settings(cards, environment), memory(), files(), disk(root), clock(root), git(root)]
    return [*lines, dvc(Path.cwd())]


def python() -> Line:
    found = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= (3, 11)
    return Line("python", OK if good else FAIL, found, "" if good else "install Python 3.11 or newer")


def installed(name: str) -> str | None:
    """Version of a distribution, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def packages(root: Path) -> list[Line]:
    """What constraints.txt pins, of what the pipeline cannot do without."""
    pins = dict(line.split("==") for line in (root / "constraints.txt").read_text().split() if "==" in line)
    return [_package(name, installed(name), pins[name]) for name in ("torch", "transformers", "dvc", "mlflow")]


def _package(name: str, found: str | None, pinned: str) -> Line:
    mend = f"pip install -c constraints.txt {name}=={pinned}"
    if found is None:
        return Line(name, FAIL, "not installed", mend)
    same = found.split("+")[0] == pinned
    return Line(name, OK if same else WARN, found, "" if same else f"{mend}   # {pinned} is what was tested")


def parse_chips(smi: str) -> list[Chip]:
    """The chips in the output of `npu-smi info`; each is described by two lines of its table."""
    lines, found = smi.splitlines(), []
    for first, second in zip(lines, lines[1:], strict=False):
        chip, memory = CHIP.match(first), HBM.search(second)
        if chip and memory:
            found.append(Chip(int(chip[1]), chip[2], chip[3], int(memory[2]), float(chip[4]) if chip[4] else None))
    return found


def driver(cards: bool, smi: str) -> Line:
    if not cards:
        return Line(
            "driver", WARN, "no Ascend card in /dev", "nothing to do: the CPU trains; `make test-npu` emulates one"
        )
    found = re.search(r"Version:\s*(\S+)", smi)
    if found is None:
        return Line("driver", FAIL, "cards, but npu-smi does not answer", "install the Ascend HDK driver of your card")
    return Line("driver", OK, found[1])


def chips(cards: bool, smi: str) -> Line:
    found = parse_chips(smi)
    if not found:
        return Line("chips", FAIL if cards else OK, "none", "npu-smi info   # must list every chip" if cards else "")
    names = ", ".join(sorted({chip.name for chip in found}))
    text = f"{len(found)} x {names}, {min(chip.memory_mb for chip in found) / 1024:.0f} GiB each"
    sick = [f"{chip.number} ({chip.health})" for chip in found if chip.health.lower() != "ok"]
    if sick:
        return Line("chips", FAIL, f"{text}; not healthy: {', '.join(sick)}", "npu-smi info -t health -i NUMBER")
    return Line("chips", OK, text)


def firmware(cards: bool) -> Line:
    found = (
        re.search(r"Firmware Version\s*:\s*(\S+)", _output("npu-smi", "info", "-t", "board", "-i", "0"))
        if cards
        else None
    )
    if found is None:
        return Line("firmware", WARN if cards else OK, "unknown" if cards else "not needed without a card")
    return Line("firmware", OK, found[1])


def emulator(environment: Mapping[str, str]) -> Path | None:
    """Folder of kernels/fakecann's libraries where the loader finds them before those of CANN, else None."""
    folders = [Path(folder) for folder in environment.get("LD_LIBRARY_PATH", "").split(os.pathsep) if folder]
    first = next((folder for folder in folders if (folder / "libascendcl.so").is_file()), None)
    return first if first and b"fakecannVersion" in (first / "libascendcl.so").read_bytes() else None


def emulation(folder: Path, npu: str | None) -> Line:
    """In place of driver, chips, firmware and CANN, which all are the emulator."""
    if npu is None:
        found = f"none: {folder} is in LD_LIBRARY_PATH, but this Python has no torch_npu, so the CPU trains"
        return Line("npu", WARN, found, "PATH=$PWD/.venv-npu/bin:$PATH shovel doctor   # or unset LD_LIBRARY_PATH")
    found = f"emulated on the CPU by {folder}: shows that torch_npu is called rightly, no speed, no card's numbers"
    return Line("npu", WARN, found, "unset LD_LIBRARY_PATH and take .venv-npu/bin out of PATH: then the CPU trains")


def cann_folder(environment: Mapping[str, str]) -> Path | None:
    candidates = [environment["ASCEND_HOME_PATH"]] if environment.get("ASCEND_HOME_PATH") else CANN_FOLDERS
    return next((Path(folder) for folder in candidates if Path(folder).is_dir()), None)


def cann_version(environment: Mapping[str, str]) -> str | None:
    """From the installation's own version file, whose name has changed over time."""
    folder = cann_folder(environment)
    files = sorted(folder.glob("**/*install.info")) + sorted(folder.glob("**/version.info")) if folder else []
    found = (
        re.search(r"^[Vv]ersion\s*=\s*\[?([\w.]+)", file.read_text(errors="replace"), re.MULTILINE) for file in files
    )
    return next((match[1] for match in found if match), None)


def cann(cards: bool, environment: Mapping[str, str]) -> Line:
    folder, found = cann_folder(environment), cann_version(environment)
    if folder is None:
        mend = "install the CANN toolkit of your torch_npu, then `source .../set_env.sh`"
        return Line("cann", FAIL if cards else OK, "not installed", mend if cards else "")
    if not environment.get("ASCEND_HOME_PATH"):
        return Line("cann", FAIL, f"{found or folder}, but not in the environment", f"source {folder}/../set_env.sh")
    return Line("cann", OK if found else WARN, found or f"{folder} names no version")


def compatibility(what: str) -> list[dict[str, str]]:
    """Of compatibility.json: the `pairs` of torch_npu and CANN, or those of `vllm` with both; the newest first."""
    return json.loads(Path(__file__).with_name("compatibility.json").read_text(encoding="utf-8"))[what]


def torch_npu(cards: bool, torch: str | None, npu: str | None, cann: str | None) -> Line:
    """torch_npu goes with one torch and, as far as published, with one CANN. cards: real, or emulated for it."""
    if npu is None:
        return Line("torch_npu", FAIL if cards else OK, "not installed", "make test-npu" if cards else "")
    if torch is None or torch.split("+")[0].split(".")[:2] != npu.split(".")[:2]:
        mend = f"pip install torch=={'.'.join(npu.split('.')[:3])}"
        return Line("torch_npu", FAIL, f"{npu} beside torch {torch}", mend)
    if not cards and cann is None:
        mend = "make test-npu   # shows how to emulate CANN; or use the Python of .venv, which has no torch_npu"
        return Line("torch_npu", FAIL, f"{npu} without CANN and cards: `import torch` fails", mend)
    fitting = next((pair["cann"] for pair in compatibility("pairs") if npu in pair["torch_npu"]), None)
    if cann is not None and fitting is not None and not cann.startswith(fitting):
        return Line("torch_npu", FAIL, f"{npu} with CANN {cann}", f"install CANN {fitting}, which belongs to {npu}")
    return Line("torch_npu", OK, npu if fitting or not cann else f"{npu}; its CANN is not in compatibility.json")


def triton(cards: bool) -> Line:
    found = installed("triton-ascend")
    return Line(
        "triton-ascend",
        OK,
        found or ("not installed; torch.compile and some kernels need it" if cards else "not needed"),
    )


def settings(cards: bool, environment: Mapping[str, str]) -> list[Line]:
    """Variables of torch_npu and HCCL that make training slow or let it fail."""
    lines = []
    if environment.get("ASCEND_LAUNCH_BLOCKING") == "1":
        lines.append(
            Line("settings", WARN, "ASCEND_LAUNCH_BLOCKING=1: for debugging, slow", "unset ASCEND_LAUNCH_BLOCKING")
        )
    for name in ("HCCL_CONNECT_TIMEOUT", "HCCL_EXEC_TIMEOUT"):
        value = environment.get(name, "")
        if value and not (value.isdigit() and int(value) >= 120):
            lines.append(Line("settings", WARN, f"{name}={value}: seconds, at least 120", f"export {name}=1800"))
    if environment.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0" and cards:
        mend = "unset TORCH_DEVICE_BACKEND_AUTOLOAD"
        lines.append(Line("settings", FAIL, "TORCH_DEVICE_BACKEND_AUTOLOAD=0 hides the cards from PyTorch", mend))
    return lines or [Line("settings", OK, "nothing unusual for torch_npu and HCCL")]


def memory() -> Line:
    text = Path("/proc/meminfo").read_text() if Path("/proc/meminfo").exists() else ""
    found = re.search(r"MemAvailable:\s*(\d+)", text)
    if found is None:
        return Line("memory", WARN, "unknown on this system")
    gib = int(found[1]) / (1 << 20)
    state = OK if gib >= LEAST_MEMORY_GIB else WARN
    return Line(
        "memory", state, f"{gib:.0f} GiB free", "" if state == OK else "lower pretrain.batch_tokens in params.yaml"
    )


def files() -> Line:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    good = soft == resource.RLIM_INFINITY or soft >= LEAST_FILES
    return Line("open files", OK if good else WARN, f"at most {soft}", "" if good else "ulimit -n 65536")


def disk(root: Path) -> Line:
    gib = shutil.disk_usage(root).free / GIB
    state = OK if gib >= LEAST_DISK_GIB else WARN if gib >= 2 else FAIL
    return Line(
        "disk", state, f"{gib:.0f} GiB free", "" if state == OK else "dvc gc --workspace   # frees old versions"
    )


def clock(root: Path) -> Line:
    """A clock that is behind the newest commit is wrong; certificates and timestamps then fail in odd ways."""
    newest = _output("git", "-C", str(root), "log", "-1", "--format=%ct").strip()
    behind = int(newest) - time.time() if newest.isdigit() else 0
    if behind > 60:
        return Line("clock", FAIL, f"{behind / 60:.0f} minutes behind the newest commit", "timedatectl set-ntp true")
    return Line("clock", OK, "not behind the newest commit")


def git(root: Path) -> Line:
    found = _output("git", "--version").strip()
    if not found:
        return Line("git", FAIL, "not installed", "install git; DVC and the records of runs need it")
    inside = _output("git", "-C", str(root), "rev-parse", "HEAD").strip()
    mend = "" if inside else "git init && git add -A && git commit -m start"
    return Line("git", OK if inside else FAIL, found.removeprefix("git version ") if inside else "no commit here", mend)


def dvc(here: Path) -> Line:
    if not (here / "dvc.yaml").is_file():
        return Line("project", WARN, "none in this folder", "cd REPOSITORY   # most commands need it")
    good = (here / ".dvc").is_dir()
    return Line(
        "project", OK if good else FAIL, "dvc.yaml and .dvc" if good else "no DVC project", "" if good else "dvc init"
    )


def _output(*command: str) -> str:
    """Standard output of a command; empty when it is missing, fails or takes longer than half a minute."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def table(lines: list[Line]) -> str:
    width = max(len(line.part) for line in lines)
    rows = (
        f"{line.state:<5} {line.part:<{width}}  {line.found}" + (f"\n{'':<{width + 8}}{line.mend}" if line.mend else "")
        for line in lines
    )
    return "\n".join(rows)


def main(arguments: list[str] | None = None, examine: Callable[[], list[Line]] = examine) -> int:
    """Print the table or JSON; 1 when something fails."""
    parser = argparse.ArgumentParser(prog="doctor", description="Is this machine ready?")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--output", type=Path, help="write the JSON into this file as well")
    options = parser.parse_args(arguments)
    return show(examine(), options.json, options.output)


def show(lines: list[Line], as_json: bool, output: Path | None) -> int:
    """Print the table or JSON, write the JSON into `output` as well; 1 when something fails."""
    content = json.dumps([asdict(line) for line in lines], indent=2)
    if output:
        output.write_text(content + "\n")
    print(content if as_json else table(lines))
    return int(any(line.state == FAIL for line in lines))


if __name__ == "__main__":
    sys.exit(main())
