"""Against a server on this machine that answers as the hub does."""

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import pytest
from huggingface_hub.utils import WeakFileLock

from recollect.models.catalog import HubFile
from recollect.models.fetch import downloads_folder

SMALL: Final = b"GGUF" + bytes(range(256)) * 4000
LARGE: Final = hashlib.shake_256(b"weights").digest(24_000_000)
"""Several of the pieces in which the hub's package writes, of 10 MiB."""
PROGRAM: Final = """
import sys
from pathlib import Path
from recollect.errors import ChecksumError, FetchError
from recollect.models.catalog import HubFile
from recollect.models.fetch import fetch_hub_file
seen = []
def progress(what, done, total):
    seen.append((what, done, total))
    if sys.argv[3] == "interrupt" and what.startswith("downloading") and done > 11_000_000:
        raise KeyboardInterrupt
try:
    path = fetch_hub_file(HubFile("org/repo", sys.argv[1]), Path(sys.argv[2]), progress)
    print(path)
    print([report for report in seen if report[0].startswith("downloading")][-1:])
except KeyboardInterrupt:
    print("interrupted")
except ChecksumError as error:
    print("ChecksumError:", error)
    print(error.kept)
except FetchError as error:
    print("FetchError:", error)
"""


@dataclass
class Hub:
    """What the server has and does, and what it was asked."""

    files: dict[str, bytes] = field(default_factory=dict)
    in_git: set[str] = field(default_factory=set)
    error: str | None = None
    """The code of what is wrong with the repository."""
    cut_at: int | None = None
    """Of the next body so many bytes are sent, and the connection is closed."""
    takes_ranges: bool = True
    more: bytes = b""
    """What bodies have behind the file."""
    size: int | None = None
    """What is said in place of a file's own size."""
    gets: list[str] = field(default_factory=list)
    """The ranges that bodies were asked for."""
    address: str = ""


