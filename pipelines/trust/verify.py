"""Is a version what it claims to be? Bytes, signatures, provenance, bill of materials, decision; nothing is downloaded.

    shovel verify 3            one line a check, exit code 1 when one fails

Where the registry does not answer, or knows no version, the model in data/models/release is checked against the
evidence that git keeps, and what only the registry knows is named as not checked.

`verify` is for other programs too: `pipelines.deployment.deploy` serves nothing that does not pass.
"""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import digests, repository
from pipelines.gates import Gate
from pipelines.params import UserError, read_yaml
from pipelines.trust import decisions, evidence, keys, signing, statement

if TYPE_CHECKING:
    from pipelines.tracking import MlflowClient, ModelVersion

EXPORTED = "data/models/release"  # in dvc.lock


def verify(
    client: MlflowClient, version: ModelVersion, release: Path, reports: Path, promoted: bool = False
) -> list[Gate]:
    """Every check of `version`, whose bytes are in the folder `release`; those that fail say what is wrong.

    reports: the folder with keys and evidence. promoted: whether a signed release record must show passed gates.
    """
    known = keys.known(reports / keys.FOLDER)
    files = functools.cache(lambda: digests.of_files(release))
    found = [_check("exported files", lambda: _exported(version, files(), release))]
    with tempfile.TemporaryDirectory() as into:
        try:
            folder = evidence.find(client, version, reports, Path(into))
        except UserError as error:
            return [*found, Gate("signature", False, str(error))]
        found += _of_evidence(version, release, files, folder, known)
    return [*found, _check("decision", lambda: decision(version, known, promoted, reports))]


