"""An in-toto statement about an exported model: SLSA provenance, version 1, in a signed DSSE envelope.

What was made (every file by sha256), from what (commit, dvc.lock, data with licences), how (parameters, seeds, device,
numerics passport, packages), by which runs, and what came of it (every report by sha256). Specifications:
https://in-toto.io/Statement/v1, https://slsa.dev/provenance/v1, https://github.com/secure-systems-lab/dsse
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import load_pem_public_key
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import Error, VerificationError
from securesystemslib.signer import CryptoSigner, SSlibKey

from pipelines import stage
from pipelines.params import read_yaml
from pipelines.trust import evidence, keys

STATEMENT_TYPE, PROVENANCE = "https://in-toto.io/Statement/v1", "https://slsa.dev/provenance/v1"
PAYLOAD_TYPE, BUILD_TYPE = "application/vnd.in-toto+json", "urn:shovel:dvc-repro:1"


def build(files: dict[str, str], facts: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The statement. files: sha256 of the exported files by name; facts: `lineage.facts` with `seconds`, how
    long each run took; folder: the evidence.
    """
    return {
        "_type": STATEMENT_TYPE,
        "subject": [_descriptor(name, sha256=digest) for name, digest in files.items()],
        "predicateType": PROVENANCE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {"command": "dvc repro", "params": read_yaml(folder / "params.yaml")},
                "internalParameters": {
                    key: facts[key] for key in ("seeds", "device", "emulated", "passport", "packages", "platform")
                },
                "resolvedDependencies": _dependencies(facts, folder),
            },
            "runDetails": {
                "builder": {"id": "urn:shovel:pipelines", "version": {"shovel": facts["git"]["commit"] or "none"}},
                "metadata": {"invocationId": facts["runs"].get("export", "none")},
                "byproducts": [*_runs(facts), *_reports(folder)],
            },
        },
    }


def _descriptor(name: str, annotations: dict[str, Any] | None = None, **digest: str) -> dict[str, Any]:
    """A ResourceDescriptor of in-toto; annotations that are None are left out."""
    kept = {key: value for key, value in (annotations or {}).items() if value is not None}
    return {"name": name} | ({"digest": digest} if digest else {}) | ({"annotations": kept} if kept else {})


def _dependencies(facts: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Commit, lock file, every source of text with its licence, every intermediate that DVC keeps."""
    inputs = [_descriptor(file.as_posix(), sha256=_sha256(folder / file.name)) for file in evidence.INPUTS]
    sources = [
        _descriptor(
            f"source {source['name']}",
            {key: source[key] for key in ("licence", "version", "language", "use", "bytes", "files")},
            **({"sha256": source["sha256"]} if source["sha256"] else {}),
        )
        for source in facts["sources"]
    ]
    data = [_descriptor(path, md5=md5) for path, md5 in facts["dvc"].items() if path.startswith("data/")]
    commit = {"gitCommit": facts["git"]["commit"]} if facts["git"]["commit"] else {}
    return [_descriptor("git commit", {"uncommitted": facts["git"]["uncommitted"]}, **commit), *inputs, *sources, *data]


def _runs(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs, and how long each took where the server knows."""
    took = facts["seconds"]
    return [
        _descriptor(f"run {label}", {"run_id": run_id, "seconds": took.get(label)})
        for label, run_id in facts["runs"].items()
    ]


def _reports(folder: Path) -> list[dict[str, Any]]:
    """Every file of the evidence; with the contracts' result, and with time and energy where a stage knows them."""
    inputs = {file.name for file in evidence.INPUTS}
    named = [file for file in sorted(folder.iterdir()) if file.name not in inputs | {evidence.STATEMENT}]
    return [_descriptor(file.name, _annotations(file), sha256=_sha256(file)) for file in named]


def _annotations(file: Path) -> dict[str, Any]:
    if file.name == "contracts.json":
        found = stage.read_json(file, made_by="contracts")
        held = sum(expectation["success"] for expectation in found["expectations"])
        return {"success": found["success"], "expectations": len(found["expectations"]), "held": held}
    if file.name in ("pretrain.json", "finetune.json"):
        found = stage.read_json(file, made_by=file.stem)
        return {key: found.get(key) for key in ("seconds", "tokens", "energy_kwh", "emulated")}
    return {}


def seal(statement: dict[str, Any], key: keys.Key) -> str:
    """`statement` signed with this person's private key, whose public half is `key`: an envelope as JSON text."""
    payload = json.dumps(statement, sort_keys=True, ensure_ascii=False).encode()
    private = keys.private()
    envelope = Envelope(payload, PAYLOAD_TYPE, {})
    envelope.sign(CryptoSigner(private, SSlibKey.from_crypto(private.public_key(), key.fingerprint)))
    return _text(envelope)


def unseal(text: str, known: dict[str, keys.Key], predicate_type: str) -> tuple[dict[str, Any], keys.Key]:
    """(statement, the key that signed it); raises `ValueError` that says what is wrong, down to one changed blank."""
    try:
        envelope = Envelope.from_dict(json.loads(text))
        same = text == _text(envelope)
    except (ValueError, KeyError, TypeError, AttributeError, Error):
        raise ValueError("it is no signed envelope") from None
    if not same:
        raise ValueError("its text was changed")
    key = _signer(envelope, known)
    statement = json.loads(envelope.payload)
    types = (envelope.payload_type, statement["_type"], statement["predicateType"])
    if types != (PAYLOAD_TYPE, STATEMENT_TYPE, predicate_type):
        raise ValueError(f"it is no in-toto statement of type {predicate_type}")
    return statement, key


def _signer(envelope: Envelope, known: dict[str, keys.Key]) -> keys.Key:
    named = list(envelope.signatures)
    if len(named) != 1 or named[0] not in known:
        what = f"key {named[0][:16]}" if named else "no key"
        raise ValueError(f"it is signed with {what}, which reports/keys does not hold")
    key = known[named[0]]
    public = SSlibKey.from_crypto(load_pem_public_key(key.file.read_bytes()), key.fingerprint)
    try:
        envelope.verify([public], threshold=1)
    except VerificationError:
        raise ValueError(f"the signature of key {key.short} does not belong to this content") from None
    return key


def _text(envelope: Envelope) -> str:
    return json.dumps(envelope.to_dict(), indent=2, sort_keys=True) + "\n"


def facts(statement: dict[str, Any]) -> dict[str, Any]:
    """`lineage.facts`, `seconds` and `digests` of the files, as a statement has them: of dvc.lock only the data."""
    build, run = statement["predicate"]["buildDefinition"], statement["predicate"]["runDetails"]
    named = {one["name"]: one for one in [*build["resolvedDependencies"], *run["byproducts"]]}
    commit = named["git commit"]
    runs = {name.removeprefix("run "): one["annotations"] for name, one in named.items() if name.startswith("run ")}
    return {
        "git": {
            "commit": commit.get("digest", {}).get("gitCommit", ""),
            "uncommitted": commit["annotations"]["uncommitted"],
        },
        "dvc": {name: one["digest"]["md5"] for name, one in named.items() if "md5" in one.get("digest", {})},
        "runs": {label: found["run_id"] for label, found in runs.items()},
        "seconds": {label: found["seconds"] for label, found in runs.items() if "seconds" in found},
        "sources": [
            {"name": name.removeprefix("source ")} | one.get("annotations", {}) | one.get("digest", {})
            for name, one in named.items()
            if name.startswith("source ")
        ],
        **build["internalParameters"],
        "digests": {one["name"]: one["digest"]["sha256"] for one in statement["subject"]},
    }


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
