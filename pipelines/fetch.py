"""Fetch the sources named in data/sources.yaml and unpack the files that are wanted.

    python -m pipelines.fetch           data/sources.yaml -> data/raw

Downloads are kept in .downloads under their sha256, so each is made once. data/raw holds one zip a source, and a
manifest that says what came from where, under which licence. When anything fails, the one of before stays as it was.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from zipfile import ZipFile

from pipelines import stage
from pipelines.archives import take
from pipelines.params import Fetch, UserError
from pipelines.repository import OWN, root
from pipelines.sources import PathSource, PypiSource, Source, UrlSource, load_sources
from pipelines.tracking import Run

SOURCES, RAW = Path("data/sources.yaml"), Path("data/raw")


def fetch(params: Fetch, sources: Path, raw: Path, cache: Path, run: Run | None = None) -> dict[str, Any]:
    """Write the folder `raw`: one zip a source and manifest.json. Returns files and bytes by source."""
    manifest = []
    with stage.replacing(raw) as fresh:
        fresh.mkdir()
        for source in load_sources(sources):
            manifest.append(_fetch_one(source, fresh / f"{source.name}.zip", cache, params))
        stage.write_json(fresh / "manifest.json", {"sources": manifest})
    return {entry["name"]: {"files": len(entry["files"]), "bytes": entry["bytes"]} for entry in manifest}


def _fetch_one(source: PypiSource | UrlSource | PathSource, packed: Path, cache: Path, params: Fetch) -> dict[str, Any]:
    """Obtain one source, take the files that are wanted, and describe them."""
    place = source.obtain(cache, params)
    _warn_unwatched(source)
    ours = ["!/README.md"] if place.resolve() == OWN.resolve() else []  # that of the repository is nobody's text
    files = take(place, [*source.files, *ours], packed, params.max_unpacked_mib << 20)
    if not files:
        raise UserError(f"source `{source.name}`: no file matches `files` {source.files}; correct the patterns.")
    with ZipFile(packed) as archive:
        size = sum(info.file_size for info in archive.infolist())
    stage.say(f"fetch      {source.name}: {len(files):,} files, {size / 1e6:.1f} MB ({source.licence})")
    return {
        "name": source.name,
        "kind": source.kind,
        "version": source.version,
        "sha256": source.sha256,
        "licence": source.licence,
        "language": source.language,
        "use": source.use,
        "format": source.format,
        "bytes": size,
        "files": [{"path": file, "language": source.language_of(file)} for file in files],
    }


def _warn_unwatched(source: Source) -> None:
    if isinstance(source, PathSource) and not Path(source.path).resolve().is_relative_to(OWN.resolve()):
        stage.say(
            f"fetch      {source.name}: {source.path} is outside {OWN}, so DVC does not see when it changes; "
            f"`dvc repro -f fetch` reads it again"
        )


if __name__ == "__main__":
    stage.main("fetch", lambda params, run: fetch(params.fetch, SOURCES, RAW, root() / ".downloads", run))