def verify_anywhere(
    client: MlflowClient, version: ModelVersion, release: Path, reports: Path, promoted: bool
) -> list[Gate]:
    """As `verify`, with the bytes from `release` or from DVC's cache."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            folder = bytes_of(version, release, Path(scratch) / "release")
        except UserError as error:
            return [Gate("exported files", False, str(error))]
        return verify(client, version, folder, reports, promoted)


def verify_bytes(release: Path, reports: Path) -> list[Gate]:
    """The checks that need no registry, of the model in `release`, by the evidence that git keeps of its bytes.

    Raises `UserError` when no model is there.
    """
    files = digests.of_files(release)
    folder = evidence.folder(reports, digests.combined(files))
    if not (folder / evidence.STATEMENT).exists():
        fix = (
            f"`dvc checkout -f {EXPORTED}` brings back what dvc.lock names, `shovel register` signs a model of your own"
        )
        return [Gate("exported files", False, f"nobody signed what lies in {release}, {folder} is missing; {fix}")]
    return [*_of_evidence(None, release, lambda: files, folder, keys.known(reports / keys.FOLDER))]


def bytes_of(version: ModelVersion, release: Path, into: Path) -> Path:
    """The folder with the bytes of a version: `release` where dvc.lock names them, else `into`, from DVC's cache.

    `release` does not count while it holds what another commit's dvc.lock names, as after a `git pull` alone. Raises
    `UserError` when DVC's cache has not got the bytes, or when nothing says which they are.
    """
    md5 = lineage_of(version).get("dvc", {}).get(EXPORTED)
    if md5 is None:
        raise UserError(f"the tag lineage of version {version.version} does not say which bytes it has.")
    here = md5 == repository.output_hashes().get(EXPORTED)
    if here and release.exists() and not repository.is_another(release, md5):
        return release
    try:
        repository.check_out(md5, Path(EXPORTED), into)
    except FileNotFoundError:
        first = "" if here else f"git checkout {version.tags.get('git.commit', '')[:12]} && "
        raise UserError(
            f"the bytes of version {version.version} are neither in {release} nor in DVC's cache; bring them with "
            f"`{first}dvc pull {EXPORTED}`."
        ) from None
    return into


def lineage_of(version: ModelVersion) -> dict[str, Any]:
    """Where the registry says that a version comes from; nothing where that is no JSON."""
    try:
        return dict(json.loads(version.tags.get("lineage", "{}")))
    except (ValueError, TypeError):
        return {}


def champion(client: MlflowClient, version: ModelVersion, reports: Path) -> Gate:
    """Whether the registry says of the live version, which others are measured by, what its evidence says."""

    def same() -> str:
        with tempfile.TemporaryDirectory() as into:
            folder = evidence.find(client, version, reports, Path(into))
            return _registered(version, *opened(folder, keys.known(reports / keys.FOLDER)), folder)

    found = _check("champion as signed", same)
    return Gate(found.name, found.passed, f"version {version.version}: {found.what}")


def opened(folder: Path, known: dict[str, keys.Key]) -> tuple[dict[str, Any], keys.Key]:
    """(statement, its key) of evidence that is sound; raises `ValueError` that says what is wrong."""
    text = (folder / evidence.STATEMENT).read_bytes().decode(errors="replace")
    content, key = statement.unseal(text, known, statement.PROVENANCE)
    _evidence(content, folder)
    return content, key


def as_gate(checks: list[Gate]) -> Gate:
    """All checks as one gate of a promotion."""
    held = sum(check.passed for check in checks)
    first = next((f"; {check.name}: {check.what}" for check in checks if not check.passed), "")
    return Gate("signature and lineage", held == len(checks), f"{held} of {len(checks)} checks hold{first}")


def _check(name: str, function: Callable[[], str]) -> Gate:
    """A check passes with the sentence that `function` returns, or fails with that of its error."""
    try:
        return Gate(name, True, function())
    except (ValueError, UserError, OSError) as error:
        return Gate(name, False, str(error).rstrip("."))
    except (KeyError, StopIteration) as error:
        return Gate(name, False, f"the statement lacks {error}; another version of shovel made it")


def _of_evidence(
    version: ModelVersion | None,
    release: Path,
    files: Callable[[], dict[str, str]],
    folder: Path,
    known: dict[str, keys.Key],
) -> Iterator[Gate]:
    """The checks that the evidence allows; without a sound statement there are no others.

    version: None where the registry is not to be asked.
    """
    text = (folder / evidence.STATEMENT).read_bytes()
    try:
        content, key = statement.unseal(text.decode(errors="replace"), known, statement.PROVENANCE)
    except ValueError as error:
        yield Gate("statement", False, f"{folder / evidence.STATEMENT}: {error}")
        return
    yield Gate("statement", True, f"signed with key {key.short}{_who(key)}")
    if version:
        tag = version.tags.get("signed.statement")
        yield _check("registered statement", lambda: _equal(hashlib.sha256(text).hexdigest(), tag))
        yield _check("registered facts", lambda: _registered(version, *opened(folder, known), folder))
    yield _check("subject", lambda: _subject(content, files()))
    yield _check("model signature", lambda: _signature(release, folder, key))
    yield _check("evidence", lambda: _evidence(content, folder))
    yield _check("bill of materials", lambda: _bill(content, folder))
    yield _check("dvc.lock", lambda: _lock(content, folder, release))
    yield _check("git commit", lambda: _commit(content, folder))
    yield _check("data contracts", lambda: _contracts(content))


def _exported(version: ModelVersion, files: dict[str, str], release: Path) -> str:
    wanted = version.tags.get("digest")
    if digests.combined(files) == wanted:
        return f"{len(files)} files, digest {wanted[:12]}"
    registered = lineage_of(version).get("digests", {})
    raise ValueError(f"{release} is not what was registered: {_difference(files, registered)}")


def _difference(found: dict[str, str], wanted: dict[str, str]) -> str:
    """Which names differ between two tables of digests."""
    changed = [f"{name} differs" for name in sorted(found.keys() & wanted.keys()) if found[name] != wanted[name]]
    missing = [f"{name} is missing" for name in sorted(wanted.keys() - found.keys())]
    return ", ".join([*changed, *missing, *(f"{name} is too much" for name in sorted(found.keys() - wanted.keys()))])


def _who(key: keys.Key) -> str:
    """Who brought the key into this repository."""
    found = repository.git("log", "-1", "--diff-filter=A", "--format=%an, %as", "--", key.file.as_posix())
    return f", which {found.replace(', ', ' committed on ')}" if found else ", which is not committed yet"


def _equal(found: str, tag: str | None) -> str:
    if found != tag:
        raise ValueError("the registry names another statement; somebody signed again, or changed the tag")
    return f"sha256 {found[:12]}, as the registry says"


def _registered(version: ModelVersion, content: dict[str, Any], key: keys.Key, folder: Path) -> str:
    """The tags that `register` gave the version say what statement and evidence, which are sound, say."""
    facts = statement.facts(content)
    wanted = evidence.tags(facts, folder, digests.combined(facts["digests"])) | {"signed.by": key.fingerprint}
    wrong = [
        f"the tag {name} is {version.tags.get(name, 'missing')}, signed was {value}"
        for name, value in wanted.items()
        if version.tags.get(name) != value
    ]
    lineage = lineage_of(version)
    try:
        said = statement.facts(statement.build(lineage["digests"], lineage, folder))
    except (KeyError, TypeError, AttributeError):
        said = {}
    wrong += [f"the tag lineage has another `{part}`" for part, value in facts.items() if said.get(part) != value]
    if wrong:
        raise ValueError(f"{'; '.join(wrong)}; somebody changed the registry, correct it there")
    return f"{len(wanted) + 1} tags say what statement and reports say"


def _digests(descriptors: list[dict[str, Any]], kind: str = "sha256") -> dict[str, str]:
    """Digests by name of those ResourceDescriptors that have one of this kind."""
    return {one["name"]: one["digest"][kind] for one in descriptors if kind in one.get("digest", {})}


def _subject(content: dict[str, Any], files: dict[str, str]) -> str:
    named = _digests(content["subject"])
    if files != named:
        raise ValueError(f"the statement is about other bytes: {_difference(files, named)}")
    return f"the statement is about these {len(files)} files"


def _signature(release: Path, folder: Path, key: keys.Key) -> str:
    try:
        signing.verify_model(release, folder / evidence.SIGNATURE, key)
    except ValueError as error:
        raise ValueError(f"{folder / evidence.SIGNATURE}: {str(error).splitlines()[0]}") from None
    return "OpenSSF model signature of the same key over the same bytes"


def _evidence(content: dict[str, Any], folder: Path) -> str:
    """Every file beside the statement is named there with its hash, and the other way round."""
    run = content["predicate"]["runDetails"]["byproducts"]
    wanted = _digests(run) | {Path(name).name: digest for name, digest in _digests(_inputs(content)).items()}
    found = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.iterdir()
        if file.name != evidence.STATEMENT
    }
    if found != wanted:
        raise ValueError(f"{folder}: {_difference(found, wanted)}")
    return f"{len(found)} files of inputs and reports have the hashes in the statement"


def _bill(content: dict[str, Any], folder: Path) -> str:
    """It lists the same files and the same sources under the same licences as the statement."""
    bill = json.loads((folder / evidence.BOM).read_text(encoding="utf-8"))
    files = {part["name"]: part["hashes"][0]["content"] for part in bill["metadata"]["component"]["components"]}
    if files != (named := _digests(content["subject"])):
        raise ValueError(f"it lists other files than the statement: {_difference(files, named)}")
    data = {part["name"] for part in bill["components"] if part["type"] == "data"}
    sources = {
        one["name"].removeprefix("source ") for one in _dependencies(content) if "licence" in one.get("annotations", {})
    }
    if data != sources:
        raise ValueError(f"it lists other sources than the statement: {', '.join(sorted(data ^ sources))}")
    return f"CycloneDX, {len(files)} files, {len(data)} sources, {len(bill['components']) - len(data)} packages"


def _inputs(content: dict[str, Any]) -> list[dict[str, Any]]:
    names = {file.as_posix() for file in evidence.INPUTS}
    return [one for one in _dependencies(content) if one["name"] in names]


def _dependencies(content: dict[str, Any]) -> list[dict[str, Any]]:
    return content["predicate"]["buildDefinition"]["resolvedDependencies"]


def _lock(content: dict[str, Any], folder: Path, release: Path) -> str:
    """The lock file of DVC names these bytes as the output of `export`, and the inputs as the statement does."""
    stages = read_yaml(folder / "dvc.lock")["stages"]
    outs = {out["path"]: out["md5"] for entry in stages.values() for out in entry.get("outs", [])}
    named = _digests(_dependencies(content), "md5")
    if wrong := [path for path, md5 in named.items() if outs.get(path) != md5]:
        raise ValueError(f"it names other hashes than the statement: {', '.join(wrong)}")
    if outs.get(EXPORTED) != repository.folder_md5(release):
        raise ValueError(f"its output {EXPORTED} is not this folder")
    return f"names this folder, and {len(named)} outputs as the statement does"


def _commit(content: dict[str, Any], folder: Path) -> str:
    """The commit is in this repository, and parameters and sources are the commit's."""
    named = next(one for one in _dependencies(content) if one["name"] == "git commit")
    commit = named.get("digest", {}).get("gitCommit", "")
    if loose := named["annotations"]["uncommitted"]:
        raise ValueError(f"{', '.join(loose[:3])} had changes that were not committed; commit, then `shovel register`")
    if not repository.git("cat-file", "-t", commit) == "commit":
        raise ValueError(f"{commit[:12] or 'none'} is not in this repository; `git fetch` brings it if it was pushed")
    for file in evidence.INPUTS[1:]:
        if repository.committed(commit, file) != (folder / file.name).read_bytes():
            raise ValueError(f"{file} of commit {commit[:12]} is another one")
    return f"{commit[:12]} is here, and parameters and sources are its own"


