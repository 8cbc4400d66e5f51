"""Every figure of the notebooks and of the review page: labelled axes, colours that the colour-blind tell apart.

A function takes tables and arrays and returns a `Picture`, which a notebook shows as it is and a page embeds as SVG.

Shapes: S tokens, T compressed entries, N residual streams, E experts.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, ParamSpec

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

STYLE = {"svg.hashsalt": "shovel", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
COLOURS = ("#245a8d", "#c0622f", "#8a94a0", "#6aa5c9", "#e3b23c", "#50616d", "#9b6a9e", "#b8c4cc")
COLUMN, HALF, WIDE = (4.6, 2.6), (5.6, 3.2), (9.6, 3.2)  # inches: of a page, of a notebook
DPI, SCREEN_DPI = 160, 96
Arguments = ParamSpec("Arguments")


class Picture(Figure):
    """A figure that a notebook shows without pyplot, sharp on every screen."""

    def savefig(self, *arguments: Any, **options: Any) -> None:
        """As of every figure, the same bytes for the same figure."""
        with mpl.rc_context(STYLE):
            super().savefig(*arguments, **options)

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=DPI, bbox_inches="tight", facecolor="white")
        content = buffer.getvalue()
        width = int.from_bytes(content[16:20], "big")  # of the PNG's header
        return content, {"width": width * SCREEN_DPI // DPI}


def styled(draw: Callable[Arguments, Picture]) -> Callable[Arguments, Picture]:
    """`draw` under the style of all pictures."""

    @wraps(draw)
    def wrapped(*arguments: Arguments.args, **options: Arguments.kwargs) -> Picture:
        with mpl.rc_context(STYLE):
            return draw(*arguments, **options)

    return wrapped


def _axes(size: tuple[float, float], columns: int = 1, **grid: Any) -> tuple[Picture, Any]:
    """An empty picture, and its axes: one, or a list from left to right."""
    picture = Picture(figsize=size, layout="constrained")
    axes = picture.subplots(1, columns, squeeze=False, gridspec_kw=grid)[0]
    return picture, axes[0] if columns == 1 else list(axes)


@styled
def sizes(table: pd.DataFrame) -> Picture:
    """Megabytes of text by source, training and held out; of a table with source, split and bytes."""
    picture, axes = _axes(HALF)
    megabytes = table.pivot_table("bytes", "source", "split", "sum", fill_value=0) / 1e6
    left = np.zeros(len(megabytes))
    for split, colour in zip(("train", "heldout"), COLOURS, strict=False):
        axes.barh(megabytes.index, megabytes[split], left=left, color=colour, label=split, height=0.6)
        left = left + megabytes[split].to_numpy()
    axes.set_xlabel("megabytes of text")
    axes.legend(frameon=False)
    return picture


@styled
def dropped(sources: Mapping[str, Mapping[str, Any]]) -> Picture:
    """Why documents were dropped, as a share of each source's; of the profile that cleaning writes."""
    picture, axes = _axes(HALF)
    reasons = sorted({reason for entry in sources.values() for reason in entry["dropped"]})
    left = np.zeros(len(sources))
    for number, reason in enumerate(reasons):
        shares = [100 * e["dropped"].get(reason, 0) / max(e["raw_documents"], 1) for e in sources.values()]
        colour = COLOURS[number % len(COLOURS)]
        axes.barh(list(sources), shares, left=left, color=colour, label=reason.replace("_", " "), height=0.6)
        left = left + shares
    axes.set_xlabel("% of the source's documents that were dropped")
    if reasons:
        picture.legend(loc="outside lower center", ncols=3, frameon=False)
    return picture


@styled
def fertility(table: pd.DataFrame, most: int = 24) -> Picture:
    """Bytes that one token stands for, by language; of a table with language, bytes and bytes_per_token."""
    shown = table.nlargest(most, "bytes").sort_values("bytes_per_token")
    picture, axes = _axes((6.4, 1.2 + 0.17 * len(shown)))
    axes.barh(shown["language"], shown["bytes_per_token"], color=COLOURS[0], height=0.7)
    overall = table["bytes"].sum() / table["tokens"].sum()
    axes.axvline(overall, color=COLOURS[1], linestyle="--", label=f"all text, {overall:.2f}")
    axes.set(xlabel="bytes a token (more is cheaper to train and to serve)", ylabel="language")
    axes.margins(y=0.01)
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1))
    return picture


@styled
def vocabulary(table: pd.DataFrame) -> Picture:
    """Bytes a token over the size of the vocabulary; of a table with vocab_size and bytes_per_token."""
    picture, axes = _axes(COLUMN)
    axes.plot(table["vocab_size"], table["bytes_per_token"], "o-", color=COLOURS[0])
    axes.set_xscale("log", base=2)
    axes.set_xticks(table["vocab_size"], [f"{size:,}" for size in table["vocab_size"]])
    axes.set(xlabel="tokens in the vocabulary", ylabel="bytes a token, held out")
    return picture


