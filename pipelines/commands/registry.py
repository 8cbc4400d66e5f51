"""Commands of the registry: which version exists, and which is live."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pipelines.commands import PARAMS, RELEASE, REPORTS


def register() -> None:
    """Make a version of the exported model, as `shovel propose` does; for scripts that know it by this name."""
    from pipelines.params import load_params
    from pipelines.register import register as register_version

    version = register_version(load_params(PARAMS).register_, RELEASE, REPORTS)
    typer.echo(f"{version.name} version {version.version}, digest {version.tags['digest'][:12]}")


Comment = Annotated[str, typer.Option(help="why, for the release record")]


def promote(
    version: Annotated[int | None, typer.Argument(help="the challenger when none is named")] = None,
    comment: Comment = "",
) -> None:
    """Make a version the champion, if every gate holds."""
    from pipelines.params import load_params
    from pipelines.register import promote as promote_version

    params = load_params(PARAMS)
    name = params.register_.name
    record = promote_version(params, RELEASE, REPORTS, version, comment)
    if record.get("unchanged"):
        typer.echo(f"{name} version {record['version']} is the champion already")
        return
    for gate in record["gates"]:
        typer.echo(f"holds  {gate['name']}: {gate['what']}")
    typer.echo(f"{name} version {record['version']} is the champion now; the record is in {REPORTS}/releases")
    _await_server(record)


def rollback(comment: Comment = "") -> None:
    """Make the previous champion the champion again."""
    from pipelines.params import load_params
    from pipelines.register import rollback as roll_back

    record = roll_back(load_params(PARAMS).register_, REPORTS, comment)
    what = f"{record['model']} version {record['version']}"
    typer.echo(f"{what} is the champion again (it replaces {record['replaces']})")
    _await_server(record)


def _await_server(record: dict[str, Any]) -> None:
    """Wait for the server of this repository to follow, where one runs."""
    from pipelines.deployment.deploy import Target
    from pipelines.deployment.endpoint import await_version
    from pipelines.register import CHAMPION

    seconds = await_version(Target(record["model"], CHAMPION), record["version"])
    if seconds is not None:
        typer.echo(f"the server answers with version {record['version']} after {seconds:.1f} s")
