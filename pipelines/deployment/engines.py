"""What can serve an exported folder, behind one small interface: a command and its environment.

builtin        our own engine (pipelines/serving), which follows the alias
transformers   `transformers serve`: the independent peer, one request at a time, stays with its version
vllm           vLLM Ascend on NPUs: a compose file with versions that belong together, for people to start
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ruamel.yaml import YAML

from pipelines.deployment.deploy import SERVING, Model, Target
from pipelines.machine.doctor import cann_version, compatibility
from pipelines.params import UserError
from pipelines.serving.server import require_callers

Command = tuple[list[str], dict[str, str], str]  # words, environment, name of the model in requests
COMPOSE = SERVING / "vllm" / "compose.yaml"
IMAGE = "quay.io/ascend/vllm-ascend"
DEVICES = ("davinci_manager", "devmm_svm", "hisi_hdc")  # beside /dev/davinci<number>
DRIVER = ("/usr/local/dcmi", "/usr/local/bin/npu-smi", "/usr/local/Ascend/driver", "/etc/ascend_install.info")


@dataclass(frozen=True)
class Engine:
    """follows: whether the process itself resolves, checks and follows the alias. command: what starts
    the process that serves a model on host and port."""

    follows: bool
    command: Callable[[Target, Model | None, str, int, Path | None], Command]


def _builtin(where: Target, _: Model | None, host: str, port: int, tokens: Path | None) -> Command:
    words = [sys.executable, "-m", "pipelines.deployment.follow", str(where), host, str(port)]
    return [*words, *([str(tokens)] if tokens else [])], dict(os.environ), where.name


def _transformers(_: Target, model: Model | None, host: str, port: int, __: Path | None) -> Command:
    """It knows no tokens, so it stays on this machine."""
    assert model is not None
    require_callers(host, None)
    program = Path(sys.executable).with_name("transformers")
    if importlib.util.find_spec("accelerate") is None or not program.exists():
        raise UserError("`transformers serve` is incomplete; `pip install -c constraints.txt -e .[peer]` mends that.")
    words = [str(program), "serve", str(model.folder), "--host", host, "--port", str(port)]
    return words, {**os.environ, "HF_HUB_OFFLINE": "1"}, str(model.folder)


ENGINES = {"builtin": Engine(True, _builtin), "transformers": Engine(False, _transformers)}


def vllm_command(where: Target, model: Model, port: int) -> list[str]:
    """`vllm serve` of a model folder that is mounted at /model."""
    config = json.loads((model.folder / "config.json").read_text(encoding="utf-8"))
    words = ["vllm", "serve", "/model", "--served-model-name", where.name, "--host", "0.0.0.0", "--port", str(port)]
    words += ["--max-model-len", str(config["max_position_embeddings"]), "--enable-expert-parallel"]
    return [*words, *(["--tokenizer-mode", "deepseek_v4"] if config["model_type"] == "deepseek_v4" else [])]


def write_vllm(where: Target, model: Model, host: str, port: int) -> tuple[Path, dict[str, str]]:
    """Write a compose file that serves the model with vLLM Ascend; returns it and the versions that fit this machine's
    CANN where there is one. Raises `UserError` when none fits."""
    versions = _versions(cann_version(os.environ))
    service = {
        "image": f"{IMAGE}:v{versions['vllm_ascend']}",
        "command": vllm_command(where, model, port),
        "ports": [f"{f'[{host}]' if ':' in host else host}:{port}:{port}"],
        "devices": [f"/dev/{name}" for name in (*DEVICES, "davinci0")],
        "volumes": [f"{model.folder.resolve()}:/model:ro", *(f"{path}:{path}:ro" for path in DRIVER)],
        "environment": {"HF_HUB_OFFLINE": "1"},
        "shm_size": "16g",
    }
    COMPOSE.parent.mkdir(parents=True, exist_ok=True)
    with COMPOSE.open("w", encoding="utf-8") as file:
        YAML().dump({"name": "shovel-vllm", "services": {"vllm": service}}, file)
    return COMPOSE, versions


def _versions(cann: str | None) -> dict[str, str]:
    """The newest row of compatibility.json, or the newest for this CANN."""
    known = compatibility("vllm")
    fitting = [row for row in known if cann is None or cann.startswith(row["cann"])]
    if not fitting:
        raise UserError(
            f"no vLLM Ascend is known for CANN {cann}; install CANN {' or '.join(row['cann'] for row in known)}."
        )
    return fitting[0]
