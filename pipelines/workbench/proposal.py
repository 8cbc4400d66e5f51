"""From a result to a decision: a version as challenger, its review, the way to champion and back."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import digests, gates, live, register, tracking
from pipelines.params import Params, UserError
from pipelines.trust import verify
from pipelines.workbench import graph
from pipelines.workbench.runs import Run

if TYPE_CHECKING:
    import pandas as pd

RELEASE, REPORTS = Path("data/models/release"), Path("reports")


@dataclass(frozen=True)
class Version:
    """A version of the registered model, as it is now. role: champion, challenger, previous or nothing."""

    name: str
    version: int
    role: str
    digest: str
    bits_per_byte: float | None
    commit: str

    def __repr__(self) -> str:
        bits = f", {self.bits_per_byte:.3f} bits per byte" if self.bits_per_byte is not None else ""
        return f"{self.name} version {self.version}{f', {self.role}' if self.role else ''}{bits}, {self.digest[:12]}"


def version(params: Params, which: int | str) -> Version:
    """A version by number or alias; raises `UserError` when there is none."""
    return _described(params, register.version(params.register_, which))


def _described(params: Params, found: Any) -> Version:
    roles = register.status(params.register_)
    role = next((alias for alias, entry in roles.items() if entry["version"] == int(found.version)), "")
    tags = found.tags
    digest, commit = tags.get("digest", ""), tags.get("git.commit", "")
    return Version(params.register_.name, int(found.version), role, digest, register.bits_of(found), commit)


def propose(params: Params, run: Run | None) -> Version:
    """Register the release of the working tree as challenger. run: must be what the working tree holds.

    Raises `UserError` when it is not, or when a stage is stale.
    """
    if run and run.id != live.WORKSPACE and not _is_in_place(run):
        raise UserError(
            f"{run.id} is not what the repository holds; keep it (`shovel keep {run.id}`), then `shovel run` makes "
            f"what follows from it, and it can be proposed."
        )
    return _described(params, register.register(params.register_, RELEASE, REPORTS))


def _is_in_place(run: Run) -> bool:
    """Whether the repository holds what the run made: its data to the byte, or where it made none, its report."""
    known = graph.all_stages()
    for name in run.stages:
        outs = [out for out in known[name].outs if out.startswith("data/")] or [str(known[name].report)]
        if any(digests.of_path(run.folder / out) != digests.of_path(Path(out)) for out in outs):
            return False
    return True


class Review:
    """What a person decides on: gates that hold or not, and the page with everything else.

    Attributes:
        version: the `Version` it is about.
        gates: one row a condition: holds, what was found. Empty where the working tree holds another model.
        page: the review page, a file that needs no network.
    """

    def __init__(self, version: Version, table: pd.DataFrame, page: Path) -> None:
        self.version, self.gates, self.page = version, table, page

    def __repr__(self) -> str:
        rows = [f"{'holds' if row.holds else 'FAILS'}  {name}: {row.found}" for name, row in self.gates.iterrows()]
        return "\n".join([repr(self.version), *rows, self.page.resolve().as_uri()])

    def as_dict(self) -> dict[str, Any]:
        """For scripts; the keys stay."""
        rows = [{"gate": name, "holds": bool(row.holds), "found": row.found} for name, row in self.gates.iterrows()]
        return {"version": asdict(self.version), "gates": rows, "page": str(self.page)}

    def _repr_html_(self) -> str:
        import html

        inside = html.escape(self.page.read_text(encoding="utf-8"), quote=True)
        style = "width:100%;height:36em;border:1px solid #8884;background:white"
        frame = f'<iframe srcdoc="{inside}" style="{style}"></iframe>'
        return f"<b>{html.escape(repr(self.version))}</b>{self.gates.style.to_html() if len(self.gates) else ''}{frame}"


def review(params: Params, which: int | str | None) -> Review:
    """The review of a version: by number or alias; the challenger, else the champion, when none is named."""
    import pandas as pd

    known = register.status(params.register_)
    if which is None and not known:
        page = REPORTS / "review.html"
        if not page.exists():
            raise UserError(f"{params.register_.name} has no version yet; `shovel demo` makes a model and promotes it.")
        raise UserError(
            f"{params.register_.name} has no version yet, `shovel propose` makes one; the page of the last model is "
            f"{page}."
        )
    found = register.version(params.register_, which or next(a for a in _ORDER if a in known))
    about = _described(params, found)
    mine = (RELEASE / "config.json").exists() and digests.of_folder(RELEASE) == about.digest
    conditions = _conditions(params, found) if mine else []
    rows = {gate.name: {"holds": gate.passed, "found": gate.what} for gate in conditions}
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["holds", "found"])
    return Review(about, table, _page(found, mine))


def _conditions(params: Params, found: Any) -> list[gates.Gate]:
    """The gates of a promotion that reports, dvc.lock and registry decide; the champion is not compared with itself."""
    client = tracking.connect()
    live = tracking.version_behind(client, found.name, register.CHAMPION)
    other = live if live and live.version != found.version else None
    return [
        *gates.of_reports(params, REPORTS, register.measured(client, other, REPORTS)),
        gates.in_step(),
        *([verify.champion(client, other, REPORTS)] if other and params.policy.signed else []),
    ]


_ORDER = (register.CHALLENGER, register.CHAMPION, register.PREVIOUS)


def _page(found: Any, mine: bool) -> Path:
    """The review page of a version: the one of the working tree where it is about this model, else MLflow's copy."""
    page = REPORTS / "review.html"
    if mine and page.exists():
        return page
    return tracking.page_of(tracking.connect(), found)
