"""Electrical energy of a training, as far as this machine counts it.

Processors count theirs: Linux shows the counters (RAPL) below /sys/class/powercap, to root only on most systems. Ascend
cards show their power in `npu-smi info`. What neither counts (fans, power supplies, most memory) is not in the figure,
and of other accelerators nothing is said.
"""

from __future__ import annotations

import subprocess
import threading
import time
from pathlib import Path

from pipelines.machine.doctor import parse_chips

POWERCAP = Path("/sys/class/powercap")
EVERY_S = 10.0  # between two looks; a counter of 262 kJ, as processors have, wraps after 5 minutes at 870 W
JOULES_PER_KWH = 3.6e6


class Meter:
    """Counts while its block runs.

    with Meter(device.type) as meter:
        ...
    meter.watts()
    """

    def __init__(self, device_type: str, powercap: Path = POWERCAP) -> None:
        self._cards = device_type == "npu"
        self._zones = [zone for zone in sorted(powercap.glob("*-rapl:*")) if zone.name.count(":") == 1]  # one a socket
        self._joules, self._seconds, self._known = 0.0, 0.0, device_type in ("cpu", "npu")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="energy", daemon=True)

    def __enter__(self) -> Meter:
        self._counters = self._read_counters()
        self._at = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._add()

    def watts(self) -> float | None:
        """Mean power over the block; None where this machine does not tell."""
        return self._joules / self._seconds if self._known and self._seconds else None

    def _look(self) -> None:
        while self._known and not self._ended.wait(EVERY_S):
            self._add()

    def _add(self) -> None:
        """What was used since the last look."""
        counters, power, now = self._read_counters(), card_watts() if self._cards else 0.0, time.monotonic()
        if power is None or not (self._cards or counters) or len(counters) != len(self._counters):
            self._known = False
            return
        pairs = zip(counters, self._counters, strict=True)
        self._joules += sum((new - old) % span for (new, span), (old, _) in pairs) / 1e6 + power * (now - self._at)
        self._seconds += now - self._at
        self._counters, self._at = counters, now

    def _read_counters(self) -> list[tuple[int, int]]:
        """(microjoules, where the counter starts again) of each processor; empty where they may not be read."""
        try:
            return [(_number(zone / "energy_uj"), _number(zone / "max_energy_range_uj") + 1) for zone in self._zones]
        except (OSError, ValueError):
            return []


def card_watts() -> float | None:
    """What all Ascend cards draw now, in watts; None where npu-smi does not say."""
    try:
        smi = subprocess.run(["npu-smi", "info"], capture_output=True, text=True, timeout=EVERY_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    powers = [chip.power_w for chip in parse_chips(smi)]
    return None if not powers or None in powers else sum(powers)


def _number(file: Path) -> int:
    return int(file.read_text())
