"""
Nothing leaves the machine, and nothing is written but where the documents say: seen by the kernel.

Python's own hooks do not reach what native libraries do, so every command, the library, the server
and ONNX Runtime GenAI run under `strace`, in a network namespace that has loopback alone. What may
be written to is the data folder, the temporary folder, and the files that a command was told to
write. docs/privacy.md says so; `CI` is unset in there, because libraries report less where it is set.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.core import TyperGroup

from recollect.cli.main import app

if sys.platform != "linux":
    pytest.skip("there is no strace", allow_module_level=True)

pytestmark = pytest.mark.slow

RECOLLECT = f"{sys.executable} -m recollect"

# In the namespace loopback is down at first.
LOOPBACK_UP = """
import fcntl, os, socket, struct, sys
flags, up_and_running = 0x8914, 0x41
fcntl.ioctl(socket.socket(), flags, struct.pack("16sh", b"lo", up_and_running))
os.execvp(sys.argv[1], sys.argv[1:])
"""

CHANGES = re.compile(
    r"\d+ +(?:mkdir|rmdir|rename|unlink|link|symlink|mknod|truncate|chmod|chown|lchown|utime|fchmod|fchown|"
    r"futimes|creat|setxattr|removexattr)\w*\("
)
OPENS_TO_WRITE = re.compile(r"\d+ +open(?:at2?)?\(.*(?:O_WRONLY|O_RDWR|O_CREAT|O_TRUNC)")
# A path in a call, and the folder that it is relative to; `strace -y` names that.
PATH = re.compile(r'(?:(?:AT_FDCWD|\d+)<([^>]*)>, )?"((?:[^"\\]|\\.)*)"')
ADDRESS = re.compile(r'inet_addr\("([^"]+)"\)|inet_pton\(AF_INET6, "([^"]+)"')
PORT = re.compile(r"htons\((\d+)\)")
SOCKET_FILE = re.compile(r'sun_path=@?"([^"]+)"')
HARMLESS = ("/dev/", "/proc/")  # terminals, semaphores in memory, the process itself


@dataclass(frozen=True)
class Traced:
    """A place to run commands in, traced."""

    root: Path
    environment: dict[str, str]

    @property
    def home(self) -> Path:
        return self.root / "home"

    @property
    def work(self) -> Path:
        """Where commands run, and where they are told to write."""
        return self.root / "work"

    def command(self, trace: Path, *command: str) -> list[str]:
        """Return a command line that runs a command traced, without a network."""
        syscalls = ["strace", "-f", "--seccomp-bpf", "-y", "-qq", "-e", "trace=%network,%file"]
        return [
            *("unshare", "--map-root-user", "--net", sys.executable, "-I", "-c", LOOPBACK_UP),
            *(*syscalls, "-o", str(trace), *command),
        ]

    def run(self, script: str) -> str:
        """Run a shell script traced, which has to succeed, and return what was traced."""
        trace = self.root / "trace"
        done = subprocess.run(  # noqa: S603 - our own commands
            self.command(trace, "/bin/sh", "-ec", textwrap.dedent(script)),
            cwd=self.work,
            env=self.environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr + done.stdout
        return trace.read_text(errors="replace")

    def offences(self, trace: str, *caches: str) -> set[str]:
        """
        Return what of a trace is not promised: talk beyond loopback, and files elsewhere.

        Args:
            trace: As strace has written it.
            caches: Folders in the user's home that docs/privacy.md names.
        """
        mine = ("home", "temporary", "work", *(f"user/{cache}" for cache in caches))
        allowed = (*HARMLESS, *(f"{self.root / name}/" for name in mine))
        return {offence for line in trace.splitlines() for offence in _offences(line, allowed)}


def _offences(line: str, allowed: tuple[str, ...]) -> Iterator[str]:
    for ipv4, ipv6 in ADDRESS.findall(line):
        if not (ipv4.startswith("127.") or ipv4 == "0.0.0.0" or ipv6 in {"::1", "::"}):  # noqa: S104
            yield f"talks to {ipv4 or ipv6}"
    if "53" in PORT.findall(line):
        yield "asks a name server"
    for path in SOCKET_FILE.findall(line):
        if not path.startswith(allowed):
            yield f"talks to {path}"
    if '"/etc/resolv.conf"' in line:
        yield "prepares to look up a name"
    if CHANGES.match(line) or OPENS_TO_WRITE.match(line):
        paths = [os.path.join(folder, path) for folder, path in PATH.findall(line)]  # noqa: PTH118
        if re.match(r"\d+ +(?:sym)?link(?:at)?\(", line):
            paths = paths[-1:]  # the other one is only read
        yield from (
            f"writes {path}"
            for path in paths
            # A relative path that strace names no folder for is one of the folder commands run in.
            if path.startswith("/") and not f"{path}/".startswith(allowed)
        )


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Traced:
    """Return a place with nothing in it; tools that are missing fail the tests of CI."""
    for tool in ("strace", "unshare"):
        if shutil.which(tool) is None:
            missing = f"{tool} is missing: apt-get install strace util-linux"
            pytest.fail(missing) if "CI" in os.environ else pytest.skip(missing)
    root = tmp_path_factory.mktemp("traced")
    for name in ("user", "temporary", "work"):
        (root / name).mkdir()
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    return Traced(
        root,
        {
            **kept,
            "HOME": str(root / "user"),  # not to be touched
            "RECOLLECT_HOME": str(root / "home"),
            "TMPDIR": str(root / "temporary"),
            "USER": "somebody",  # whom nobody has to look up
            # What Python compiles when a program runs for the first time is of the installation.
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUTF8": "1",
            "TERM": "xterm",
            "PROMPT_TOOLKIT_NO_CPR": "1",
        },
    )


@pytest.fixture(scope="module")
def gguf(traced: Traced) -> Path:
    """Return a model of a few kilobytes, which is converted and runs on OpenVINO as any other."""
    where = Path(__file__).parents[1] / "unit" / "models" / "conftest.py"
    spec = importlib.util.spec_from_file_location("tiny_models", where)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    path: Path = module.write_gguf(traced.work / "tiny.gguf", context_length=2048)
    return path


# A command that has to be refused; `! command` alone does not end a shell that -e is given to.
REFUSED = 'refused() { if "$@" 2>complaint; then echo "$* was not refused" >&2; exit 1; fi; }'

LIBRARY = """
import sys
import recollect
from recollect import Grammar, SamplingParams
from recollect.og import Config, Generator, GeneratorParams, Model, Tokenizer

