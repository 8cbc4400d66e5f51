"""Sign an exported model: OpenSSF model signature, bill of materials and statement, in one step and without network."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from pipelines import digests, stage
from pipelines.trust import evidence, keys, mlbom, statement


def sign(name: str, release: Path, reports: Path, files: dict[str, str], facts: dict[str, Any]) -> dict[str, str]:
    """Write the evidence of the folder `release`; returns the tags that tie a version to it.

    name: the registered model. files: sha256 of the exported files by name. facts: `lineage.facts`. A key is made on
    first use. Raises `UserError`.
    """
    key, made = keys.ensure(reports / keys.FOLDER)
    if made:
        stage.say(f"keys       made a key to sign with: {keys.private_file()}, public half {key.file}")
    target = evidence.folder(reports, digests.combined(files))
    with stage.replacing(target) as fresh:
        evidence.collect(reports, facts["passport"], fresh)
        mlbom.write(fresh / evidence.BOM, name, release, files, facts["sources"])
        sign_model(release, fresh / evidence.SIGNATURE)
        sealed = statement.seal(statement.build(files, facts, fresh), key)
        (fresh / evidence.STATEMENT).write_text(sealed, encoding="utf-8")
    stage.say(f"sign       {target}: signed with key {key.short}")
    return {"signed.by": key.fingerprint, "signed.statement": hashlib.sha256(sealed.encode()).hexdigest()}


def sign_model(release: Path, signature: Path) -> None:
    """OpenSSF model signature of a folder, with this person's key."""
    from model_signing import signing  # two seconds of import

    keys.private()  # says what is wrong with it, if anything is
    config = signing.Config().use_elliptic_key_signer(private_key=keys.private_file())
    config.set_hashing_config(_hashing()).sign(release, signature)


def verify_model(release: Path, signature: Path, key: keys.Key) -> None:
    """Raises `ValueError` that says what differs when `signature` is not of this folder and of `key`."""
    from cryptography.exceptions import InvalidSignature
    from model_signing import verifying

    config = verifying.Config().use_elliptic_key_verifier(public_key=key.file)
    try:
        config.set_hashing_config(_hashing()).verify(release, signature)
    except InvalidSignature:
        raise ValueError(f"it was not made with key {key.short}") from None
    except ValueError as error:
        raise ValueError("it is of other bytes" if "Hash mismatch" in str(error) else str(error)) from None
    except (KeyError, TypeError, IndexError, AttributeError):
        raise ValueError("it is no model signature") from None


def _hashing() -> Any:
    """Every file counts, `.gitignore` too; DVC's cache may link to its files."""
    from model_signing import hashing

    return hashing.Config().set_ignored_paths(paths=[], ignore_git_paths=False).set_allow_symlinks(True)
