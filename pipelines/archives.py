"""Take files out of an archive, a folder or a single file, without trusting it, into one archive of our own.

One file a source instead of thousands: DVC and object stores count files. It is a zip without compression, whose bytes
depend on names and contents alone.

Refused, with one sentence and nothing left behind: paths that lead outside, links and devices among the chosen files,
archives that unpack to more than the limit, damaged archives. Modes and owners are not taken over.
"""

from __future__ import annotations

import errno
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

import pathspec

from pipelines.params import UserError

BLOCK = 1 << 20
MAX_ENTRIES = 1_000_000
NO_TIME = (1980, 1, 1, 0, 0, 0)  # the first that a zip can name


@dataclass(frozen=True)
class Entry:
    """One member: its name in the archive, its unpacked size in bytes, whether it is a regular file."""

    name: str
    size: int
    regular: bool
    directory: bool


class Archive(Protocol):
    """What tar and zip have in common."""

    def entries(self) -> Iterator[Entry]: ...
    def open(self, name: str) -> IO[bytes]: ...
    def close(self) -> None: ...


class _Tar:
    def __init__(self, path: Path) -> None:
        self.tar = tarfile.open(path)  # noqa: SIM115  closed by its owner
        self.members: dict[str, tarfile.TarInfo] = {}  # `getmember` would search through all of them

    def entries(self) -> Iterator[Entry]:
        for member in self.tar:
            self.members[member.name] = member
            yield Entry(member.name, member.size, member.isreg(), member.isdir())

    def open(self, name: str) -> IO[bytes]:
        opened = self.tar.extractfile(self.members[name])
        assert opened is not None, "only regular files are opened"
        return opened

    def close(self) -> None:
        self.tar.close()


class _Zip:
    def __init__(self, path: Path) -> None:
        self.zip = zipfile.ZipFile(path)

    def entries(self) -> Iterator[Entry]:
        for info in self.zip.infolist():
            kind = info.external_attr >> 28  # the file type of a Unix mode: 8 regular, 4 folder, 0 not stated
            yield Entry(info.filename, info.file_size, kind in (0, 8) and not info.is_dir(), info.is_dir())

    def open(self, name: str) -> IO[bytes]:
        return self.zip.open(name)

    def close(self) -> None:
        self.zip.close()


def take(place: Path, patterns: list[str], target: Path, max_bytes: int) -> list[str]:
    """Copy the files that match `patterns` from `place` into the new zip `target`; returns their paths in it, sorted.

    place: a folder, a tar or zip archive, or one file of text. A folder that holds everything in an archive is
    dropped from the paths. patterns: as in .gitignore. Raises `UserError`.
    """
    chosen = pathspec.PathSpec.from_lines("gitignore", patterns)
    with zipfile.ZipFile(target, "w") as packed:
        if place.is_dir():
            _take_from_folder(place, chosen, packed, max_bytes)
        else:
            _take_from_file(place, chosen, packed, max_bytes)
        return sorted(packed.namelist())


def _take_from_file(place: Path, chosen: pathspec.PathSpec, packed: zipfile.ZipFile, max_bytes: int) -> None:
    try:
        archive = _open(place)
        if archive is None:
            _copy(place.open("rb"), packed, place.name, max_bytes, place.name)
            return
        with closing(archive):
            _take_from_archive(archive, chosen, packed, max_bytes, place.name)
    except UserError:
        raise
    except Exception as error:  # the libraries raise errors of many kinds for a damaged archive
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise  # the system's own: a full disk, no permission
        raise UserError(f"the archive {place.name} is damaged or protected ({error}); fetch it again.") from None


def _open(path: Path) -> Archive | None:
    if zipfile.is_zipfile(path):
        return _Zip(path)
    if tarfile.is_tarfile(path):
        return _Tar(path)
    if path.suffix in {".gz", ".tgz", ".bz2", ".xz", ".tar", ".zip", ".whl"}:
        raise UserError(
            f"{path.name} is damaged or not an archive of files; fetch it again, or unpack it where it is one file."
        )
    return None


def _take_from_archive(
    archive: Archive, chosen: pathspec.PathSpec, packed: zipfile.ZipFile, max_bytes: int, label: str
) -> None:
    entries = {entry.name: entry for entry in _checked_entries(archive, max_bytes, label)}  # of equal names the last
    top = _common_folder([entry.name for entry in entries.values() if not entry.directory])
    room = max_bytes
    for entry in entries.values():
        path = entry.name[len(top) :]
        if entry.directory or not chosen.match_file(path):
            continue
        if not entry.regular:
            raise UserError(f"the archive {label} holds a link or device ({entry.name}); take it out of `files`.")
        with archive.open(entry.name) as opened:
            room -= _copy(opened, packed, path, room, label)


def _checked_entries(archive: Archive, max_bytes: int, label: str) -> Iterator[Entry]:
    """Every member, its path proven to stay inside; stops at the first excess."""
    total = 0
    for number, entry in enumerate(archive.entries()):
        path = PurePosixPath(entry.name)
        outside = (
            path.is_absolute()
            or ".." in path.parts
            or "\\" in entry.name
            or "\0" in entry.name
            or ":" in path.parts[:1]
        )
        if outside or (len(entry.name) > 1 and entry.name[1] == ":"):
            raise UserError(f"the archive {label} holds a path that leads outside ({entry.name}); do not use it.")
        total += entry.size
        if total > max_bytes or number >= MAX_ENTRIES:
            raise _too_big(label, max_bytes)
        if path.parts:
            yield Entry(str(path), entry.size, entry.regular, entry.directory)


def _common_folder(names: list[str]) -> str:
    """`django-5.2/` when everything lies below it, else the empty string."""
    tops = {name.split("/", 1)[0] for name in names}
    return f"{tops.pop()}/" if len(tops) == 1 and all("/" in name for name in names) else ""


def _take_from_folder(folder: Path, chosen: pathspec.PathSpec, packed: zipfile.ZipFile, max_bytes: int) -> None:
    room = max_bytes
    for file in sorted(folder.rglob("*")):
        path = file.relative_to(folder).as_posix()
        if file.is_file() and not file.is_symlink() and chosen.match_file(path):
            room -= _copy(file.open("rb"), packed, path, room, folder.name)


def _copy(source: IO[bytes], packed: zipfile.ZipFile, path: str, room: int, label: str) -> int:
    """Copy at most `room` bytes, whatever the archive claims; returns how many."""
    try:
        path.encode()
    except UnicodeEncodeError:
        source.close()
        sentence = f"{label} holds a file whose name is not UTF-8 ({path!a}); rename it or take it out of `files`."
        raise UserError(sentence) from None
    copied = 0
    with source, packed.open(zipfile.ZipInfo(path, NO_TIME), "w", force_zip64=True) as file:
        while block := source.read(BLOCK):
            copied += len(block)
            if copied > room:
                raise _too_big(label, room)
            file.write(block)
    return copied


def _too_big(label: str, max_bytes: int) -> UserError:
    return UserError(
        f"{label} unpacks to more than the limit of {max_bytes / 2**20:,.0f} MiB; if you trust it, raise "
        f"`fetch.max_unpacked_mib` in params.yaml."
    )
