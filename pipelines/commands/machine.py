"""Commands about this machine: its health, its parts, its numbers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.commands import REPORTS


def _in_a_folder(file: Path | None) -> Path | None:
    """An option's file; its folder has to be there."""
    if file is not None and not file.parent.is_dir():
        raise typer.BadParameter(f"the folder {file.parent} does not exist; make it first.")
    return file


def _new_file(what: str) -> Any:
    return typer.Option(help=what, dir_okay=False, callback=_in_a_folder)


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table")] = False,
    output: Annotated[Path | None, _new_file("write the JSON into this file as well")] = None,
) -> None:
    """Is this machine ready? Ends with 1 when something fails, and says what to change."""
    from pipelines.machine.doctor import examine, show

    raise typer.Exit(show(examine(), as_json, output))


def audit(
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a sentence")] = False,
    pid: Annotated[int | None, typer.Option(help="a process; this one, with torch, when none is given")] = None,
    sbom: Annotated[Path | None, _new_file("write a bill of materials (CycloneDX) into this file")] = None,
) -> None:
    """Is an NVIDIA part loaded or installed? Ends with 1 when one is."""
    from pipelines.params import UserError
    from pipelines.trust import audit as audits

    if pid is None:
        __import__("torch")
    try:
        found = audits.audit(pid or "self")
    except ValueError as error:
        raise UserError(f"{error}.") from None
    typer.echo(audits.as_json(found) if as_json else audits.sentence(found))
    if sbom:
        from pipelines.trust.sbom import write

        typer.echo(f"sbom       {sbom}: {write(sbom, found)} distributions", err=True)
    raise typer.Exit(int(not found.free))


def passport() -> None:
    """Are the numbers of this device right? Compares them with the reference; ends with 1 when one is off."""
    from moe_kernels import device as devices

    from pipelines import stage
    from pipelines.machine import environment
    from pipelines.params import UserError

    device = devices.default()
    environment.make_passport(device)
    file = environment.passport_file(device)
    if environment.passport(device) == environment.NO_PASSPORT:
        raise UserError(f"no passport could be made of {devices.name(device)}; the error above says why.")
    page = file.with_suffix(".html")
    if REPORTS.is_dir():
        for suffix in (".json", ".html"):
            shutil.copyfile(file.with_suffix(suffix), REPORTS / f"passport{suffix}")
        page = REPORTS / "passport.html"
    typer.echo(f"passport   {page}")
    raise typer.Exit(int(not stage.read_json(file, made_by="passport")["passed"]))