class _Server(ThreadingHTTPServer):
    hub: Hub


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        hub = self.server.hub
        path = self.path.partition("?")[0]
        if hub.error is not None:
            status = 401 if hub.error == "RepoNotFound" else 403
            return self._say(status, {"X-Error-Code": hub.error})
        if path == "/api/models/org/repo/tree/main":
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                for name, data in hub.files.items()
            ]
            return self._say(200, {"Content-Type": "application/json"}, json.dumps(tree).encode())
        found = re.fullmatch(r"(/cdn|/org/repo/resolve/\w+)/(.*)", path)
        name = found[2] if found else ""
        if found is None or name not in hub.files:
            return self._say(404, {"X-Error-Code": "EntryNotFound"})
        data = hub.files[name]
        if found[1] == "/cdn":
            return self._send(data, with_body=with_body)
        return self._resolve(name, data, with_body=with_body)

    def _resolve(self, name: str, data: bytes, *, with_body: bool) -> None:
        hub = self.server.hub
        commit = {"X-Repo-Commit": "a" * 40}
        if name in hub.in_git:
            oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()  # noqa: S324 - git's
            if with_body:
                return self._send(data, with_body=True)
            return self._say(200, commit | {"ETag": f'"{oid}"', "Content-Length": str(len(data))})
        linked = {
            "X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Linked-Size": str(len(data) if hub.size is None else hub.size),
            # Another host, as the hub's files lie on one.
            "Location": f"{hub.address.replace('127.0.0.1', 'localhost')}/cdn/{name}",
        }
        return self._say(302, commit | linked)

    def _send(self, data: bytes, *, with_body: bool) -> None:
        hub = self.server.hub
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked and hub.takes_ranges else 0
        if with_body:
            hub.gets.append(self.headers.get("Range", "all"))
        self.send_response(206 if start else 200)
        data += hub.more
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if with_body:
            end, hub.cut_at = hub.cut_at, None
            with contextlib.suppress(ConnectionError):  # who asked has been interrupted
                self.wfile.write(data[start:end])
            if end is not None:
                self.close_connection = True

    def _say(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it
        """Say nothing."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = _Server(("127.0.0.1", 0), _Handler)
    server.hub = Hub(address=f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, args=[0.01])
    thread.start()
    yield server.hub
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def fetch(
    hub: Hub, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[str]]:
    """Fetch in a process of its own: the hub's package reads its address once, when imported."""

    def run(filename: str, how: str = "", address: str | None = None) -> list[str]:
        monkeypatch.setenv("HF_ENDPOINT", address or hub.address)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        command = [sys.executable, "-c", PROGRAM, filename, str(home), how]
        done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
        return done.stdout.splitlines()

    return run


def left(home: Path) -> dict[str, int]:
    """Return the size of each file in the folder of downloads, by its name."""
    folder = downloads_folder(HubFile("org/repo", "a.gguf"), home)
    return {path.name: path.stat().st_size for path in folder.glob("*") if path.suffix != ".lock"}


Fetch = Callable[..., list[str]]


@pytest.mark.slow
def test_a_file_is_downloaded_with_progress_and_checked(hub: Hub, fetch: Fetch) -> None:
    hub.files["a.gguf"] = SMALL
    path, last = fetch("a.gguf")
    assert Path(path).read_bytes() == SMALL
    assert last == str([("downloading a.gguf", len(SMALL), len(SMALL))])


@pytest.mark.slow
def test_a_file_that_lies_in_git_is_checked_by_what_git_calls_it(hub: Hub, fetch: Fetch) -> None:
    hub.files["a.gguf"], hub.in_git = SMALL, {"a.gguf"}
    path, _ = fetch("a.gguf")
    assert Path(path).read_bytes() == SMALL


@pytest.mark.slow
def test_an_interrupted_download_goes_on_where_it_ended(hub: Hub, home: Path, fetch: Fetch) -> None:
    hub.files["a.gguf"] = LARGE
    assert fetch("a.gguf", "interrupt") == ["interrupted"]
    ((name, have),) = left(home).items()
    assert name.endswith(".part")
    assert 0 < have < len(LARGE)
    path, last = fetch("a.gguf")
    assert hub.gets == ["all", f"bytes={have}-"]
    assert Path(path).read_bytes() == LARGE
    assert last == str([("downloading a.gguf", len(LARGE), len(LARGE))])
    assert left(home) == {"a.gguf": len(LARGE)}


@pytest.mark.slow
def test_what_is_whole_is_not_downloaded_again(hub: Hub, fetch: Fetch) -> None:
    hub.files["a.gguf"] = SMALL
    for _ in range(2):
        path, *_ = fetch("a.gguf")
        assert Path(path).read_bytes() == SMALL
    assert hub.gets == ["all"]


@pytest.mark.slow
def test_a_connection_that_is_cut_is_gone_on_with_at_once(hub: Hub, fetch: Fetch) -> None:
    hub.files["a.gguf"], hub.cut_at = LARGE, 15_000_000
    path, _ = fetch("a.gguf")
    assert Path(path).read_bytes() == LARGE
    assert len(hub.gets) == 2
    assert hub.gets[1].startswith("bytes=")


@pytest.mark.slow
def test_a_server_that_knows_no_ranges_sends_all_again(hub: Hub, home: Path, fetch: Fetch) -> None:
    hub.files["a.gguf"], hub.takes_ranges = LARGE, False
    assert fetch("a.gguf", "interrupt") == ["interrupted"]
    path, _ = fetch("a.gguf")
    assert Path(path).read_bytes() == LARGE


@pytest.mark.slow
def test_a_server_that_sends_more_than_it_says_does_not_fill_the_disk(
    hub: Hub, home: Path, fetch: Fetch
) -> None:
    hub.files["a.gguf"], hub.more = LARGE, LARGE
    (error,) = fetch("a.gguf")
    assert f"sends more of org/repo:a.gguf than the {len(LARGE):,} bytes that it names" in error
    assert sum(left(home).values()) <= len(LARGE)
    hub.more = b""
    path, _ = fetch("a.gguf")
    assert Path(path).read_bytes() == LARGE


@pytest.mark.slow
@pytest.mark.parametrize("off", [-1000, 1000])
def test_a_server_that_says_a_wrong_size_is_told_in_a_sentence(
    hub: Hub, home: Path, fetch: Fetch, off: int
) -> None:
    hub.files["a.gguf"], hub.size = LARGE, len(LARGE) + off
    (error,) = fetch("a.gguf")
    assert error.startswith("FetchError: ")
    assert f"{len(LARGE) + off:,}" in error or f"{len(LARGE) + off}" in error
    hub.size = None
    path, _ = fetch("a.gguf")
    assert Path(path).read_bytes() == LARGE


@pytest.mark.slow
def test_a_size_that_is_none_is_left_out(hub: Hub, fetch: Fetch) -> None:
    hub.files["a.gguf"], hub.size = SMALL, -5
    path, _ = fetch("a.gguf")
    assert Path(path).read_bytes() == SMALL


@pytest.mark.slow
def test_another_file_under_the_name_is_not_gone_on_with(
    hub: Hub, home: Path, fetch: Fetch
) -> None:
    hub.files["a.gguf"] = LARGE
    fetch("a.gguf", "interrupt")
    hub.files["a.gguf"] = SMALL
    path, _ = fetch("a.gguf")
    assert Path(path).read_bytes() == SMALL
    assert hub.gets == ["all", "all"]


@pytest.mark.slow
def test_a_wrong_byte_is_found_and_the_file_set_aside(hub: Hub, home: Path, fetch: Fetch) -> None:
    hub.files["a.gguf"] = LARGE
    fetch("a.gguf", "interrupt")
    (part,) = (downloads_folder(HubFile("org/repo", "a.gguf"), home)).glob("*.part")
    content = bytearray(part.read_bytes())
    content[5] ^= 1
    part.write_bytes(content)
    error, kept = fetch("a.gguf")
    assert error.startswith("ChecksumError: The download of org/repo:a.gguf is not the file that")
    assert Path(kept).stat().st_size == len(LARGE)
    assert left(home) == {}
    path, _ = fetch("a.gguf")
    assert Path(path).read_bytes() == LARGE


@pytest.mark.slow
def test_only_the_last_wrong_file_is_kept(hub: Hub, home: Path, fetch: Fetch) -> None:
    hub.files["a.gguf"] = SMALL
    digest = hashlib.sha256(SMALL).hexdigest()
    folder = downloads_folder(HubFile("org/repo", "a.gguf"), home)
    for number in range(2):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"a.gguf.{digest[:16]}.part").write_bytes(bytes([number]) * len(SMALL))
        _, kept = fetch("a.gguf")
        assert list((home / "rejected").iterdir()) == [Path(kept)]


