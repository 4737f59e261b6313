"""
`recollect chat` as a user has it: a process, with a real pseudo-terminal or with pipes.
"""

import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

if sys.platform == "win32":
    pytest.skip("there are no pseudo-terminals", allow_module_level=True)

import pexpect

CHAT = [sys.executable, "-m", "recollect", "chat"]
REFERENCE = ["--model", "reference", "--ignore-eos"]
CUT = "recollect: The reply was cut at the token limit.\n"
PROMPT = "you>"  # and a space, which may come as a movement of the cursor
TIMEOUT_S = 60
CTRL_D = "\x04"
UP = "\x1b[A"

Spawn = Callable[..., Any]


def enter(child: Any, line: str) -> None:
    """Type a line and press Enter."""
    child.send(line + "\r")


def leave(child: Any) -> None:
    """Press Ctrl-D at the prompt and see that it ends well."""
    child.send(CTRL_D)
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def piped(
    environment: dict[str, str], text: str, *arguments: str
) -> "subprocess.CompletedProcess[str]":
    """Run a chat with *text* as its standard input."""
    return subprocess.run(  # noqa: S603 - our own command
        [*CHAT, *arguments],
        input=text,
        capture_output=True,
        encoding="utf-8",
        env=environment,
        timeout=TIMEOUT_S,
        check=False,
    )


def test_a_message_gets_a_reply_with_its_cost(spawn: Spawn) -> None:
    child = spawn(*REFERENCE, "-n", "20")
    enter(child, "hello")
    child.expect(r"cut at the token limit, /continue goes on · [\d,]+ new · .*first token .*tok/s")
    child.expect_exact(PROMPT)
    enter(child, "again")
    child.expect(r"[\d,]+ new · (?:[\d,]+ read ahead · )?[\d,]+ reused \(memory\) · first token")
    child.expect_exact(PROMPT)
    leave(child)


def test_ctrl_c_stops_a_reply_and_keeps_what_was_said(spawn: Spawn) -> None:
    # Seconds of work, of which Ctrl-C lets the first few milliseconds pass.
    child = spawn(*REFERENCE, "-n", "8000", "--kv-memory", "8MB")
    enter(child, "hello")
    child.expect_exact("hello")
    child.expect(r"(?s).{300}")
    child.sendintr()
    child.expect("stopped, /continue goes on · [0-9]+ new")
    child.expect_exact(PROMPT)
    enter(child, "/stats")
    child.expect("1 turn in all branches; open: main")
    child.expect(r"([\d,]+) of 8,192 tokens in main")
    assert int(child.match[1].replace(",", "")) < 8000
    child.expect_exact(PROMPT)
    enter(child, "/tree")
    child.expect("1 hello → .*main .here.")
    child.expect_exact(PROMPT)
    leave(child)


def test_ctrl_c_at_the_prompt_clears_the_line_and_twice_leaves(spawn: Spawn) -> None:
    child = spawn(*REFERENCE, "-n", "5")
    child.send("never sent")
    child.expect_exact("never sent")
    child.sendintr()
    child.expect("Ctrl-C again, or Ctrl-D, to leave")
    child.expect_exact(PROMPT)
    enter(child, "/tree")
    child.expect("0 start.*main .here.")
    child.expect_exact(PROMPT)
    child.sendintr()
    child.expect("Ctrl-C again")
    child.expect_exact(PROMPT)
    child.sendintr()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_a_message_can_have_several_lines(spawn: Spawn) -> None:
    child = spawn(*REFERENCE, "-n", "5")
    enter(child, "one\x1b\rtwo")
    child.expect("new · ")
    child.expect_exact(PROMPT)
    enter(child, "/tree")
    child.expect("1 one two → ")
    child.expect_exact(PROMPT)
    leave(child)


def test_fork_regenerate_and_edit_make_branches(spawn: Spawn) -> None:
    child = spawn(*REFERENCE, "-n", "5")
    for line in ("hello", "/regenerate", "/edit 1 goodbye"):
        enter(child, line)
        child.expect("new · ")
        child.expect_exact(PROMPT)
    enter(child, "/fork idea")
    child.expect_exact("you (idea)>")
    enter(child, "/stats")
    child.expect("3 turns in all branches; open: main, idea")
    child.expect_exact("you (idea)>")
    leave(child)


