"""
Encryption as a user has it: `--encrypt`, a passphrase in a pipe or typed, a wrong one, another terminal.
"""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

if sys.platform == "win32":
    pytest.skip("there are no pseudo-terminals", allow_module_level=True)

import httpx
import pexpect

from recollect.config import HISTORY_NAME
from recollect.encryption import KEY_FILE, PASSPHRASE_VARIABLE
from recollect.journal.journal import JOURNAL_NAME

CUT = "recollect: The reply was cut at the token limit.\n"
SHORT = ["--model", "reference", "--ignore-eos", "-n", "5"]
PHRASE = "the treasure lies below the oak"
TIMEOUT_S = 60
RECOLLECT = [sys.executable, "-m", "recollect"]


@pytest.fixture
def home(environment: dict[str, str]) -> Path:
    environment.pop(PASSPHRASE_VARIABLE, None)
    return Path(environment["RECOLLECT_HOME"])


def run(
    environment: dict[str, str], *arguments: str, text: str = "", passphrase: str | None = None
) -> Any:
    """Run a command without a terminal: in a session of its own it has none to ask on."""
    secret = {} if passphrase is None else {PASSPHRASE_VARIABLE: passphrase}
    return subprocess.run(  # noqa: S603 - our own command
        [sys.executable, "-m", "recollect", *arguments],
        input=text,
        capture_output=True,
        encoding="utf-8",
        env=environment | secret,
        timeout=TIMEOUT_S,
        check=False,
        start_new_session=True,
    )


def in_the_files(home: Path) -> list[str]:
    """Return the names of the files in which what was said can be read."""
    files = [file for file in home.rglob("*") if file.is_file()]
    return sorted(file.name for file in files if PHRASE.encode() in file.read_bytes())


def test_a_chat_is_encrypted_and_resumed_through_pipes(
    environment: dict[str, str], home: Path
) -> None:
    said = run(
        environment,
        *["chat", *SHORT, "--encrypt", "--name", "map"],
        text=f"{PHRASE}\n",
        passphrase="sesame",
    )
    assert (said.returncode, said.stderr) == (0, CUT)
    assert in_the_files(home) == []
    again = run(
        environment, "chat", *SHORT, "--resume", "map", text="and now?\n", passphrase="sesame"
    )
    assert (again.returncode, again.stderr) == (0, CUT)
    exported = run(
        environment, "conversations", "export", "map", "--format", "json", passphrase="sesame"
    )
    nodes = json.loads(exported.stdout)["nodes"]
    assert [node["content"] for node in nodes if node["role"] == "user"] == [PHRASE, "and now?"]


@pytest.mark.parametrize(
    ("passphrase", "says"),
    [("Sesame", "That is not the passphrase"), (None, "is encrypted: give its passphrase")],
)
@pytest.mark.parametrize(
    "command", [["chat", *SHORT, "--resume"], ["conversations"], ["chat", *SHORT, "--encrypt"]]
)
def test_without_the_passphrase_no_command_reads_or_changes_anything(
    environment: dict[str, str],
    home: Path,
    command: list[str],
    passphrase: str | None,
    says: str,
) -> None:
    run(environment, "chat", *SHORT, "--encrypt", "--name", "map", text="x\n", passphrase="sesame")
    before = (home / JOURNAL_NAME).read_bytes(), (home / KEY_FILE).read_bytes()
    refused = run(environment, *command, text="y\n", passphrase=passphrase)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert says in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert ((home / JOURNAL_NAME).read_bytes(), (home / KEY_FILE).read_bytes()) == before


