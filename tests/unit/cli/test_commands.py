"""The commands of a chat, on the reference model."""

import re
from collections.abc import Callable
from io import StringIO
from typing import Any

import pytest

from recollect.cli.commands import COMMANDS, is_command, run_command
from recollect.cli.repl import handle_line
from recollect.cli.state import Chat
from recollect.engine import prompt_ends
from recollect.errors import (
    ContextFullError,
    ConversationError,
    InvalidParameterError,
    NameTakenError,
    RecollectError,
    RewindError,
    StoreError,
    UnknownCheckpointError,
)
from recollect.kv.disk import DiskStore
from recollect.text.tokenizer import ByteTokenizer
from recollect.types import SamplingParams


def said(chat: Chat) -> list[str]:
    """Return the user's messages on the current path."""
    return [node.content for node in chat.session.path() if node.role == "user"]


def take(screen: StringIO) -> str:
    """Return what was printed since the last call."""
    text = screen.getvalue()
    screen.seek(0)
    screen.truncate()
    return text


def pinned_blocks(chat: Chat) -> int:
    return sum(cached.pins > 0 for cached in chat.model.engine.cache.blocks())


def test_undo_takes_back_the_last_turn(chat: Chat) -> None:
    for text in ("one", "two"):
        handle_line(chat, text)
    run_command(chat, "/undo")
    assert said(chat) == ["one"]


def test_undo_takes_a_number(chat: Chat) -> None:
    for text in ("one", "two", "three"):
        handle_line(chat, text)
    run_command(chat, "/undo 2")
    assert said(chat) == ["one"]


@pytest.mark.parametrize(
    ("number", "left"), [(0, []), (1, ["one"]), (2, ["one", "two"]), (3, ["one", "two", "three"])]
)
def test_rewind_goes_to_after_that_turn(chat: Chat, number: int, left: list[str]) -> None:
    for text in ("one", "two", "three"):
        handle_line(chat, text)
    run_command(chat, f"/rewind {number}")
    assert said(chat) == left


def test_rewind_to_the_start_keeps_the_instructions(make_chat: Callable[..., Chat]) -> None:
    chat = make_chat(system="be brief")
    handle_line(chat, "one")
    run_command(chat, "/rewind 0")
    assert chat.session.transcript() == [{"role": "system", "content": "be brief"}]


@pytest.mark.parametrize(
    ("turns", "line", "told"),
    [
        (3, "/rewind 4", "There is no turn 4: this branch has 3 turns"),
        (1, "/rewind 99", "There is no turn 99: this branch has 1 turn;"),
        (0, "/rewind 1", "There is no turn 1: nothing has been said on this branch yet"),
        (3, "/undo 4", "has 3 turns, so 4 cannot be undone: undo between 1 and 3"),
        (3, "/undo 0", "has 3 turns, so 0 cannot be undone: undo between 1 and 3"),
        (1, "/undo 2", "has 1 turn, so 2 cannot be undone: undo that one"),
        (0, "/undo", "There is nothing to undo: this branch has no turn yet"),
    ],
)
def test_a_turn_that_is_not_there_is_refused_and_changes_nothing(
    chat: Chat, turns: int, line: str, told: str
) -> None:
    for number in range(turns):
        handle_line(chat, f"message {number}")
    tip = chat.session.tip
    with pytest.raises(RewindError, match=told):
        run_command(chat, line)
    assert chat.session.tip is tip


@pytest.mark.parametrize(
    "line", ["/rewind", "/rewind x", "/rewind -1", "/undo ²", "/goto", "/edit"]
)
def test_what_is_no_number_is_refused(chat: Chat, line: str) -> None:
    with pytest.raises(InvalidParameterError):
        run_command(chat, line)


def test_goto_reaches_a_turn_that_was_taken_back(chat: Chat) -> None:
    for text in ("one", "two"):
        handle_line(chat, text)
    taken_back = chat.session.tip
    run_command(chat, "/rewind 0")
    run_command(chat, f"/goto #{taken_back.id}")
    assert chat.session.tip is taken_back


