"""The registry: a model version that points at the exported folder, and the aliases that say which one is live.

    python -m pipelines.register        data/models/release -> a version in MLflow, alias challenger

The bytes stay where they are (DVC versions them); the registry keeps digests. `promote` moves `champion` only when
every gate holds and leaves a release record in reports/releases; `rollback` takes the last move back.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import digests, gates, lineage, live, repository, stage, tracking
from pipelines.params import Params, Register, UserError, load_params

if TYPE_CHECKING:
    from pipelines.tracking import MlflowClient, ModelVersion

RELEASE, REPORTS = Path("data/models/release"), Path("reports")
CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"


def register(params: Register, release: Path, reports: Path) -> ModelVersion:
    """The version whose digest is that of the folder `release`, made when there is none yet; alias `challenger`.

    Raises `UserError` inside a DVC experiment (a sweep must not fill the registry), and when the reports beside a new
    version would not be about it.
    """
    if os.environ.get("DVC_EXP_NAME"):
        raise UserError("experiments register nothing; apply the best one (`dvc exp apply`), commit, then register.")
    client = tracking.connect()
    files = digests.of_files(release)
    digest = digests.combined(files)
    tracking.create_model(client, params.name, "The review page of a version says why it exists.")
    known = [v for v in versions(client, params.name) if v.tags.get("digest") == digest]
    version = known[0] if known else _create(client, params, release, reports, files)
    if int(version.version) != number(client, params.name, CHAMPION):
        client.set_registered_model_alias(params.name, CHALLENGER, version.version)
    return version


def promote(params: Params, release: Path, reports: Path, version: int | None = None) -> dict[str, Any]:
    """Make a version (the challenger, when none is named) the champion; returns the release record.

    Raises `UserError` that names every gate which does not hold; nothing is moved then.
    """
    client = tracking.connect()
    name = params.register_.name
    chosen = _chosen(client, name, version)
    live = tracking.version_behind(client, name, CHAMPION)
    if live and int(live.version) == int(chosen.version):
        return {"version": int(chosen.version), "unchanged": True}
    found = [
        *gates.of_reports(params, reports, bits_of(live)),
        *gates.of_working_tree(chosen.tags.get("digest"), release),
    ]
    if failed := [gate for gate in found if not gate.passed]:
        reasons = "; ".join(f"{gate.name} ({gate.what})" for gate in failed)
        raise UserError(f"version {chosen.version} of {name} was not promoted: {reasons}.")
    return _move(client, name, reports, chosen, live, "promote", found)


def rollback(params: Register, reports: Path) -> dict[str, Any]:
    """Make the previous champion the champion again; the two change places. Returns the release record."""
    client = tracking.connect()
    previous, live = (tracking.version_behind(client, params.name, alias) for alias in (PREVIOUS, CHAMPION))
    if previous is None:
        raise UserError(f"{params.name} has no previous champion to go back to; see the versions with `shovel status`.")
    return _move(client, params.name, reports, previous, live, "rollback", [])


def status(params: Register) -> dict[str, dict[str, Any]]:
    """Version, bits per byte and digest behind each alias that is set."""
    client = tracking.connect()
    found = {alias: tracking.version_behind(client, params.name, alias) for alias in (CHAMPION, CHALLENGER, PREVIOUS)}
    return {
        alias: {"version": int(v.version), "bits_per_byte": bits_of(v), "digest": v.tags.get("digest")}
        for alias, v in found.items()
        if v
    }


def champion_folder(params: Register, release: Path) -> Path:
    """The folder with the champion's bytes; raises `UserError` when this working tree holds other ones."""
    live = tracking.version_behind(tracking.connect(), params.name, CHAMPION)
    if live is None:
        raise UserError(f"{params.name} has no champion yet; `make demo` makes one, `shovel promote` chooses one.")
    if digests.of_folder(release) != live.tags.get("digest"):
        raise UserError(
            f"{release} is not what version {live.version}, the champion, was registered with; bring it back with "
            f"`git checkout {live.tags.get('git.commit', '')[:12]} dvc.lock && dvc checkout {release}`."
        )
    return release


def folder_of(version: ModelVersion, release: Path) -> Path:
    """A folder with the bytes of a version: `release` where it holds them, else a copy out of DVC's cache.

    Raises `UserError` when neither has them.
    """
    if (release / "config.json").exists() and digests.of_folder(release) == version.tags.get("digest"):
        return release
    md5 = json.loads(version.tags.get("lineage", "{}")).get("dvc", {}).get(release.as_posix(), "")
    copy = live.home() / "models" / version.tags.get("digest", "")[:16]
    if not copy.exists():
        try:
            with stage.replacing(copy) as fresh:
                repository.check_out(md5, release, fresh)
        except (OSError, ValueError):
            raise UserError(
                f"the bytes of version {version.version} are not on this machine; "
                f"`git checkout {version.tags.get('git.commit', '')[:12]} dvc.lock && dvc pull {release}` brings them."
            ) from None
    return copy


def versions(client: MlflowClient, name: str) -> list[ModelVersion]:
    """All versions of the model, newest first."""
    found = client.search_model_versions(f"name = '{name}'")
    return sorted(found, key=lambda version: int(version.version), reverse=True)


