"""A chat by question, pipe or file, on the reference model."""

import io
import json
import re
from pathlib import Path

import pytest

from recollect.cli.batch import MOST_CHARACTERS, answer_all, one_message, open_prompts
from recollect.cli.display import printable
from recollect.conversation.model import Model
from recollect.errors import ConfigError, ContextFullError
from recollect.types import SamplingParams

SHORT = SamplingParams(max_tokens=6, ignore_eos=True)
RUNAWAY = SamplingParams(logit_bias={ord("a"): 100.0})
"""A reply that says `a` for ever."""


def prompts_of(path: Path) -> list[str]:
    with open_prompts(path) as prompts:
        return list(prompts)


def test_blank_lines_are_no_prompts_and_spaces_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffone\r\n\n   \n  two\nünf".encode())
    assert prompts_of(path) == ["one", "  two", "ünf"]


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        prompts_of(tmp_path / "nowhere")


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "prompts.bin"
    path.write_bytes(b"one\n\xff\xfe\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        prompts_of(path)


@pytest.mark.slow
def test_a_line_without_an_end_is_not_waited_for(tmp_path: Path) -> None:
    """As of a device such as /dev/zero, which would take all memory."""
    path = tmp_path / "prompts.txt"
    path.write_text("one\n" + "x" * (MOST_CHARACTERS - 1) + "\n\ntwo\n")
    with open_prompts(path) as prompts:
        assert next(prompts) == "one"
        with pytest.raises(ConfigError, match="has a line of"):
            next(prompts)
    path.write_text("x" * (MOST_CHARACTERS - 2) + "\ntwo")
    assert [len(line) for line in prompts_of(path)] == [MOST_CHARACTERS - 2, 3]


@pytest.mark.parametrize(
    ("question", "piped", "expected"),
    [
        ("What failed?", "one\n  two\n\n", "one\n  two\n\nWhat failed?"),
        ("What failed?", " \n", "What failed?"),
        (None, "\n\n  indented\nlines  \n", "  indented\nlines"),
    ],
)
def test_what_is_piped_stands_before_the_question(
    question: str | None, piped: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(piped.encode())))
    assert one_message(question) == expected


@pytest.mark.parametrize(
    ("question", "piped", "wrong"),
    [
        (None, b" \n\n", "has no text"),
        ("  ", b"text", "question is empty"),
        (None, b"\xff\xfe", "not UTF-8"),
        ("What?", b"x" * MOST_CHARACTERS, "--lines"),
    ],
)
def test_what_is_no_message_is_refused(
    question: str | None, piped: bytes, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(piped)))
    with pytest.raises(ConfigError, match=wrong):
        one_message(question)


def test_input_without_an_end_is_not_waited_for() -> None:
    with Path("/dev/zero").open(encoding="utf-8") as endless, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", endless)
        with pytest.raises(ConfigError, match="characters or more"):
            one_message(None)


def test_each_turn_is_one_json_object(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    session = model.session(params=SHORT)
    answer_all(session, ["one", "two"], as_json=True)
    turns = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [turn["prompt"] for turn in turns] == ["one", "two"]
    assert all(
        set(turn) == {"prompt", "reply", "finish_reason", "ended", "usage"} for turn in turns
    )
    replies = [node for node in session.path() if node.role == "assistant"]
    assert [turn["reply"] for turn in turns] == [node.content for node in replies]
    assert {turn["ended"] for turn in turns} == {None}
    assert [turn["usage"] for turn in turns] == [node.usage for node in replies]


@pytest.mark.slow
def test_a_turn_says_that_it_repeated_itself(
    model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    answer_all(model.session(params=RUNAWAY), ["one"], as_json=True)
    turn = json.loads(capsys.readouterr().out)
    assert (turn["finish_reason"], turn["ended"]) == ("length", "repetition")


def test_text_is_the_replies_and_nothing_else(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    session = model.session(params=SHORT)
    answer_all(session, ["one", "two"], as_json=False)
    replies = [node.content for node in session.path() if node.role == "assistant"]
    assert out.getvalue() == "".join(reply + "\n" for reply in replies)


@pytest.mark.parametrize("is_terminal", [True, False])
@pytest.mark.parametrize(
    ("params", "why"),
    [
        (RUNAWAY, "recollect: The reply repeated itself and was ended.\n"),
        (SHORT, "recollect: The reply was cut at the token limit.\n"),
        (SamplingParams(logit_bias={ord("a"): 100.0}, stop=("aa",)), ""),
    ],
)
def test_why_text_was_cut_is_told_beside_it(
    params: SamplingParams,
    why: str,
    is_terminal: bool,
    model: Model,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = io.StringIO()
    monkeypatch.setattr(out, "isatty", lambda: is_terminal)
    monkeypatch.setattr("sys.stdout", out)
    answer_all(model.session(params=params), ["one"], as_json=False, plain=True)
    assert capsys.readouterr().err == why
    assert "recollect:" not in out.getvalue()


OURS = re.compile(r"\r(?:\x1b\[\d+[AC])*\x1b\[J|\x1b\[[0-9;]+m")
"""How text is drawn again, and styled."""


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "how", [{"as_json": True}, {"as_json": False}, {"as_json": False, "plain": True}]
)
def test_control_characters_of_the_model_do_not_reach_a_terminal(
    model: Model, monkeypatch: pytest.MonkeyPatch, how: dict[str, bool]
) -> None:
    out = io.StringIO()
    monkeypatch.setattr(out, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setenv("TERM", "xterm")
    params = SamplingParams(max_tokens=400, ignore_eos=True)
    answer_all(model.session(params=params), ["one"], **how)
    shown = out.getvalue()
    if how == {"as_json": False}:
        assert OURS.search(shown)
        shown = OURS.sub("", shown)
    assert printable(shown) == shown


def test_the_turns_before_an_error_are_printed(
    model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    session = model.session(params=SHORT)
    with pytest.raises(ContextFullError):
        answer_all(session, ["one", "long " * 1000, "three"], as_json=True)
    assert [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()] == ["one"]
