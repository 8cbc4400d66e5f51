"""The `shovel` command. Everything heavy is imported inside the commands, so that `shovel --help` is immediate.

Exit codes: 0 done, 2 a mistake that the sentence on the terminal tells how to mend, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Raw text to a reviewed mixture-of-experts model.")
PARAMS, SOURCES, PRESETS = Path("params.yaml"), Path("data/sources.yaml"), Path(__file__).parent / "presets"
REPORTS, RELEASE = Path("reports"), Path("data/models/release")


def main() -> None:
    """Entry point, from any folder of the repository: a person's mistake becomes one sentence and exit code 2."""
    from pipelines.repository import root
    from pipelines.stage import advice

    os.chdir(root())
    try:
        app()
    except (Exception, KeyboardInterrupt) as error:
        found = advice(error)
        if found is None:
            raise
        print(f"shovel: {found[0]}", file=sys.stderr)
        sys.exit(found[1])


@app.command()
def check() -> None:
    """Read params.yaml and data/sources.yaml and say what is wrong with them."""
    from model.schedule import first_row
    from pipelines.params import load_params
    from pipelines.sources import load_sources

    params, sources = load_params(PARAMS), load_sources(SOURCES)
    typer.echo(f"{PARAMS} is fine; {SOURCES} is fine: {len(sources)} sources ({', '.join(s.name for s in sources)})")
    train = params.pretrain
    start = train.start_batch_tokens or train.batch_tokens
    total = first_row(train.steps, train.batch_tokens, start, train.batch_ramp_steps)  # of rows of one token
    typer.echo(f"pretraining will read {total / 1e6:.1f} M tokens in {train.steps:,} steps")


@app.command()
def use(preset: Annotated[str, typer.Argument(help="demo or laptop")]) -> None:
    """Rewrite params.yaml for another scale; git shows the change."""
    from pipelines.params import UserError, load_params

    known = sorted(file.stem for file in PRESETS.glob("*.yaml"))
    if preset not in known:
        raise UserError(f"no preset is called {preset!r}; choose one of {', '.join(known)}.")
    load_params(PRESETS / f"{preset}.yaml")
    shutil.copyfile(PRESETS / f"{preset}.yaml", PARAMS)
    typer.echo(f"{PARAMS} is now the preset {preset}; see `git diff {PARAMS}`, then `shovel run`")


@app.command()
def run(stages: Annotated[list[str] | None, typer.Argument(help="stages; all when none is named")] = None) -> None:
    """Run what changed (`dvc repro`) and tie the runs to commit and hashes."""
    check()
    _repro(stages or [])
    link()


@app.command()
def demo() -> None:
    """From raw text to a promoted model, and a short summary."""
    start = time.monotonic()
    check()
    _repro([])
    from pipelines.lineage import link as link_runs
    from pipelines.params import UserError, load_params
    from pipelines.register import promote as promote_version
    from pipelines.register import register as register_version

    params = load_params(PARAMS)
    link_runs(REPORTS)
    version = register_version(params.register_, RELEASE, REPORTS)
    typer.echo(f"register   {version.name} version {version.version}, digest {version.tags['digest'][:12]}", err=True)
    try:
        outcome = promote_version(params, RELEASE, REPORTS, int(version.version))
        word = "is the champion already" if outcome.get("unchanged") else "is the champion now"
        typer.echo(f"promote    version {version.version} {word}", err=True)
    except UserError as error:
        typer.echo(f"promote    {error}", err=True)
    _summary(time.monotonic() - start)


@app.command()
def link() -> None:
    """Tie MLflow runs to the commit and the hashes in dvc.lock: after a commit, and after an outage of the server."""
    from pipelines.lineage import link as link_runs

    done = link_runs(REPORTS)
    extra = [f"{done[key]} {what}" for key, what in (("delivered", "delivered late"), ("reaped", "ended")) if done[key]]
    typer.echo(f"link       {done['linked']} runs{', ' + ', '.join(extra) if extra else ''}", err=True)


@app.command()
def accept() -> None:
    """Make the present data the reference that later data is compared with (reports/profile.json, for git)."""
    from pipelines.contracts import ACCEPTED, CHAT, CLEAN
    from pipelines.contracts import accept as accept_profile

    sources = accept_profile(CLEAN, CHAT, ACCEPTED)
    typer.echo(f"{ACCEPTED} now describes {', '.join(sources)}; commit it")


@app.command()
def register() -> None:
    """Make a version of the exported model in the MLflow registry; the same bytes never become two versions."""
    from pipelines.params import load_params
    from pipelines.register import register as register_version

    version = register_version(load_params(PARAMS).register_, RELEASE, REPORTS)
    typer.echo(f"{version.name} version {version.version}, digest {version.tags['digest'][:12]}")


@app.command()
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


@app.command()
def rollback() -> None:
    """Make the previous champion the champion again."""
    from pipelines.params import load_params
    from pipelines.register import rollback as roll_back

    record = roll_back(load_params(PARAMS).register_, REPORTS)
    what = f"{record['model']} version {record['version']}"
    typer.echo(f"{what} is the champion again (it replaces {record['replaces']})")


