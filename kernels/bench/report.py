"""The table of the benchmarks: as text, as the figure reports/bench.svg, and as the block of README.md.

    python kernels/bench/report.py       reports/bench.json -> reports/bench.svg, README.md

README.md holds what reports/bench.json says between two comments; a test compares them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from measure import Row, target_text, value_text

JSON, SVG, README = Path("reports/bench.json"), Path("reports/bench.svg"), Path("README.md")
BLOCK = re.compile(r"(<!-- bench -->\n).*?(<!-- end of bench -->)", re.DOTALL)
STYLE = {"svg.hashsalt": "shovel", "font.size": 8, "axes.spines.top": False, "axes.spines.right": False}
VERDICTS = {True: "met", False: "**not met**", None: "no figure"}
COLOURS = {True: "#3d7d4f", False: "#b5543a"}


def rows_of(content: dict[str, Any]) -> list[Row]:
    """The rows of reports/bench.json."""
    return [Row(**row) for row in content["rows"]]


def markdown(content: dict[str, Any]) -> str:
    """The table with the machine that it was measured on."""
    m = content["machine"]
    lines = [
        f"{m['processor']}, {m['cores']} cores, {m['memory_gib']} GiB; PyTorch {m['versions']['torch']}, transformers "
        f"{m['versions']['transformers']}, {content['date']}, load {m['load']} at the start. Steps are of 4 x 512 "
        "tokens. They run on one thread, all sides in one process and with the same memory settings, unless a row says "
        "`all cores`: there each side runs alone in its own process, as someone who trains would run it. In "
        "parentheses the least and the most of the rounds.",
        "",
        "| what | target | measured | | ours | peer |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows_of(content):
        ends = [value_text(end, row.unit) for end in row.spread or ()]
        measured = value_text(row.measured, row.unit) + (f" ({' to '.join(ends)})" if ends else "")
        note = f" ({row.note})" if row.note else ""
        cells = [row.what + note, target_text(row), measured, VERDICTS[row.met], row.ours, row.peer]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_readme(content: dict[str, Any], readme: Path = README) -> None:
    """Renew the block between the comments."""
    text = readme.read_text(encoding="utf-8")
    assert BLOCK.search(text), f"{readme} has lost the comments that the table belongs between"
    readme.write_text(BLOCK.sub(lambda found: found[1] + markdown(content) + found[2], text), encoding="utf-8")


def draw(content: dict[str, Any], path: Path = SVG) -> None:
    """How far from its target each measured row is, as a bar on a logarithmic axis; right of 1 is better."""
    rows = [row for row in rows_of(content) if row.measured]
    reached = [row.measured / row.target if row.at_least else row.target / row.measured for row in rows]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 0.22 * len(rows) + 0.8))
        axes = figure.subplots()
        places = range(len(rows))[::-1]
        axes.barh(places, [value - 1 for value in reached], left=1, color=[COLOURS[bool(row.met)] for row in rows])
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.margins(y=0.01)
        axes.set_yticks(places, [row.what for row in rows])
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_xlabel("measured over target; right of 1: met")
        figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")


def main() -> None:
    """Figure and README from the JSON."""
    content = json.loads(JSON.read_text(encoding="utf-8"))
    draw(content)
    write_readme(content)


if __name__ == "__main__":
    main()
