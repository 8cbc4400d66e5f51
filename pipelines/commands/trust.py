"""Commands of trust: look at a version, ask where it comes from, check it, sign."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from pipelines.commands import PARAMS, RELEASE, REPORTS

Json = Annotated[bool, typer.Option("--json", help="JSON instead of lines")]


def review(
    version: Annotated[str | None, typer.Argument(help="a number or alias; the challenger when none is named")] = None,
    comment: Annotated[str, typer.Option(help="say this about the version, instead of showing it")] = "",
    as_json: Json = False,
) -> None:
    """What to decide on: the gates of a version and its review page, or leave a comment for all who decide.

    The page opens in a browser where there is a terminal.

    Examples: shovel review 2; shovel review 2 --comment "knows too little Welsh"
    """
    import sys
    import webbrowser

    from pipelines import project, tracking
    from pipelines.trust import decisions

    found = project.review(version)
    if comment:
        client = tracking.connect()
        decisions.comment(client, client.get_model_version(found.version.name, str(found.version.version)), comment)
        typer.echo(f"{found.version.name} version {found.version.version}: the comment is kept with it")
        return
    typer.echo(json.dumps(found.as_dict()) if as_json else repr(found))
    if sys.stdout.isatty():
        webbrowser.open(found.page.resolve().as_uri())


def why(
    version: Annotated[int | None, typer.Argument(help="the champion when none is named")] = None,
    as_json: Json = False,
) -> None:
    """Why a version exists: data, filters, training, cost, comparison, decisions.

    Example: shovel why 3 --json
    """
    from pipelines import register, tracking
    from pipelines.trust.why import lines, story

    client = tracking.connect()
    found = register.find(client, _name(), version, (register.CHAMPION, register.CHALLENGER))
    told = story(client, found, REPORTS)
    typer.echo(json.dumps(told, indent=2, ensure_ascii=False) if as_json else "\n".join(lines(told)))


def keys() -> None:
    """Make the key pair that signs: the private key stays in your home, the public one goes into reports/keys."""
    from pipelines.trust import keys as signing_keys

    key = signing_keys.make(REPORTS / signing_keys.FOLDER)
    typer.echo(f"private key  {signing_keys.private_file()}, mode 0600: keep a copy where only you can read it")
    typer.echo(f"public key   {key.file}: commit it, so that others can check what you sign")


def verify(
    version: Annotated[int | None, typer.Argument(help="the champion when none is named")] = None,
    as_json: Json = False,
) -> None:
    """Is a version what it claims to be? Offline; ends with 1 when a check fails, and says what is wrong.

    Without an answer from the registry: what the model in data/models/release and its evidence in git show.

    Example: shovel verify 3
    """
    from pipelines import register
    from pipelines.tracking import connect
    from pipelines.trust.verify import verify_anywhere, verify_bytes

    name, number = _name(), None
    silent = _silent(name) if (REPORTS / "evidence").exists() else None
    if silent:
        checks, about = verify_bytes(RELEASE, REPORTS), f"in {RELEASE}, whatever its number"
    else:
        client = connect()
        found = register.find(client, name, version, (register.CHAMPION, register.CHALLENGER))
        number = int(found.version)
        live = number == register.number(client, name, register.CHAMPION)
        checks, about = verify_anywhere(client, found, RELEASE, REPORTS, promoted=live), f"version {number}"
    passed = all(check.passed for check in checks)
    holds = f"every check holds{' that needs no registry' if silent else ''}"
    if as_json:
        content = {"model": name, "version": number, "passed": passed, "not_checked": silent}
        content |= {"checks": [asdict(check) for check in checks]}
        typer.echo(json.dumps(content, indent=2, ensure_ascii=False))
    else:
        typer.echo(f"{name} {about}: {holds if passed else 'NOT what it claims to be'}")
        for check in checks:
            typer.echo(f"{'holds' if check.passed else 'FAILS'}  {check.name}: {check.what}")
        if silent:
            typer.echo(f"not checked  {silent}")
    raise typer.Exit(int(not passed))


def _silent(name: str) -> str | None:
    """What cannot be checked of the model `name` and why; None when the registry knows versions of it."""
    from pipelines import register, tracking
    from pipelines.params import UserError

    try:
        if register.versions(tracking.connect(), name):
            return None
        why = f"the registry has no version of {name}"
    except UserError as error:
        why = str(error).rstrip(".")
    return f"version number, alias, tags and signed decision: {why}"


def _name() -> str:
    """The registered model of this repository."""
    from pipelines.params import load_params

    return load_params(PARAMS).register_.name