def test_goto_refuses_what_is_no_reply(chat: Chat) -> None:
    handle_line(chat, "one")
    for line in ("/goto 0", "/goto 1", "/goto 77"):
        with pytest.raises(ConversationError):
            run_command(chat, line)


def test_a_fork_shares_the_past_and_not_the_future(chat: Chat) -> None:
    handle_line(chat, "one")
    run_command(chat, "/fork idea")
    handle_line(chat, "in idea")
    run_command(chat, "/switch main")
    handle_line(chat, "in main")
    assert said(chat) == ["one", "in main"]
    run_command(chat, "/switch idea")
    assert said(chat) == ["one", "in idea"]


@pytest.mark.usefixtures("nothing_read_ahead")  # which takes passes
def test_a_fork_costs_no_forward_pass(chat: Chat) -> None:
    handle_line(chat, "one")
    before = chat.model.engine.forward_passes
    run_command(chat, "/fork idea")
    assert chat.model.engine.forward_passes == before


@pytest.mark.parametrize("name", ["main", "", "two words"])
def test_a_fork_needs_a_name_of_its_own(chat: Chat, name: str) -> None:
    with pytest.raises(RecollectError):
        run_command(chat, f"/fork {name}")
    assert list(chat.sessions) == ["main"]


def test_switch_without_a_name_lists_the_sessions(chat: Chat, screen: StringIO) -> None:
    run_command(chat, "/fork idea")
    take(screen)
    run_command(chat, "/switch")
    assert take(screen) == "main: 0 turns\nidea: 0 turns  (here)\n"
    handle_line(chat, "one")
    take(screen)
    run_command(chat, "/switch")
    assert take(screen) == "main: 0 turns\nidea: 1 turn  (here)\n"


def test_a_session_that_is_not_there_is_named(chat: Chat) -> None:
    with pytest.raises(ConversationError, match="nowhere"):
        run_command(chat, "/switch nowhere")
    with pytest.raises(ConversationError, match="no branch 'nowhere': give one of main"):
        run_command(chat, "/close nowhere")
    with pytest.raises(ConversationError, match="Give one of main"):
        run_command(chat, "/close")


def test_close_lets_blocks_go_that_were_pinned(chat: Chat) -> None:
    handle_line(chat, "one")
    run_command(chat, "/fork idea")
    handle_line(chat, "a longer message, that takes blocks of its own")
    run_command(chat, "/pin")
    run_command(chat, "/switch main")
    assert pinned_blocks(chat) > 0
    run_command(chat, "/close idea")
    assert pinned_blocks(chat) == 0
    assert list(chat.sessions) == ["main"]


def test_a_closed_session_is_opened_again_where_it_stood(chat: Chat) -> None:
    handle_line(chat, "one")
    run_command(chat, "/fork idea")
    handle_line(chat, "two")
    tip = chat.session.tip
    for line in ("/switch main", "/close idea", "/switch idea"):
        run_command(chat, line)
    assert chat.session.tip is tip
    handle_line(chat, "three")
    assert chat.session.conversation.tips["idea"] is chat.session.tip


def test_a_pin_can_be_taken_back(chat: Chat, screen: StringIO) -> None:
    handle_line(chat, "one")
    run_command(chat, "/pin")
    warm, total = chat.session.warm_tokens()
    assert warm == total
    assert f"The cache of main ({warm:,} tokens) is pinned in memory" in take(screen)
    run_command(chat, "/stats")
    assert f"{pinned_blocks(chat)} blocks pinned" in take(screen)
    run_command(chat, "/unpin")
    assert pinned_blocks(chat) == 0


def test_name_keeps_the_conversation_under_another_name(
    make_chat: Callable[..., Chat], screen: StringIO
) -> None:
    chat = make_chat(keep=True)
    run_command(chat, "/name")
    assert "gets the date as its name" in take(screen)
    handle_line(chat, "one")
    run_command(chat, "/name a poem")
    handle_line(chat, "two")
    (kept,) = chat.model.sessions()
    assert (kept.name, kept.turns) == ("a poem", 2)
    run_command(chat, "/name")
    assert "'a poem'" in take(screen)


