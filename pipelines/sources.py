"""data/sources.yaml: where the text comes from, under which licence, in which language, and what it is for.

Each kind of source is a class with `obtain(cache, params) -> Path`: a file, an archive or a folder on this disk. A new
kind (Debian packages, npm packages) is one more class in `KINDS`.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

import requests
import tenacity
from pydantic import Field, field_validator

from pipelines.params import Fetch, Section, UserError, checked, read_yaml
from pipelines.stage import progress

BLOCK = 1 << 16  # bytes; what a broken connection can cost
SHA256 = r"^[0-9a-f]{64}$"


class Source(Section):
    """What every kind of source says about itself."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", description="of its zip in data/raw")
    kind: str
    licence: str = Field(min_length=1, description="SPDX identifier")
    language: str = Field(
        min_length=2, description="code such as en or zh_Hans, `code` for programs, or a path with {language} in it"
    )
    languages: dict[str, str] = Field(default_factory=dict, description="what {language} matched -> language code")
    use: Literal["pretrain", "chat", "eval"]
    format: Literal["auto", "text", "rst", "po", "dialogues"] = Field("auto", description="auto: by the file's name")
    files: list[str] = Field(default=["**"], min_length=1, description="patterns as in .gitignore; `!` takes back")
    sha256: str | None = Field(None, pattern=SHA256, description="of the archive or file")

    @field_validator("language")
    @classmethod
    def _one_place(cls, language: str) -> str:
        if "/" in language and language.count("{language}") != 1:
            raise ValueError("a path pattern must hold {language} exactly once")
        return language

    def language_of(self, path: str) -> str:
        """Language of the file at `path` inside the source; raises `UserError` when the pattern does not fit."""
        if "{language}" not in self.language:
            return self.language
        before, after = (re.escape(part).replace(r"\*", "[^/]*") for part in self.language.split("{language}"))
        found = re.search(f"(?:^|/){before}([^/]+){after}", path)
        if not found:
            raise UserError(
                f"data/sources.yaml: source `{self.name}`: `language` ({self.language}) does not fit the file {path}; "
                f"mend the pattern, or leave such files out of `files`."
            )
        return self.languages.get(found[1], found[1])


class PypiSource(Source):
    """A package on the Python package index, through `pip download`: pip's own configuration and mirrors apply."""

    package: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    version: str = Field(pattern=r"^[0-9][0-9A-Za-z.!+-]*$")
    archive: Literal["sdist", "wheel"]
    sha256: str = Field(pattern=SHA256)

    def obtain(self, cache: Path, params: Fetch) -> Path:
        """The archive, downloaded once; its hash is checked by pip before anything else looks at it."""
        folder = cache / self.sha256
        if not any(folder.glob("*")):
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache, prefix=".pip-") as fresh:
                self._download(Path(fresh), params)
                (file,) = Path(fresh).iterdir()
                file.replace(_claim(folder) / file.name)
        archive = next(folder.iterdir())
        check_sha256(self, archive)
        return archive

    def _download(self, folder: Path, params: Fetch) -> None:
        (folder / "requirements.txt").write_text(f"{self.package}=={self.version} --hash=sha256:{self.sha256}\n")
        choice = "--no-binary" if self.archive == "sdist" else "--only-binary"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--quiet"]
        command += [choice, self.package, "--retries", str(params.retries), "--timeout", str(params.timeout_s)]
        command += ["--require-hashes", "--dest", str(folder), "-r", str(folder / "requirements.txt")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        (folder / "requirements.txt").unlink()
        if done.returncode:
            raise UserError(self._why(done.stderr))

    def _why(self, stderr: str) -> str:
        what = f"source `{self.name}`: {self.package} {self.version} ({self.archive})"
        if got := re.search(r"Got\s+([0-9a-f]{64})", stderr):
            return f"{what} has sha256 {got[1]}, not {self.sha256}: {CHECKSUM_ADVICE}"
        lines = [line for line in stderr.splitlines() if line.startswith("ERROR:")] or stderr.splitlines() or ["?"]
        return f"{what} could not be downloaded ({lines[0].removeprefix('ERROR: ')}); {NETWORK_ADVICE}"


class UrlSource(Source):
    """One file behind http, https or file; a broken download continues where it stopped."""

    url: str = Field(pattern=r"^(https?|file)://")
    sha256: str = Field(pattern=SHA256)

    @property
    def version(self) -> str:
        return self.url

    def obtain(self, cache: Path, params: Fetch) -> Path:
        """The file, downloaded once."""
        folder = cache / self.sha256
        if not any(folder.glob("*")):
            cache.mkdir(parents=True, exist_ok=True)
            part = cache / f"{self.sha256}.part"
            self._download(part, params)
            check_sha256(self, part)
            name = Path(unquote(urlsplit(self.url).path)).name or "download"
            part.replace(_claim(folder) / name)
        file = next(folder.iterdir())
        check_sha256(self, file)
        return file

    def _download(self, part: Path, params: Fetch) -> None:
        if self.url.startswith("file://"):
            self._copy(part)
            return
        attempt = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(params.retries),
            wait=tenacity.wait_exponential_jitter(multiplier=0.5, max=30),
            retry=tenacity.retry_if_exception(_worth_another_try),
            reraise=True,
        )
        try:
            attempt(self._continue, part, params.timeout_s)
        except requests.RequestException as error:
            raise UserError(
                f"source `{self.name}`: {self.url} could not be downloaded ({_short(error)}); {NETWORK_ADVICE}"
            ) from None

    def _copy(self, part: Path) -> None:
        try:
            part.write_bytes(Path(url2pathname(urlsplit(self.url).path)).read_bytes())
        except (FileNotFoundError, IsADirectoryError):
            raise UserError(f"source `{self.name}`: {self.url} is not a file; correct `url`.") from None

    def _continue(self, part: Path, timeout_s: float) -> None:
        """Append what is missing to `part`; a server without ranges sends everything again."""
        have = part.stat().st_size if part.exists() else 0
        headers = (
            {"Range": f"bytes={have}-", "Accept-Encoding": "identity"} if have else {"Accept-Encoding": "identity"}
        )
        with requests.get(self.url, headers=headers, stream=True, timeout=timeout_s) as answer:
            if have and answer.status_code == requests.codes.requested_range_not_satisfiable:
                return
            answer.raise_for_status()
            continues = have > 0 and answer.status_code == requests.codes.partial_content
            total = int(answer.headers.get("Content-Length", 0)) or None
            with part.open("ab" if continues else "wb") as file, progress(self.name, total) as advance:
                for block in answer.iter_content(BLOCK):
                    file.write(block)
                    advance(len(block))


