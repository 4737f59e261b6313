"""
What it takes to look at the page: a browser, npm's packages as `packages/` names them, and a real server.

The packages are kept in the user's cache, so only the first run fetches them. The browser is the
Chromium of the system, or the one that the variable CHROMIUM names.
"""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, NoReturn
from urllib.parse import urlsplit

import platformdirs
import pytest

from recollect import config
from recollect.models.prepare import models_folder, prepare
from recollect.server.access import Keyring
from recollect.server.app import create_app
from recollect.server.hub import ModelHub
from recollect.server.settings import Settings

HERE: Final = Path(__file__).parent
PACKAGES: Final = HERE / "packages"
SETTINGS: Final = {"max_output_tokens": "24", "temperature": "0"}
"""Short replies, which are the same each time."""


def cannot_run(why: str) -> NoReturn:
    """End the test: it fails where all of them have to run."""
    if "CI" in os.environ:
        pytest.fail(why)
    pytest.skip(why)


@pytest.fixture(scope="session")
def modules() -> Path:
    """Return npm's packages, fetched the first time."""
    if shutil.which("npm") is None:
        cannot_run("npm is missing: apt-get install nodejs npm")
    digest = sha256((PACKAGES / "package-lock.json").read_bytes()).hexdigest()[:12]
    folder = platformdirs.user_cache_path("recollect") / "browser" / digest
    folder.mkdir(parents=True, exist_ok=True)
    with Path(f"{folder}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").exists():
            for name in ("package.json", "package-lock.json", ".npmrc"):
                shutil.copy(PACKAGES / name, folder)
            # Not `ci`, which wants the packages of all other platforms to be in the lock, too.
            done = subprocess.run(
                ["npm", "install", "--ignore-scripts"],  # noqa: S607 - the system's npm
                cwd=folder,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stdout + done.stderr
            (folder / "complete").touch()
    return folder / "node_modules"


@pytest.fixture(scope="module")  # while it is open, no other test can run an event loop
def browser() -> Iterator[Any]:
    """Return a Chromium without a window."""
    program = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if program is None:
        cannot_run("Chromium is missing: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as tools:
        chromium = tools.chromium.launch(executable_path=program)
        yield chromium
        chromium.close()


class Server:
    """A server in a process of its own, as a user starts it."""

    def __init__(self, home: Path, *arguments: str, packages: Path | None = None) -> None:
        self._environment = {**os.environ, "RECOLLECT_HOME": str(home), "PYTHONUTF8": "1"}
        if packages is not None:
            self._environment["PYTHONPATH"] = str(packages)
        self._arguments = arguments
        self.port = 0
        self.start()

    def start(self, *arguments: str) -> None:
        """Start it, on the port that it had; with other arguments, where there are any."""
        self._arguments = arguments or self._arguments
        command = [sys.executable, "-m", "recollect", "serve", "--port", str(self.port)]
        self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and package
            [*command, *self._arguments], env=self._environment, stderr=subprocess.PIPE, text=True
        )
        assert self._process.stderr is not None
        told = ""
        for line in self._process.stderr:
            told += line
            if found := re.search(r"trees: (http://127\.0\.0\.1:(\d+)/)", line):
                self.url, self.port = found[1], int(found[2])
                # Each request is a line: a pipe that nobody reads is full some time, and the server waits.
                self._reader = threading.Thread(target=self._process.stderr.read, daemon=True)
                self._reader.start()
                return
        raise AssertionError(told)

    def stop(self) -> None:
        """Stop it as a service manager does."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it in the middle of whatever it does."""
        self._end(signal.SIGKILL)

    def _end(self, how: signal.Signals) -> None:
        if self._process.poll() is None:
            self._process.send_signal(how)
            self._process.wait(timeout=60)
        self._reader.join(timeout=60)
        assert self._process.stderr is not None
        self._process.stderr.close()


@pytest.fixture(scope="session")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Return what starts a server with a home of its own; `packages`: a folder that comes before others."""
    prepare("smollm2", home=config.home())
    with ExitStack() as stack:

        def start(*arguments: str, model: str = "smollm2", packages: Path | None = None) -> Server:
            home = tmp_path_factory.mktemp("home")
            models_folder(home).symlink_to(models_folder(config.home()))
            server = Server(home, "--model", model, *arguments, packages=packages)
            stack.callback(server.stop)
            return server

        yield start


@pytest.fixture(scope="session")
def server(start_server: Callable[..., Server]) -> Server:
    """Return a server without keys, whose replies take a while: guesses would bring some at once."""
    return start_server("--no-draft")


@pytest.fixture(scope="session")
def quick(start_server: Callable[..., Server]) -> Server:
    """Return a server whose model takes no time, for what does not depend on what is said."""
    return start_server(model="reference")


@pytest.fixture(scope="session")
def public(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, re.Pattern[str]]]:
    """Return the calls that `/openapi.json` describes, and the page's own files."""
    home = tmp_path_factory.mktemp("home")
    hub = ModelHub(lambda _: pytest.fail("nothing is loaded here"), ["m"])
    document = create_app(Settings(home=home, models=("m",)), hub, Keyring([])).openapi()
    return [("GET", re.compile("/|/web/.*"))] + [
        (method.upper(), re.compile(re.sub(r"{[^}]+}", "[^/]+", path)))
        for path, methods in document["paths"].items()
        for method in methods
    ]


@pytest.fixture
def windows(
    browser: Any, public: list[tuple[str, re.Pattern[str]]]
) -> Iterator[Callable[..., Any]]:
    """
    Return what opens a window of a person of its own, at a page.

    With its settings, and a script that changes the browser before the page is there. Whatever the page
    complains of fails the test: errors, refused scripts, files that are not there. So does a call of
    the server that its public API does not have.
    """
    complaints: list[str] = []
    calls: set[tuple[str, str]] = set()
    with ExitStack() as stack:

        def begin(
            url: str, *, settings: Mapping[str, str] = SETTINGS, script: str = "", **how: Any
        ) -> Any:
            how = {"viewport": {"width": 1360, "height": 860}, "reduced_motion": "reduce", **how}
            context = browser.new_context(**how)
            stack.callback(context.close)
            name, text = "recollect-settings", json.dumps(json.dumps(settings))
            context.add_init_script(
                f"if (!localStorage.getItem('{name}')) localStorage.setItem('{name}', {text});{script}"
            )
            context.set_default_timeout(90_000)
            context.on(
                "request",
                lambda one: (
                    calls.add((one.method, urlsplit(one.url).path))
                    if one.url.startswith("http")  # and no file that it makes itself
                    else None
                ),
            )
            page = context.new_page()
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on(
                "console",
                lambda told: (
                    complaints.append(f"{told.text} {told.location['url']}")
                    if told.type == "error"
                    else None
                ),
            )
            page.goto(url)
            return page

        yield begin
    # A wrong key, a server that is stopped, a test's own try, a conversation that has been deleted.
    expected = ("401", "ERR_", "TrustedHTML", "/v1/conversations/")
    assert [one for one in complaints if not any(what in one for what in expected)] == []
    others = {
        (method, path)
        for method, path in calls
        if not any(method == known and where.fullmatch(path) for known, where in public)
    }
    assert others == set()
