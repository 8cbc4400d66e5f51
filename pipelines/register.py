"""The registry: a model version that points at the exported folder, and the aliases that say which one is live.

    python -m pipelines.register        data/models/release -> a version in MLflow, alias challenger

The bytes stay where they are (DVC versions them); the registry keeps digests. `promote` moves `champion` only when
every gate holds and leaves a release record in reports/releases; `rollback` takes the last move back.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import digests, gates, lineage, locks, paired, repository, stage, summary, tracking
from pipelines.params import Params, Register, UserError, load_params
from pipelines.trust import decisions, evidence, signing, verify

if TYPE_CHECKING:
    from pipelines.tracking import MlflowClient, ModelVersion

RELEASE, REPORTS = Path("data/models/release"), Path("reports")
CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
REPLACED = "replaced"  # tag of a version: which one was live before it


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
    tracking.create_model(client, params.name, summary.MODEL)
    if not _is_complete(client, _of_bytes(client, params.name, digest), reports):
        _publish(release)  # may take long: before the lock
    with locks.exclusively(client, params.name):
        version = _of_bytes(client, params.name, digest)
        if not _is_complete(client, version, reports):
            version = _write(client, params, release, reports, files, version)
        if int(version.version) != number(client, params.name, CHAMPION):
            client.set_registered_model_alias(params.name, CHALLENGER, version.version)
    return version


def promote(
    params: Params, release: Path, reports: Path, version: int | None = None, comment: str = ""
) -> dict[str, Any]:
    """Make a version (the challenger, when none is named) the champion; returns the release record.

    Raises `UserError` that names every gate which does not hold; nothing is moved then.
    """
    client = tracking.connect()
    name = params.register_.name
    chosen = find(client, name, version)
    live = tracking.version_behind(client, name, CHAMPION)
    if live and int(live.version) == int(chosen.version):
        return {"version": int(chosen.version), "unchanged": True}
    found = [
        *gates.of_reports(params, reports, measured(client, live, reports)),
        *gates.of_working_tree(chosen.tags.get("digest"), release),
        gates.of_comparison(reports, int(live.version) if live else None),
        *gates.of_decision(params.policy, comment),
        *([verify.champion(client, live, reports)] if live and params.policy.signed else []),
        *([verify.as_gate(verify.verify(client, chosen, release, reports))] if params.policy.signed else []),
    ]
    if failed := [gate for gate in found if not gate.passed]:
        reasons = "; ".join(f"{gate.name} ({gate.what})" for gate in failed)
        raise UserError(f"version {chosen.version} of {name} was not promoted: {reasons}.")
    return _move(client, name, reports, chosen, live, "promote", found, comment)


def _require_unmoved(client: MlflowClient, name: str, live: ModelVersion | None) -> None:
    """Raises `UserError` when another version is live than the one that the decision was made against."""
    now = number(client, name, CHAMPION)
    if now != (int(live.version) if live else None):
        raise UserError(
            f"somebody else made version {now} of {name} the champion just now, nothing was moved; compare with it "
            "(`dvc repro -sf review`) and decide again."
        )


def rollback(params: Register, reports: Path, comment: str = "") -> dict[str, Any]:
    """Make the previous champion the champion again; the two change places. Returns the release record."""
    client = tracking.connect()
    previous, live = (tracking.version_behind(client, params.name, alias) for alias in (PREVIOUS, CHAMPION))
    if previous and live and previous.version == live.version and REPLACED in live.tags:
        previous = find(client, params.name, int(live.tags[REPLACED]))  # a server died between the moves of two aliases
    if previous is None or (live and previous.version == live.version):
        raise UserError(
            f"{params.name} has no previous champion to go back to; `shovel promote VERSION` takes another."
        )
    return _move(client, params.name, reports, previous, live, "rollback", [], comment)


def status(params: Register) -> dict[str, dict[str, Any]]:
    """Version, bits per byte and digest behind each alias that is set."""
    client = tracking.connect()
    found = {alias: tracking.version_behind(client, params.name, alias) for alias in (CHAMPION, CHALLENGER, PREVIOUS)}
    return {
        alias: {"version": int(v.version), "bits_per_byte": bits_of(v), "digest": v.tags.get("digest")}
        for alias, v in found.items()
        if v
    }


def versions(client: MlflowClient, name: str) -> list[ModelVersion]:
    """All versions of the model, newest first."""
    found = client.search_model_versions(f"name = '{name}'")
    return sorted(found, key=lambda version: int(version.version), reverse=True)


def version(params: Register, which: int | str) -> ModelVersion:
    """A version by number or alias; raises `UserError` when there is none."""
    client, text = tracking.connect(), str(which)
    if text.isdigit():
        return find(client, params.name, int(text))
    return find(client, params.name, None, (text,))


def find(
    client: MlflowClient, name: str, version: int | None, aliases: tuple[str, ...] = (CHALLENGER, CHAMPION)
) -> ModelVersion:
    """A version by its number, or the first that an alias names; raises `UserError` when there is none."""
    if version is None:
        behind = (tracking.version_behind(client, name, alias) for alias in aliases)
        found = next((known for known in behind if known), None)
    else:
        found = next((known for known in versions(client, name) if int(known.version) == version), None)
    if found is None:
        what = f"no version {version}" if version is not None else f"no {' and no '.join(aliases)}"
        raise UserError(f"{name} has {what}; {_what_there_is(client, name)}.")
    return found


def _what_there_is(client: MlflowClient, name: str) -> str:
    """The versions, or the command that makes the first."""
    if known := ", ".join(str(version.version) for version in reversed(versions(client, name))):
        return f"there are: {known}"
    made = (RELEASE / "config.json").exists()
    return "`shovel propose` makes the first version" if made else "`shovel demo` makes a model and promotes it"


def number(client: MlflowClient, name: str, alias: str) -> int | None:
    """The version behind an alias."""
    found = tracking.version_behind(client, name, alias)
    return int(found.version) if found else None


def bits_of(version: ModelVersion | None, reports: Path = REPORTS) -> float | None:
    """Held-out bits per byte that the version was registered with: by its evidence, else, without any, by its tag."""
    if version is None:
        return None
    kept = evidence.folder(reports, version.tags.get("digest", "")) / evidence.CHAT
    if kept.exists():
        return stage.read_json(kept, made_by="evaluate")["bits_per_byte"]
    return float(version.tags["bits_per_byte"]) if "bits_per_byte" in version.tags else None


def measured(client: MlflowClient, live: ModelVersion | None, reports: Path) -> gates.Champion | None:
    """What the live version was registered with: of its evidence, else, without any, of its tags. None without one."""
    if live is None:
        return None
    with tempfile.TemporaryDirectory() as into:
        try:
            documents = paired.documents(evidence.find(client, live, reports, Path(into)), "chat")
        except UserError:
            documents = None
    return gates.Champion(int(live.version), bits_of(live, reports), documents)


def _of_bytes(client: MlflowClient, name: str, digest: str) -> ModelVersion | None:
    return next((known for known in versions(client, name) if known.tags.get("digest") == digest), None)


def _is_complete(client: MlflowClient, version: ModelVersion | None, reports: Path) -> bool:
    """Whether it is there and not worth signing (again): never done, not to be found, or done before the commit."""
    if version is None:
        return False
    committed_since = version.tags.get("git.dirty") == "true" and not repository.uncommitted_sources()
    return not committed_since and evidence.exists(client, version, reports)


def _publish(release: Path) -> None:
    """Bring the bytes to where others get them; raises `UserError` when they are not what the reports are about."""
    if stale := repository.stale_stages():
        raise UserError(
            f"reports and model are not in step, `dvc status` names {', '.join(stale)}; `shovel run` first."
        )
    if not tracking.is_local():
        repository.push(release)


def _write(
    client: MlflowClient,
    params: Register,
    release: Path,
    reports: Path,
    files: dict[str, str],
    version: ModelVersion | None,
) -> ModelVersion:
    """Sign the folder and make a version of it, or bring what `version` says of itself up to date."""
    facts = lineage.facts(reports)
    facts["seconds"] = tracking.seconds(client, facts["runs"])
    digest = digests.combined(files)
    tags = {
        **evidence.tags(facts, reports, digest),
        "lineage": json.dumps(facts | {"digests": files}, ensure_ascii=False),
        **signing.sign(params.name, release, reports, files, facts),
    }
    review = tracking.find_run(client, facts["runs"].get("review"))
    if review:
        tracking.upload(client, review.info.run_id, evidence.folder(reports, digest), evidence.artifact(digest))
    if version:
        return tracking.tag_version(client, version, tags)
    return client.create_model_version(
        params.name,
        source=_source(release, digest),
        run_id=review.info.run_id if review else None,
        tags=tags,
        description=summary.describe(reports, facts, digest, review),
    )


def _source(release: Path, digest: str) -> str:
    """Where the bytes are: this disk for a local registry; a server refuses file paths and gets path and digest."""
    return release.resolve().as_uri() if tracking.is_local() else f"dvc://{release.as_posix()}?sha256={digest}"


def _move(
    client: MlflowClient,
    name: str,
    reports: Path,
    chosen: ModelVersion,
    live: ModelVersion | None,
    action: str,
    found: list[gates.Gate],
    comment: str,
) -> dict[str, Any]:
    """Move the aliases and leave the release record, which is returned; an existing one is never overwritten."""
    now = datetime.now(UTC)
    stem = f"{name}-v{chosen.version}-{now:%Y-%m-%d}"
    record = _record(name, reports, chosen, live, action, now)
    record |= {"gates": [asdict(gate) for gate in found], "comment": comment, "comments": decisions.comments(chosen)}
    tags = decisions.tags(record, reports) | ({REPLACED: live.version} if live else {})
    # a full disk or a dead server: neither alias nor record without the other
    with locks.exclusively(client, name), stage.replacing(_free(reports / decisions.RELEASES, stem)) as fresh:
        _require_unmoved(client, name, live)
        stage.write_json(fresh, record)
        if live:
            client.set_registered_model_alias(name, PREVIOUS, live.version)
        tracking.tag_version(client, chosen, tags)
        client.set_registered_model_alias(name, CHAMPION, chosen.version)
        if number(client, name, CHALLENGER) == int(chosen.version):
            client.delete_registered_model_alias(name, CHALLENGER)
    return record


def _free(folder: Path, stem: str) -> Path:
    """The first name that no record has."""
    names = (folder / f"{stem}{f'-{number}' if number > 1 else ''}.json" for number in count(1))
    return next(file for file in names if not file.exists())


def _record(
    name: str, reports: Path, chosen: ModelVersion, live: ModelVersion | None, action: str, now: datetime
) -> dict[str, Any]:
    """What was decided, by whom, and where the version comes from: as it was registered, not as the working tree is."""
    return {
        "action": action,
        "model": name,
        "version": int(chosen.version),
        "replaces": int(live.version) if live else None,
        "at": now.isoformat(timespec="seconds"),
        "by": repository.person(),
        "digest": chosen.tags.get("digest"),
        "bits_per_byte": bits_of(chosen, reports),
        "lineage": json.loads(chosen.tags.get("lineage", "{}")),
    }


if __name__ == "__main__":
    with stage.exits("register"):
        made = register(load_params().register_, RELEASE, REPORTS)
        stage.say(f"register   {made.name} version {made.version}")
