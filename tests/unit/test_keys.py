"""The key pair: private to one person, outside of the repository, never overwritten; and the envelopes it signs."""

import base64
import json
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from pipelines.params import UserError
from pipelines.trust import keys, statement

CONTENT = {
    "_type": statement.STATEMENT_TYPE,
    "subject": [],
    "predicateType": statement.PROVENANCE,
    "predicate": {"é": 1},
}


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty repository to stand in, and a home beside it."""
    (tmp_path / "repository" / ".dvc").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "repository")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    return tmp_path / "repository"


def test_the_private_key_is_nobody_elses_and_is_not_overwritten(repository: Path) -> None:
    key = keys.make(repository / "keys")
    private = keys.private_file()
    assert stat.S_IMODE(private.stat().st_mode) == 0o600 and not private.is_relative_to(repository)
    assert stat.S_IMODE(private.parent.stat().st_mode) == 0o700 and list(private.parent.iterdir()) == [private]
    assert b"PRIVATE" not in key.file.read_bytes() and list(keys.known(repository / "keys")) == [key.fingerprint]
    before = private.read_bytes()
    with pytest.raises(UserError, match="exists and is not overwritten"):
        keys.make(repository / "keys")
    assert private.read_bytes() == before and keys.ensure(repository / "keys") == (key, False)


def test_of_many_who_start_at_once_one_makes_the_key(repository: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: keys.ensure(repository / "keys"), range(8)))
    assert sum(new for _, new in made) == 1 and len({key.fingerprint for key, _ in made}) == 1


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda file: file.chmod(0o640), "others may read"),
        (lambda file: file.write_bytes(b"-----BEGIN PRIVATE KEY-----\n"), "is no private key"),
        (lambda file: file.unlink(), "is missing; `shovel keys` makes a key"),
    ],
)
def test_a_key_that_cannot_be_used_is_said_so(repository: Path, spoil, what: str) -> None:
    keys.make(repository / "keys")
    spoil(keys.private_file())
    with pytest.raises(UserError, match=what):
        keys.publish(repository / "keys")


def test_a_private_key_inside_the_repository_is_refused(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(repository / "configuration"))
    with pytest.raises(UserError, match="inside the repository"):
        keys.make(repository / "keys")
    assert not list(repository.rglob("*.pem"))


def test_an_envelope_holds_for_others_and_for_no_other_byte(repository: Path) -> None:
    """DSSE, protocol 1.0.2: the signature is of the payload's type and the payload with their lengths."""
    key = keys.make(repository / "keys")
    known = keys.known(repository / "keys")
    sealed = statement.seal(CONTENT, key)
    assert statement.unseal(sealed, known, statement.PROVENANCE) == (CONTENT, key)
    envelope = json.loads(sealed)
    payload, kind = base64.b64decode(envelope["payload"]), envelope["payloadType"]
    theirs = load_pem_public_key(key.file.read_bytes())
    signature = base64.b64decode(envelope["signatures"][0]["sig"])
    signed = b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(payload), payload)
    theirs.verify(signature, signed, ec.ECDSA(hashes.SHA256()))  # raises where it is not
    for position in range(len(sealed)):
        for other in {" ", chr(ord(sealed[position]) ^ 1)} - {sealed[position]}:
            with pytest.raises(ValueError):
                statement.unseal(sealed[:position] + other + sealed[position + 1 :], known, statement.PROVENANCE)


def test_a_statement_of_another_kind_or_of_an_unknown_key_is_refused(repository: Path) -> None:
    sealed = statement.seal(CONTENT, keys.make(repository / "keys"))
    with pytest.raises(ValueError, match="no in-toto statement of type urn:other"):
        statement.unseal(sealed, keys.known(repository / "keys"), "urn:other")
    with pytest.raises(ValueError, match="which reports/keys does not hold"):
        statement.unseal(sealed, {}, statement.PROVENANCE)