class PathSource(Source):
    """A file or a folder on this disk: txt, md, rst, po, jsonl, parquet, or an archive of them."""

    path: str = Field(min_length=1)

    @property
    def version(self) -> str:
        return self.path

    def obtain(self, cache: Path, params: Fetch) -> Path:
        """The place itself; nothing is copied yet."""
        place = Path(self.path).expanduser()
        if not place.exists():
            raise UserError(f"source `{self.name}`: {self.path} does not exist; correct `path` in data/sources.yaml.")
        if self.sha256 and place.is_dir():
            raise UserError(f"source `{self.name}`: `sha256` is for one file and {self.path} is a folder; remove it.")
        if self.sha256:
            check_sha256(self, place)
        return place


KINDS: dict[str, type[Source]] = {"pypi": PypiSource, "url": UrlSource, "path": PathSource}
CHECKSUM_ADVICE = "the content changed or was damaged; check where it comes from before you correct `sha256`."
NETWORK_ADVICE = "check the network and the entry in data/sources.yaml, and run again; nothing was changed."


class _Listing(Section):
    sources: list[dict[str, object]] = Field(min_length=1)


def load_sources(path: Path) -> list[PypiSource | UrlSource | PathSource]:
    """The checked entries of data/sources.yaml; raises `UserError` with one sentence."""
    entries = checked(_Listing, read_yaml(path), path).sources
    sources = [_entry(path, number, entry) for number, entry in enumerate(entries, start=1)]
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path}: the name `{name}` is used {names.count(name)} times; give each source its own.")
    if not any(source.use == "pretrain" for source in sources):
        raise UserError(f"{path}: no source has `use: pretrain`; there would be nothing to train on, so add one.")
    return sources


def _entry(path: Path, number: int, entry: dict[str, object]) -> PypiSource | UrlSource | PathSource:
    label = f"source `{entry['name']}`" if "name" in entry else f"source number {number}"
    kind = KINDS.get(str(entry.get("kind")))
    if kind is None:
        raise UserError(f"{path}: {label}: `kind` is {entry.get('kind')!r}; choose one of {', '.join(KINDS)}.")
    try:
        return checked(kind, entry, path)
    except UserError as error:
        raise UserError(str(error).replace(f"{path}: ", f"{path}: {label}: ", 1)) from None


def check_sha256(source: Source, file: Path) -> None:
    """Raises `UserError` and forgets a downloaded file when its content is not what was promised."""
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    if digest != source.sha256:
        if source.kind != "path":
            file.unlink()
        raise UserError(f"source `{source.name}` has sha256 {digest}, not {source.sha256}: {CHECKSUM_ADVICE}")


def _claim(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _worth_another_try(error: BaseException) -> bool:
    """Connection trouble and server errors pass; 404 and the like do not."""
    answer = getattr(error, "response", None)
    return isinstance(error, requests.RequestException) and (answer is None or answer.status_code >= 500)


def _short(error: requests.RequestException) -> str:
    if error.response is not None:
        return f"HTTP status {error.response.status_code}"
    return type(error).__name__
