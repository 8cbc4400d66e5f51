"""The keys of signatures: a person's private key, outside of every repository, and the public keys that git keeps.

    shovel keys          ~/.config/shovel/signing-key.pem (mode 0600), reports/keys/<fingerprint>.pem

ECDSA on P-256 (FIPS 186-5), which OpenSSF model signing and in-toto's tools read. A fingerprint is the sha256 of the
public key's PEM file, the name that OpenSSF model signing gives it. Who may put a file into reports/keys decides whom
this repository trusts, so a new one is looked at like any change of code.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from pipelines import repository
from pipelines.params import UserError
from pipelines.stage import replacing

FOLDER = "keys"  # below reports: the public keys


@dataclass(frozen=True)
class Key:
    """A public key: its file, its fingerprint (64 hexadecimal digits) and its PEM text."""

    file: Path
    fingerprint: str

    @property
    def short(self) -> str:
        return self.fingerprint[:16]


def private_file() -> Path:
    """Where this person's private key lies, also before there is one. Raises `UserError` inside the repository."""
    configuration = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    file = (configuration / "shovel" / "signing-key.pem").resolve()
    if file.is_relative_to(repository.root().resolve()):
        raise UserError(f"{file} would lie inside the repository; point XDG_CONFIG_HOME to a folder outside of it.")
    return file


def make(keys: Path) -> Key:
    """A new key pair; raises `UserError` when there is one, which is never overwritten."""
    if not _create(private_file()):
        raise UserError(f"{private_file()} exists and is not overwritten; move it away to make another key.")
    return publish(keys)


def ensure(keys: Path) -> tuple[Key, bool]:
    """(this person's key, whether it had to be made)"""
    made = not private_file().exists() and _create(private_file())
    return publish(keys), made


def _create(file: Path) -> bool:
    """Write a new private key, readable to nobody else at any moment; False when there is one, also just now."""
    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.NamedTemporaryFile(dir=file.parent) as fresh:  # mode 0600
        fresh.write(pem)
        fresh.flush()
        try:
            os.link(fresh.name, file)  # unlike a rename it refuses to replace
        except FileExistsError:
            return False
    return True


def private() -> ec.EllipticCurvePrivateKey:
    """This person's private key. Raises `UserError` when there is none, or when others may read it."""
    file = private_file()
    if not file.exists():
        raise UserError(f"{file} is missing; `shovel keys` makes a key.")
    if file.stat().st_mode & 0o077:
        raise UserError(f"others may read {file}; `chmod 600 {file}`, or make another key if they may have read it.")
    try:
        key = serialization.load_pem_private_key(file.read_bytes(), password=None)
    except (ValueError, TypeError):
        raise UserError(f"{file} is no private key without a passphrase; move it away and run `shovel keys`.") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise UserError(f"{file} is no ECDSA key on P-256; move it away and run `shovel keys`.")
    return key


def publish(keys: Path) -> Key:
    """Write the public half into `keys`, where git keeps it; one that is there stays."""
    pem = (
        private().public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    fingerprint = hashlib.sha256(pem).hexdigest()
    file = keys / f"{fingerprint[:16]}.pem"
    if not file.exists():
        with replacing(file) as fresh:
            fresh.write_bytes(pem)
    return Key(file, fingerprint)


def known(keys: Path) -> dict[str, Key]:
    """The public keys of this repository by fingerprint."""
    found = [Key(file, hashlib.sha256(file.read_bytes()).hexdigest()) for file in sorted(keys.glob("*.pem"))]
    return {key.fingerprint: key for key in found}
