"""Commands about this machine: its health, its parts, its numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table")] = False,
    output: Annotated[Path | None, typer.Option(help="write the JSON into this file as well")] = None,
) -> None:
    """Is this machine ready? Ends with 1 when something fails, and says what to change."""
    from pipelines.doctor import examine, show

    raise typer.Exit(show(examine(), as_json, output))


def audit(
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a sentence")] = False,
    pid: Annotated[int | None, typer.Option(help="a process; this one, with torch, when none is given")] = None,
    sbom: Annotated[Path | None, typer.Option(help="write a bill of materials (CycloneDX) into this file")] = None,
) -> None:
    """Is an NVIDIA part loaded or installed? Ends with 1 when one is."""
    from pipelines import audit as audits
    from pipelines.params import UserError

    if pid is None:
        __import__("torch")
    try:
        found = audits.audit(pid or "self")
    except ValueError as error:
        raise UserError(f"{error}.") from None
    typer.echo(audits.as_json(found) if as_json else audits.sentence(found))
    if sbom:
        from pipelines.sbom import write

        typer.echo(f"sbom       {sbom}: {write(sbom, found)} distributions", err=True)
    raise typer.Exit(int(not found.free))


def passport() -> None:
    """Are the numbers of this device right? Compares them with the reference; ends with 1 when one is off."""
    from moe_kernels import device as devices

    from pipelines.passport import FILE, PAGE, failed
    from pipelines.passport import passport as compare

    device = devices.default()
    content = compare(device, FILE, PAGE)
    wrong, number = failed(content), len(content["entries"])
    typer.echo(f"passport   {devices.name(device)}: {number - len(wrong)} of {number} comparisons pass; {PAGE}")
    if wrong:
        typer.echo(f"passport   outside the tolerance: {', '.join(wrong)}")
    raise typer.Exit(int(bool(wrong)))
