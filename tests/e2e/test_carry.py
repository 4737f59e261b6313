"""
What is on disk carries over: to a chat that comes back, and to another home; terminal and real model.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

if sys.platform == "win32":
    pytest.skip("there are no pseudo-terminals", allow_module_level=True)

import pexpect

from recollect import config

RECOLLECT = [sys.executable, "-m", "recollect"]
SHORT = ["--model", "reference", "--ignore-eos", "-n", "5"]
PROMPT = "you>"
TIMEOUT_S = 120

Spawn = Callable[..., Any]


def say(child: Any, line: str, until: str = "first token") -> None:
    """Type a line, press Enter, and wait for what ends it and for the next prompt."""
    child.send(line + "\r")
    child.expect(until)
    child.expect_exact(PROMPT)


def leave(child: Any) -> str:
    """Press Ctrl-D at the prompt and return what it says last."""
    child.send("\x04")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    return str(child.before)


def run(environment: dict[str, str], *arguments: str, text: str = "") -> str:
    done = subprocess.run(  # noqa: S603 - our own command
        [*RECOLLECT, *arguments],
        input=text,
        capture_output=True,
        encoding="utf-8",
        env=environment,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def usage(environment: dict[str, str], text: str, *arguments: str) -> dict[str, int]:
    """Say something in a process of its own; return what it cost."""
    turn = json.loads(run(environment, "chat", "--json", *arguments, text=text + "\n"))
    return dict(turn["usage"])


@pytest.fixture
def real_home(tmp_path: Path, environment: dict[str, str]) -> dict[str, str]:
    """Return an environment whose home has the models of the user's, and nothing else of it."""
    home = Path(environment["RECOLLECT_HOME"])
    home.mkdir(mode=0o700)
    users = Path(os.environ.get("RECOLLECT_HOME") or config.home())
    (users / "models").mkdir(parents=True, exist_ok=True)
    (home / "models").symlink_to(users / "models")
    return environment


def test_a_place_that_was_saved_is_there_after_a_restart(
    spawn: Spawn, environment: dict[str, str]
) -> None:
    first = spawn(*SHORT, "--name", "poem")
    say(first, "one")
    say(first, "/save here", "Saved the checkpoint")
    say(first, "two")
    leave(first)
    second = spawn(*SHORT, "--checkpoint", "here")
    assert "main 1 turn (here)" in second.before
    say(second, "/tree", "on disk")
    second.send("three\r")
    second.expect(r"reused \((disk|[\d,]+ memory, [\d,]+ disk)\)")
    second.expect_exact(PROMPT)
    say(second, "/load here", "main is after turn 1")
    leave(second)
    listed = json.loads(run(environment, "checkpoints", "--json"))
    assert [(made["name"], made["conversation"], made["turns"]) for made in listed] == [
        ("here", "poem", 1)
    ]


def test_what_is_typed_after_load_is_completed(spawn: Spawn) -> None:
    child = spawn(*SHORT, "--name", "poem")
    say(child, "one")
    say(child, "/save somewhere", "Saved the checkpoint")
    child.send("/load some\t\r")
    child.expect("main is after turn 1")
    child.expect_exact(PROMPT)
    leave(child)


@pytest.mark.model
def test_a_real_model_reads_no_document_twice(real_home: dict[str, str], tmp_path: Path) -> None:
    text = "The mill by the river has ground corn since the old days of the town. " * 20
    (tmp_path / "mill.txt").write_text(text)
    said = run(real_home, "warm", str(tmp_path / "mill.txt"))
    found = re.match(r"'mill.txt' is warm: ([\d,]+) tokens", said)
    assert found is not None
    tokens = int(found[1].replace(",", ""))
    assert "warm already" in run(real_home, "warm", str(tmp_path / "mill.txt"))
    cost = usage(real_home, text + "How old is it?", "-n", "8")
    # What ends the text may be one token with what follows it.
    assert tokens - 2 <= cost["restored_tokens"] <= tokens
    assert cost["computed_tokens"] < 20


@pytest.mark.model
def test_a_real_conversation_goes_on_in_another_home(
    real_home: dict[str, str], tmp_path: Path
) -> None:
    said = ["--name", "mill", "-n", "16"]
    usage(real_home, "Tell me of a mill by a river. " * 10, *said)
    file = tmp_path / "mill.safetensors"
    run(real_home, "export", "mill", str(file))
    there = real_home | {"RECOLLECT_HOME": str(tmp_path / "there")}
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "models").symlink_to(
        (Path(real_home["RECOLLECT_HOME"]) / "models").resolve()
    )
    told = run(there, "import", str(file))
    tokens = int(told.partition("need not read ")[2].split()[0].replace(",", ""))
    cost = usage(there, "And who lives there?", "--resume", "mill", "-n", "8")
    assert cost["restored_tokens"] == tokens
    assert cost["computed_tokens"] == cost["prompt_tokens"] - tokens
    assert "All of " in run(there, "cache", "verify")