@styled
def streams(read_SN: np.ndarray, write_SN: np.ndarray, mix_SNN: np.ndarray, errors: Sequence[float]) -> Picture:
    """A hyper-connection: what it reads and writes, how it mixes, how fast Sinkhorn's iterations balance the mixing."""
    picture, (left, middle, right) = _axes(WIDE, 3, width_ratios=(1, 1, 1.1))
    names = [f"{n}" for n in range(read_SN.shape[1])]
    for offset, values, label in ((-0.2, read_SN, "read"), (0.2, write_SN, "write")):
        colour = COLOURS[int(offset > 0)]
        bars = {"yerr": values.std(axis=0), "error_kw": {"elinewidth": 0.8}}
        left.bar(np.arange(len(names)) + offset, values.mean(axis=0), 0.38, label=label, color=colour, **bars)
    left.set(xticks=range(len(names)), xlabel="residual stream", ylabel="weight, mean and deviation over tokens")
    left.legend(frameon=False)
    mean_NN = mix_SNN.mean(axis=0)
    middle.imshow(mean_NN, cmap="Blues", vmin=0, vmax=1)
    for (row, column), value in np.ndenumerate(mean_NN):
        middle.text(column, row, f"{value:.2f}", ha="center", va="center", color="white" if value > 0.5 else "black")
    middle.set(xticks=range(len(names)), yticks=range(len(names)), xlabel="to stream", ylabel="from stream")
    middle.set_title("mixing, mean over tokens", fontsize=9)
    right.semilogy(range(1, len(errors) + 1), np.maximum(errors, 1e-9), "o-", markersize=3, color=COLOURS[0])
    right.set(xlabel="Sinkhorn iterations", ylabel="worst row's distance from a sum of 1")
    return picture


SEEN = ("hidden", "compressed entry, not chosen", "compressed entry", "raw token")


@styled
def reach(parts: Mapping[str, Any]) -> Picture:
    """What each token may look at: one panel a kind of layer, of `model.anatomy.attention_parts` by name."""
    picture, panels = _axes((WIDE[0], 3.6), len(parts))
    colours = ListedColormap(["#ffffff", "#e3ebf2", COLOURS[3], COLOURS[0]])
    for axes, (name, part) in zip(np.atleast_1d(panels), parts.items(), strict=True):
        axes.imshow(_seen(part), cmap=colours, vmin=0, vmax=3, interpolation="nearest", aspect="equal")
        axes.set_title(name.replace("_", " "), fontsize=9)
        axes.set(xlabel="token looked at", ylabel="token")
    patches = [mpl.patches.Patch(facecolor=colours(n), edgecolor="#8a94a0", label=SEEN[n]) for n in (3, 2, 1)]
    picture.legend(handles=patches, loc="outside lower center", ncols=3, frameon=False)
    return picture


def _seen(part: Any) -> np.ndarray:
    """[S, S] of 0 hidden, 1 entry not chosen, 2 entry chosen, 3 raw token; an entry covers the tokens of its block."""
    near_SS = part.near_SS.numpy() > 0
    seen_SS = np.zeros(near_SS.shape)
    if part.rate:
        entries_ST = part.visible_ST.numpy() * 1.0 + part.chosen_ST.numpy()
        spread_SX = entries_ST.repeat(part.rate, axis=1)
        seen_SS[:, : spread_SX.shape[1]] = spread_SX
    seen_SS[near_SS] = 3
    return seen_SS


@styled
def attention(part: Any) -> Picture:
    """Where attention goes: to raw tokens (left), to compressed entries (middle), and how much to each (right)."""
    picture, (left, middle, right) = _axes((WIDE[0], 3.4), 3)
    for axes, values, label in ((left, part.near_SS, "raw token"), (middle, part.far_ST, "compressed entry")):
        image = axes.imshow(np.sqrt(values.numpy()), cmap="magma", vmin=0, aspect="auto", interpolation="nearest")
        axes.set(xlabel=label, ylabel="token")
    bar = picture.colorbar(image, ax=middle, label="probability, mean over heads")
    marks = np.array([0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0])
    marks = marks[np.sqrt(marks) <= image.norm.vmax]
    bar.set_ticks(np.sqrt(marks), labels=[f"{mark:g}" for mark in marks])
    shares = np.stack([part.near_SS.sum(1), part.far_ST.sum(1), part.sink_S])
    labels = ("raw tokens", "compressed entries", "sink")
    right.stackplot(range(shares.shape[1]), shares, labels=labels, colors=(COLOURS[0], COLOURS[3], COLOURS[7]))
    right.set(xlabel="token", ylabel="share of attention", ylim=(0, 1), xlim=(0, shares.shape[1] - 1))
    right.legend(loc="lower center", fontsize=8)
    return picture


