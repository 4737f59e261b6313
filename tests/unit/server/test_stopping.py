"""Ctrl-C ends a server in words: what it waits for, a last event for clients, and no traceback."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")

SCRIPT: Final = Path(__file__).with_name("stopping_server.py")


class Server:
    """A server in a process of its own."""

    def __init__(self, home: Path, load_s: float) -> None:
        environment = {
            **os.environ,
            "RECOLLECT_HOME": str(home),
            "STOPPING_LOAD_S": str(load_s),
            "PYTHONUTF8": "1",
        }
        environment.pop("RECOLLECT_API_KEY", None)
        self.process = subprocess.Popen(  # noqa: S603 - our own interpreter and script
            [sys.executable, str(SCRIPT)], env=environment, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stderr is not None
        first = self.process.stderr.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", first)
        assert found is not None, first + self.process.communicate()[1]
        self.client = httpx.Client(base_url=found[0], timeout=60, trust_env=False)

    def interrupt(self) -> None:
        """Send what Ctrl-C sends."""
        self.process.send_signal(signal.SIGINT)

    def wait_for(self, text: str) -> str:
        """Return what is said till a line that has this text."""
        assert self.process.stderr is not None
        lines = []
        for line in self.process.stderr:
            lines.append(line)
            if text in line:
                break
        return "".join(lines)

    def end(self) -> str:
        """Wait for the end; return what was said on the way."""
        _, said = self.process.communicate(timeout=60)
        return said


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Return what starts a server; it is killed where a test fails."""
    with ExitStack() as stack:

        def start(*, load_s: float = 0) -> Server:
            server = Server(tmp_path / "home", load_s)
            stack.callback(server.client.close)
            stack.callback(server.process.kill)
            return server

        yield start


class Stream(threading.Thread):
    """Reads a long reply."""

    def __init__(self, client: httpx.Client, path: str, body: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self.lines: list[str] = []
        self.failure: Exception | None = None
        self.begun = threading.Event()
        self.ended_at = 0.0
        self._client, self._path, self._body = client, path, body
        self.start()
        assert self.begun.wait(60), self.failure

    def run(self) -> None:
        """Read till the end."""
        try:
            with self._client.stream("POST", self._path, json=self._body) as response:
                for line in response.iter_lines():
                    if line.startswith("data: "):
                        self.lines.append(line.removeprefix("data: "))
                        self.begun.set()
        except httpx.HTTPError as error:
            self.failure = error
            self.begun.set()
        self.ended_at = time.monotonic()


LONG: Final = {"stream": True, "ignore_eos": True, "max_tokens": 4000}
SAID: Final = [{"role": "user", "content": "Hello"}]


@pytest.mark.slow
def test_a_second_ctrl_c_ends_a_stream_with_a_last_event(start: Callable[..., Server]) -> None:
    server = start()
    stream = Stream(server.client, "/v1/chat/completions", {**LONG, "messages": SAID})
    server.interrupt()
    said = server.wait_for("Stopping")
    assert "Stopping: waiting up to 10 s for 1 reply; Ctrl-C again ends it now." in said
    begun = time.monotonic()
    server.interrupt()
    said = server.end()
    assert {line.split()[2] for line in said.splitlines()} == {"INFO"}
    assert server.process.returncode == 0
    stream.join(60)
    assert stream.failure is None
    assert stream.ended_at - begun < 8  # far less than the 10 s that replies are given
    assert json.loads(stream.lines[-1])["error"]["code"] == "server_stopping"


@pytest.mark.slow
def test_after_ten_seconds_replies_end_with_a_last_event(start: Callable[..., Server]) -> None:
    server = start()
    streams = [
        Stream(server.client, "/v1/chat/completions", {**LONG, "messages": SAID}),
        Stream(server.client, "/v1/completions", {**LONG, "prompt": "Hello"}),
    ]
    server.interrupt()
    said = server.end()
    assert "Stopping: waiting up to 10 s for 2 replies; Ctrl-C again ends them now." in said
    assert "Traceback" not in said
    assert "Error" not in said
    assert server.process.returncode == 0
    for stream in streams:
        stream.join(60)
        assert stream.failure is None
        assert "error" in json.loads(stream.lines[-1])


@pytest.mark.slow
def test_ctrl_c_while_the_model_loads_ends_at_once(start: Callable[..., Server]) -> None:
    server = start(load_s=300)
    server.interrupt()
    said = server.end()
    # The address of the page may have been told by then.
    lines = [line for line in said.splitlines() if line and "as trees: http" not in line]
    assert lines == ["Stopping."]
    assert server.process.returncode == 0


@pytest.mark.slow
def test_a_request_that_waits_for_the_model_is_answered(start: Callable[..., Server]) -> None:
    server = start(load_s=300)
    answers: list[httpx.Response] = []

    def ask() -> None:
        answers.append(server.client.post("/v1/chat/completions", json={"messages": SAID}))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    while not re.search(r"_running\S* 1\b", server.client.get("/metrics").text):
        time.sleep(0.05)
    server.interrupt()
    said = server.wait_for("Stopping")
    server.interrupt()
    said += server.end()
    asking.join(60)
    assert "Stopping: waiting up to 10 s for 1 reply; Ctrl-C again ends it now." in said
    assert "Traceback" not in said
    assert [answer.status_code for answer in answers] == [503]


@pytest.mark.slow
def test_who_watches_events_is_not_waited_for(start: Callable[..., Server]) -> None:
    """Streams of events have no end of their own, and nobody loses a word by theirs."""
    server = start()
    with server.client.stream("GET", "/v1/events") as watched:
        lines = watched.iter_lines()
        assert next(lines).startswith(":")
        begun = time.monotonic()
        server.interrupt()
        assert all(not line.startswith("data") for line in lines)
        said = server.end()
    assert server.process.returncode == 0
    assert "Traceback" not in said
    assert time.monotonic() - begun < 8  # replies would be waited for up to 10 s
