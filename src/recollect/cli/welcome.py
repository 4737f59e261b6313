"""
What a chat begins and ends with: the model, where a resumed conversation stands, how to go on.

Prints; changes nothing.
"""

import shlex
from typing import Final

from rich.text import Text

from recollect.cli.state import Chat
from recollect.cli.terminal import printable
from recollect.errors import StoreError

_TURNS_SHOWN: Final = 2
_MOST_CHARACTERS: Final = 600
"""Of a message that is shown again: its beginning and its end."""


def welcome(chat: Chat) -> None:
    """Say what is spoken to, and show the end of what was said before."""
    model = chat.model
    chat.note(
        f"{model.name} · {model.profile} · {model.context_length:,} tokens of context · "
        "/help lists commands, Ctrl-D leaves"
    )
    if not chat.session.conversation.is_kept:
        chat.note("Nothing of this chat is kept (--no-save).")
    if len(chat.session.tree) and chat.session.conversation.name is not None:
        _show_where_it_stands(chat)


def farewell(chat: Chat) -> None:
    """Say how to go on with what was kept."""
    conversation = chat.session.conversation
    has_turns = any(node.role == "assistant" for node in conversation.tree.nodes())
    if not conversation.is_kept or conversation.kept_as is None or not has_turns:
        return
    try:
        name = conversation.current_name()  # somebody may have renamed it since
    except StoreError:
        name = conversation.name
    if name is None:
        chat.note("This conversation has been deleted elsewhere: nothing of it is kept.")
    else:
        chat.note(f"Kept: recollect chat --resume {shlex.quote(name)}")


def branches(chat: Chat) -> str:
    """Return the named tips of the conversation with their turns, for one line."""
    parts = []
    for name, tip in chat.tips().items():
        here = " (here)" if name == chat.current else ""
        parts.append(f"{name} {count(tip.turns, 'turn')}{here}")
    return " · ".join(parts)


def count(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def _show_where_it_stands(chat: Chat) -> None:
    conversation = chat.session.conversation
    chat.note(f"Resumed {conversation.name!r}: {branches(chat)}")
    own = chat.model.weights_fingerprint
    foreign = sum(node.fingerprint not in {None, own} for node in chat.session.path())
    if foreign:
        # A file that was replaced under the same name is another model too.
        name = conversation.other_model
        writer = "another model" if name in {None, chat.model.name} else name
        chat.note(
            f"{count(foreign, 'reply', 'replies')} of it came from {writer}: "
            f"{chat.model.name} reads the text anew, and goes on."
        )
    _show_last_turns(chat)


def _show_last_turns(chat: Chat) -> None:
    path = [node for node in chat.session.path() if node.role != "system"]
    asked = [index for index, node in enumerate(path) if node.role == "user"]
    if not asked:
        return
    first = asked[-_TURNS_SHOWN:][0]
    if first:
        chat.note("…")
    for node in path[first:]:
        said = _shorten(printable(node.content).strip())
        line = f"you: {said}" if node.role == "user" else said
        chat.console.print(Text(line, "dim"), highlight=False)
    if path[-1].role == "user":
        chat.note(
            "This has no reply yet: /regenerate gives one; what you say instead takes its place."
        )


def _shorten(text: str) -> str:
    if len(text) <= _MOST_CHARACTERS:
        return text
    half = _MOST_CHARACTERS // 2
    return f"{text[:half].rstrip()} … {text[-half:].lstrip()}"
