"""Commands of the registry: which version exists, and which is live."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.commands import PARAMS, RELEASE, REPORTS


def register() -> None:
    """Make a version of the exported model, as `shovel propose` does; for scripts that know it by this name."""
    from pipelines.params import load_params
    from pipelines.register import register as register_version

    version = register_version(load_params(PARAMS).register_, RELEASE, REPORTS)
    typer.echo(f"{version.name} version {version.version}, digest {version.tags['digest'][:12]}")


def promote(version: Annotated[int | None, typer.Argument(help="the challenger when none is named")] = None) -> None:
    """Make a version the champion, if every gate holds."""
    from pipelines.params import load_params
    from pipelines.register import promote as promote_version

    params = load_params(PARAMS)
    name = params.register_.name
    record = promote_version(params, RELEASE, REPORTS, version)
    if record.get("unchanged"):
        typer.echo(f"{name} version {record['version']} is the champion already")
        return
    for gate in record["gates"]:
        typer.echo(f"holds  {gate['name']}: {gate['what']}")
    typer.echo(f"{name} version {record['version']} is the champion now; the record is in {REPORTS}/releases")


def rollback() -> None:
    """Make the previous champion the champion again."""
    from pipelines.params import load_params
    from pipelines.register import rollback as roll_back

    record = roll_back(load_params(PARAMS).register_, REPORTS)
    what = f"{record['model']} version {record['version']}"
    typer.echo(f"{what} is the champion again (it replaces {record['replaces']})")
