"""A running `recollect serve` on the real model, as a user starts it."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from recollect import config
from recollect.models.prepare import models_folder, prepare

KEY = "rk-test"
OTHER_KEY = "rk-other"


class Server:
    """A server in a process of its own."""

    def __init__(self, home: Path, *arguments: str) -> None:
        # Clients that talk to this machine must not take the way through a proxy.
        environment = {
            **os.environ,
            "RECOLLECT_HOME": str(home),
            "NO_PROXY": "127.0.0.1",
            "PYTHONUTF8": "1",
        }
        command = [sys.executable, "-m", "recollect", "serve", "--port", "0", *arguments]
        self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and package
            command, env=environment, stderr=subprocess.PIPE, text=True
        )
        self.lines: list[str] = []
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.lines.append(line)
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                self.url = found[0]
                # Each request is a line: a pipe that nobody reads is full some time, and the server waits.
                self._reader = threading.Thread(
                    target=self.lines.extend, args=[self._process.stderr], daemon=True
                )
                self._reader.start()
                break
        else:
            self._process.communicate()
            raise AssertionError("".join(self.lines))

    @property
    def api(self) -> str:
        """Return the address that clients are given."""
        return f"{self.url}/v1"

    def stop(self) -> int:
        """Stop it as a service manager does; return its exit status."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(timeout=60)
        self._reader.join(timeout=60)
        assert self._process.stderr is not None
        self._process.stderr.close()
        return self._process.returncode


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a home of its own, with the models of the user's."""
    prepare("smollm2", home=config.home())
    home = tmp_path_factory.mktemp("home")
    models_folder(home).symlink_to(models_folder(config.home()))
    return home


@pytest.fixture(scope="session")
def start_server(home: Path) -> Iterator[Callable[..., Server]]:
    """Return what starts a server on `home`; those still running are stopped in the end."""
    with ExitStack() as stack:

        def start(*arguments: str) -> Server:
            given = ("--model", "smollm2", "--profile", "exact", "--temperature", "0")
            server = Server(home, *given, *arguments)
            stack.callback(server.stop)
            return server

        yield start


@pytest.fixture(scope="session")
def server(start_server: Callable[..., Server]) -> Server:
    """Return a server with two keys, and another name for its model."""
    return start_server("--api-key", KEY, "--api-key", OTHER_KEY, "--alias", "gpt-4o-mini")


@pytest.fixture(scope="session")
def url(server: Server) -> str:
    """Return the address that OpenAI's clients are given."""
    return server.api


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    """Return a bare client with the first key."""
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=60, trust_env=False) as client:
        yield client


@pytest.fixture
def keys() -> tuple[str, str]:
    """Return the keys of `server`."""
    return KEY, OTHER_KEY
