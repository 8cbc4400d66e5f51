"""Promises about the tree itself."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
SOURCES = [path for folder in ("model", "pipelines", "kernels") for path in (ROOT / folder).rglob("*.py")]
STAGES = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]


def test_kernels_is_no_package_and_transformers_imports_from_the_root() -> None:
    """A regular package called `kernels` would hide the one that transformers looks for."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    statement = "import transformers.models.deepseek_v3.modeling_deepseek_v3"
    subprocess.run([sys.executable, "-c", statement], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_device_py_names_devices(path: Path) -> None:
    if path.name != "device.py":
        assert not re.search(r"torch\.(cuda|npu)\b|\.to\([\"'](cuda|npu)", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_short_and_say_what_they_return(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 90, node.name
            assert node.returns is not None, node.name


AROUND = {"stage", "params", "tracking", "repository", "machine.environment"}  # run and record any stage
SHOWN = {"pages", "figures", "digests", "lineage", "register"}  # draw, name or ask for what is there already


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_depends_on_the_code_that_shapes_its_result(name: str) -> None:
    """The stage's own module, and every module of `pipelines` that it imports directly, but those around all stages
    (their parameters are the stage's `params`) and those that compute nothing."""
    own = ROOT / "pipelines" / f"{name}.py"
    modules = {"pipelines." + name}
    for node in ast.walk(ast.parse(own.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "pipelines":
            folder = ROOT / node.module.replace(".", "/")
            modules |= {f"{node.module}.{part.name}" if folder.is_dir() else node.module for part in node.names}
    shaping = {module for module in modules if module.removeprefix("pipelines.") not in AROUND | SHOWN}
    listed = {dep for dep in STAGES[name]["deps"] if dep.startswith("pipelines/") and dep.endswith(".py")}
    assert listed == {f"{module.replace('.', '/')}.py" for module in shaping}


def test_mlflow_has_one_door() -> None:
    """Besides what runs inside its server."""
    ours = [path for path in SOURCES if path.parent.name != "server"]
    users = [path.name for path in ours if re.search(r"^\s*(import|from) mlflow", path.read_text(), re.MULTILINE)]
    assert users == ["tracking.py"]


@pytest.mark.parametrize(
    ("module", "heavy"),
    [("model.train", ["torch._dynamo", "mlflow"]), ("pipelines.review", ["torch", "mlflow"]),
     ("pipelines.register", ["torch", "mlflow", "dvc"])],
)  # fmt: skip
def test_what_takes_seconds_is_imported_where_it_is_needed(module: str, heavy: list[str]) -> None:
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