def test_an_error_is_one_line_and_the_chat_goes_on(spawn: Spawn) -> None:
    child = spawn(*REFERENCE, "-n", "5")
    enter(child, "/unod")
    child.expect("recollect: There is no command /unod: did you mean /undo")
    child.expect_exact(PROMPT)
    enter(child, "/undo")
    child.expect("recollect: There is nothing to undo")
    child.expect_exact(PROMPT)
    enter(child, "/quit")
    child.expect(pexpect.EOF)


def test_a_lone_exit_asks(spawn: Spawn) -> None:
    child = spawn(*REFERENCE, "-n", "5")
    enter(child, "exit")
    child.expect_exact("Leave the chat? [Y/n]")
    enter(child, "n")
    child.expect("To send it as a message")
    child.expect_exact(PROMPT)
    enter(child, "quit")
    child.expect_exact("Leave the chat? [Y/n]")
    enter(child, "")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_a_chat_goes_on_with_another_model(spawn: Spawn) -> None:
    child = spawn(*REFERENCE, "-n", "5")
    enter(child, "hello")
    child.expect("new · ")
    child.expect_exact(PROMPT)
    enter(child, "/model reference")  # loaded anew, in place of the former one
    child.expect("replies from now on, with 8,192 tokens of context. It reads 1 turn once.")
    child.expect_exact(PROMPT)
    enter(child, "again")
    child.expect("new · ")
    child.expect_exact(PROMPT)
    enter(child, "/tree")
    child.expect("2 again")
    child.expect_exact(PROMPT)
    child.send(CTRL_D)
    child.expect("Saved. To go on: recollect chat --resume")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_history_comes_back_in_the_next_chat(spawn: Spawn, environment: dict[str, str]) -> None:
    first = spawn(*REFERENCE, "-n", "5")
    enter(first, "remember this line")
    first.expect("new · ")
    first.expect_exact(PROMPT)
    leave(first)
    path = Path(environment["RECOLLECT_HOME"]) / "history"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    second = spawn(*REFERENCE, "-n", "5")
    second.send(UP)
    second.expect_exact("remember this line")
    second.send("\r")
    second.expect("new · ")
    second.expect_exact(PROMPT)
    leave(second)


