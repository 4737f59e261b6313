"""When the context is full, whole oldest turns go, once, and the instructions stay."""

from collections.abc import Callable, Sequence

import pytest

from recollect.conversation.model import Model
from recollect.conversation.tree import Node, Tree, Window, turn_starts, without_oldest
from recollect.errors import ContextFullError
from recollect.types import Role, SamplingParams


def path_of(text: str) -> list[Node]:
    """Return a path: one letter for each message, `s`, `u` or `a`."""
    roles: dict[str, Role] = {"s": "system", "u": "user", "a": "assistant"}
    tree = Tree()
    node = tree.root
    for number, letter in enumerate(text):
        node = tree.add(node, roles[letter], str(number))
    return node.path()


def shown(path: Sequence[Node]) -> str:
    return "".join(node.content for node in path)


@pytest.mark.parametrize(
    ("path", "starts"),
    [("", []), ("s", []), ("ua", [0]), ("suaua", [1, 3]), ("suua", [1]), ("suaa", [1])],
)
def test_a_turn_starts_with_a_user_who_follows_something_else(path: str, starts: list[int]) -> None:
    assert turn_starts(path_of(path)) == starts


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(9, "03456"), (5, "03456"), (4, "056"), (3, "056"), (2, "056"), (0, "056")],
)
def test_whole_oldest_turns_go_and_the_instructions_and_the_last_turn_stay(
    limit: int, expected: str
) -> None:
    assert shown(without_oldest(path_of("suauaua"[:7]), limit, len)) == expected


def test_without_turns_there_is_nothing_to_leave_out() -> None:
    assert shown(without_oldest(path_of("s"), 0, len)) == "0"


def test_what_was_left_out_stays_out_and_the_rest_begins_alike() -> None:
    window, path = Window(), path_of("suauauaua")
    first = window.fitting(path, 8, len, "drop_oldest")
    assert shown(first) == "078"
    longer = path_of("suauauauaua")
    assert shown(window.shown([*path, *longer[9:]])) == "078910"
    assert shown(window.shown(path[:3])) == "012", "before what was left out, nothing is"


def test_an_error_is_the_default_and_dropping_says_how_many(
    make_model: Callable[..., Model],
) -> None:
    short = SamplingParams(max_tokens=4, ignore_eos=True)
    model = make_model(context_length=400)
    strict = model.session("Be brief.", params=short)
    chat = model.session("Be brief.", params=short, overflow="drop_oldest")
    dropped, reused = [], []
    for number in range(12):
        reply = chat.respond(f"message number {number}")
        dropped.append(reply.dropped_turns)
        reused.append(reply.usage.reused_tokens)
        assert reply.usage.prompt_tokens < 400
        assert len(chat.transcript()) == 1 + 2 * (number + 1)
        if number == 0:
            assert reply.usage.prompt_tokens < 200
    assert dropped == sorted(dropped), "what is left out stays out"
    assert 0 < len(set(dropped)) - 1 <= 2, "it is left out by many turns at once"
    first = dropped.index(max(dropped))
    assert reused[first] >= len("Be brief.")
    assert all(tokens > 100 for tokens in reused[first + 1 :])
    said = [f"message number {number}" for number in range(12)]
    with pytest.raises(ContextFullError):
        list(map(strict.respond, said))


def test_a_message_that_only_fits_alone_is_answered_alone(
    make_model: Callable[..., Model],
) -> None:
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    model = make_model(context_length=400)
    chat = model.session("Be brief.", params=params, overflow="drop_oldest")
    chat.respond("x" * 200)
    reply = chat.respond("y" * 250)
    assert reply.dropped_turns == 1
    assert 250 < reply.usage.prompt_tokens < 400
    assert chat.respond("z" * 250).dropped_turns == 2
    with pytest.raises(ContextFullError):
        chat.respond("w" * 500)
