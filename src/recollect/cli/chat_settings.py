"""
What `/set` and `/model` change in a chat: how replies are sampled, what happens when the context is
full, and which model replies.

Reads values as they are typed, lists them, and gives them to the sessions that are open. Another model
gets the open sessions, with all that was said in them.
"""

import shlex
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final, get_args

from recollect.cli.state import Chat
from recollect.conversation.conversation import Conversation
from recollect.conversation.model import Model
from recollect.conversation.session import Session
from recollect.conversation.tree import Node, Overflow
from recollect.errors import ConversationError, InvalidParameterError
from recollect.types import SAMPLING, SamplingParams

OVERFLOW: Final = "overflow"
NONE: Final = "none"
"""What is typed for a limit, a seed or stops that there shall not be."""

_OVERFLOWS: Final[dict[str, Overflow]] = {
    value.replace("_", "-"): value for value in get_args(Overflow)
}
_EITHER_OVERFLOW: Final = " or ".join(_OVERFLOWS)
_WORDS: Final = {"on": True, "true": True, "off": False, "false": False}


def _whole(text: str) -> int:
    """Return a whole number, or raise ValueError; Python itself would take `1_000` and `٣`."""
    if not text.removeprefix("-").isascii() or not text.removeprefix("-").isdecimal():
        raise ValueError
    return int(text)


def _whole_or_none(text: str) -> int | None:
    return None if text == NONE else _whole(text)


def _texts(text: str) -> tuple[str, ...]:
    return () if text == NONE else tuple(shlex.split(text))


def _switch(text: str) -> bool:
    if text not in _WORDS:
        raise ValueError
    return _WORDS[text]


_KINDS: Final[dict[str, tuple[Callable[[str], Any], str, str]]] = {
    "temperature": (float, "a number from 0 on", "0 always takes the likeliest token"),
    "top_k": (_whole, "a whole number from 0 on", "choose among the N likeliest tokens; 0: all"),
    "top_p": (
        float,
        "a number above 0 and up to 1",
        "choose among the likeliest tokens that add up to X",
    ),
    "min_p": (
        float,
        "a number from 0 to 1",
        "choose among tokens at least X times as likely as the best",
    ),
    "seed": (
        _whole_or_none,
        f"a whole number from 0 on, or {NONE}",
        "the same seed gives the same reply",
    ),
    "max_tokens": (
        _whole_or_none,
        f"a whole number from 1 on, or {NONE}",
        "most tokens in one reply",
    ),
    "reasoning_budget": (
        _whole_or_none,
        f"a whole number from 0 on, or {NONE}",
        "most tokens of reasoning",
    ),
    "repetition_penalty": (
        float,
        "a number above 0",
        "above 1: tokens that occurred are less likely",
    ),
    "presence_penalty": (float, "a number", "subtracted once for a token of the reply"),
    "frequency_penalty": (float, "a number", "subtracted each time the reply has a token"),
    "stop": (_texts, f'texts in quotes, or {NONE}, as in /set stop "END"', "end before these"),
    "ignore_eos": (_switch, "on or off", "ignore the token by which the model ends"),
}
"""Of each sampling parameter what reads it, what it may be, and what it does."""

NAMES: Final = (*_KINDS, OVERFLOW)


def set_value(chat: Chat, name: str, typed: str) -> str:
    """
    Change a setting of all sessions of a chat, and return the value as it is shown.

    Args:
        chat: Its open sessions, and those that it opens later, have the value from then on.
        name: One of `NAMES`; a hyphen may stand for an underscore.
        typed: The value; empty where none was typed.

    Raises:
        InvalidParameterError: There is no such setting, or it cannot have that value.
    """
    name = name.lower().removeprefix("--").replace("-", "_")
    if name == OVERFLOW:
        overflow = _OVERFLOWS.get(typed.lower().replace("_", "-"))
        if overflow is None:
            raise _unfit(name, _EITHER_OVERFLOW, typed)
        for session in chat.sessions.values():
            session.overflow = overflow
        return overflow.replace("_", "-")
    if name not in _KINDS:
        raise InvalidParameterError(
            f"There is no setting {name!r}: give one of {', '.join(NAMES)}."
        )
    read, kind, _ = _KINDS[name]
    if not typed:
        raise _unfit(name, kind, typed)
    try:
        value = read(typed if name == "stop" else typed.lower())
    except ValueError as cause:
        raise _unfit(name, kind, typed) from cause
    params = replace(chat.params, **{name: value})
    for session in chat.sessions.values():
        session.params = replace(session.params, **{name: value})
    chat.params = params
    chat.chosen.add(name)
    return _shown(value)


