"""Against a server on this machine that answers as the hub does."""

import hashlib
import importlib.util
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from recollect.errors import FetchError
from recollect.models.catalog import HubFile
from recollect.models.fetch import download_from_hub, hub_is_installed
from recollect.types import no_progress

needs_hub = pytest.mark.skipif(not hub_is_installed(), reason="huggingface_hub is not installed")
CONTENT = b"GGUF" + bytes(range(256)) * 4000
PROGRAM = """
import sys; from pathlib import Path
from recollect.errors import FetchError
from recollect.models.catalog import HubFile
from recollect.models.fetch import download_from_hub
seen = []
try:
    file = HubFile("org/repo", sys.argv[1])
    path = download_from_hub(file, Path(sys.argv[2]), lambda *report: seen.append(report))
    print(path)
    print(seen[-1])
except FetchError as error:
    print("FetchError:", error)
"""


class _Hub(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        if not self.path.endswith("/org/repo/resolve/main/a.gguf") and "/a.gguf" not in self.path:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("ETag", f'"{hashlib.sha256(CONTENT).hexdigest()}"')
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        if with_body:
            self.wfile.write(CONTENT)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it
        """Say nothing."""


@pytest.fixture
def hub_address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], str]:
    """Download in a process of its own: the hub's package reads its address once, when imported."""

    def run(address: str, filename: str) -> str:
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        command = [sys.executable, "-c", PROGRAM, filename, str(tmp_path / "out")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
        return done.stdout

    return run


@needs_hub
def test_a_file_is_downloaded_with_progress(
    hub_address: str, download: Callable[[str, str], str]
) -> None:
    path, last = download(hub_address, "a.gguf").splitlines()
    assert Path(path).read_bytes() == CONTENT
    assert last == str(("downloading a.gguf", len(CONTENT), len(CONTENT)))


@needs_hub
@pytest.mark.slow
def test_a_file_that_the_hub_lacks_is_named(
    hub_address: str, download: Callable[[str, str], str]
) -> None:
    assert "FetchError: The model hub has no org/repo:b.gguf" in download(hub_address, "b.gguf")


@needs_hub
def test_a_hub_that_cannot_be_reached_is_said_soon(download: Callable[[str, str], str]) -> None:
    assert "check the network" in download("http://127.0.0.1:9", "a.gguf")


def test_without_the_package_the_remedy_is_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(FetchError, match=r'pip install "recollect-llm\[hub\]"'):
        download_from_hub(HubFile("org/repo", "a.gguf"), tmp_path, no_progress)
