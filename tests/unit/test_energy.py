"""Energy from the counters of a processor and from the power of Ascend cards, against figures that are set by hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipelines.machine import energy
from pipelines.machine.energy import Meter

SMI = """
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| 0     910B3               | OK            | 93.6        40                0    / 0             |
| 0                         | 0000:C1:00.0  | 0           0    / 0          3364 / 65536         |
| 1     910B3               | OK            | 6.4         41                0    / 0             |
| 0                         | 0000:01:00.0  | 0           0    / 0          3362 / 65536         |
"""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the meter sees; it looks by itself far too rarely for these tests."""
    now = [100.0]
    monkeypatch.setattr(energy.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def sockets(tmp_path: Path) -> list[Path]:
    """Two processors with a part each, which must not count twice."""
    for name in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text("9000000\n")
        (tmp_path / name / "max_energy_range_uj").write_text("9999999\n")
    return [tmp_path / "intel-rapl:0" / "energy_uj", tmp_path / "intel-rapl:1" / "energy_uj"]


@pytest.fixture
def cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An npu-smi that lists two cards of 100 W together."""
    program = tmp_path / "bin" / "npu-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ncat <<'END'{SMI}END\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")


def test_every_socket_counts_once_and_a_counter_may_start_again(clock, sockets, tmp_path: Path) -> None:
    with Meter("cpu", tmp_path) as meter:
        clock[0] += 2.0
        sockets[0].write_text("9500000\n")  # half a joule
        sockets[1].write_text("500000\n")  # one and a half, past the end of the counter
    assert meter.watts() == pytest.approx(1.0)


def test_cards_count_beside_the_processors(clock, sockets, cards, tmp_path: Path) -> None:
    with Meter("npu", tmp_path) as meter:
        clock[0] += 2.0
        sockets[0].write_text("9500000\n")
    assert meter.watts() == pytest.approx(100.25)


def test_nothing_is_said_where_not_all_is_known(clock, sockets, tmp_path: Path) -> None:
    for device_type, folder in (("cuda", tmp_path), ("npu", tmp_path), ("cpu", tmp_path / "none")):
        with Meter(device_type, folder) as meter:
            clock[0] += 2.0
        assert meter.watts() is None