@app.command()
def status() -> None:
    """What would run, which version is live, and the last figures."""
    from pipelines.params import load_params
    from pipelines.register import status as registry_status

    params = load_params(PARAMS)
    done = subprocess.run([*_dvc(), "status"], capture_output=True, text=True, check=False)
    typer.echo(done.stdout.strip() or done.stderr.strip())
    found = registry_status(params.register_)
    for alias, entry in found.items():
        bits = f", {entry['bits_per_byte']:.3f} bits per byte" if entry["bits_per_byte"] is not None else ""
        typer.echo(f"{alias}: {params.register_.name} version {entry['version']}{bits}")
    if not found:
        typer.echo(f"{params.register_.name} has no version yet; `make demo` makes one")


@app.command()
def review() -> None:
    """Open the review page of the last model in a browser."""
    import webbrowser

    from pipelines.params import UserError

    page = REPORTS / "review.html"
    if not page.exists():
        raise UserError(f"{page} is missing; `dvc repro review` makes it, `dvc pull` fetches it.")
    typer.echo(page.resolve().as_uri())
    webbrowser.open(page.resolve().as_uri())


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table")] = False,
    output: Annotated[Path | None, typer.Option(help="write the JSON into this file as well")] = None,
) -> None:
    """Is this machine ready? Ends with 1 when something fails, and says what to change."""
    from pipelines.doctor import examine, show

    raise typer.Exit(show(examine(), as_json, output))


@app.command()
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


@app.command()
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


@app.command()
def ui(port: int = 5000) -> None:
    """The MLflow server on 127.0.0.1, one worker; prints the address of the training view."""
    from pipelines.tracking import ui_address, ui_command

    _require_free(port)
    command, environment = ui_command(port)
    typer.echo(f"open {ui_address(port)}  (Ctrl-C ends it)")
    os.execvpe(command[0], command, environment)


@app.command()
def serve(port: int = 8000) -> None:
    """The champion behind an OpenAI-compatible endpoint on 127.0.0.1."""
    from pipelines.params import load_params
    from pipelines.register import champion_folder

    _require_free(port)
    folder = champion_folder(load_params(PARAMS).register_, RELEASE)
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder)]
    body = json.dumps({"model": str(folder), "messages": [{"role": "user", "content": "What is AI?"}]})
    typer.echo(
        f"serving {folder} at http://127.0.0.1:{port}/v1 (Ctrl-C ends it); when it runs, ask in another terminal:\n"
        f"  curl http://127.0.0.1:{port}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    os.execvpe(command[0], [*command, "--host", "127.0.0.1", "--port", str(port)], environment)


def _dvc() -> list[str]:
    return [sys.executable, "-m", "dvc"]


def _repro(stages: list[str]) -> None:
    """`dvc repro`, its own chatter left out: the stages speak for themselves. Ends this command when it fails."""
    start = time.monotonic()
    code = _wait(subprocess.Popen([*_dvc(), "repro", *stages], stdout=subprocess.DEVNULL))
    if code:
        typer.echo(f"dvc repro  stopped after {time.monotonic() - start:.0f} s; mend what is named above", err=True)
        raise typer.Exit(2 if code == 255 else abs(code))
    typer.echo(f"dvc repro  up to date after {time.monotonic() - start:.0f} s", err=True)


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Exit code; Ctrl-C reaches the whole group, and the child is given the time to put things back."""
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


def _require_free(port: int) -> None:
    import socket

    from pipelines.params import UserError

    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise UserError(f"port {port} is in use on 127.0.0.1; name another with --port.")


def _summary(seconds: float) -> None:
    """What was made, in the fewest lines."""
    from pipelines.lineage import RAW, sources
    from pipelines.stage import read_json

    def report(name: str) -> dict[str, Any]:
        return read_json(REPORTS / f"{name}.json", made_by=name.split("-")[0])

    trained, tuned, base, chat = (report(name) for name in ("pretrain", "finetune", "evaluate-base", "evaluate-chat"))
    text = ", ".join(f"{s['name']} ({s['bytes'] / 1e6:.1f} MB)" for s in sources(RAW) if s["use"] == "pretrain")
    low, high = base["ci95"]
    bits = {name: f"{report['bits_per_byte']:.3f}" for name, report in (("base", base), ("chat", chat))}
    total, active = trained["parameters"] / 1e6, trained["active_parameters"] / 1e6
    emulated = trained["emulated"] or tuned["emulated"]
    time_of_training = "place on an emulated device" if emulated else f"{trained['seconds'] + tuned['seconds']:.0f} s"
    typer.echo(
        f"""
A mixture of experts, {total:.1f} M parameters of which {active:.1f} M work on a token,
pretrained on {trained["tokens"] / 1e6:.1f} M tokens of {text}
and fine-tuned on {tuned["dialogues"]:,} dialogues; training took {time_of_training}.

  bits per held-out byte   base {bits["base"]} (95 %: {low:.3f} to {high:.3f}), chat {bits["chat"]}
  the same bytes           xz {base["baselines"]["xz"]:.3f}, 5-gram byte model {base["baselines"]["five_gram"]:.3f}
  review page              {(REPORTS / "review.html").resolve()}
  this command             {seconds:.0f} s

Next: make ui (runs and registry), make lab (notebooks), make serve (chat with it)"""
    )


if __name__ == "__main__":
    main()