def version(params: Register, which: int | str) -> ModelVersion:
    """A version by number or alias; raises `UserError` when there is none."""
    client, name = tracking.connect(), params.name
    if isinstance(which, int) or which.isdigit():
        found = next((known for known in versions(client, name) if int(known.version) == int(which)), None)
    else:
        found = tracking.version_behind(client, name, which)
    if found is None:
        raise UserError(f"{name} has no version {which!r}; `shovel status` names those there are.")
    return found


def number(client: MlflowClient, name: str, alias: str) -> int | None:
    """The version behind an alias."""
    found = tracking.version_behind(client, name, alias)
    return int(found.version) if found else None


def bits_of(version: ModelVersion | None) -> float | None:
    """Held-out bits per byte that the version was registered with."""
    return float(version.tags["bits_per_byte"]) if version and "bits_per_byte" in version.tags else None


def _chosen(client: MlflowClient, name: str, version: int | None) -> ModelVersion:
    if version is None:
        found = tracking.version_behind(client, name, CHALLENGER) or tracking.version_behind(client, name, CHAMPION)
    else:
        found = next((known for known in versions(client, name) if int(known.version) == version), None)
    if found is None:
        what = f"no version {version}" if version else "no challenger and no champion"
        raise UserError(f"{name} has {what}; `shovel register` makes a version.")
    return found


def _create(
    client: MlflowClient, params: Register, release: Path, reports: Path, files: dict[str, str]
) -> ModelVersion:
    chat = stage.read_json(reports / "evaluate-chat.json", made_by="evaluate")
    if stale := repository.stale_stages():
        raise UserError(
            f"reports and model are not in step, `dvc status` names {', '.join(stale)}; `shovel run` first."
        )
    facts = lineage.facts(reports)
    digest = digests.combined(files)
    tags = {
        "digest": digest,
        "bits_per_byte": repr(chat["bits_per_byte"]),
        "git.commit": facts["git"]["commit"],
        "git.dirty": str(bool(facts["git"]["uncommitted"])).lower(),
        **lineage.trained_on(reports),
        "lineage": json.dumps(facts | {"digests": files}, ensure_ascii=False),
    }
    review = tracking.find_run(client, facts["runs"].get("review"))
    return client.create_model_version(
        params.name,
        source=_source(release, digest),
        run_id=review.info.run_id if review else None,
        tags=tags,
        description=_description(chat, digest),
    )


def _source(release: Path, digest: str) -> str:
    """Where the bytes are: this disk for a local registry; a server refuses file paths and gets path and digest."""
    return release.resolve().as_uri() if tracking.is_local() else f"dvc://{release.as_posix()}?sha256={digest}"


def _description(chat: dict[str, Any], digest: str) -> str:
    beside = chat["baselines"]
    return (
        f"{chat['bits_per_byte']:.3f} bits per byte held out (xz {beside['xz']:.3f}, "
        f"5-gram {beside['five_gram']:.3f}), assistant perplexity {chat['assistant_perplexity']:.1f}. "
        f"Digest {digest[:12]}. The review page is an artifact of the source run."
    )


def _move(
    client: MlflowClient,
    name: str,
    reports: Path,
    chosen: ModelVersion,
    live: ModelVersion | None,
    action: str,
    found: list[gates.Gate],
) -> dict[str, Any]:
    """Move the aliases and leave the release record, which is returned; an existing one is never overwritten."""
    now = datetime.now(UTC)
    stem = f"{name}-v{chosen.version}-{now:%Y-%m-%d}"
    taken = len(list((reports / "releases").glob(f"{stem}*.json")))
    file = reports / "releases" / f"{stem}{f'-{taken + 1}' if taken else ''}.json"
    record = _record(name, chosen, live, action, now) | {"gates": [asdict(gate) for gate in found]}
    with stage.replacing(file) as fresh:  # a full disk or a dead server: neither alias nor record without the other
        stage.write_json(fresh, record)
        client.set_registered_model_alias(name, CHAMPION, chosen.version)
        if live:
            client.set_registered_model_alias(name, PREVIOUS, live.version)
        if number(client, name, CHALLENGER) == int(chosen.version):
            client.delete_registered_model_alias(name, CHALLENGER)
    return record


def _record(name: str, chosen: ModelVersion, live: ModelVersion | None, action: str, now: datetime) -> dict[str, Any]:
    """What was decided, by whom, and where the version comes from: as it was registered, not as the working tree is."""
    return {
        "action": action,
        "model": name,
        "version": int(chosen.version),
        "replaces": int(live.version) if live else None,
        "at": now.isoformat(timespec="seconds"),
        "by": f"{repository.git('config', 'user.name')} <{repository.git('config', 'user.email')}>",
        "digest": chosen.tags.get("digest"),
        "bits_per_byte": bits_of(chosen),
        "lineage": json.loads(chosen.tags.get("lineage", "{}")),
    }


if __name__ == "__main__":
    with stage.exits("register"):
        made = register(load_params().register_, RELEASE, REPORTS)
        stage.say(f"register   {made.name} version {made.version}")
