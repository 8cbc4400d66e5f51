"""Commands of trust: who signs, and whether a version is what it claims to be."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from pipelines.commands import PARAMS, RELEASE, REPORTS


def keys() -> None:
    """Make the key pair that signs: the private key stays in your home, the public one goes into reports/keys."""
    from pipelines import keys as signing_keys

    key = signing_keys.make(REPORTS / signing_keys.FOLDER)
    typer.echo(f"private key  {signing_keys.private_file()}, mode 0600: keep a copy where only you can read it")
    typer.echo(f"public key   {key.file}: commit it, so that others can check what you sign")


def verify(
    version: Annotated[int | None, typer.Argument(help="the champion when none is named")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of lines")] = False,
) -> None:
    """Is a version what it claims to be? Offline; ends with 1 when a check fails, and says what is wrong."""
    from pipelines import register
    from pipelines.tracking import connect
    from pipelines.verify import verify_anywhere

    client, name = connect(), _name()
    found = register.find(client, name, version, (register.CHAMPION, register.CHALLENGER))
    live = int(found.version) == register.number(client, name, register.CHAMPION)
    checks = verify_anywhere(client, found, RELEASE, REPORTS, promoted=live)
    passed = all(check.passed for check in checks)
    if as_json:
        content = {"model": name, "version": int(found.version), "passed": passed}
        content |= {"checks": [asdict(check) for check in checks]}
        typer.echo(json.dumps(content, indent=2, ensure_ascii=False))
    else:
        typer.echo(f"{name} version {found.version}: {'every check holds' if passed else 'NOT what it claims to be'}")
        for check in checks:
            typer.echo(f"{'holds' if check.passed else 'FAILS'}  {check.name}: {check.what}")
    raise typer.Exit(int(not passed))


def _name() -> str:
    """The registered model of this repository."""
    from pipelines.params import load_params

    return load_params(PARAMS).register_.name