@styled
def indexer(far_T: np.ndarray, score_T: np.ndarray, chosen_T: np.ndarray, recall_S: np.ndarray) -> Picture:
    """One query's attention to its entries beside the indexer's scores, and the recall of every query."""
    picture, (left, right) = _axes(WIDE, 2)
    for chosen, colour, label in ((True, COLOURS[0], "chosen"), (False, COLOURS[1], "left out")):
        mine = chosen_T == chosen
        left.scatter(score_T[mine], far_T[mine], s=14, color=colour, label=label)
    left.set(xlabel="the indexer's score of an entry", ylabel="attention without the indexer")
    left.legend(frameon=False)
    right.plot(100 * recall_S, color=COLOURS[0], linewidth=1)
    right.set(xlabel="token", ylabel="% of the attention that is kept", ylim=(0, 102))
    return picture


@styled
def routing(tokens: Sequence[str], experts_SK: np.ndarray, weights_SK: np.ndarray, number: int) -> Picture:
    """Which expert took which token, and with which weight."""
    weights_SE = np.zeros((len(tokens), number))
    np.put_along_axis(weights_SE, experts_SK, weights_SK, axis=1)
    picture, axes = _axes((WIDE[0], 0.9 + 0.19 * number))
    image = axes.imshow(weights_SE.T, cmap="Blues", vmin=0, aspect="auto")
    axes.set_xticks(range(len(tokens)), [repr(token)[1:-1] for token in tokens], rotation=90, fontfamily="monospace")
    axes.set(yticks=range(0, number, max(1, number // 8)), ylabel="expert")
    axes.set_xticks(np.arange(-0.5, len(tokens)), minor=True)
    axes.grid(which="minor", axis="x", color="#dddddd", linewidth=0.5)
    axes.tick_params(which="minor", length=0)
    picture.colorbar(image, label="weight", pad=0.01)
    return picture


@styled
def curve(table: pd.DataFrame) -> Picture:
    """The loss of a training, step by step and smoothed."""
    picture, axes = _axes(COLUMN)
    axes.plot(table["step"], table["loss"], color=COLOURS[2], linewidth=0.7)
    smooth = table["loss"].ewm(halflife=max(len(table) / 50, 1)).mean()
    axes.plot(table["step"], smooth, color=COLOURS[0], linewidth=1.6)
    axes.set(xlabel="step", ylabel="loss, nats a token", xlim=(0, None))
    return picture


@styled
def lines(table: pd.DataFrame, columns: Sequence[str], label: str) -> Picture:
    """Some columns of a table over its steps."""
    picture, axes = _axes(HALF)
    for column, colour in zip(columns, COLOURS, strict=False):
        axes.plot(table["step"], table[column], color=colour, label=column.replace("_", " "), linewidth=1.2)
    axes.set(xlabel="step", ylabel=label)
    axes.legend(frameon=False)
    return picture


@styled
def bits(base: Mapping[str, Any], chat: Mapping[str, Any]) -> Picture:
    """Bits per byte by source with the baselines as lines; of two reports of `evaluate`."""
    names = ["all", *base["by_source"]]
    picture, axes = _axes(COLUMN)
    for offset, (report, label) in enumerate(((base, "base"), (chat, "chat"))):
        heights = [report["bits_per_byte"], *(row["bits_per_byte"] for row in report["by_source"].values())]
        axes.bar(np.arange(len(names)) + (offset - 0.5) * 0.36, heights, 0.34, label=label, color=COLOURS[offset])
    for name, label, style in (("xz", "xz, all", ":"), ("five_gram", "5-gram, all", "--")):
        axes.axhline(base["baselines"][name], color="#555", linestyle=style, linewidth=1, label=label)
    axes.set_xticks(range(len(names)), [name.replace("-", "\n", 1) for name in names])
    axes.set(ylabel="bits a byte", ylim=(0, axes.get_ylim()[1] * 1.25))
    axes.legend(ncols=4, frameon=False, fontsize=8, loc="upper center")
    return picture


@styled
def load(shares_by_layer: Mapping[str, Sequence[float]]) -> Picture:
    """Tokens that each expert takes: one row a layer, one column an expert, relative to an equal share."""
    shares_LE = np.array(list(shares_by_layer.values()))
    picture, axes = _axes(COLUMN)
    image = axes.imshow(shares_LE * shares_LE.shape[1], cmap="RdBu_r", vmin=0, vmax=2, aspect="auto")
    axes.set_yticks(range(len(shares_LE)), [name.replace("_", " ") for name in shares_by_layer])
    axes.set_xlabel("expert")
    axes.xaxis.get_major_locator().set_params(integer=True)
    picture.colorbar(image, label="times an equal share")
    return picture