def test_a_pipe_gets_replies_as_json(environment: dict[str, str]) -> None:
    done = piped(environment, "one\n\ntwo\n", *REFERENCE, "-n", "5", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    turns = [json.loads(line) for line in done.stdout.splitlines()]
    assert [turn["prompt"] for turn in turns] == ["one", "two"]
    assert turns[1]["usage"]["reused_tokens"] > 0


def test_a_pipe_gets_replies_as_text_without_decoration(environment: dict[str, str]) -> None:
    as_json = piped(environment, "one\ntwo\n", *REFERENCE, "-n", "5", "--json")
    as_text = piped(environment, "one\ntwo\n", *REFERENCE, "-n", "5", "--lines")
    replies = [json.loads(line)["reply"] for line in as_json.stdout.splitlines()]
    assert as_text.stdout == "".join(reply + "\n" for reply in replies)
    assert (as_json.stderr, as_text.stderr) == ("", 2 * CUT)


def test_a_question_is_answered_once_about_what_was_piped(environment: dict[str, str]) -> None:
    log = "\n  first line\nthe build failed\n\n"
    options = (*REFERENCE, "-n", "5", "--json")
    asked = piped(environment, log, "What failed?", *options)
    assert (asked.returncode, asked.stderr) == (0, "")
    (turn,) = map(json.loads, asked.stdout.splitlines())
    assert turn["prompt"] == "  first line\nthe build failed\n\nWhat failed?"
    again = piped(environment, log, "Where did it fail?", *options)
    assert json.loads(again.stdout)["usage"]["reused_tokens"] > 0  # the text comes first
    alone = piped(environment, "", "What is this?", *options)
    assert json.loads(alone.stdout)["prompt"] == "What is this?"
    as_text = piped(environment, log, "What failed?", *REFERENCE, "-n", "5")
    line = turn["reply"] + "\n"
    assert as_text.stdout == line.replace("\r\n", "\n").replace("\r", "\n")  # as the test reads it


def test_a_pipe_alone_is_one_message(environment: dict[str, str]) -> None:
    done = piped(environment, "one\n\ntwo\n", *REFERENCE, "-n", "5")
    asked = piped(environment, "", "one\n\ntwo", *REFERENCE, "-n", "5")
    assert (done.returncode, done.stderr) == (0, CUT)
    assert done.stdout == asked.stdout


def test_a_question_at_a_terminal_waits_for_no_input(
    environment: dict[str, str], terminal: Callable[..., Any]
) -> None:
    child = terminal(*CHAT, *REFERENCE, "-n", "5", "hello", env=environment)
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    assert PROMPT not in child.before


@pytest.mark.parametrize(
    ("arguments", "variables"),
    [(["--plain"], {}), ([], {"NO_COLOR": "1"}), ([], {"TERM": "dumb"})],
)
def test_plain_replies_are_the_text_and_move_no_cursor(
    arguments: list[str],
    variables: dict[str, str],
    environment: dict[str, str],
    terminal: Callable[..., Any],
) -> None:
    asked = [*REFERENCE, "-n", "200", "hello", *arguments]
    child = terminal(*CHAT, *asked, env=environment | variables, dimensions=(50, 200))
    child.expect(pexpect.EOF)
    child.close()
    shown = child.before.rpartition("\x1b[?25h")[2]  # after the bar that is drawn while it loads
    assert child.exitstatus == 0
    assert "\x1b[J" not in shown
    assert not re.search(r"\x1b\[[0-9;]*m", shown)


def test_a_pipe_leaves_the_terminal_alone(
    environment: dict[str, str], terminal: Callable[..., Any]
) -> None:
    chat = " ".join([*CHAT, *REFERENCE, "-n", "5"])
    script = f"printf 'hi\\n' | {chat} > {os.devnull}; read line; echo got:$line"
    child = terminal("/bin/sh", "-c", script, env=environment)
    child.sendline("typed")
    child.expect("got:typed")
    child.expect(pexpect.EOF)
    child.close()


def test_an_error_in_a_turn_keeps_the_turns_before_and_is_status_2(
    environment: dict[str, str],
) -> None:
    done = piped(environment, f"one\n{'long ' * 3000}\nthree\n", *REFERENCE, "-n", "5", "--json")
    assert done.returncode == 2
    assert [json.loads(line)["prompt"] for line in done.stdout.splitlines()] == ["one"]
    assert done.stderr.startswith("recollect: ")
    assert done.stderr.count("\n") == 1


def test_a_bad_model_is_one_line_and_status_2(environment: dict[str, str]) -> None:
    done = piped(environment, "hello\n", "--model", "no such model")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("recollect: There is no model")
    assert done.stderr.count("\n") == 1


@pytest.mark.model
def test_a_real_model_reads_nothing_twice(environment: dict[str, str]) -> None:
    environment.pop("RECOLLECT_HOME")  # where the model is
    prompts = "My name is Alex.\nWhat is my name?\n"
    done = piped(environment, prompts, "--json", "-n", "24")
    assert done.returncode == 0
    first, second = (json.loads(line)["usage"] for line in done.stdout.splitlines())
    known = first["prompt_tokens"] + first["generated_tokens"]
    # The last token generated has no KV yet; all others have, and are not read again.
    assert second["reused_tokens"] >= known - 1
    assert second["reused_tokens"] + second["computed_tokens"] == second["prompt_tokens"]


def test_a_reply_at_a_terminal_has_a_soft_limit(spawn: Spawn) -> None:
    child = spawn(*REFERENCE)
    enter(child, "hello")
    child.expect("cut at the token limit, /continue goes on")
    child.expect_exact(PROMPT)
    enter(child, "/stats")
    child.expect(r"context.*2,\d\d\d of 8,192")
    child.expect(r"sampling.*greedy")
    child.expect_exact(PROMPT)
    enter(child, "/continue")
    child.expect("cut at the token limit, /continue goes on")
    child.expect_exact(PROMPT)
    enter(child, "/stats")
    child.expect(r"context.*4,\d\d\d of 8,192")
    child.expect_exact(PROMPT)
    leave(child)
