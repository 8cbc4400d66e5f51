"""Bill of materials of a model: CycloneDX 1.6 with the exported files, a model card, the data, the packages it was
trained with.

`pipelines/trust/sbom.py` lists what is installed; here that is one part of three. The library has no model card and no
data component yet, so these are added to its JSON; the result is valid against CycloneDX's schema.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6

from pipelines import digests, stage
from pipelines.trust import sbom

MODEL = "model"  # its reference in the bill


def write(file: Path, name: str, release: Path, files: dict[str, str], sources: list[dict[str, Any]]) -> None:
    """Write the bill of the model `name` into `file`, beside the reports of its stages.

    release: the exported folder; files: sha256 of its files by name. sources: `lineage.sources`.
    """
    data = [_data(source) for source in sources]
    packages = [sbom.component(package) for package in _packages(file.parent)]
    bom = Bom()
    bom.metadata.component = _model(name, files)
    bom.components = [*data, *packages]
    bom.register_dependency(bom.metadata.component, [*data, *packages])
    content = json.loads(JsonV1Dot6(bom).output_as_string())
    content["metadata"]["component"]["modelCard"] = _card(data, release, file.parent)
    for component in content["components"]:
        if component["type"] == "data":
            component["data"] = [{"type": "dataset", "name": component["name"]}]
    stage.write_json(file, content)


def _packages(folder: Path) -> list[sbom.Package]:
    """What was installed where the model was trained and fine-tuned; of this Python where that was not written down."""
    audits = [stage.read_json(folder / f"{name}.json", made_by=name)["audit"] for name in ("pretrain", "finetune")]
    if None in audits:
        return sbom.packages()
    return sbom.recorded({entry for audit in audits for entry in audit["distributions"]})


def _model(name: str, files: dict[str, str]) -> Component:
    """The exported folder; its version is its digest, its parts are its files."""
    parts = [
        Component(name=file, type=ComponentType.FILE, bom_ref=f"{MODEL}/{file}", hashes=[_sha256(digest)])
        for file, digest in files.items()
    ]
    return Component(
        name=name,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        version=digests.combined(files),
        bom_ref=MODEL,
        components=parts,
    )


def _data(source: dict[str, Any]) -> Component:
    """A source of text; the hash is that of the archive that was fetched."""
    return Component(
        name=source["name"],
        type=ComponentType.DATA,
        version=source["version"],
        bom_ref=f"data/{source['name']}",
        licenses=[LicenseFactory().make_from_string(source["licence"])],
        hashes=[_sha256(source["sha256"])] if source["sha256"] else [],
        properties=[
            Property(name=f"{sbom.PROJECT}:{key}", value=str(source[key]))
            for key in ("kind", "language", "use", "bytes")
        ],
    )


def _sha256(content: str) -> HashType:
    return HashType(alg=HashAlgorithm.SHA_256, content=content)


def _card(data: list[Component], release: Path, folder: Path) -> dict[str, Any]:
    """What the model is and how good, as CycloneDX words a model card."""
    config = json.loads((release / "config.json").read_text(encoding="utf-8"))
    chat = stage.read_json(folder / "evaluate-chat.json", made_by="evaluate")
    low, high = chat["ci95"]
    bits = {
        "type": "bits per byte",
        "value": repr(chat["bits_per_byte"]),
        "slice": "held-out documents",
        "confidenceInterval": {"lowerBound": repr(low), "upperBound": repr(high)},
    }
    perplexity = {"type": "perplexity", "value": repr(chat["assistant_perplexity"]), "slice": "held-out answers"}
    metrics = [bits, *([perplexity] if chat["assistant_tokens"] else [])]
    return {
        "modelParameters": {
            "approach": {"type": "self-supervised"},
            "task": "text-generation",
            "architectureFamily": "transformer, mixture of experts",
            "modelArchitecture": config["architectures"][0],
            "datasets": [{"ref": str(component.bom_ref.value)} for component in data],
        },
        "quantitativeAnalysis": {"performanceMetrics": metrics},
    }