def _contracts(content: dict[str, Any]) -> str:
    run = content["predicate"]["runDetails"]["byproducts"]
    found = next(one for one in run if one["name"] == "contracts.json")["annotations"]
    if not found["success"]:
        raise ValueError(f"{found['held']} of {found['expectations']} expectations held; it was trained all the same")
    return f"{found['held']} of {found['expectations']} expectations held"


def decision(version: ModelVersion, known: dict[str, keys.Key], promoted: bool, reports: Path) -> str:
    """Who promoted the version after which gates; raises `ValueError` when that is not signed, or a gate had failed, or
    when what people read of it was changed.
    """
    try:
        found = decisions.signed(version, known)
    except ValueError as error:
        raise ValueError(f"the signed release record: {error}") from None
    kept = all([decisions.is_kept(record, reports) for record, _ in found])
    said = [decisions.sentence(record) for record, _ in found]
    if found and version.tags.get("decision") not in said:
        raise ValueError(
            f"the tag decision is {version.tags.get('decision', 'missing')}, signed was {' and '.join(said)}"
        )
    record, key = next(((record, key) for record, key in found if record["action"] == "promote"), (None, None))
    if record is None:
        if promoted:
            raise ValueError(f"nobody promoted version {version.version} through the gates; use `shovel promote`")
        return "not promoted yet"
    if wrong := [gate["name"] for gate in record["gates"] if not gate["passed"]]:
        raise ValueError(f"gates had not passed: {', '.join(wrong)}")
    what = f"{len(record['gates'])} gates passed, signed with key {key.short}"
    missing = "" if kept else f"; {reports / decisions.RELEASES} has no record of it, which `git pull` may bring"
    return f"promoted {record['at']} by {record['by']}, {what}{missing}"