@pytest.mark.slow
def test_a_file_that_is_not_there_names_those_that_are(hub: Hub, fetch: Fetch) -> None:
    hub.files |= {f"q/model-{n:02}.gguf": b"" for n in range(14)} | {"README.md": b""}
    (error,) = fetch("b.gguf")
    assert error.startswith(
        "FetchError: The model hub has no org/repo:b.gguf: name one of q/model-00.gguf, "
    )
    assert error.endswith("q/model-11.gguf, or 2 more.")
    hub.files = {"README.md": b""}
    assert "org/repo holds no GGUF file" in fetch("b.gguf")[0]


@pytest.mark.slow
def test_a_gated_repository_says_where_to_ask(hub: Hub, fetch: Fetch) -> None:
    hub.files["a.gguf"], hub.error = SMALL, "GatedRepo"
    (error,) = fetch("a.gguf")
    assert "is gated: ask for access at https://huggingface.co/org/repo" in error
    assert "`hf auth login`" in error


@pytest.mark.slow
def test_a_repository_that_is_not_there_is_said(hub: Hub, fetch: Fetch) -> None:
    hub.error = "RepoNotFound"
    assert "The model hub has no repository org/repo, or not for you" in fetch("a.gguf")[0]


@pytest.mark.slow
def test_without_a_network_one_sentence_says_so_soon(home: Path, fetch: Fetch) -> None:
    begun = time.monotonic()
    (error,) = fetch("a.gguf", address="http://127.0.0.1:9")
    assert re.fullmatch(r"FetchError: org/repo:a\.gguf could not be downloaded .*path\.", error)
    assert "check the network" in error
    assert time.monotonic() - begun < 20
    assert left(home) == {}


@pytest.mark.slow
def test_two_processes_do_not_write_one_file(hub: Hub, home: Path, fetch: Fetch) -> None:
    hub.files["a.gguf"] = SMALL
    folder = downloads_folder(HubFile("org/repo", "a.gguf"), home)
    folder.mkdir(parents=True)
    with WeakFileLock(folder / "a.gguf.lock"):
        (error,) = fetch("a.gguf")
    assert "is being downloaded by another process: wait until it is done" in error
    assert len(fetch("a.gguf")) == 2


@pytest.mark.slow
def test_what_nobody_went_on_with_is_deleted(hub: Hub, home: Path, fetch: Fetch) -> None:
    hub.files["a.gguf"] = SMALL
    old, new = home / "downloads" / "old", home / "downloads" / "new"
    for folder in (old, new):
        folder.mkdir(parents=True)
        (folder / "x.part").touch()
    month_ago = time.time() - 31 * 24 * 3600
    for path in (old / "x.part", old):
        os.utime(path, (month_ago, month_ago))
    fetch("a.gguf")
    assert not old.exists()
    assert new.exists()


@pytest.mark.slow
def test_recollect_pull_goes_on_and_converts(
    hub: Hub,
    home: Path,
    fetch: Fetch,
    make_gguf: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub.files["a.gguf"] = make_gguf().read_bytes()
    fetch("a.gguf")
    monkeypatch.setenv("RECOLLECT_HOME", str(home))
    command = [sys.executable, "-m", "recollect", "pull", "org/repo:a.gguf"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    assert (done.returncode, done.stderr.count("\n")) == (0, 1), done.stderr
    assert done.stdout.startswith("org/repo:a.gguf is ready in ")
    assert hub.gets == ["all"]
    assert left(home) == {}
    (kept,) = (home / "sources").glob("*/a.gguf")
    assert kept.read_bytes() == hub.files["a.gguf"]
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    again: Any = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    assert (again.returncode, again.stderr) == (0, ""), "what is here needs no network"


@pytest.mark.slow
def test_to_pull_a_repository_names_its_files(
    hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.files |= {"a-Q4_K_M.gguf": SMALL, "b.gguf": SMALL, "README.md": b""}
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    monkeypatch.setenv("RECOLLECT_HOME", str(home))
    for more, said in (
        ([], "org/repo:FILE: name one of a-Q4_K_M.gguf, b.gguf."),
        (["--offline"], "name a file of the hub's repository as org/repo:file.gguf."),
    ):
        command = [sys.executable, "-m", "recollect", "pull", "org/repo", *more]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        assert done.returncode == 2
        assert done.stderr.strip().endswith(said)
