"""The audit finds NVIDIA's parts by name, in a process that has them loaded; a gate and a bill of parts use it."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import distributions
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from typer.testing import CliRunner

from pipelines import gates
from pipelines.cli import app
from pipelines.trust import audit, sbom
from pipelines.trust.audit import Audit

NVIDIA = ["libcuda.so.1", "libcudart.so.12", "libcublasLt.so.12", "libcudnn_ops.so.9", "libnccl.so.2", "libnvrtc.so.12",
          "libtorch_cuda.so", "libc10_cuda.so", "libcudart-a7b20f20.so.12"]  # fmt: skip
CLEAN = Audit([], [], 90, ["torch==2.13.0"])
runner = CliRunner()
OTHER = [
    "libc.so.6",
    "libtorch_cpu.so",
    "libascendcl.so",
    "libhccl.so",
    "libtorch_npu.so",
    "libgomp.so.1",
    "libcurl.so.4",
]


@pytest.mark.parametrize("name", NVIDIA)
def test_nvidias_libraries_are_known(name: str) -> None:
    assert audit.LIBRARY.match(name)


@pytest.mark.parametrize("name", OTHER)
def test_others_are_not_taken_for_nvidias(name: str) -> None:
    assert not audit.LIBRARY.match(name)


def test_distributions_are_known_by_name() -> None:
    assert all(
        map(audit.DISTRIBUTION.fullmatch, ["nvidia-cublas-cu12", "cupy-cuda12x", "nvidia-nccl-cu12", "cuda-python"])
    )
    assert not any(map(audit.DISTRIBUTION.fullmatch, ["torch", "torch-npu", "numpy", "triton-ascend", "cudatext"]))


def test_this_process_has_no_nvidia_part() -> None:
    found = audit.audit()
    assert found.free and found.libraries > 5 and len(found.distributions) > 20


def test_a_loaded_library_is_found_in_another_process(tmp_path: Path) -> None:
    """Any library under NVIDIA's name will do."""
    original = next(path for path in audit.loaded_libraries() if Path(path).name.startswith("libm"))
    shutil.copy(original, tmp_path / "libcudart.so.12")
    code = "import ctypes, sys; ctypes.CDLL(sys.argv[1]); print('ready', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path / "libcudart.so.12")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        found = audit.audit(process.pid)
        assert runner.invoke(app, ["audit", "--pid", str(process.pid)]).exit_code == 1
        process.communicate("")
    assert found.nvidia_libraries == [str(tmp_path / "libcudart.so.12")] and not found.free


def test_a_process_that_does_not_exist_is_said_so() -> None:
    with pytest.raises(ValueError, match="a process that runs"):
        audit.audit(2**22 + 1)


def test_the_command_prints_json_and_ends_with_zero_where_nothing_is_found() -> None:
    done = runner.invoke(app, ["audit", "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["free"]


@pytest.mark.parametrize(
    ("finetune", "passed", "what"),
    [
        (asdict(CLEAN), True, "pretrain and finetune loaded none"),
        (
            asdict(CLEAN) | {"nvidia_libraries": ["/lib/libcudart.so.12"]},
            False,
            "finetune loaded libcudart.so.12; train",
        ),
        (asdict(CLEAN) | {"nvidia_distributions": ["nvidia-ml-py"]}, True, "loaded none"),
        (None, False, "finetune could not tell"),
    ],
)
def test_the_gate_reads_what_the_training_stages_recorded(tmp_path: Path, finetune, passed: bool, what: str) -> None:
    for name, found in (("pretrain", asdict(CLEAN)), ("finetune", finetune)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"audit": found}))
    gate = gates._no_nvidia(tmp_path)
    assert gate.passed == passed and what in gate.what


def test_the_bill_of_materials_is_valid_and_lists_what_is_installed(tmp_path: Path) -> None:
    done = runner.invoke(app, ["audit", "--sbom", str(tmp_path / "sbom.json")])
    assert done.exit_code == 0, done.output
    text = (tmp_path / "sbom.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    parts = {part["purl"]: part for part in json.loads(text)["components"]}
    theirs = {(d.metadata["Name"].lower(), d.version) for d in distributions()} - {("shovel", "0.1.0")}
    assert {(part["name"].lower(), part["version"]) for part in parts.values()} <= theirs
    assert len(parts) == len({name for name, _ in theirs}) and "pkg:pypi/typer@" in " ".join(parts)
    licensed = sum(bool(part.get("licenses")) for part in parts.values())
    assert licensed > len(parts) / 2


def test_packages_of_another_environment_are_listed_as_they_were_written_down() -> None:
    here = next(package for package in sbom.packages() if package.name == "typer")
    listed = sbom.recorded({f"typer=={here.version}", "torch==1.0", "shovel==0.1.0"})
    assert listed == [sbom.Package("torch", "1.0", ""), here]


def test_the_bill_says_what_the_audit_found(tmp_path: Path) -> None:
    sbom.write(tmp_path / "sbom.json", Audit(["/lib/libcuda.so.1"], [], 1, []))
    properties = json.loads((tmp_path / "sbom.json").read_text())["metadata"]["properties"]
    found = {entry["name"]: entry["value"] for entry in properties}
    assert found == {"shovel:nvidia_free": "false", "shovel:nvidia_library": "/lib/libcuda.so.1"}
