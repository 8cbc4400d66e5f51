"""What computes: the device, emulated or not, which backend does which operation, and whether its numbers are right."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import moe_kernels
import torch
from moe_kernels import device as devices

from pipelines.doctor import cann_version, installed

PASSPORT, NO_PASSPORT = Path("reports/passport.json"), "none of this stack"


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
        "cann": "" if emulated(device) else cann_version(os.environ) or "",
        "kernels": kernels.hexdigest()[:16],
    }


def passport(device: torch.device, file: Path = PASSPORT) -> str:
    """Digest of the passport of this stack, which `shovel passport` writes; `NO_PASSPORT` where there is none."""
    try:
        known = json.loads(file.read_text(encoding="utf-8"))["stack"]
    except (OSError, ValueError, KeyError):
        return NO_PASSPORT
    return digest(file) if known == stack(device) else NO_PASSPORT


def distrust(device: torch.device, file: Path = PASSPORT) -> None:
    """Have the reference compute, with a warning, what did not pass in the passport of this stack."""
    if passport(device, file) == NO_PASSPORT:
        return
    entries = json.loads(file.read_text(encoding="utf-8"))["entries"]
    wrong = {e["name"] for e in entries if e["part"] == "operation" and e["backend"] == device.type and not e["passed"]}
    moe_kernels.withhold(wrong, device.type)


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
