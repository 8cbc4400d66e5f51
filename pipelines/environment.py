"""What computed: the device, whether it is emulated, and which backend does which operation, for runs and versions."""

from __future__ import annotations

import json

import moe_kernels
import torch
from moe_kernels import device as devices


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
    }