short = SamplingParams(max_tokens=4, ignore_eos=True, logprobs=1)
with recollect.load(sys.argv[1]) as model:
    session = model.session("Be brief.", keep=True, tools=[{"type": "function", "function": {
        "name": "clock", "description": "the time", "parameters": {"type": "object"}}}])
    session.prewarm("what is typed")
    session.respond("what is typed and sent", params=SamplingParams(max_tokens=4))
    if model.engine.info.reuse.as_bytes:
        session.checkpoint("library")
    session.fork(name="other").respond("again", params=SamplingParams(max_tokens=4))
    model.session().respond("JSON", params=SamplingParams(grammar=Grammar.json_object(), max_tokens=4))
    model.session_from([{"role": "user", "content": "hello"}]).respond(None, params=short)

original = Model(Config(sys.argv[1]))
tokens = Tokenizer(original).encode("hello")
params = GeneratorParams(original)
params.set_search_options(max_length=len(tokens) + 4)
generator = Generator(original, params)
generator.append_tokens(tokens)
generator.generate_next_token()
"""

CLIENT = """
import json, sys, urllib.request

def call(path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(sys.argv[1] + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return answer.read()

question = [{"role": "user", "content": "hello"}]
call("/models")
call("/chat/completions", {"messages": question, "max_tokens": 4})
call("/completions", {"prompt": "hello", "max_tokens": 4})
call("/responses", {"input": "hello", "max_output_tokens": 4})
call("/messages", {"model": "tiny", "messages": question, "max_tokens": 4})
call("/prewarm", {"messages": question})
"""


def test_what_should_be_found_is_found(traced: Traced) -> None:
    program = "import socket; socket.getaddrinfo('www.example.com', 80)"
    trace = traced.run(f"""
        {sys.executable} -c "{program}" 2>errors || true
        touch "$HOME/telemetry"
        {sys.executable} -c "import openvino"
    """)
    offences = traced.offences(trace)
    assert f"writes {traced.root}/user/telemetry" in offences
    assert f"writes {traced.root}/user/intel/openvino_ga_cid" in offences
    assert offences & {"asks a name server", "prepares to look up a name"}
    shutil.rmtree(traced.root / "user")
    (traced.root / "user").mkdir()


def test_no_command_is_forgotten() -> None:
    """What is not in a script here is `keys list` and what drops a checkpoint: no more than files."""
    command = typer.main.get_command(app)
    assert isinstance(command, TyperGroup)
    text = Path(__file__).read_text("utf-8")
    forgotten = [name for name in command.commands if f"{{RECOLLECT}} {name}" not in text]
    assert forgotten == []


def test_no_command_talks_or_writes_elsewhere(traced: Traced, gguf: Path) -> None:
    trace = traced.run(f"""
        chat() {{ {RECOLLECT} chat --model {gguf} --ignore-eos -n 4 "$@"; }}
        {RECOLLECT} pull {gguf}
        {RECOLLECT} models
        {RECOLLECT} doctor
        {RECOLLECT} explain
        echo one | chat --name kept
        echo two | chat --resume kept --json
        echo three | chat --no-save
        {RECOLLECT} conversations
        {RECOLLECT} conversations export kept kept.json
        {RECOLLECT} conversations import kept.json --name again
        {RECOLLECT} conversations show again
        {RECOLLECT} conversations search one
        {RECOLLECT} conversations rename again once
        {RECOLLECT} conversations delete once --yes
        {RECOLLECT} export kept kept.safetensors
        {RECOLLECT} import kept.safetensors --name carried
        echo 'A handbook of a few words, which is read once and for all of the time.' >handbook.txt
        {RECOLLECT} warm handbook.txt --model {gguf}
        {RECOLLECT} checkpoints
        {RECOLLECT} cache ls
        {RECOLLECT} cache stats
        {RECOLLECT} cache verify
        {RECOLLECT} cache evict 1MB
        {RECOLLECT} cache unpin handbook.txt
        {RECOLLECT} cache clear --yes
    """)
    assert traced.offences(trace) == set()


def test_no_proof_talks_or_writes_elsewhere(traced: Traced, gguf: Path) -> None:
    trace = traced.run(f"""
        {RECOLLECT} verify --model {gguf} -n 4 --json verified.json
        {RECOLLECT} rewind-test --model {gguf} || true
        {RECOLLECT} scenarios --model reference --json scenarios.json
        {RECOLLECT} bench --model {gguf} --input 64 --output 4 --input2 8 --output2 4 \\
            --iterations 2 --turns 2 --plot growth.png
    """)
    # matplotlib keeps its list of fonts; it makes the folders above its own, too.
    caches = (".cache/matplotlib", ".config/matplotlib")
    above = {f"writes {traced.root}/user/{folder}" for folder in (".cache", ".config")}
    assert traced.offences(trace, *caches) - above == set()


def test_no_encrypted_folder_is_different(traced: Traced) -> None:
    trace = traced.run(f"""
        export RECOLLECT_HOME=home RECOLLECT_PASSPHRASE=secret
        echo one | {RECOLLECT} chat --model reference --ignore-eos -n 4 --name kept
        {RECOLLECT} encrypt
        echo two | {RECOLLECT} chat --model reference --ignore-eos -n 4 --resume kept
    """)
    assert traced.offences(trace) == set()


def test_the_library_talks_to_nobody(traced: Traced, gguf: Path) -> None:
    (traced.work / "library.py").write_text(LIBRARY)
    trace = traced.run(f"{sys.executable} library.py {gguf}")
    assert traced.offences(trace) == set()


def test_the_server_talks_to_its_clients_alone(traced: Traced, gguf: Path) -> None:
    (traced.work / "client.py").write_text(CLIENT)
    trace = traced.run(f"""
        {RECOLLECT} keys add somebody --operator >key && {RECOLLECT} keys remove somebody
        {RECOLLECT} serve --model {gguf} --port 0 2>log &
        until grep -q Listening log; do sleep 0.1; done
        {sys.executable} client.py "$(sed -n 's/.*Listening on \\([^ ]*\\).*/\\1/p' log)"
        port=$(sed -n 's/.*Listening on [^ ]*:\\([0-9]*\\).*/\\1/p' log)
        BROWSER=true {RECOLLECT} web --port $port
        kill -TERM $!
        wait $!
    """)
    assert '"127.0.0.1"' in trace
    assert traced.offences(trace) == set()


def test_a_chat_at_a_terminal_talks_to_nobody(
    traced: Traced, gguf: Path, terminal: Callable[..., Any]
) -> None:
    trace = traced.root / "chat"
    chat = f"cd {traced.work} && exec {RECOLLECT} chat --model {gguf} --ignore-eos -n 4"
    command = traced.command(trace, "/bin/sh", "-c", chat)
    child = terminal(*command, env=traced.environment, dimensions=(50, 100))
    child.expect_exact("you>")
    for line in ("hello", "/fork idea", "/stats", "/save here", "/tree", "/help"):
        child.send(f"{line}\r")
        child.expect(r"you[^\n]*>")
    child.send("/quit\r")
    child.wait()
    content = trace.read_text(errors="replace")
    assert "history" in content
    assert traced.offences(content) == set()


def test_a_model_that_is_missing_is_announced_before_anything_is_asked(traced: Traced) -> None:
    trace = traced.run(f"""
        {REFUSED}
        export RECOLLECT_HOME=empty PIP_RETRIES=0 PIP_CONFIG_FILE=/dev/null
        refused {RECOLLECT} chat --prompts /dev/null
        grep -q '^Fetching smollm2 (98 MB) from' complaint
        grep -q 'could not be downloaded' complaint
    """)
    assert traced.offences(trace) & {"asks a name server", "prepares to look up a name"}


def test_offline_nothing_is_asked(traced: Traced) -> None:
    trace = traced.run(f"""
        {REFUSED}
        export RECOLLECT_HOME=empty
        refused {RECOLLECT} chat --prompts /dev/null --offline
        grep -q 'nothing may be fetched' complaint
        refused {RECOLLECT} pull org/repo:file.gguf --offline
        grep -q 'nothing may be fetched' complaint
        export RECOLLECT_OFFLINE=1
        refused {RECOLLECT} serve --port 0
        grep -q 'nothing may be fetched' complaint
        refused {RECOLLECT} pull smollm2
        grep -q 'nothing may be fetched' complaint
    """)
    assert traced.offences(trace) == set()


@pytest.mark.model
def test_onnx_runtime_genai_talks_to_nobody(
    traced: Traced, onnx_folder: Callable[[str], Path]
) -> None:
    folder = onnx_folder("int8")  # made here where it is not there, with what converts
    (traced.work / "library.py").write_text(LIBRARY)
    trace = traced.run(f"""
        echo one | {RECOLLECT} chat --model {folder} -n 4 --no-save
        {sys.executable} library.py {folder}
    """)
    assert "libonnxruntime-genai" in trace
    assert traced.offences(trace) == set()


@pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason='pip install "recollect-llm[convert]"'
)
def test_converting_talks_to_nobody(traced: Traced, gguf: Path) -> None:
    trace = traced.run(f"{RECOLLECT} convert {gguf} converted")
    assert "transformers" in trace
    assert traced.offences(trace) == set()
