"""Downloads that break, checksums that lie, archives that attack: one sentence each, nothing left behind."""

import hashlib
import http.server
import io
import json
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.fetch import fetch
from pipelines.params import Fetch, UserError
from pipelines.sources import load_sources

PARAMS = Fetch(timeout_s=5, retries=3, max_unpacked_mib=1)
CONTENT = bytes(range(256)) * 4096  # 1 MiB


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Flaky(http.server.BaseHTTPRequestHandler):
    """CONTENT with ranges; the first answer breaks off; /down fails, /gone is absent, /whole has no ranges"""

    requests: list[tuple[str, str | None]] = []

    def do_GET(self) -> None:
        first = not any(path == self.path for path, _ in self.requests)
        asked = self.headers.get("Range")
        self.requests.append((self.path, asked))
        if self.path == "/down":
            self.send_error(503)
            return
        if self.path == "/gone":
            self.send_error(404)
            return
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.path != "/whole" else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        self.wfile.write(CONTENT[start : len(CONTENT) // 2] if first else CONTENT[start:])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Flaky.requests = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Flaky) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()


def sources(folder: Path, **entry: object) -> Path:
    common = {"name": "mine", "licence": "CC0-1.0", "language": "en", "use": "pretrain"}
    (folder / "sources.yaml").write_text(json.dumps({"sources": [common | entry]}))
    return folder / "sources.yaml"


def get(folder: Path, **entry: object) -> dict:
    return fetch(PARAMS, sources(folder, **entry), folder / "raw", folder / "cache")


def taken(folder: Path, path: str) -> bytes:
    return zipfile.Path(folder / "raw/mine.zip", path).read_bytes()


@pytest.mark.parametrize("path", ["/ranges.bin", "/whole"])
def test_a_broken_download_is_completed(tmp_path: Path, server: str, path: str) -> None:
    get(tmp_path, kind="url", url=server + path, sha256=sha256(CONTENT))
    assert taken(tmp_path, path[1:]) == CONTENT
    first = (tmp_path / "raw/mine.zip").read_bytes()
    assert [asked for _, asked in Flaky.requests] == [None, f"bytes={len(CONTENT) // 2}-"]
    get(tmp_path, kind="url", url=server + path, sha256=sha256(CONTENT))
    assert len(Flaky.requests) == 2, "a second fetch takes the kept download"
    assert (tmp_path / "raw/mine.zip").read_bytes() == first, "equal sources give equal bytes, whatever the time"


def test_a_server_that_is_down_is_retried_and_named(tmp_path: Path, server: str) -> None:
    with pytest.raises(UserError, match=r"`mine`.*could not be downloaded \(HTTP status 503\); check the network"):
        get(tmp_path, kind="url", url=server + "/down", sha256=sha256(CONTENT))
    assert len(Flaky.requests) == 3
    with pytest.raises(UserError, match="HTTP status 404"):
        get(tmp_path, kind="url", url=server + "/gone", sha256=sha256(CONTENT))
    assert len(Flaky.requests) == 4, "what is not there is not asked for again"


def test_a_wrong_checksum_stops_and_the_old_output_stays(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("good text")
    address = (tmp_path / "text.txt").as_uri()
    get(tmp_path, kind="url", url=address, sha256=sha256(b"good text"))
    (tmp_path / "text.txt").write_text("changed")
    with pytest.raises(UserError, match=f"sha256 {sha256(b'changed')}, not {'0' * 64}"):
        get(tmp_path, kind="url", url=address, sha256="0" * 64)
    assert taken(tmp_path, "text.txt") == b"good text"
    assert not list((tmp_path / "cache").glob("*.part")) and not list(tmp_path.glob(".raw*"))


def wheel(folder: Path, text: str) -> Path:
    """A real, if small, wheel."""
    path = folder / "corpus_of_mine-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("corpus_of_mine/text.txt", text)
        archive.writestr(
            "corpus_of_mine-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: corpus-of-mine\nVersion: 1.0\n"
        )
        archive.writestr("corpus_of_mine-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("corpus_of_mine-1.0.dist-info/RECORD", "")
    return path


def test_pypi_goes_through_pip_and_its_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = wheel(tmp_path, "hello")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    entry = {"kind": "pypi", "package": "corpus-of-mine", "version": "1.0", "archive": "wheel", "files": ["*.txt"]}
    get(tmp_path, **entry, sha256=sha256(path.read_bytes()))
    assert taken(tmp_path, "corpus_of_mine/text.txt") == b"hello"
    with pytest.raises(UserError, match="has sha256 .*, not 000"):
        get(tmp_path, **entry, sha256="0" * 64)
    with pytest.raises(UserError, match="corpus-of-mine 2.0 .*could not be downloaded"):
        get(tmp_path, **entry | {"version": "2.0"}, sha256="1" * 64)
    assert taken(tmp_path, "corpus_of_mine/text.txt") == b"hello"


def tar(path: Path, *members: tuple[str, bytes | str]) -> Path:
    """bytes: a file; str: a symbolic link to it."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        ([("../../outside.txt", b"x")], "leads outside"),
        ([("/etc/outside.txt", b"x")], "leads outside"),
        ([("a\\..\\outside.txt", b"x")], "leads outside"),
        ([("C:/outside.txt", b"x")], "leads outside"),
        ([("top/link.txt", "/etc/passwd")], "link or device"),
        ([("top/zeros.txt", bytes(5 << 20))], "more than the limit of 1 MiB"),
        ([(f"top/{n}.txt", bytes(300 << 10)) for n in range(5)], "more than the limit of 1 MiB"),
    ],
)
def test_hostile_archives_are_refused(tmp_path: Path, members: list, sentence: str) -> None:
    path = tar(tmp_path / "bad.tar.gz", *members)
    with pytest.raises(UserError, match=sentence):
        get(tmp_path, kind="path", path=str(path))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bad.tar.gz", "sources.yaml"]


def test_a_zip_that_lies_about_its_size_is_stopped_while_unpacking(tmp_path: Path) -> None:
    path = tmp_path / "liar.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros.txt", bytes(3 << 20))
    lie = path.read_bytes().replace((3 << 20).to_bytes(4, "little"), (9).to_bytes(4, "little"))
    path.write_bytes(lie)
    with pytest.raises(UserError):
        get(tmp_path, kind="path", path=str(path))
    assert not (tmp_path / "raw").exists()


def test_a_truncated_archive_is_called_damaged(tmp_path: Path) -> None:
    random = hashlib.shake_128(b"seed").digest(400_000)
    content = tar(tmp_path / "cut.tar.gz", ("top/a.txt", random)).read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cut.tar.gz is damaged"):
        get(tmp_path, kind="path", path=str(tmp_path / "cut.tar.gz"))
    (tmp_path / "cut.tar.gz").write_bytes(b"not an archive")
    with pytest.raises(UserError, match="cut.tar.gz is damaged or not an archive of files; .* unpack it"):
        get(tmp_path, kind="path", path=str(tmp_path / "cut.tar.gz"))


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_garbled_archive_is_called_damaged(tmp_path: Path, method: int) -> None:
    with zipfile.ZipFile(tmp_path / "bad.zip", "w", method) as archive:
        archive.writestr("a.txt", b"hello " * 99)
    content = bytearray((tmp_path / "bad.zip").read_bytes())
    content[39:60] = b"\xff" * 21  # behind the header of LZMA's own
    (tmp_path / "bad.zip").write_bytes(content)
    with pytest.raises(UserError, match="bad.zip is damaged"):
        get(tmp_path, kind="path", path=str(tmp_path / "bad.zip"))


def test_a_name_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tar(tmp_path / "latin.tar.gz", ("caf\udce9.txt", b"x"), ("b.txt", b"b"))
    with pytest.raises(UserError, match=r"latin.tar.gz holds a file whose name is not UTF-8 \('caf.udce9.txt'\)"):
        get(tmp_path, kind="path", path=str(path))
    get(tmp_path, kind="path", path=str(path), files=["b.txt"])


def test_patterns_choose_and_the_common_folder_goes(tmp_path: Path) -> None:
    twice = [("top/docs/a.txt", b"a first time"), ("top/docs/a.txt", b"a")]
    path = tar(tmp_path / "good.tar.gz", *twice, ("top/docs/skip/b.txt", b"b"), ("top/c.py", b"c"))
    get(tmp_path, kind="path", path=str(path), files=["docs/**", "!docs/skip/"])
    assert taken(tmp_path, "docs/a.txt") == b"a", "of members of one name the last counts, as in tar"
    manifest = json.loads((tmp_path / "raw/manifest.json").read_text())
    assert manifest["sources"][0]["files"] == [{"language": "en", "path": "docs/a.txt"}]
    with pytest.raises(UserError, match="no file matches"):
        get(tmp_path, kind="path", path=str(path), files=["*.rst"])


def test_the_page_of_the_own_folder_is_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("README.md", "page.md", "more/README.md"):
        (tmp_path / "data/own" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data/own" / name).write_text(name)
    entry = GOOD | {"path": "data/own", "files": ["*.md"]}
    Path("sources.yaml").write_text(json.dumps({"sources": [entry]}))
    fetch(PARAMS, Path("sources.yaml"), tmp_path / "raw", tmp_path / "cache")
    with zipfile.ZipFile(tmp_path / "raw" / f"{GOOD['name']}.zip") as packed:
        assert packed.namelist() == ["more/README.md", "page.md"]


def test_the_language_comes_from_the_path(tmp_path: Path) -> None:
    for name in ("locale/de/x.txt", "locale/german/y.txt"):
        (tmp_path / "own" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "own" / name).write_text("Text")
    entry = {"kind": "path", "path": str(tmp_path / "own"), "language": "locale/{language}/"}
    get(tmp_path, **entry, languages={"german": "de"})
    files = json.loads((tmp_path / "raw/manifest.json").read_text())["sources"][0]["files"]
    assert {file["language"] for file in files} == {"de"}
    with pytest.raises(UserError, match="does not fit the file"):
        get(tmp_path, **entry | {"language": "other/{language}/"})


GOOD = {"name": "a", "kind": "path", "path": "x", "licence": "MIT", "language": "en", "use": "pretrain"}
PYPI = {"name": "a", "kind": "pypi", "licence": "MIT", "language": "en", "use": "pretrain", "package": "p"}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"sources": []}, "`sources`"),
        ({"source": [GOOD]}, "did you mean `sources`"),
        ({"sources": [GOOD | {"kind": "ftp"}]}, "source `a`: `kind` is 'ftp'; choose one of pypi, url, path"),
        ({"sources": [GOOD | {"licens": "MIT"}]}, "source `a`: `licens` is not a known key; did you mean `licence`"),
        ({"sources": [{**GOOD, "use": "train"}]}, "source `a`: `use` is 'train'"),
        ({"sources": [GOOD, GOOD]}, "name `a` is used 2 times"),
        ({"sources": [GOOD | {"use": "chat"}]}, "no source has `use: pretrain`"),
        ({"sources": [{k: v for k, v in GOOD.items() if k != "licence"}]}, "`licence` is missing"),
        ({"sources": [GOOD | {"name": "../up"}]}, "`name`"),
        ({"sources": [PYPI | {"version": 1.0, "archive": "wheel", "sha256": "0" * 64}]}, "`version` is 1.0"),
        ({"sources": [PYPI | {"version": "1.0", "archive": "wheel", "sha256": "abc"}]}, "`sha256` is 'abc'"),
        ({"sources": [GOOD | {"language": "a/{language}/b/{language}"}]}, "exactly once"),
        ([1, 2], "must be a section of keys"),
    ],
)
def test_broken_source_lists(tmp_path: Path, content: object, sentence: str) -> None:
    (tmp_path / "sources.yaml").write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        load_sources(tmp_path / "sources.yaml")
    assert sentence in str(caught.value) and str(caught.value).count("\n") == 0


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist; correct `path`"):
        get(tmp_path, kind="path", path=str(tmp_path / "nowhere"))
