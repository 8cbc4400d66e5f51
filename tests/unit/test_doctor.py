"""What the doctor reads and what it advises, from fixtures and on this machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.machine import doctor
from pipelines.machine.doctor import FAIL, OK, WARN, Chip, Line

ROOT = Path(__file__).parents[2]
SMI = """
+------------------------------------------------------------------------------------------------+
| npu-smi 24.1.rc3                 Version: 24.1.rc3                                             |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     910B3               | OK            | 93.6        40                0    / 0             |
| 0                         | 0000:C1:00.0  | 0           0    / 0          3364 / 65536         |
+===========================+===============+====================================================+
| 1     910B3               | Alarm         | 91.2        41                0    / 0             |
| 0                         | 0000:01:00.0  | 0           0    / 0          3362 / 65536         |
+===========================+===============+====================================================+
"""


def test_chips_are_read_from_npu_smi() -> None:
    assert doctor.parse_chips(SMI) == [Chip(0, "910B3", "OK", 65536, 93.6), Chip(1, "910B3", "Alarm", 65536, 91.2)]
    assert doctor.driver(True, SMI) == Line("driver", OK, "24.1.rc3")


def test_a_sick_chip_is_named() -> None:
    line = doctor.chips(True, SMI)
    assert (line.state, line.found) == (FAIL, "2 x 910B3, 64 GiB each; not healthy: 1 (Alarm)")
    assert doctor.chips(True, SMI.replace("Alarm", "OK   ")).state == OK


@pytest.mark.parametrize(
    ("cards", "smi", "state"), [(False, "", WARN), (True, "", FAIL), (True, SMI, OK)], ids=["none", "silent", "sound"]
)
def test_the_driver_matters_only_where_cards_are(cards: bool, smi: str, state: str) -> None:
    line = doctor.driver(cards, smi)
    assert line.state == state and bool(line.mend) == (state != OK)


@pytest.mark.parametrize(
    ("torch", "npu", "cann", "state", "advice"),
    [
        ("2.12.0", "2.12.0", "9.1.0", OK, ""),
        ("2.13.0+cpu", "2.13.0", "9.1.0", OK, ""),  # a pair that nothing is published about
        ("2.9.0", "2.9.0", "8.5.0.1", OK, ""),
        ("2.9.0", "2.9.0", "9.1.0", FAIL, "install CANN 8.5.0"),
        ("2.12.0", "2.13.0", "9.1.0", FAIL, "pip install torch==2.13.0"),
        (None, "2.13.0", None, FAIL, "pip install torch==2.13.0"),
        ("2.13.0", None, None, FAIL, "make test-npu"),
    ],
)
def test_torch_npu_fits_torch_and_cann(torch: str, npu: str, cann: str, state: str, advice: str) -> None:
    line = doctor.torch_npu(True, torch, npu, cann)
    assert line.state == state and advice in line.mend


def test_cann_is_found_by_its_version_file(tmp_path: Path) -> None:
    here = {"ASCEND_HOME_PATH": str(tmp_path)}
    assert doctor.cann(True, {"ASCEND_HOME_PATH": str(tmp_path / "nowhere")}).state == FAIL
    assert doctor.cann(True, here).state == WARN
    (tmp_path / "ascend_toolkit_install.info").write_text("package_name=Ascend-cann-toolkit\nversion=8.5.0\n")
    assert doctor.cann(True, here) == Line("cann", OK, "8.5.0")


def test_an_emulated_npu_takes_the_place_of_driver_and_cann(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = {"LD_LIBRARY_PATH": f"{tmp_path}:/elsewhere"}
    assert doctor.emulator(here) is None and doctor.emulator({}) is None
    (tmp_path / "libascendcl.so").write_bytes(b"CANN itself")
    assert doctor.emulator(here) is None
    (tmp_path / "libascendcl.so").write_bytes(b"\0fakecannVersion\0")
    assert doctor.emulator(here) == tmp_path
    monkeypatch.setattr(doctor, "installed", {"torch": "2.13.0", "torch-npu": "2.13.0"}.get)
    found = {line.part: line for line in doctor.examine(environment=here)}
    assert "emulated on the CPU" in found["npu"].found and found["torch_npu"].state == OK and "driver" not in found
    monkeypatch.setattr(doctor, "installed", {"torch": "2.13.0"}.get)
    found = {line.part: line for line in doctor.examine(environment=here)}
    assert "no torch_npu, so the CPU trains" in found["npu"].found and found["torch_npu"].state == OK


def test_torch_npu_without_cann_is_a_fail() -> None:
    line = doctor.torch_npu(False, "2.13.0", "2.13.0", None)
    assert line.state == FAIL and "import torch" in line.found and "make test-npu" in line.mend


def test_settings_that_slow_or_break_training_are_named() -> None:
    assert [line.state for line in doctor.settings(True, {})] == [OK]
    odd = {"ASCEND_LAUNCH_BLOCKING": "1", "HCCL_CONNECT_TIMEOUT": "30", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    found = doctor.settings(True, odd)
    assert [line.state for line in found] == [WARN, WARN, FAIL] and all(line.mend for line in found)


def test_a_clock_behind_the_newest_commit_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.clock(ROOT).state == OK
    monkeypatch.setattr(doctor.time, "time", lambda: 0.0)
    assert doctor.clock(ROOT).state == FAIL


def test_every_fail_says_what_to_change_and_the_exit_code_follows(tmp_path: Path, capsys) -> None:
    sound, broken = [Line("a", OK, "x"), Line("b", WARN, "y", "z")], [Line("a", FAIL, "x", "mend it")]
    file = tmp_path / "doctor.json"
    assert doctor.main(["--output", str(file)], lambda: sound) == 0
    assert "warn  b  y\n" in capsys.readouterr().out
    assert doctor.main(["--json"], lambda: broken) == 1
    assert json.loads(capsys.readouterr().out)[0]["mend"] == "mend it"
    assert [line["state"] for line in json.loads(file.read_text())] == [OK, WARN]
    assert all(line.mend for line in doctor.examine() if line.state == FAIL)


def test_the_command_is_the_same_table() -> None:
    done = CliRunner().invoke(app, ["doctor", "--json"])
    lines = json.loads(done.stdout)
    assert {line["part"] for line in lines} >= {"python", "torch", "driver", "disk"}
    assert done.exit_code == int(any(line["state"] == FAIL for line in lines))


def test_it_works_with_nothing_installed() -> None:
    """Without site-packages every package fails, by name, with the line that installs it."""
    command = [sys.executable, "-S", "-m", "pipelines.machine.doctor", "--json"]
    done = subprocess.run(command, cwd=ROOT, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    torch = next(line for line in json.loads(done.stdout) if line["part"] == "torch")
    assert (torch["state"], torch["found"]) == ("fail", "not installed") and "torch==2.13.0" in torch["mend"]
