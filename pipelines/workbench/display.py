"""How runs look: a card with bar and loss so far in notebooks, one line in a terminal; redrawn while they run."""

from __future__ import annotations

import html as markup
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipelines import live
from pipelines.workbench import overrides

if TYPE_CHECKING:
    from rich.text import Text

    from pipelines.workbench.runs import Run

COLOURS = {live.FINISHED: "#2e7d32", live.FAILED: "#b3261e", live.KILLED: "#b3261e", live.INTERRUPTED: "#a15c00"}
LINES = ("#245a8d", "#c0622f")  # of a picture: the first state, the second
BLOCKS = "▁▂▃▄▅▆▇█"
BAR = 12  # characters
REDRAW_S = 1.0


def watch(run: Run) -> Run:
    """Show a run until it ends."""
    show = _in_notebook if _is_notebook() else _in_terminal
    show(run)
    return run


def show(run: Run) -> None:
    """A run as it is now."""
    if _is_notebook():
        from IPython.display import display

        display(_both(run), raw=True)
    else:
        print(line(run), file=sys.stderr)


def _is_notebook() -> bool:
    """Whether the one who asks is a Jupyter kernel."""
    shell = sys.modules.get("IPython")
    return bool(shell and shell.get_ipython() and hasattr(shell.get_ipython(), "kernel"))


def _in_notebook(run: Run) -> None:
    from IPython.display import display

    handle = display(_both(run), raw=True, display_id=True)
    while run.running or run.status == "created":
        time.sleep(REDRAW_S)
        handle.update(_both(run), raw=True)
    handle.update(_both(run), raw=True)


def _both(run: Run) -> dict[str, str]:
    return {"text/html": html(run), "text/plain": line(run)}


def _in_terminal(run: Run) -> None:
    from rich.live import Live

    from pipelines.stage import console

    if not console.is_terminal:
        run.wait()
        console.print(line(run), markup=False, soft_wrap=True)
        return
    with Live(_fitted(run, console.width), console=console, refresh_per_second=4) as screen:
        while run.running or run.status == "created":
            time.sleep(0.25)
            screen.update(_fitted(run, console.width))
        screen.update(_fitted(run, console.width))


def _fitted(run: Run, width: int) -> Text:
    from rich.text import Text

    return Text(line(run, width), no_wrap=True, overflow="ellipsis")


def line(run: Run, width: int | None = None) -> str:
    """`pretrain-1  running  pretrain  ━━━╌╌╌╌╌╌╌╌╌  ▇▆▅▄▃  40 of 180  loss 5.31  1,900 tokens/s  2 min left`

    width: characters that there are; curve, bar, speed and stage, in this order, stay away where they do not fit.
    """
    last = run.progress
    parts, spare = [f"{run.id}  {run.status}"], []
    if last:
        losses = [point["loss"] for point in last.points if "loss" in point]
        done = round(BAR * min(1.0, last.done / last.total)) if last.total else 0
        bar = "━" * done + "╌" * (BAR - done) if last.running else ""
        curve, facts = sparkline(losses) if losses else "", _facts(run, last)
        spare = [curve, bar, *(fact for fact in facts if fact.endswith("tokens/s")), last.label]
        parts += [last.label, bar, curve, *facts]
    if run.message and run.status not in (live.STARTING, live.RUNNING, live.FINISHED):
        parts.append(run.message)
    parts = [part for part in parts if part]
    for part in (part for part in spare if part):
        if width is not None and len("  ".join(parts)) > width:
            parts.remove(part)
    return "  ".join(parts)


def _facts(run: Run, last: live.Snapshot) -> list[str]:
    """How far the last stage is, its loss and speed; what time is left, or how long all stages took."""
    newest: dict[str, Any] = last.points[-1] if last.points else {}
    facts = [f"{last.done:,.0f} of {last.total:,.0f}"] if last.total else []
    facts += [f"loss {newest['loss']:.3f}"] if "loss" in newest else []
    facts += [f"{newest['tokens_per_s']:,.0f} tokens/s"] if "tokens_per_s" in newest else []
    left = last.seconds_left if last.running else None
    return [*facts, f"{_duration(left)} left" if left is not None else _duration(run.seconds)]


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def sparkline(values: list[float], width: int = 24) -> str:
    """The course of some numbers in one line of text."""
    size = -(-len(values) // width)
    means = [sum(part) / len(part) for part in (values[n : n + size] for n in range(0, len(values), size))]
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((mean - low) * scale)] for mean in means)


def html(run: Run) -> str:
    """A card: what runs with which overrides, bar, facts, loss so far."""
    last, colour = run.progress, COLOURS.get(run.status, "#245a8d")
    what = overrides.in_words(run.overrides) or "params.yaml as it is"
    rows = [
        f"<b>{markup.escape(run.id)}</b> <span style='color:{colour}'>{run.status}</span>",
        f"{markup.escape(', '.join(run.stages))} &middot; {markup.escape(what)}",
    ]
    if last:
        share = min(1.0, last.done / last.total) if last.total else float(run.status == live.FINISHED)
        rows.append(_bar(share, colour) + f" {last.label}: " + " &middot; ".join(map(markup.escape, _facts(run, last))))
    if run.message and run.status not in (live.STARTING, live.RUNNING, live.FINISHED):
        rows.append(f"<span style='color:{colour}'>{markup.escape(run.message)}</span>")
    picture = _picture(last.points) if last else ""
    return "<div style='line-height:1.5'>" + "<br>".join(rows) + f"</div>{picture}"


def _bar(share: float, colour: str) -> str:
    box = "height:.7em;border-radius:3px"
    inside = f"<span style='display:block;width:{share:.1%};background:{colour};{box}'></span>"
    return f"<span style='display:inline-block;width:16em;background:#8884;{box}'>{inside}</span>"


def _picture(points: list[dict[str, float]]) -> str:
    """The loss so far; nothing before there are two points."""
    losses = {point["step"]: point["loss"] for point in points if "loss" in point}
    return picture({"loss": losses}) if len(losses) > 1 else ""


def picture(curves: Mapping[str, Mapping[float, float]]) -> str:
    """Losses by step as <img>, with a legend where there is more than one."""
    from matplotlib.figure import Figure

    from pipelines import pages

    figure = Figure(figsize=(5.2, 2.2), layout="constrained")
    axes = figure.subplots()
    for colour, (name, losses) in zip(LINES, curves.items(), strict=False):
        axes.plot(list(losses), list(losses.values()), color=colour, linewidth=1.2, label=name)
    axes.set(xlabel="step", ylabel="loss, nats a token")
    axes.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1:
        axes.legend(frameon=False)
    return f"<img alt='loss by step' style='background:white' src='{pages.inline_svg(figure)}'>"