def test_a_name_before_the_first_turn_leaves_nothing_behind(
    make_chat: Callable[..., Chat],
) -> None:
    chat = make_chat(keep=True)
    run_command(chat, "/name poem")
    assert chat.model.sessions() == []
    handle_line(chat, "one")
    assert [kept.name for kept in chat.model.sessions()] == ["poem"]


def test_a_name_that_is_taken_or_none_is_refused(make_chat: Callable[..., Chat]) -> None:
    chat = make_chat(keep=True)
    handle_line(chat, "/name poem")
    handle_line(chat, "one")
    run_command(chat, "/system")
    with pytest.raises(NameTakenError):
        run_command(chat, "/name poem")
    with pytest.raises(ConversationError):
        run_command(chat, "/name -x")
    handle_line(chat, "two")
    with pytest.raises(NameTakenError):
        run_command(chat, "/name poem")
    assert len(chat.model.sessions()) == 2


def test_what_is_not_kept_has_no_name(chat: Chat) -> None:
    with pytest.raises(ConversationError, match="not saved"):
        run_command(chat, "/name poem")


def test_the_tree_says_what_is_in_memory_and_how_long_branches_are(
    chat: Chat, screen: StringIO
) -> None:
    handle_line(chat, "one")
    run_command(chat, "/fork idea")
    handle_line(chat, "two")
    chat.session.prewarm()
    take(screen)
    run_command(chat, "/tree")
    lines = take(screen).splitlines()
    assert lines[1].startswith("● 1 one → ")
    assert lines[2].startswith("● 2 two → ")
    assert lines[3:] == [
        "idea 2 turns (here) · main 1 turn",
        "● in memory  ◎ on disk  ◐ in part  ○ not cached",
    ]


def test_close_says_how_to_go_on_with_what_was_closed(
    make_chat: Callable[..., Chat], screen: StringIO
) -> None:
    for keep, other in (
        (True, "recollect chat --resume poem"),
        (False, "Nothing of it was saved."),
    ):
        chat = make_chat(keep=keep)
        handle_line(chat, "one")
        run_command(chat, "/fork idea")
        run_command(chat, "/switch main")
        if keep:
            run_command(chat, "/name poem")
        take(screen)
        run_command(chat, "/close idea")
        assert "/switch idea opens it again" in take(screen)
        run_command(chat, "/system")  # what was main is another conversation now, main-1
        take(screen)
        run_command(chat, "/close main-1")
        assert take(screen).rstrip().endswith(other)


def test_the_tree_names_branches_that_were_closed(chat: Chat, screen: StringIO) -> None:
    handle_line(chat, "one")
    run_command(chat, "/fork idea")
    for line in ("/switch main", "/close idea", "/tree"):
        run_command(chat, line)
    shown = take(screen)
    assert "main (here), idea (closed)" in shown
    assert "main 1 turn (here) · idea 1 turn (closed)" in shown
    run_command(chat, "/switch idea")
    take(screen)
    run_command(chat, "/tree")
    assert "closed" not in take(screen)


def test_the_session_one_is_in_cannot_be_closed(chat: Chat) -> None:
    with pytest.raises(ConversationError):
        run_command(chat, "/close main")
    assert list(chat.sessions) == ["main"]


def test_the_tree_says_what_is_on_disk_only(
    make_chat: Callable[..., Chat], open_store: Callable[..., DiskStore], screen: StringIO
) -> None:
    chat = make_chat(keep=True, store=open_store())
    handle_line(chat, "one")
    chat.session.prewarm()
    chat.model.close()
    again = make_chat(store=open_store())
    again.sessions["main"] = again.model.resume()
    take(screen)
    run_command(again, "/tree")
    lines = take(screen).splitlines()
    assert lines[1].startswith("◎ 1 one → ")
    assert "◎ on disk" in lines[3]


