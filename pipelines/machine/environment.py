"""What computes: the device, emulated or not, which backend does which operation, and whether its numbers are right.

python -m pipelines.machine.environment    makes the passport of the default device where there is none
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import moe_kernels
import torch
from filelock import FileLock
from moe_kernels import cache
from moe_kernels import device as devices

import pipelines
from pipelines import stage
from pipelines.machine.doctor import cann_version, installed

NO_PASSPORT = "none of this stack"


def emulated(device: torch.device) -> bool:
    """Whether this device is an Ascend of kernels/fakecann, whose speed says nothing about a real one."""
    return device.type == "npu" and devices.emulated()


def tags(device: torch.device) -> dict[str, str]:
    """Tags of a run or a version: device type and name, emulated or not, backend of each operation as JSON."""
    return {
        "device": device.type,
        "device.name": devices.name(device),
        "emulated": str(emulated(device)).lower(),
        "kernels": json.dumps(moe_kernels.chosen(device), sort_keys=True),
        "passport": passport(device),
    }


def stack(device: torch.device) -> dict[str, str]:
    """What the numbers of this device depend on; a passport holds for one stack."""
    kernels = hashlib.sha256()
    for file in sorted(Path(moe_kernels.__file__).parent.rglob("*")):
        if file.suffix in (".py", ".cpp", ".h"):
            kernels.update(file.read_bytes())
    return {
        "device": devices.name(device).rsplit(", ", 1)[0] if device.type == "cpu" else devices.name(device),
        "device_type": device.type,
        "emulated": str(emulated(device)).lower(),
        "torch": torch.__version__,
        "torch_npu": installed("torch-npu") or "",
        "triton": installed("triton") or installed("triton-ascend") or "",
        "cann": "" if emulated(device) else cann_version(os.environ) or "",
        "kernels": kernels.hexdigest()[:16],
    }


def passport_file(device: torch.device) -> Path:
    """Where the passport of this stack lies on this machine, as JSON; the page is beside it. Raises `OSError`."""
    named = json.dumps(stack(device), sort_keys=True)
    return cache.folder("passports") / f"{hashlib.sha256(named.encode()).hexdigest()[:16]}.json"


def passport(device: torch.device) -> str:
    """Digest of the passport of this stack; `NO_PASSPORT` where there is none."""
    return digest(passport_file(device)) if _entries(device) is not None else NO_PASSPORT


def passport_page(device: torch.device) -> Path | None:
    """The page of the passport of this stack, where there is one."""
    return passport_file(device).with_suffix(".html") if _entries(device) is not None else None


def require_passport(device: torch.device) -> None:
    """From here on the device's own kernels compute only what a passing entry of its passport vouches for.

    A passport is made first where this stack has none, once, in well under a minute.
    Whatever it does not vouch for, which is everything where none can be made, is left to the reference with a warning.
    """
    if _entries(device) is None:
        make_passport(device, if_absent=True)
    found, chosen = {}, moe_kernels.chosen(device)
    for entry in _entries(device) or ():
        if entry["part"] == "operation" and entry["backend"] == chosen.get(entry["name"]):
            found[entry["name"]] = found.get(entry["name"], True) and entry["passed"]
    used = (name for name, backend in chosen.items() if backend != "reference")
    moe_kernels.withhold([name for name in used if not found.get(name)], device.type)


def make_passport(device: torch.device, if_absent: bool = False) -> None:
    """Compare this stack with the reference in a process of its own, which an operator that fails cannot harm.

    There every error of an Ascend is reported by the call that made it.
    """
    try:
        file = passport_file(device)
    except OSError:
        return
    sources = [Path(module.__file__ or "").parents[1] for module in (moe_kernels, pipelines)]
    path = os.pathsep.join([*map(str, sources), os.environ.get("PYTHONPATH", "")])
    words = [sys.executable, "-W", "ignore", "-m", "pipelines.machine.passport", device.type, str(file)]
    with FileLock(file.with_suffix(".lock")):
        if not if_absent or _entries(device) is None:
            settings = {"PYTHONPATH": path, "ASCEND_LAUNCH_BLOCKING": "1", "DVC_STAGE": ""}
            subprocess.run(words, env={**os.environ, **settings}, check=False)


def _entries(device: torch.device) -> list[dict[str, Any]] | None:
    """Of the passport of this stack; None where there is none."""
    try:
        content = json.loads(passport_file(device).read_text(encoding="utf-8"))
        return content["entries"] if content["stack"] == stack(device) else None
    except (OSError, ValueError, KeyError):
        return None


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


if __name__ == "__main__":
    with stage.exits("passport"):
        make_passport(devices.default(), if_absent=True)