@contextmanager
def serving(environment: dict[str, str], end: int) -> Iterator[httpx.Client]:
    """Have a server run in the encrypted folder, which a signal ends; return a client of it."""
    with subprocess.Popen(  # noqa: S603 - our own command
        [*RECOLLECT, "serve", "--encrypt", "--model", "reference", "--port", "0"],
        env=environment | {PASSPHRASE_VARIABLE: "sesame"},
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        try:
            assert server.stderr is not None
            addresses = (re.search(r"http://127\.0\.0\.1:\d+", line) for line in server.stderr)
            address = next(found[0] for found in addresses if found)
            with httpx.Client(base_url=f"{address}/v1", trust_env=False, timeout=60) as client:
                yield client
        finally:
            server.send_signal(end)
            server.communicate(timeout=TIMEOUT_S)


def test_a_server_keeps_what_it_is_told_encrypted(environment: dict[str, str], home: Path) -> None:
    said = {"input": PHRASE, "max_output_tokens": 5, "metadata": {"note": PHRASE}}
    with serving(environment, signal.SIGTERM) as client:
        kept = client.post("/responses", json=said).raise_for_status().json()["id"]
        again = {"input": "and?", "previous_response_id": kept, "max_output_tokens": 5}
        client.post("/responses", json=again).raise_for_status()
        found = client.get(f"/responses/{kept}").raise_for_status().json()
    assert found["metadata"] == {"note": PHRASE}
    assert (home / JOURNAL_NAME).exists()
    assert in_the_files(home) == []


def test_an_exploration_goes_on_in_an_encrypted_folder_after_the_server_was_killed(
    environment: dict[str, str], home: Path
) -> None:
    """What was kept is there with its names, can be gone on with and explored from, and stays sealed."""

    def post(client: httpx.Client, path: str, body: dict[str, Any]) -> Any:
        return client.post(path, json=body).raise_for_status().json()

    # With a seed: a reply that ends by itself is not gone on with.
    short = {"temperature": 1.0, "max_output_tokens": 5, "seed": 9}
    with serving(environment, signal.SIGKILL) as client:
        items = [{"role": "user", "content": f"{PHRASE} {n}"} for n in range(3)]
        conversation = post(client, "/conversations", {"items": items})["id"]
        place = f"/conversations/{conversation}"
        tried = [{"prompt": PHRASE, "name": "idea"}, {"prompt": "or elsewhere?"}]
        first = post(client, f"{place}/explore", {"branches": tried, **short})
        before = client.get(f"{place}/tree").json()["nodes"]
    assert len(first["branches"]) == 2
    with serving(environment, signal.SIGKILL) as client:
        after = client.get(f"{place}/tree").json()
        assert [one["items"] for one in after["nodes"]] == [one["items"] for one in before]
        assert "idea" in after["tips"]
        branch = f"{conversation}.idea"
        post(client, "/responses", {"conversation": branch, "input": PHRASE, **short})
        again = post(client, f"/conversations/{branch}/explore", {"n": 2, **short})
        assert len(again["branches"]) == 2
        found = client.get("/search", params={"query": f'"{PHRASE}"'}).json()["data"]
        assert len(found) == 5
    with serving(environment, signal.SIGTERM) as client:
        last = client.get(f"{place}/tree").json()
        assert len(last["nodes"]) == len(before) + 2 + 2
        assert len(client.get(f"{place}/branches").json()["data"]) >= 4
    assert in_the_files(home) == []


def test_a_plain_folder_is_encrypted_with_a_passphrase_that_is_typed_twice(
    environment: dict[str, str], home: Path, terminal: Callable[..., Any]
) -> None:
    run(environment, "chat", *SHORT, "--name", "map", text=f"{PHRASE}\n")
    (home / HISTORY_NAME).write_text(PHRASE)
    assert in_the_files(home) == [JOURNAL_NAME, HISTORY_NAME]
    for second, says in (("other", "differ"), ("sesame", "is encrypted")):
        child = terminal(sys.executable, "-m", "recollect", "encrypt", env=environment)
        for prompt, typed in (("New passphrase", "sesame"), ("again", second)):
            child.expect(prompt)
            child.waitnoecho()
            child.sendline(typed)
        child.expect(says)
        child.expect(pexpect.EOF)
        assert "sesame" not in child.before
        child.close()
    assert child.exitstatus == 0
    assert in_the_files(home) == []
    listed = run(environment, "conversations", "--json", passphrase="sesame")
    assert [info["name"] for info in json.loads(listed.stdout)] == ["map"]


def test_a_chat_at_the_terminal_asks_for_the_passphrase_and_leaves_no_history(
    environment: dict[str, str], home: Path, terminal: Callable[..., Any]
) -> None:
    run(environment, "encrypt", passphrase="sesame")
    child = terminal(
        sys.executable, "-m", "recollect", "chat", *SHORT, env=environment, dimensions=(50, 200)
    )
    child.expect("Passphrase of")
    child.waitnoecho()
    child.sendline("sesame")
    child.expect_exact("you>")
    child.send(PHRASE + "\r")
    child.expect("first token")
    child.expect_exact("you>")
    child.send("\x04")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    assert not (home / HISTORY_NAME).exists()
    assert in_the_files(home) == []
    listed = run(environment, "conversations", "--json", passphrase="sesame")
    assert [info["turns"] for info in json.loads(listed.stdout)] == [1]
