"""What a chat holds and prints."""

import re
import signal
from collections.abc import Callable
from dataclasses import replace
from io import StringIO

import pytest

from recollect.cli.display import format_duration
from recollect.cli.state import Chat, Totals, usage_line
from recollect.conversation.tree import Tree
from recollect.conversation.turn import Reply
from recollect.errors import ConversationError
from recollect.types import FinishReason, Usage


def usage(computed: int = 31, reused: int = 96, prefill_tps: float | None = 2000.0) -> Usage:
    return Usage(
        prompt_tokens=computed + reused,
        reused_tokens=reused,
        computed_tokens=computed,
        generated_tokens=9,
        ttft_s=0.041,
        prefill_tps=prefill_tps,
        decode_tps=58.2,
    )


def reply(reason: FinishReason = "stop", cost: Usage | None = None) -> Reply:
    tree = Tree()
    node = tree.add(tree.root, "user", "hello")
    return Reply(text="hello", finish_reason=reason, usage=cost or usage(), node=node)


def test_the_line_under_a_reply() -> None:
    expected = "31 new · 96 reused (memory) · first token 41 ms · 58 tok/s"
    assert expected == usage_line(reply())


@pytest.mark.parametrize(
    ("restored", "whence"),
    [(0, "96 reused (memory)"), (96, "96 reused (disk)"), (22, "96 reused (74 memory, 22 disk)")],
)
def test_the_line_says_where_kv_came_from(restored: int, whence: str) -> None:
    cost = replace(usage(), restored_tokens=restored)
    assert f" · {whence} · " in usage_line(reply(cost=cost))


def test_the_line_tells_what_was_read_ahead_from_what_was_there_before() -> None:
    line = usage_line(reply(cost=replace(usage(computed=46, reused=0), read_ahead_tokens=45)))
    assert line.startswith("1 new · 45 read ahead · first token")


def test_the_line_says_how_many_tokens_were_guessed() -> None:
    line = usage_line(reply(cost=replace(usage(), drafted_tokens=40, accepted_tokens=31)))
    assert line.endswith(" tok/s (31 guessed right)")


def test_speed_is_not_that_of_tokens_nobody_waited_for() -> None:
    totals = Totals()
    totals.add(replace(usage(computed=1000), read_ahead_tokens=999))
    assert totals.best_prefill_tps is None


def test_the_line_says_nothing_of_what_was_not_reused() -> None:
    assert "reused" not in usage_line(reply(cost=usage(reused=0)))


@pytest.mark.parametrize(
    ("reason", "begins"),
    [
        ("cancelled", "stopped, /continue goes on · "),
        ("length", "cut at the token limit, /continue goes on · "),
    ],
)
def test_the_line_says_why_a_reply_is_not_whole(reason: FinishReason, begins: str) -> None:
    assert usage_line(reply(reason)).startswith(begins)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0414, "41 ms"), (0.9994, "999 ms"), (1.25, "1.2 s"), (90, "1.5 min")]
)
def test_durations_have_a_unit_that_fits(seconds: float, text: str) -> None:
    assert text == format_duration(seconds)


def test_saved_time_is_taken_from_the_fastest_long_prompt_alone() -> None:
    totals = Totals()
    totals.add(usage(computed=31, prefill_tps=10.0))
    assert totals.saved_s is None
    totals.add(usage(computed=1000, reused=0, prefill_tps=1000.0))
    totals.add(usage(computed=1000, reused=904, prefill_tps=500.0))
    assert totals.saved_s == pytest.approx(1.0)


def test_control_characters_of_the_model_do_not_reach_the_terminal(
    make_chat: Callable[..., Chat],
    screen: StringIO,
) -> None:
    chat = make_chat(max_tokens=400)
    given = chat.say("hello")
    assert given is not None
    assert any(ord(character) < 32 for character in given.text if character not in "\n\t")
    shown = screen.getvalue()
    assert not any(ord(character) < 32 for character in shown if character not in "\n\t")