def test_save_and_load_go_away_and_come_back(
    make_chat: Callable[..., Chat], open_store: Callable[..., DiskStore], screen: StringIO
) -> None:
    chat = make_chat(keep=True, store=open_store())
    handle_line(chat, "one")
    run_command(chat, "/save first")
    assert "Saved the checkpoint 'first', with " in take(screen)
    handle_line(chat, "two")
    run_command(chat, "/load first")
    assert "main is after turn 1." in take(screen)
    assert said(chat) == ["one"]
    run_command(chat, "/save")
    assert take(screen).startswith("first: 20")  # the date, which it is kept as
    assert chat.checkpoint_names() == ["first"]


def test_load_opens_another_conversation_beside(
    make_chat: Callable[..., Chat], open_store: Callable[..., DiskStore], screen: StringIO
) -> None:
    chat = make_chat(keep=True, store=open_store())
    handle_line(chat, "one")
    run_command(chat, "/save the first")
    run_command(chat, "/system be brief")
    run_command(chat, "/load the first")
    assert chat.current == "the-first"
    assert said(chat) == ["one"]
    assert "Now in the conversation '20" in take(screen)
    run_command(chat, "/switch main")
    assert said(chat) == []


@pytest.mark.slow
def test_load_opens_another_conversation_under_a_name_that_is_not_open(
    make_chat: Callable[..., Chat], open_store: Callable[..., DiskStore]
) -> None:
    chat = make_chat(keep=True, store=open_store())
    handle_line(chat, "one")
    run_command(chat, "/save main")
    run_command(chat, "/system be brief")  # the conversation before is main-1 now
    run_command(chat, "/load main")
    assert chat.current == "main-2"
    assert said(chat) == ["one"]


def test_load_names_what_there_is_not(
    make_chat: Callable[..., Chat], open_store: Callable[..., DiskStore]
) -> None:
    chat = make_chat(store=open_store())
    with pytest.raises(UnknownCheckpointError):
        run_command(chat, "/load nowhere")
    with pytest.raises(InvalidParameterError):
        run_command(chat, "/load")


def test_a_chat_that_is_not_kept_says_so_for_save(
    make_chat: Callable[..., Chat], open_store: Callable[..., DiskStore]
) -> None:
    chat = make_chat(store=open_store())
    for line in ("/save", "/save here"):
        with pytest.raises(ConversationError, match=r"not saved.* start a chat without --no-save"):
            run_command(chat, line)


def test_save_says_that_no_place_is_kept(
    make_chat: Callable[..., Chat], open_store: Callable[..., DiskStore], screen: StringIO
) -> None:
    run_command(make_chat(keep=True, store=open_store()), "/save")
    assert take(screen) == "There is no checkpoint yet: /save NAME saves one here.\n"


def test_without_kv_on_disk_save_says_how_to_have_it(make_chat: Callable[..., Chat]) -> None:
    chat = make_chat(keep=True)
    with pytest.raises(StoreError, match="--kv-disk"):
        run_command(chat, "/save here")
    assert chat.checkpoint_names() == []


def test_stats_show_what_the_disk_did(
    make_chat: Callable[..., Chat], open_store: Callable[..., DiskStore], screen: StringIO
) -> None:
    chat = make_chat(store=open_store())
    handle_line(chat, "one")
    tier = chat.model.engine.tier
    assert tier is not None
    chat.session.close()
    tier.flush()
    take(screen)
    run_command(chat, "/stats")
    written = tier.statistics().written_blocks
    assert written > 0
    assert f"KV on disk        0 tokens restored in 0 ms, {written} blocks" in take(screen)


