"""Commands of the daily work: check, change scale, run, look."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from importlib.util import find_spec
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from pipelines.commands import PARAMS, PRESETS, RELEASE, REPORTS, SOURCES, complete
from pipelines.commands.runs import try_out

if TYPE_CHECKING:
    from pipelines.sources import Source

NOTHING_TO_DO_S = 2.0  # in which `dvc repro` ends then
INTERRUPTED = 130  # exit code
BUSY = re.compile("being blocked by|Unable to acquire lock")  # DVC, when another of its processes works here


def check() -> None:
    """Read params.yaml and data/sources.yaml and say what is wrong with them."""
    from model.schedule import first_row
    from pipelines.params import load_params
    from pipelines.sources import load_sources

    params, sources = load_params(PARAMS), load_sources(SOURCES)
    _require_languages(params.finetune.languages, [source for source in sources if source.use == "chat"])
    typer.echo(f"{PARAMS} is fine; {SOURCES} is fine: {len(sources)} sources ({', '.join(s.name for s in sources)})")
    train = params.pretrain
    batches = (train.batch_tokens, train.start_batch_tokens or train.batch_tokens)
    rows = [tokens // train.sequence_length for tokens in batches]
    total = first_row(train.steps, *rows, train.batch_ramp_steps) * train.sequence_length
    typer.echo(f"pretraining will read {total:,} tokens in {train.steps:,} steps")


def _require_languages(wanted: list[str], sources: Sequence[Source]) -> None:
    """Raises `UserError` when no dialogue can be in one of them; lines of jsonl and parquet may name any language."""
    from pipelines.params import UserError

    possible: set[str] = set()
    for source in sources:
        suffixes = {PurePath(pattern).suffix for pattern in source.files if not pattern.startswith("!")}
        languages = set(source.languages.values()) if "{language}" in source.language else {source.language}
        if suffixes & {"", ".*", ".jsonl", ".parquet"} or not languages:
            return
        possible |= languages
    if possible and not possible & set(wanted):
        raise UserError(
            f"{PARAMS}: `finetune.languages` {wanted} is the language of no chat source; choose among "
            f"{', '.join(sorted(possible))}, or name it in {SOURCES}."
        )


def use(
    preset: Annotated[str, typer.Argument(help="demo, laptop, ...", autocompletion=complete.presets)],
) -> None:
    """Rewrite params.yaml for another scale; git shows the change.

    Example: shovel use laptop
    """
    from pipelines import repository, stage
    from pipelines.params import UserError, load_params

    known = complete.presets("")
    if preset not in known:
        raise UserError(f"no preset is called {preset!r}; choose one of {', '.join(known)}.")
    load_params(PRESETS / f"{preset}.yaml")
    presets = [(PRESETS / f"{name}.yaml").read_bytes() for name in known]
    edited = repository.git("diff", "--name-only", "HEAD", "--", PARAMS.as_posix())
    if edited and PARAMS.exists() and PARAMS.read_bytes() not in presets:
        raise UserError(
            f"{PARAMS} has edits that would be lost; commit them or `git checkout {PARAMS}`, then run again."
        )
    with stage.replacing(PARAMS) as fresh:
        shutil.copyfile(PRESETS / f"{preset}.yaml", fresh)
    typer.echo(f"{PARAMS} is now the preset {preset}; see `git diff {PARAMS}`, then `shovel run`")


def run(
    stages: Annotated[
        list[str] | None, typer.Argument(help="stages; all when none is named", autocompletion=complete.stages)
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="try a value, params.yaml stays as it is")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="keep what was tried, as `shovel keep` does")] = False,
) -> None:
    """Run what changed (`dvc repro`) and tie the runs to commit and hashes; with --set, try values apart from it.

    Examples: shovel run; shovel run pretrain --set learning_rate=3e-3 --set steps=200;
    shovel run evaluate@chat --set finetune.steps=80 --keep
    """
    if settings:
        try_out(stages or [], settings, keep)
        return
    if keep:
        from pipelines.params import UserError

        raise UserError("--keep goes with --set; without --set the results are in place anyway.")
    _require_known(stages or [])
    check()
    _repro(stages or [])
    link()


def demo() -> None:
    """From raw text to a promoted model, and a short summary."""
    start = time.monotonic()
    _fit_to_device()
    check()
    _repro([])
    from pipelines.lineage import link as link_runs
    from pipelines.params import UserError, load_params
    from pipelines.register import promote as promote_version
    from pipelines.register import register as register_version

    params = load_params(PARAMS)
    link_runs(REPORTS)
    version = register_version(params.register_, RELEASE, REPORTS)
    where = version.tags["device"] + (", emulated" if version.tags["emulated"] == "true" else "")
    named = f"{version.name} version {version.version}"
    typer.echo(f"register   {named}, trained on {where}, digest {version.tags['digest'][:12]}", err=True)
    try:
        outcome = promote_version(params, RELEASE, REPORTS, int(version.version))
        word = "is the champion already" if outcome.get("unchanged") else "is the champion now"
        typer.echo(f"promote    version {version.version} {word}", err=True)
    except UserError as error:
        typer.echo(f"promote    {error}", err=True)
        typer.echo("promote    it is registered; mend that, then `shovel register` and `shovel promote`", err=True)
    _summary(time.monotonic() - start)


def _fit_to_device() -> None:
    """Where params.yaml is still a preset of the demo: the short one if an emulated device computes, else the long."""
    wanted, other = ("emulated", "demo") if _device_is_emulated() else ("demo", "emulated")
    if PARAMS.read_bytes() == (PRESETS / f"{other}.yaml").read_bytes():
        use(wanted)


def _device_is_emulated() -> bool:
    """Whether an emulated Ascend would compute; PyTorch, seconds of import, is asked only where its plugin is."""
    if find_spec("torch_npu") is None:
        return False
    from moe_kernels import device as devices

    return devices.default().type == "npu" and devices.emulated()


def link() -> None:
    """Tie MLflow runs to the commit and the hashes in dvc.lock: after a commit, and after an outage of the server."""
    from pipelines.lineage import link as link_runs

    done = link_runs(REPORTS)
    words = {"delivered": "delivered late", "waiting": "still running and delivered later", "reaped": "ended"}
    extra = [f"{done[key]} {what}" for key, what in words.items() if done[key]]
    typer.echo(f"link       {done['linked']} runs{', ' + ', '.join(extra) if extra else ''}", err=True)


def accept() -> None:
    """Make the present data the reference that later data is compared with (reports/profile.json, for git)."""
    from pipelines.contracts import ACCEPTED, CHAT, CLEAN
    from pipelines.contracts import accept as accept_profile

    sources = accept_profile(CLEAN, CHAT, ACCEPTED)
    typer.echo(f"{ACCEPTED} now describes {', '.join(sources)}; commit it")


def status(as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a screen")] = False) -> None:
    """The state of this repository and what to do next, in one screen.

    Example: shovel status --json
    """
    from pipelines.stage import console

    with console.status("asking DVC and the registry"):
        from pipelines.workbench.overview import overview

        found = overview()
    if as_json:
        typer.echo(json.dumps(found.as_dict()))
        return
    from pipelines.workbench.screen import show

    show(found)


def _repro(stages: list[str]) -> None:
    """`dvc repro`, its own chatter left out: the stages speak for themselves. Ends this command when it fails."""
    from pipelines import repository, tracking

    repository.require_readable()
    _require_idle(stages)
    start = time.time()
    threading.Thread(target=tracking.load, daemon=True).start()  # what comes next needs it, and DVC is another process
    with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
        words = [sys.executable, "-m", "pipelines.commands.dvc", str(file.fileno()), "repro", *stages]
        with nullcontext() if stages else _examined_meanwhile():
            code = _wait(subprocess.Popen(words, stdout=subprocess.DEVNULL, pass_fds=[file.fileno()]))
        file.seek(0)
        said = file.read()
    if code:
        _stop(start, code, said)
    typer.echo(f"{said}dvc repro  up to date after {time.time() - start:.0f} s", err=True)


def _require_known(stages: list[str]) -> None:
    """Raises `UserError` for what is no stage."""
    from pipelines.params import UserError

    known = complete.stages("")
    for word in stages:
        if word not in known:
            raise UserError(f"no stage is called {word!r}; choose one of {', '.join(known)}.")


def _require_idle(stages: list[str]) -> None:
    """Raises `UserError` when one of these stages runs in the repository now; any, when none is named."""
    from pipelines import live
    from pipelines.params import UserError

    labels = [stage.replace("@", "-") for stage in stages]
    for one in live.snapshots(live.WORKSPACE):
        if one.running and (not labels or one.label in labels or one.label.partition("-")[0] in labels):
            raise UserError(live.busy(one))


def _stop(start: float, code: int, said: str) -> NoReturn:
    """End this command as `dvc repro` ended, which says this itself."""
    from pipelines import live
    from pipelines.params import UserError

    if BUSY.search(said):
        _require_idle([])
        raise UserError("another `dvc` works in this repository; run again when it has ended.")
    stopped = [one for one in live.snapshots(live.WORKSPACE) if one.updated >= start and one.status == live.INTERRUPTED]
    if code == INTERRUPTED or stopped:
        if not stopped:  # else the stage has said so
            typer.echo("dvc repro  interrupted; the same command goes on", err=True)
        raise typer.Exit(INTERRUPTED)
    typer.echo(f"{said}dvc repro  stopped after {time.time() - start:.0f} s; mend what is named above", err=True)
    raise typer.Exit(2 if code == 255 else abs(code))


@contextmanager
def _examined_meanwhile() -> Iterator[None]:
    """Where this machine has no passport, which training needs, make it while the first stages wait for the network.

    It begins when it is clear that there is something to run, in a process group of its own that ends with the block:
    nothing has needed what is not done by then.
    """
    begun: list[subprocess.Popen[str]] = []
    timer = threading.Timer(NOTHING_TO_DO_S, _examine, args=(begun,))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        for process in begun:
            if process.poll() is None:  # else its number may be another's by now
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        timer.join()


def _examine(begun: list[subprocess.Popen[str]]) -> None:
    """Say what the examination says, each line in the place of a bar that a stage may be drawing."""
    words = [sys.executable, "-m", "pipelines.machine.environment"]
    clear = "\r\033[K" if sys.stderr.isatty() else ""
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        begun.append(process)
        for line in process.stderr or ():
            print(f"{clear}{line}", end="", file=sys.stderr, flush=True)


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Exit code, `INTERRUPTED` if it failed after a Ctrl-C: that reaches the whole group, and the child is given the
    time to put things back."""
    interrupted = False
    while True:
        try:
            code = process.wait()
            return INTERRUPTED if code and interrupted else code
        except KeyboardInterrupt:
            interrupted = True


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
pretrained on {trained["tokens"]:,} tokens of {text}
and fine-tuned on {tuned["dialogues"]:,} dialogues; training took {time_of_training}.

  bits per held-out byte   base {bits["base"]} (95 %: {low:.3f} to {high:.3f}), chat {bits["chat"]}
  the same bytes           xz {base["baselines"]["xz"]:.3f}, 5-gram byte model {base["baselines"]["five_gram"]:.3f}
  review page              {(REPORTS / "review.html").resolve()}
  this command             {seconds:.0f} s

Next: make ui (runs and registry), make lab (notebooks), make serve (chat with it)"""
    )
