"""Chats that share a conversation, by hand and by pipe, and numbers that are the same everywhere."""

import io
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from recollect.cli.batch import answer_all
from recollect.cli.main import app
from recollect.cli.repl import handle_line
from recollect.cli.state import Chat, farewell, welcome
from recollect.conversation.model import Model
from recollect.types import SamplingParams

SHORT = SamplingParams(max_tokens=6, ignore_eos=True)


def resumed(model: Model, name: str, screen: io.StringIO) -> Chat:
    return Chat(model, Console(file=screen, width=120), model.resume(name, params=SHORT))


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["conversations", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def two(home: Path, model: Model) -> tuple[Chat, Chat]:
    model.session("Be brief.", params=SHORT, name="trains").respond("one")
    return resumed(model, "trains", io.StringIO()), resumed(model, "trains", io.StringIO())


def shown(chat: Chat) -> str:
    screen = chat.console.file
    assert isinstance(screen, io.StringIO)
    text = screen.getvalue()
    screen.seek(0)
    screen.truncate()
    return text


@pytest.mark.slow
def test_the_second_chat_says_that_it_goes_on_as_a_branch(two: tuple[Chat, Chat]) -> None:
    first, second = two
    handle_line(first, "first")
    assert "branch" not in shown(first)
    handle_line(second, "second")
    text = shown(second)
    told = [line for line in text.splitlines() if "main-2" in line]
    assert len(told) == 1
    assert "Another program has moved the branch 'main'" in told[0]
    assert "goes on in the new branch 'main-2'" in text.replace("\n", " ")
    assert "To go on where the other program is: recollect chat --resume trains\n" in text
    assert second.current == "main-2"
    handle_line(second, "again")
    assert "has moved" not in shown(second)
    handle_line(second, "/tree")
    assert "main-2 (here)" in shown(second)
    tips = second.model.journal.load("trains").tips
    assert set(tips) == {"main", "main-2"}


def test_an_undo_in_the_second_chat_says_so_too(two: tuple[Chat, Chat]) -> None:
    first, second = two
    handle_line(first, "first")
    shown(second)
    handle_line(second, "/undo")
    assert "'main-2'" in shown(second)


def test_a_pipe_says_so_on_stderr(
    two: tuple[Chat, Chat], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = two
    handle_line(first, "first")
    answer_all(second.session, ["second", "third"], as_json=True)
    captured = capsys.readouterr()
    assert captured.err.count("main-2") == 1
    assert captured.out.count('"prompt"') == 2


def test_a_chat_names_its_conversation_as_it_is_called_by_then(two: tuple[Chat, Chat]) -> None:
    chat, _ = two
    run("rename", "trains", "boats")
    handle_line(chat, "/name")
    assert "'boats'" in shown(chat)
    run("rename", "boats", "cars")
    farewell(chat)
    assert "recollect chat --resume cars" in shown(chat)
    run("delete", "cars", "--yes")
    farewell(chat)
    assert "deleted" in shown(chat)


def test_a_question_without_reply_is_shown_and_can_be_answered(
    two: tuple[Chat, Chat],
) -> None:
    killed, _ = two
    killed.session.conversation.ask(killed.session.tip, "two", tip="main")
    chat = resumed(killed.model, "trains", io.StringIO())
    welcome(chat)
    text = shown(chat)
    assert "you: two" in text
    assert "/regenerate" in text
    handle_line(chat, "/regenerate")
    assert [node.content for node in chat.session.path() if node.role == "user"] == ["one", "two"]
    assert chat.session.tip.role == "assistant"


def numbers(text: str) -> dict[str, str]:
    """Return what the lines of a tree say, by their number after `#`."""
    found = (re.search(r"\d+ (\w+) →.*#(\d+)", line) for line in text.splitlines())
    return {one[2]: one[1] for one in found if one is not None}


@pytest.mark.slow
def test_a_reply_has_one_number_wherever_it_is_shown(
    home: Path, model: Model, make_model: Callable[..., Model]
) -> None:
    """Another conversation comes first, so the journal's own ids are others."""
    model.session(params=SHORT, name="other").respond("zero")
    chat = Chat(
        model,
        Console(file=io.StringIO(), width=120),
        model.session("Be brief.", params=SHORT, name="trains"),
    )
    for line in ("one", "two", "/undo", "three", "/fork idea", "four"):
        handle_line(chat, line)
    shown(chat)
    handle_line(chat, "/tree")
    drawn = numbers(shown(chat))
    assert set(drawn.values()) == {"one", "two", "three", "four"}
    assert numbers(run("show", "trains")) == drawn
    again = resumed(model, "trains", io.StringIO())
    handle_line(again, "/tree")
    assert numbers(shown(again)) == drawn
    for number, said in drawn.items():
        handle_line(again, f"/goto #{number}")
        asked = again.session.tip.parent
        assert asked is not None
        assert asked.content == said


@pytest.mark.slow
def test_a_reply_keeps_its_number_whatever_came_between(home: Path, model: Model) -> None:
    chat = Chat(
        model,
        Console(file=io.StringIO(), width=120),
        model.session("Be brief.", params=SHORT, name="trains"),
    )
    conversation = chat.session.conversation
    handle_line(chat, "one")
    conversation.take_back(conversation.ask(chat.session.tip, "stopped", tip="main"))
    handle_line(chat, "/regenerate")
    with chat.session.stream("interrupted") as stream:
        next(iter(stream))
        stream.stop()
    handle_line(chat, "/undo")
    beside = resumed(model, "trains", io.StringIO())
    handle_line(beside, "beside")
    # As a process that was killed leaves it: asked, and never answered.
    beside.session.conversation.ask(beside.session.tip, "killed", tip=beside.session.name)
    for line in ("two", "/undo", "three", "/fork idea", "four"):
        handle_line(chat, line)
    handle_line(beside, "again")
    shown(chat)
    handle_line(chat, "/tree")
    live = numbers(shown(chat))
    assert set(live.values()) == {"one", "interrupted", "two", "three", "four"}
    kept = numbers(run("show", "trains"))
    assert set(kept.values()) == {*live.values(), "beside", "again"}
    assert live.items() <= kept.items()
    shown(beside)
    handle_line(beside, "/tree")
    assert numbers(shown(beside)).items() <= kept.items()
    again = resumed(model, "trains", io.StringIO())
    handle_line(again, "/tree")
    assert numbers(shown(again)) == kept
    for number, said in live.items():
        handle_line(chat, f"/goto #{number}")
        asked = chat.session.tip.parent
        assert asked is not None
        assert asked.content == said
    shown(chat)
    handle_line(chat, "/goto #99")
    assert "There is no reply #99: /tree shows the replies with their numbers." in shown(chat)


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
@pytest.mark.parametrize("file", ["a.md", "a.json"])
def test_an_exported_conversation_can_be_read_by_its_owner_only(
    two: tuple[Chat, Chat], tmp_path: Path, file: str
) -> None:
    before = os.umask(0)
    try:
        run("export", "trains", str(tmp_path / file))
        assert (
            CliRunner().invoke(app, ["export", "trains", str(tmp_path / "kv"), "--no-kv"]).exit_code
            == 0
        )
    finally:
        os.umask(before)
    for path in (tmp_path / file, tmp_path / "kv"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