def test_stats_say_why_the_disk_is_not_used(
    make_chat: Callable[..., Chat],
    open_store: Callable[..., DiskStore],
    screen: StringIO,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chat = make_chat(store=open_store())
    monkeypatch.setattr("recollect.kv.disk.RESERVED_BYTES", 1 << 60)
    handle_line(chat, "one")
    assert chat.model.engine.tier is not None
    chat.model.engine.tier.flush()
    take(screen)
    run_command(chat, "/stats")
    assert "KV on disk        off. The disk of " in take(screen)


def test_regenerate_adds_another_reply_to_the_same_message(chat: Chat) -> None:
    handle_line(chat, "one")
    first = chat.session.tip
    run_command(chat, "/regenerate")
    assert chat.session.tip is not first
    assert chat.session.tip.parent is first.parent


def test_regenerate_is_never_greedy(chat: Chat) -> None:
    params = chat.varied_params()
    assert params.temperature > 0
    assert params.seed is None


def test_regenerate_with_nothing_said_is_refused(chat: Chat) -> None:
    with pytest.raises(ConversationError):
        run_command(chat, "/regenerate")


def test_a_regenerate_that_fails_leaves_the_conversation_where_it_was(
    chat: Chat, faults: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_ends, "MOST_END_BYTES", 0)  # else nothing is read before the reply
    handle_line(chat, "one")
    tip = chat.session.tip
    chat.session.prewarm()  # so that the fault is not that of what is done in the background
    faults.forward_in = 0
    with pytest.raises(RecollectError):
        run_command(chat, "/regenerate")
    assert chat.session.tip is tip


def test_edit_says_something_else_in_that_turn(chat: Chat) -> None:
    for text in ("one", "two"):
        handle_line(chat, text)
    run_command(chat, "/edit 1 uno")
    assert said(chat) == ["uno"]
    assert len(chat.session.tree.root.children) == 2


def test_edit_without_text_offers_the_old_one(chat: Chat) -> None:
    handle_line(chat, "one\nand a half")
    run_command(chat, "/edit 1")
    assert chat.draft == "/edit 1 one\nand a half"
    assert said(chat) == ["one\nand a half"]


def test_an_edit_that_does_not_fit_leaves_the_conversation_where_it_was(
    make_chat: Callable[..., Chat],
) -> None:
    chat = make_chat(context_length=128)
    handle_line(chat, "one")
    tip = chat.session.tip
    with pytest.raises(ContextFullError):
        run_command(chat, "/edit 1 " + "long " * 100)
    assert chat.session.tip is tip


def test_system_begins_anew_and_keeps_the_conversation_before(chat: Chat) -> None:
    handle_line(chat, "one")
    run_command(chat, "/system be brief")
    assert chat.session.transcript() == [{"role": "system", "content": "be brief"}]
    assert chat.current == "main"
    run_command(chat, "/switch main-1")
    assert said(chat) == ["one"]


def test_system_keeps_nothing_where_nothing_was_said(chat: Chat) -> None:
    run_command(chat, "/system one")
    run_command(chat, "/system two\nlines")
    assert list(chat.sessions) == ["main"]
    assert chat.session.transcript() == [{"role": "system", "content": "two\nlines"}]


def test_stats_count_what_the_engine_counts(chat: Chat, screen: StringIO) -> None:
    for text in ("one", "two"):
        handle_line(chat, text)
    chat.session.close()  # what is done in the background counts too
    take(screen)
    run_command(chat, "/stats")
    reused = sum(node.usage["reused_tokens"] for node in chat.session.path() if node.usage)
    assert reused > 0
    assert f"computed          {chat.model.engine.computed_tokens:,} tokens" in screen.getvalue()
    assert f"reused            {reused:,} tokens in 2 replies" in screen.getvalue()


def test_what_was_saved_is_only_said_once_a_long_prompt_was_timed(
    chat: Chat, screen: StringIO
) -> None:
    handle_line(chat, "one")
    run_command(chat, "/stats")
    assert "time saved        unknown" in take(screen)
    handle_line(chat, "a long message " * 20)
    run_command(chat, "/stats")
    assert "time saved        about" in take(screen)


def test_help_names_every_command(chat: Chat, screen: StringIO) -> None:
    run_command(chat, "/help")
    for name in COMMANDS:
        assert f"/{name}" in screen.getvalue()


def test_quit_leaves(chat: Chat) -> None:
    run_command(chat, "/quit")
    assert chat.leaving


def test_an_unknown_command_names_the_near_one(chat: Chat) -> None:
    with pytest.raises(InvalidParameterError, match="did you mean /undo"):
        run_command(chat, "/unod")
    with pytest.raises(InvalidParameterError, match="/help lists the commands"):
        run_command(chat, "/xyzzy")


def test_a_command_that_takes_nothing_refuses_what_follows_it(chat: Chat) -> None:
    with pytest.raises(InvalidParameterError):
        run_command(chat, "/quit now")
    assert not chat.leaving


def test_a_space_before_the_slash_makes_it_a_message(chat: Chat) -> None:
    assert is_command("/etc/hosts")
    handle_line(chat, " /etc/hosts is what?")
    assert said(chat) == ["/etc/hosts is what?"]


def test_an_error_is_one_line_and_the_chat_goes_on(
    make_chat: Callable[..., Chat], screen: StringIO
) -> None:
    chat = make_chat(context_length=128)
    handle_line(chat, "/unod")
    handle_line(chat, "x" * 200)
    assert take(screen).count("recollect: ") == 2
    handle_line(chat, "one")
    assert said(chat) == ["one"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/goto", "Give the number of a reply, such as /goto #4; /tree shows them."),
        ("/goto #99", "There is no reply #99: /tree shows the replies with their numbers."),
        ("/goto #1", "#1 is not a reply: give the number of a reply; /tree shows them."),
        ("/rewind", "Give the turn to go back to, or 0 for the start."),
    ],
)
def test_a_place_that_is_none_is_told_plainly(
    chat: Chat, screen: StringIO, line: str, told: str
) -> None:
    handle_line(chat, "one")
    take(screen)
    handle_line(chat, line)
    assert take(screen) == f"recollect: {told}\n"


