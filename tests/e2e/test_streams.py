"""
Streams that are closed, full or not read, paths that are none, and Ctrl-C: one line, no traceback.

Everything runs as a user runs it, from a shell.
"""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

if sys.platform == "win32":
    pytest.skip("there is no such shell", allow_module_level=True)

RECOLLECT = f"{sys.executable} -m recollect"
CHAT = f"{RECOLLECT} chat --model reference --ignore-eos -n 4"
needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")


def shell(command: str, environment: dict[str, str]) -> tuple[int, str]:
    """Run a command line and return its status and what it wrote to stderr."""
    done = subprocess.run(  # noqa: S603 - our own commands
        ["/bin/sh", "-c", command],
        env=environment,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=60,
        check=False,
    )
    return done.returncode, done.stderr


def require_one_line(command: str, environment: dict[str, str], *, about: str) -> None:
    status, complaint = shell(command, environment)
    assert complaint.startswith("recollect: "), complaint
    assert complaint.count("\n") == 1, complaint
    assert about in complaint
    assert status == 2


@pytest.mark.parametrize(
    "command",
    [
        f"{RECOLLECT} --version >&-",
        f"{RECOLLECT} models --json >&-",
        f"echo hi | {CHAT} >&-",
        f"echo hi | {CHAT} --json >&-",
        f"{CHAT} <&-",
        f"{CHAT} <&- >&-",
    ],
)
def test_a_stream_that_is_closed_is_said(command: str, environment: dict[str, str]) -> None:
    require_one_line(command, environment, about="Bad file descriptor")


@needs_full
@pytest.mark.parametrize(
    "command",
    [
        f"{RECOLLECT} --help >/dev/full",
        f"{RECOLLECT} models >/dev/full",
        f"{RECOLLECT} conversations list --json >/dev/full",
        f"echo hi | {CHAT} >/dev/full",
        f"echo hi | {CHAT} --json >/dev/full",
    ],
)
def test_output_that_has_no_room_is_said(command: str, environment: dict[str, str]) -> None:
    require_one_line(command, environment, about="No space left")


@pytest.mark.parametrize("where", ["&-", pytest.param("/dev/full", marks=needs_full)])
def test_where_errors_cannot_be_written_the_status_tells(
    where: str, environment: dict[str, str]
) -> None:
    assert shell(f"{CHAT} --model nix 2>{where}", environment) == (2, "")
    status, _ = shell(f"echo hi | {CHAT} 2>{where}", environment)
    assert status == 0


def test_whoever_has_read_enough_may_go(environment: dict[str, str]) -> None:
    status, complaint = shell(f"(seq 1 40 | {CHAT} --lines; echo $? >&2) | head -c 5", environment)
    # The reader may be gone before the first reply is whole, or after it.
    assert (
        status,
        complaint.removeprefix("recollect: The reply was cut at the token limit.\n"),
    ) == (
        0,
        "1\n",
    )
    status, complaint = shell(f"({RECOLLECT} models; echo $? >&2) | head -c 0", environment)
    assert (status, complaint) == (0, "1\n")


def test_a_database_does_not_take_the_number_of_a_stream_that_is_closed(
    environment: dict[str, str],
) -> None:
    status, complaint = shell(f"echo hi | {CHAT} --name kept 2>&-", environment)
    assert (status, complaint) == (0, "")
    status, complaint = shell(f"{RECOLLECT} conversations show kept", environment)
    assert (status, complaint) == (0, "")


