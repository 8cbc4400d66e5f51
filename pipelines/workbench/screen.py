"""The overview on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from pipelines import live
from pipelines.workbench import graph
from pipelines.workbench.overview import Overview

STYLES = {graph.FRESH: "green", graph.STALE: "yellow", live.RUNNING: "cyan", live.WAITING: "cyan"}


def show(found: Overview) -> None:
    """Print it: the sentence, the stages, figures and versions, and last what to do next."""
    console = Console(highlight=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False, show_header=False)
    for stage in found.stages.values():
        table.add_row(stage.name, f"[{STYLES.get(stage.state, 'red')}]{stage.state}[/]", _short(stage.why))
    console.print(found.summary, markup=False)
    console.print(table)
    for title, value in found.figures.items():
        console.print(f"{title:<32} {value:.3f}", markup=False)
    for alias, entry in found.versions.items():
        bits = f", {entry['bits_per_byte']:.3f} bits per byte" if entry["bits_per_byte"] is not None else ""
        console.print(f"{alias:<32} version {entry['version']}{bits}", markup=False)
    for run in found.running:
        console.print(f"{'running':<32} {run}  (shovel watch {run})", markup=False)
    for note in found.notes:
        console.print(note, markup=False)
    console.print(f"[bold]next[/]  [bold cyan]{found.command}[/]  {found.why}")


def _short(text: str, width: int = 90) -> str:
    return text if len(text) <= width else text[: width - 1] + "\u2026"
