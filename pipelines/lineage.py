"""Where a model comes from: git, dvc.lock, run ids, seeds, package versions, device, sources and their licences.

`facts` collects; `link` writes onto every MLflow run what is known only after its stage: the commit and the hashes of
its outputs (DVC writes dvc.lock when a stage has ended).
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipelines import repository, stage, tracking
from pipelines.params import load_params

PACKAGES = ("torch", "transformers", "tokenizers", "tiktoken", "mlflow", "dvc", "great-expectations", "numpy", "pandas")
RAW = Path("data/raw")
TRAINING = ("pretrain", "finetune")  # the stages that make weights
UNCOMMITTED = "+uncommitted"  # ends the tag git.commit until the commit with the run's results is made


def facts(reports: Path) -> dict[str, Any]:
    """Everything that names this pipeline's state; JSON-able, equal for equal states."""
    params = load_params()
    trained = trained_on(reports)
    return {
        "git": {"commit": repository.commit(), "uncommitted": repository.uncommitted_sources()},
        "dvc": repository.output_hashes(),
        "runs": run_ids(reports),
        "seeds": {"pretrain": params.pretrain.seed, "finetune": params.finetune.seed},
        "packages": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "device": trained["device.name"],
        "emulated": trained["emulated"] == "true",
        "passport": trained["passport"],
        "sources": sources(RAW),
    }


def trained_on(reports: Path) -> dict[str, str]:
    """Device type, name and passport of the training stages, and whether one was emulated: tags of a version."""
    trained = [stage.read_json(reports / f"{name}.json", made_by=name) for name in TRAINING]
    return {
        "device": _joined(report["device"] for report in trained),
        "device.name": _joined(report["device_name"] for report in trained),
        "passport": _joined(report["passport"] for report in trained),
        "emulated": str(any(report["emulated"] for report in trained)).lower(),
    }


def _joined(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(names))


def sources(raw: Path) -> list[dict[str, Any]]:
    """Name, version, hash, licence and size of every source of text."""
    keys = ("name", "kind", "version", "sha256", "licence", "language", "use", "bytes")
    entries = stage.read_json(raw / "manifest.json", made_by="fetch")["sources"]
    return [{key: entry[key] for key in keys} | {"files": len(entry["files"])} for entry in entries]


def run_ids(reports: Path) -> dict[str, str]:
    """MLflow run id of every stage, from the files that git keeps."""
    files = sorted((reports / "runs").glob("*.json"))
    return {file.stem: stage.read_json(file, made_by=file.stem)["run_id"] for file in files}


def link(reports: Path) -> dict[str, int]:
    """Deliver what is pending, end dead runs, tag every run with commit, output hashes and dvc.lock's hash."""
    client = tracking.connect()
    delivered, waiting = tracking.sync_pending(client)
    linked = sum(_link_one(client, label, run_id) for label, run_id in run_ids(reports).items())
    return {"linked": linked, "delivered": delivered, "waiting": waiting, "reaped": tracking.reap(client)}


def _link_one(client: tracking.MlflowClient, label: str, run_id: str) -> bool:
    """False when this server does not know the run (it was made with another one), or when somebody deleted it."""
    run = tracking.find_run(client, run_id)
    if run is None:
        return False
    tags = run.data.tags
    wanted = _tags(label)
    known = tags.get("git.commit", UNCOMMITTED)
    if not known.endswith(UNCOMMITTED) and known != wanted["git.commit"]:
        wanted = {"dvc.restored_into": wanted["git.commit"]}
    for key, value in wanted.items():
        if tags.get(key) != value:
            client.set_tag(run.info.run_id, key, value)
    return True


def _tags(label: str) -> dict[str, str]:
    """What the lock file says of the stage `label` (`evaluate-base` there is `evaluate@base`)."""
    lock = Path("dvc.lock")
    entry = repository.stages().get(label) or repository.stages().get(label.replace("-", "@", 1)) or {}
    tags = {f"dvc.{kind}.{item['path']}": item["md5"] for kind in ("dep", "out") for item in entry.get(f"{kind}s", [])}
    if lock.exists():
        tags["dvc.lock.sha256"] = hashlib.sha256(lock.read_bytes()).hexdigest()
    dirty = bool(repository.uncommitted())
    return tags | {"git.commit": repository.commit() + (UNCOMMITTED if dirty else "")}
