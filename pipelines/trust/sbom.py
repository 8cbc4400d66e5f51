"""Software bill of materials of this Python: CycloneDX 1.6, one component a distribution, with its licence."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import Property
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

from pipelines import repository
from pipelines.stage import replacing
from pipelines.trust.audit import Audit

PROJECT = "shovel"


@dataclass(frozen=True)
class Package:
    """A distribution as its metadata describes it; licence is empty where the metadata names none."""

    name: str
    version: str
    licence: str

    @classmethod
    def of(cls, distribution: Distribution) -> Package:
        found = distribution.metadata
        stated = found.get("License-Expression") or found.get("License") or ""
        return cls(found["Name"], distribution.version, stated if len(stated) < 80 and "\n" not in stated else "")


def packages() -> list[Package]:
    """What is installed, one of each name, sorted; this project, where it is installed, is not its own part."""
    found = {package.name.lower(): package for package in map(Package.of, distributions())}
    return [found[name] for name in sorted(found) if name != PROJECT]


def recorded(named: set[str]) -> list[Package]:
    """Packages written down as `name==version`, sorted; the licence is known of those that are installed here too."""
    here = {(package.name.lower(), package.version): package for package in packages()}
    pairs = [(name, version) for name, _, version in (entry.partition("==") for entry in sorted(named))]
    return [here.get(pair, Package(*pair, licence="")) for pair in pairs if pair[0] != PROJECT]


def write(file: Path, audit: Audit) -> int:
    """Write the bill as JSON into `file`, with what the audit found as properties; returns how many parts it has."""
    bom, parts = Bom(), packages()
    bom.metadata.component = Component(name=PROJECT, type=ComponentType.APPLICATION, version=repository.commit())
    bom.metadata.properties = [
        Property(name=f"{PROJECT}:nvidia_free", value=str(audit.free).lower()),
        *(Property(name=f"{PROJECT}:nvidia_library", value=path) for path in audit.nvidia_libraries),
    ]
    components = [component(package) for package in parts]
    bom.components = components
    bom.register_dependency(bom.metadata.component, components)
    with replacing(file) as fresh:
        fresh.write_text(JsonV1Dot6(bom).output_as_string(indent=2) + "\n", encoding="utf-8")
    return len(parts)


def component(package: Package) -> Component:
    """A distribution as a part of a bill."""
    address = PackageURL("pypi", name=package.name.lower().replace("_", "-"), version=package.version)
    licences = [LicenseFactory().make_from_string(package.licence)] if package.licence else []
    return Component(
        name=package.name,
        version=package.version,
        type=ComponentType.LIBRARY,
        purl=address,
        bom_ref=str(address),
        licenses=licences,
    )