def _unfit(name: str, kind: str, typed: str) -> InvalidParameterError:
    """Return the error for a value that is missing or of the wrong kind, which says what it may be."""
    instead = f", not {typed!r}" if typed else ""
    return InvalidParameterError(f"{name} is {kind}{instead}: give one.")


def settings(chat: Chat) -> list[tuple[str, str, str]]:
    """Return name, value and meaning of each setting."""
    listed = [
        (name, _shown(getattr(chat.params, name)), about) for name, (_, _, about) in _KINDS.items()
    ]
    overflow = chat.session.overflow.replace("_", "-")
    return [*listed, (OVERFLOW, overflow, f"when the context is full: {_EITHER_OVERFLOW}")]


def _shown(value: object) -> str:
    if value is None or value == ():
        return NONE
    if isinstance(value, bool):
        return "on" if value else "off"
    return shlex.join(value) if isinstance(value, tuple) else str(value)


def change_model(chat: Chat, name: str) -> None:
    """
    Load another model and go on with it in all open sessions; the former one is unloaded then.

    For a moment both are in memory: if the new one cannot be had, the chat is as it was.

    Raises:
        ConversationError: This chat cannot load a model.
        RecollectError: The model cannot be had, or a conversation cannot be opened.
    """
    if chat.load_model is None:
        raise ConversationError("This chat was given its model: begin another one with --model.")
    model = chat.load_model(name)
    try:
        sessions = _carried(chat, model)
    except BaseException:
        model.close()
        raise
    former = chat.model
    chat.go_on_with(model, sessions)
    _take_recommended(chat)
    former.close()


def _take_recommended(chat: Chat) -> None:
    """Sample as the makers of the model recommend, but for what somebody has asked for."""
    usual = SamplingParams()
    unasked = {name: getattr(usual, name) for name in SAMPLING if name not in chat.chosen}
    makers = chat.model.local.sampling
    chat.params = replace(chat.params, **unasked).with_recommended(makers, chat.chosen)
    for session in chat.sessions.values():
        session.params = chat.params


def _carried(chat: Chat, model: Model) -> dict[str, Session]:
    """Return a session of a model for each that is open, at the same place."""
    opened: dict[int, tuple[Session, Callable[[Node], Node]]] = {}
    carried = {}
    for key, old in chat.sessions.items():
        if id(old.conversation) not in opened:
            opened[id(old.conversation)] = _opened(chat, old, model)
        first, found = opened[id(old.conversation)]
        tip, branch = found(old.tip), old.name or key
        is_there = branch in first.conversation.tips
        session = first.branch(branch) if is_there else first.fork(tip, name=branch)
        if session.tip is not tip:
            session.rewind(tip)
        session.overflow = old.overflow
        carried[key] = session
    return carried


def _opened(chat: Chat, old: Session, model: Model) -> tuple[Session, Callable[[Node], Node]]:
    """Return a session in a conversation as a model has it, and what finds the same node there."""
    before = old.conversation
    name = before.current_name()
    if before.journal_id is not None and name is not None:
        session = model.resume(name, params=chat.params)
        there = session.conversation

        def found(node: Node) -> Node:
            saved = before.saved_id(node)
            same = None if saved is None else there.saved_node(saved)
            return same or there.tree.root

        return session, found
    is_new = before.journal_id is None  # if not, somebody has deleted it: nothing more is saved
    session = model.session(
        params=chat.params, keep=is_new and before.is_saved, name=name if is_new else None
    )
    nodes = _copied(before, session.conversation)
    for branch, tip in before.tips.items():
        session.conversation.set_tip(branch, nodes[tip.id])
    return session, lambda node: nodes[node.id]


def _copied(before: Conversation, after: Conversation) -> dict[int, Node]:
    """Copy the messages of a conversation that is not saved; return the new nodes by the old ids."""
    nodes = {before.tree.root.id: after.tree.root}
    for node in before.tree.nodes():
        assert node.parent is not None, "the root is no message"
        nodes[node.id] = after.add_unsaved(nodes[node.parent.id], node.message())
    return nodes