def test_a_reply_that_was_cut_goes_on(chat: Chat, screen: StringIO) -> None:
    handle_line(chat, "one")
    assert "cut at the token limit, /continue goes on" in take(screen)
    cut = chat.session.tip
    handle_line(chat, "/continue")
    assert said(chat) == ["one"]
    assert chat.session.tip.content.startswith(cut.content)
    assert len(chat.session.tip.content) > len(cut.content)


def test_a_reply_that_repeated_itself_says_so_and_goes_on(chat: Chat, screen: StringIO) -> None:
    chat.say("one", SamplingParams(logit_bias={ord("a"): 100.0}))
    shown = take(screen)
    assert "The reply repeated itself and was ended: /continue goes on." in shown
    assert "token limit" not in shown
    cut = chat.session.tip.content
    handle_line(chat, "/continue")
    assert len(chat.session.tip.content) > len(cut)


def test_what_is_whole_does_not_go_on(chat: Chat, screen: StringIO) -> None:
    end = min(ByteTokenizer.eos_token_ids)
    handle_line(chat, "/continue")
    assert "no message to answer" in take(screen)
    chat.say("one", SamplingParams(logit_bias={end: 100.0}))
    handle_line(chat, "/continue")
    assert "ended by itself" in take(screen)


def test_what_stats_say_of_the_sampling_gives_the_last_reply_again(
    chat: Chat, screen: StringIO
) -> None:
    run_command(chat, "/set temperature 1")
    handle_line(chat, "one")
    said = chat.session.tip.content
    take(screen)
    run_command(chat, "/stats")
    told = re.search(r"sampling +temperature 1.0; --seed (\d+) gives", take(screen))
    assert told is not None
    run_command(chat, "/undo")
    handle_line(chat, "one")
    assert chat.session.tip.content != said, "another seed is drawn"
    run_command(chat, "/undo")
    run_command(chat, f"/set seed {told[1]}")
    handle_line(chat, "one")
    assert chat.session.tip.content == said


def test_penalties_of_a_greedy_chat_are_told(chat: Chat, screen: StringIO) -> None:
    run_command(chat, "/set repetition-penalty 1.3")
    run_command(chat, "/stats")
    assert "greedy, repetition_penalty 1.3" in take(screen)
