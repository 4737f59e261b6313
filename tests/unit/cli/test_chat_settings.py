"""What `/set` and `/new` change in a chat, and what is said where the context is full."""

from collections.abc import Callable
from io import StringIO

import pytest

from recollect.cli.chat_settings import NAMES
from recollect.cli.commands import run_command
from recollect.cli.repl import handle_line
from recollect.cli.state import Chat
from recollect.errors import InvalidParameterError


@pytest.mark.parametrize(
    ("typed", "field", "value"),
    [
        ("temperature 0.7", "temperature", 0.7),
        ("top-k 40", "top_k", 40),
        ("--top-p 0.9", "top_p", 0.9),
        ("min_p 0.1", "min_p", 0.1),
        ("seed 7", "seed", 7),
        ("seed none", "seed", None),
        ("max_tokens NONE", "max_tokens", None),
        ("repetition_penalty 1.1", "repetition_penalty", 1.1),
        ("presence_penalty -1", "presence_penalty", -1.0),
        ("frequency_penalty 0.5", "frequency_penalty", 0.5),
        ('stop "THE END" x', "stop", ("THE END", "x")),
        ("stop none", "stop", ()),
        ("ignore_eos off", "ignore_eos", False),
    ],
)
def test_a_setting_holds_in_all_sessions(chat: Chat, typed: str, field: str, value: object) -> None:
    handle_line(chat, "one")
    run_command(chat, "/fork idea")
    run_command(chat, f"/set {typed}")
    assert all(getattr(one.params, field) == value for one in chat.sessions.values())
    run_command(chat, "/new")
    assert getattr(chat.session.params, field) == value


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("temprature 1", "There is no setting 'temprature': give one of temperature"),
        ("temperature warm", "temperature is a number from 0 on, not 'warm'"),
        ("temperature -1", "temperature is -1.0; it must be 0 or more"),
        ("temperature nan", "it must be 0 or more"),
        ("top_p 2", "it must be above 0 and at most 1"),
        ("top_k 1.5", "top_k is a whole number"),
        ("max_tokens 0", "it must be at least 1"),
        ("max_tokens --5", "max_tokens is a whole number"),
        ('stop "open', "stop is texts in quotes"),
        ("ignore_eos maybe", "on or off"),
        ("overflow sometimes", "overflow is error or drop-oldest, not 'sometimes'"),
        ("overflow", "overflow is error or drop-oldest"),
        ("temperature", "temperature is a number from 0 on"),
        ("top_p", "top_p is a number above 0 and up to 1"),
        ("seed", "seed is a whole number from 0 on, or none"),
    ],
)
def test_what_cannot_be_set_changes_nothing(chat: Chat, typed: str, told: str) -> None:
    before = chat.params
    with pytest.raises(InvalidParameterError, match=told):
        run_command(chat, f"/set {typed}")
    assert chat.params == chat.session.params == before


def test_alone_it_lists_all(chat: Chat, screen: StringIO) -> None:
    run_command(chat, "/set temperature 0.25")
    run_command(chat, "/set overflow drop-oldest")
    run_command(chat, "/set")
    listed = dict(line.split()[:2] for line in screen.getvalue().splitlines()[2:])
    assert set(listed) == set(NAMES)
    assert (listed["temperature"], listed["seed"]) == ("0.25", "none")
    assert listed["overflow"] == "drop-oldest"


def test_a_full_context_names_the_ways_out_and_one_of_them_works(
    make_chat: Callable[..., Chat], screen: StringIO
) -> None:
    chat = make_chat(context_length=200)
    for _ in range(30):
        handle_line(chat, "some more words")
        if "Ways out" in screen.getvalue():
            break
    assert "/set overflow drop-oldest" in screen.getvalue()
    handle_line(chat, "/set overflow drop-oldest")
    turns = chat.session.tip.turns
    handle_line(chat, "some more words")
    assert chat.session.tip.turns == turns + 1
    assert "left out, the context is full" in " ".join(screen.getvalue().split())
    handle_line(chat, "/new")
    assert chat.session.overflow == "drop_oldest"
    handle_line(chat, "word " * 400)
    assert "/set overflow" not in screen.getvalue().rpartition("Ways out")[2]


def test_a_reply_that_fills_the_context_names_them_too(
    make_chat: Callable[..., Chat], screen: StringIO
) -> None:
    chat = make_chat(context_length=200, max_tokens=180)
    handle_line(chat, "/set max_tokens 20")
    handle_line(chat, "one")
    assert "The context is full" not in screen.getvalue()
    handle_line(chat, "/set max_tokens none")
    handle_line(chat, "two")
    assert "The context is full. Ways out: /set overflow drop-oldest" in screen.getvalue()


def test_new_keeps_the_instructions(make_chat: Callable[..., Chat], screen: StringIO) -> None:
    chat = make_chat(system="be brief")
    handle_line(chat, "one")
    run_command(chat, "/new")
    assert chat.session.transcript() == [{"role": "system", "content": "be brief"}]
    assert "with the same instructions" in screen.getvalue()
    assert "/switch main-1 goes back" in screen.getvalue()


@pytest.mark.parametrize("line", ["?", "/?", "/help", "? "])
def test_a_question_mark_is_help(chat: Chat, screen: StringIO, line: str) -> None:
    handle_line(chat, line)
    assert "/undo" in screen.getvalue()
    assert not chat.session.path()


@pytest.mark.parametrize("line", ["/exit", "/bye", "/quit", "/EXIT"])
def test_each_word_for_leaving_leaves(chat: Chat, line: str) -> None:
    handle_line(chat, line)
    assert chat.leaving