def test_the_reply_is_on_the_screen_before_its_line(chat: Chat, screen: StringIO) -> None:
    given = chat.say("hello")
    assert given is not None
    assert screen.getvalue().endswith(f"\n  {usage_line(given)}\n\n")


def test_ctrl_c_in_the_middle_keeps_what_was_said(
    make_chat: Callable[..., Chat],
    screen: StringIO,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chat = make_chat(max_tokens=500)
    write = screen.write
    pieces = 0

    def write_and_interrupt(text: str) -> int:
        nonlocal pieces
        pieces += 1
        if pieces == 20:
            signal.raise_signal(signal.SIGINT)
        return int(write(text))

    monkeypatch.setattr(screen, "write", write_and_interrupt)
    given = chat.say("hello")
    assert given is not None
    assert given.finish_reason == "cancelled"
    assert 1 <= given.usage.generated_tokens < 500
    assert chat.session.tip is given.node
    assert "stopped, /continue goes on · " in screen.getvalue()


def test_ctrl_c_before_the_first_token_leaves_the_conversation_as_it_was(
    chat: Chat,
    screen: StringIO,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session, engine = chat.session, chat.model.engine
    start = session.stream

    def interrupted(text: str | None, **settings: object) -> object:
        with engine.lock:  # which lets no forward pass begin
            stream = start(text)
            stream.stop()
            signal.raise_signal(signal.SIGINT)
        return stream

    monkeypatch.setattr(session, "stream", interrupted)
    tip = session.tip
    assert chat.say("hello") is None
    assert session.tip is tip
    assert "The reply was stopped before it began" in screen.getvalue()


def test_ctrl_c_is_as_before_after_a_reply(chat: Chat) -> None:
    before = signal.getsignal(signal.SIGINT)
    chat.say("hello")
    assert signal.getsignal(signal.SIGINT) is before


def test_each_branch_of_a_conversation_is_a_session(make_chat: Callable[..., Chat]) -> None:
    chat = make_chat(keep=True)
    chat.say("one")
    chat.add_session("idea", lambda: chat.session.fork(name="idea"))
    chat.say("two")
    kept = chat.session.conversation.name
    again = Chat(chat.model, chat.console, chat.model.resume(kept))
    assert (again.current, list(again.sessions)) == ("main", ["main", "idea"])
    assert [len(session.path()) for session in again.sessions.values()] == [2, 4]


def test_a_branch_from_before_the_first_turn_is_there_again(
    make_chat: Callable[..., Chat],
) -> None:
    chat = make_chat(keep=True, system="be brief")
    chat.add_session("idea", lambda: chat.session.fork(name="idea"))
    chat.say("one")
    again = Chat(chat.model, chat.console, chat.model.resume())
    roles = {name: [m["role"] for m in s.transcript()] for name, s in again.sessions.items()}
    assert roles == {"main": ["system"], "idea": ["system", "user", "assistant"]}


def test_what_is_begun_anew_is_kept_where_the_one_before_was(
    make_chat: Callable[..., Chat],
) -> None:
    chat = make_chat(keep=True)
    chat.say("one")
    chat.start_anew("be brief")
    chat.say("two")
    assert [kept.turns for kept in chat.model.sessions()] == [1, 1]


def test_a_session_can_be_called_only_what_the_journal_can_keep(
    make_chat: Callable[..., Chat],
) -> None:
    chat = make_chat(keep=True)
    with pytest.raises(ConversationError):
        chat.add_session("-x", chat.session.fork)
    assert list(chat.sessions) == ["main"]


def test_what_is_left_out_of_a_full_context_is_said(make_chat: Callable[..., Chat]) -> None:
    chat = make_chat(context_length=200)
    chat.session.overflow = "drop_oldest"
    lines = [usage_line(given) for text in "abcdefgh" if (given := chat.say(text * 9)) is not None]
    assert "left out" not in lines[0]
    assert re.search(r"the oldest \d turns are left out, the context is full", lines[-1])