@pytest.mark.parametrize(
    "command",
    [
        "models",
        "conversations",
        "checkpoints",
        "cache ls",
        "keys list",
        "keys add somebody",
        "encrypt",
        "pull smollm2",
        "export some where",
        "chat --model reference --prompts /dev/null",
        "serve --model reference --port 0",
    ],
)
def test_a_home_that_is_no_folder_is_named(
    command: str, environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    environment |= {"RECOLLECT_HOME": str(tmp_path / "file" / "home"), "RECOLLECT_PASSPHRASE": "x"}
    require_one_line(
        f"{RECOLLECT} {command}", environment, about=f"{tmp_path / 'file'} is no folder: set"
    )


def test_a_home_of_nobody_is_named(environment: dict[str, str]) -> None:
    environment["RECOLLECT_HOME"] = "~no-such-user/home"
    require_one_line(f"{RECOLLECT} models", environment, about="~no-such-user/home")


@pytest.mark.parametrize(
    "command",
    [
        "verify --model reference --json",
        "scenarios --model reference --json",
        "bench --model reference --json",
        "bench --model reference --plot",
        "export some",
    ],
)
@pytest.mark.parametrize("where", ["nowhere/result.png", "file/result.png", "folder.png"])
def test_where_a_result_goes_is_looked_at_before_the_work(
    command: str, where: str, environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    begun = time.monotonic()
    status, complaint = shell(f"{RECOLLECT} {command} {tmp_path / where}", environment)
    assert time.monotonic() - begun < 30
    assert (status, complaint.count("\n")) == (2, 1), complaint
    assert str((tmp_path / where).parent) in complaint
    assert not list(tmp_path.glob("home/kv/*")), "nothing was computed"


def test_a_result_that_cannot_be_written_is_printed_all_the_same(
    environment: dict[str, str],
) -> None:
    done = subprocess.run(  # noqa: S603 - our own command
        [
            *(sys.executable, "-m", "recollect", "verify", "--model", "reference"),
            *("--operations", "3", "--json", "/dev/full"),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout.endswith(
        "\nNOT COMPARED  (model against its file: NOT COMPARED; reuse: PASS)\n"
    )
    said = done.stderr.splitlines()
    assert said[-1].startswith("recollect: /dev/full cannot be written (No space left")


@pytest.mark.parametrize("after_s", [0.05, 0.1, 0.2, 0.3, 0.5])
def test_an_interrupt_while_the_command_starts_is_no_traceback(
    after_s: float, environment: dict[str, str]
) -> None:
    with subprocess.Popen(  # noqa: S603 - our own command
        [sys.executable, "-c", STARTED],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()  # Python itself has started
        time.sleep(after_s)
        process.send_signal(signal.SIGINT)
        _, complaint = process.communicate(timeout=30)
    assert "Traceback" not in complaint
    assert process.returncode in {0, 130, -signal.SIGINT}


# `python -m recollect` from the moment on where Python itself is there: it can be interrupted, though
# a shell may have let interrupts be ignored in what runs behind it.
STARTED = """
import runpy, signal, sys
sys.orig_argv = ["python", "-m", "recollect", "models"]
signal.signal(signal.SIGINT, signal.default_int_handler)
import recollect  # which is quick, and says what an interrupt does; its commands take long
print("started", flush=True)
sys.argv = ["-m", "models"]
runpy.run_module("recollect", run_name="__main__", alter_sys=True)
"""


def files_of(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def with_room(size: int, command: str) -> str:
    """Return a command line in which no file may grow beyond so many bytes, as on a full disk."""
    limit = f"import os,resource;resource.setrlimit(resource.RLIMIT_FSIZE,({size},{size}))"
    return f"""{sys.executable} -c '{limit};os.execvp("/bin/sh",["/bin/sh","-c","{command}"])'"""


def test_an_export_without_room_leaves_no_file(environment: dict[str, str], tmp_path: Path) -> None:
    """It would be in the way of the next try, which needs a name that is new."""
    small, large, target = (tmp_path / f"{name}.json" for name in ("small", "large", "target"))
    assert shell(f"echo hello | {CHAT} --name a", environment)[0] == 0
    assert shell(f"{RECOLLECT} conversations export a {small}", environment)[0] == 0
    large.write_text(small.read_text().replace("hello", "hello" * 10_000))
    assert shell(f"{RECOLLECT} conversations import --name b {large}", environment)[0] == 0
    export = f"{RECOLLECT} conversations export b {target}"
    # SQLite's own file beside the journal takes 32 KiB; the export takes more than it has.
    require_one_line(with_room(33 << 10, export), environment, about="too large")
    assert not target.exists()
    assert shell(export, environment)[0] == 0


def test_a_key_without_room_is_said_and_leaves_no_file(
    environment: dict[str, str], tmp_path: Path
) -> None:
    command = f"{RECOLLECT} keys add phone"
    require_one_line(with_room(0, command), environment, about="api-keys.json cannot be written")
    assert files_of(tmp_path / "home") == set()
    assert shell(command, environment)[0] == 0
