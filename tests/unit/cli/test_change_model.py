"""`/model`: a chat goes on with another model, in all that is open."""

from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from recollect.cli.commands import run_command
from recollect.cli.repl import handle_line
from recollect.cli.state import Chat
from recollect.conversation.model import Model
from recollect.errors import ConversationError, UnknownModelError
from recollect.types import SamplingParams

SHORT = SamplingParams(max_tokens=8, ignore_eos=True, seed=3)


def said(chat: Chat) -> dict[str, list[tuple[object, str]]]:
    """Return the messages of each open session."""
    return {
        name: [(node.role, node.content) for node in session.path()]
        for name, session in chat.sessions.items()
    }


@pytest.fixture
def start(make_model: Callable[..., Model], screen: StringIO) -> Callable[..., Chat]:
    """Return a maker of chats that load models of the context length that is their name."""

    def load(name: str) -> Model:
        if not name.isdecimal():
            raise UnknownModelError(f"There is no model {name!r}.")
        return make_model(context_length=int(name))

    def start_chat(*, keep: bool, **options: Any) -> Chat:
        model = make_model()
        session = model.session("be brief", params=SHORT, keep=keep, **options)
        return Chat(model, Console(file=screen, width=100), session, load_model=load)

    return start_chat


@pytest.mark.few(1)
@pytest.mark.parametrize("keep", [True, False])
def test_all_that_is_open_goes_on(start: Callable[..., Chat], keep: bool) -> None:
    chat = start(keep=keep)
    for line in ("one", "two", "/undo", "three", "/fork idea", "four", "/new", "five", "/new"):
        handle_line(chat, line)
    run_command(chat, "/switch idea-1")
    former, before, tips = chat.model, said(chat), chat.tips().keys()
    nodes = len(chat.session.tree)
    run_command(chat, "/model 1024")
    assert chat.model is not former
    assert chat.model.context_length == 1024
    assert said(chat) == before
    assert len(chat.session.tree) == nodes  # what was undone, too
    assert chat.session.params == SHORT
    assert chat.session.conversation is chat.sessions["main"].conversation
    assert chat.session.conversation is not chat.sessions["idea"].conversation
    handle_line(chat, "six")
    here = said(chat)["idea-1"]
    assert here[: len(before["idea-1"])] == before["idea-1"]
    asked = [text for role, text in here if role == "user"]
    assert asked == ["one", "three", "four", "six"]
    assert chat.session.conversation.is_saved is keep
    assert chat.tips().keys() == tips


def test_what_was_saved_is_saved_by_the_other_model(start: Callable[..., Chat]) -> None:
    chat = start(keep=True, name="rivers")
    for line in ("one", "/model 1024", "two"):
        handle_line(chat, line)
    chat.model.close()
    stored = chat.load_model("512").resume("rivers")  # type: ignore[misc] # it was given one
    assert [node.content for node in stored.path() if node.role == "user"] == ["one", "two"]


def test_a_name_is_kept_for_the_first_turn(start: Callable[..., Chat]) -> None:
    chat = start(keep=True, name="rivers")
    for line in ("/model 1024", "one"):
        handle_line(chat, line)
    assert [info.name for info in chat.model.sessions()] == ["rivers"]


def test_a_model_that_cannot_be_had_changes_nothing(
    start: Callable[..., Chat], screen: StringIO
) -> None:
    chat = start(keep=False)
    handle_line(chat, "one")
    model, before = chat.model, dict(chat.sessions)
    handle_line(chat, "/model nonsense")
    assert "There is no model 'nonsense'" in screen.getvalue()
    assert (chat.model, chat.sessions) == (model, before)
    handle_line(chat, "two")
    assert chat.session.tip.turns == 2


def test_overflow_goes_along(start: Callable[..., Chat]) -> None:
    chat = start(keep=False)
    for line in ("/set overflow drop-oldest", "one", "/model 1024"):
        handle_line(chat, line)
    assert chat.session.overflow == "drop_oldest"


def test_a_chat_without_a_loader_says_so(chat: Chat, screen: StringIO, tmp_path: Path) -> None:
    with pytest.raises(ConversationError, match="--model"):
        run_command(chat, f"/model {tmp_path}")
    run_command(chat, "/model")
    assert "/model NAME changes it" in screen.getvalue()


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([], {"temperature": 0.7, "top_k": 20, "top_p": 1.0}),
        (["/set top_p 0.5"], {"temperature": 0.7, "top_k": 20, "top_p": 0.5}),
        (["/set temperature 0.4"], {"temperature": 0.4, "top_k": 20, "top_p": 1.0}),
        (["/set temperature 0"], {"temperature": 0.0, "top_k": 0, "top_p": 1.0}),
    ],
)
def test_another_model_samples_as_its_makers_say_but_for_what_was_asked_for(
    make_model: Callable[..., Model],
    screen: StringIO,
    lines: list[str],
    expected: dict[str, float],
) -> None:
    first = make_model(sampling={"temperature": 0.2, "top_p": 0.9})
    params = SHORT.with_recommended(first.local.sampling, ())
    chat = Chat(
        first,
        Console(file=screen, width=100),
        first.session(params=params),
        load_model=lambda _: make_model(sampling={"temperature": 0.7, "top_k": 20}),
    )
    for line in (*lines, "/fork idea", "/model another", "one"):
        handle_line(chat, line)
    for params in (chat.params, *(session.params for session in chat.sessions.values())):
        assert {name: getattr(params, name) for name in expected} == expected
        assert (params.max_tokens, params.seed) == (SHORT.max_tokens, SHORT.seed)
    used = chat.session.tip.usage
    assert used is not None
    assert (used.get("sampling") or {}).get("temperature", 0.0) == expected["temperature"]
