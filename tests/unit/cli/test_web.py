"""`recollect web` and `recollect chat --web`: which server's page is opened."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from typer.testing import CliRunner

from recollect.cli import web as module
from recollect.cli.main import app


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the addresses that a browser is told to open."""
    found: list[str] = []
    monkeypatch.setattr("webbrowser.open", found.append)
    return found


@pytest.fixture
def answers() -> Iterator[tuple[dict[str, bytes], int]]:
    """Return what somebody on this machine answers, and the port."""
    said = {"body": b""}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(said["body"])

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01], daemon=True)
        thread.start()
        yield said, server.server_port
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("command", [["web"], ["chat", "--web", "-m", "reference"]])
def test_the_page_of_a_server_that_runs_is_opened(
    command: list[str],
    answers: tuple[dict[str, bytes], int],
    opened: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said, port = answers
    said["body"] = b'{"name": "recollect", "version": "1"}'
    monkeypatch.setattr(module, "DEFAULT_PORT", port)
    more = ["--port", str(port)] if command == ["web"] else []
    result = CliRunner().invoke(app, [*command, *more])
    assert result.exit_code == 0, result.output
    assert opened == [f"http://127.0.0.1:{port}/"]


@pytest.mark.parametrize("body", [b"Ollama is running", b"[]", b'{"name": "other"}'])
def test_what_is_not_ours_is_not_opened(
    body: bytes, answers: tuple[dict[str, bytes], int], opened: list[str]
) -> None:
    said, port = answers
    said["body"] = body
    assert not module.is_served(f"http://127.0.0.1:{port}/")
    result = CliRunner().invoke(app, ["web", "--port", str(port), "-m", "reference"])
    assert "Cannot listen" in str(result.exception)
    assert opened == []
