"""What a chat begins and ends with."""

from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest

import recollect
from recollect.cli.display import count
from recollect.cli.state import Chat, farewell, statistics, welcome
from recollect.journal.records import Entry, NewNode
from recollect.types import FinishReason


@pytest.fixture
def kept(make_chat: Callable[..., Chat]) -> Chat:
    return make_chat(keep=True)


def resumed(chat: Chat, screen: StringIO) -> str:
    """Resume the last conversation, and return what is shown then."""
    again = Chat(chat.model, chat.console, chat.model.resume())
    screen.seek(0)
    screen.truncate()
    welcome(again)
    return screen.getvalue()


def test_a_chat_that_is_not_kept_says_so(chat: Chat, screen: StringIO) -> None:
    welcome(chat)
    assert screen.getvalue().splitlines()[2:] == ["Nothing of this chat is saved (--no-save)."]


def test_a_new_chat_says_what_is_spoken_to(kept: Chat, screen: StringIO) -> None:
    welcome(kept)
    assert screen.getvalue().startswith("reference · exact · 2,048 tokens of context\n? lists")
    assert screen.getvalue().count("\n") == 2


def test_it_says_what_guesses(chat: Chat, screen: StringIO, tmp_path: Path) -> None:
    """In its first line, and in what `/stats` tells."""
    with recollect.load(
        "reference", home=tmp_path / "other", kv_disk=0, draft_model="reference"
    ) as model:
        guessed = Chat(model, chat.console, model.session())
        welcome(guessed)
        assert screen.getvalue().startswith("reference, guessed by reference · fast · ")
        assert ("guessed by", "reference") in statistics(guessed)
    assert "guessed by" not in dict(statistics(chat))


def test_a_new_chat_with_instructions_is_not_a_resumed_one(kept: Chat, screen: StringIO) -> None:
    begun = Chat(kept.model, kept.console, kept.model.session("Be brief.", keep=True, name="new"))
    welcome(begun)
    assert "Resumed" not in screen.getvalue()


def test_a_resumed_chat_shows_its_branches_and_the_last_turns(kept: Chat, screen: StringIO) -> None:
    for text in ("one", "two", "three"):
        kept.say(text)
    kept.add_session("idea", lambda: kept.session.fork(name="idea"))
    shown = resumed(kept, screen)
    assert ": main 3 turns (here) · idea 3 turns\n" in shown
    assert "…\nyou: two\n" in shown
    assert "you: three\n" in shown
    assert "one" not in shown


@pytest.mark.parametrize(
    ("finish_reason", "told"),
    [
        ("cancelled", "The last reply was stopped: /continue goes on with it."),
        ("length", "The last reply was cut: /continue goes on with it."),
    ],
)
def test_a_resumed_chat_says_that_the_last_reply_was_cut(
    kept: Chat, screen: StringIO, finish_reason: FinishReason, told: str
) -> None:
    messages = [
        NewNode(role="user", content="one"),
        NewNode(role="assistant", content="beg", finish_reason=finish_reason),
    ]
    kept.session.conversation.add(kept.session.tip, messages, tip="main")
    assert resumed(kept, screen).splitlines()[-1] == told


def test_a_resumed_chat_says_nothing_of_a_reply_that_is_whole(kept: Chat, screen: StringIO) -> None:
    messages = [
        NewNode(role="user", content="one"),
        NewNode(role="assistant", content="whole", finish_reason="stop"),
    ]
    kept.session.conversation.add(kept.session.tip, messages, tip="main")
    assert resumed(kept, screen).splitlines()[-1] == "whole"


def test_long_messages_are_shortened_and_move_no_cursor(kept: Chat, screen: StringIO) -> None:
    long = "begin\x1b[2J " + "middle " * 200 + "end"
    parent = kept.session.tip
    messages = [NewNode(role="user", content=long), NewNode(role="assistant", content=long)]
    kept.session.conversation.add(parent, messages, tip="main")
    shown = resumed(kept, screen)
    assert "\x1b" not in shown
    assert shown.count("begin") == shown.count("end") == 2
    assert len(shown) < 1600


def test_a_conversation_of_another_model_says_so(kept: Chat, screen: StringIO) -> None:
    journal = kept.model.journal
    chat_id = journal.create("poem", model="bard", fingerprint="f00d").id
    reply = NewNode(role="assistant", content="uno", token_ids=[1], fingerprint="f00d")
    turn = [NewNode(role="user", content="one"), reply]
    last = journal.append(chat_id, None, turn, tip="main")[-1]
    assert "1 reply of this branch came from bard: reference reads the text" in resumed(
        kept, screen
    )
    again = [replace(turn[0], content="two"), replace(reply, content="due")]
    journal.append(chat_id, last, again, tip="main")
    journal.write(chat_id, Entry(nodes=(), model=("reference", "f00d")))
    assert "2 replies of this branch came from another model" in resumed(kept, screen)


def test_leaving_says_how_to_go_on(kept: Chat, screen: StringIO) -> None:
    farewell(kept)
    assert screen.getvalue() == ""
    kept.session.conversation.rename("a poem")
    farewell(kept)
    assert screen.getvalue() == ""
    kept.say("one")
    farewell(kept)
    assert screen.getvalue().endswith("\nSaved. To go on: recollect chat --resume 'a poem'\n")


def test_what_is_not_kept_ends_without_a_word(chat: Chat, screen: StringIO) -> None:
    chat.say("one")
    before = screen.getvalue()
    farewell(chat)
    assert screen.getvalue() == before


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 turns"), (1, "1 turn"), (2, "2 turns"), (1234, "1,234 turns")]
)
def test_numbers_have_their_noun(number: int, text: str) -> None:
    assert text == count(number, "turn")
