"""
The commands of a chat at the terminal, `/undo`, `/fork`, `/tree` and the others, as a table.

Each is a function of the chat and of what was typed after its name. Does not read input.
"""

import difflib
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

from rich.text import Text

from recollect.cli.chat_settings import change_model, set_value, settings
from recollect.cli.clipboard import copy_text
from recollect.cli.display import (
    MARKS,
    count,
    definitions,
    draw_tree,
    format_bytes,
    printable,
    warmth,
)
from recollect.cli.state import REGENERATE_TEMPERATURE, Chat, branches, statistics, ways_out
from recollect.conversation.session import Session
from recollect.conversation.tree import Node
from recollect.conversation.turn import is_cut
from recollect.errors import (
    ContextFullError,
    ConversationError,
    InvalidParameterError,
    RecollectError,
    RewindError,
    UnknownNodeError,
)

PREFIX: Final = "/"
HELP: Final = "?"
"""Alone on a line, it is `/help`."""
ALIASES: Final = {HELP: "help", "exit": "quit", "bye": "quit"}
"""Other names of commands."""

Action = Callable[[Chat, str], None]


@dataclass(frozen=True, slots=True)
class Command:
    """A line that can be typed in place of a message."""

    name: str
    arguments: str
    """How they are shown in /help; empty where there are none."""
    help: str
    run: Action
    """Called with the chat and the rest of the line. Raises a RecollectError where it cannot."""


def is_command(text: str) -> bool:
    """Return whether a line is a command; a space before it makes it a message."""
    return text.startswith(PREFIX) or text.rstrip() == HELP


def run_command(chat: Chat, line: str) -> None:
    """
    Do what the line says.

    Raises:
        RecollectError: There is no such command, or it cannot be done; nothing was changed.
    """
    words = line.removeprefix(PREFIX).split(maxsplit=1)
    name, rest = [*words, "", ""][:2]
    command = COMMANDS.get(ALIASES.get(name.lower(), name.lower()))
    if command is None:
        raise InvalidParameterError(_unknown(name))
    if rest and not command.arguments:
        raise InvalidParameterError(f"/{command.name} takes nothing after it.")
    command.run(chat, rest.strip())


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name.lower(), [*COMMANDS, *ALIASES], n=1)
    hint = f"did you mean /{near[0]}?" if near else "/help lists the commands."
    return f"There is no command /{name}: {hint} To send it as a message, put a space before it."


def _number(text: str, what: str) -> int:
    """Return a whole number that the user typed."""
    if not (text.isascii() and text.isdecimal()):
        wrong = f"{text!r} is not a number: give" if text else "Give"
        raise InvalidParameterError(f"{wrong} {what}.")
    return int(text)


def _start(chat: Chat) -> Node:
    """Return the node before the first turn: the instructions, or the root."""
    path = chat.session.path()
    return path[0] if path and path[0].role == "system" else chat.session.tree.root


def _turn(chat: Chat, number: int) -> Node:
    """Return the user's message of a turn on the current path, counted from 1."""
    asked = [node for node in chat.session.path() if node.role == "user"]
    if not 1 <= number <= len(asked):
        if not asked:
            raise RewindError(
                f"There is no turn {number}: nothing has been said on this branch yet."
            )
        has = count(len(asked), "turn")
        raise RewindError(f"There is no turn {number}: this branch has {has}; /tree shows all.")
    return asked[number - 1]


def _tell_turn(chat: Chat) -> None:
    tip = chat.session.tip
    where = f"after turn {tip.turns}" if tip.turns else "at the start"
    chat.note(f"{chat.current} is {where}.")


def undo(chat: Chat, rest: str) -> None:
    """Go back by one turn, or by several, on the current branch."""
    chat.session.undo(_number(rest, "how many turns to undo") if rest else 1)
    _tell_turn(chat)


def rewind(chat: Chat, rest: str) -> None:
    """Go back to the end of a turn on the current branch."""
    number = _number(rest, "the turn to go back to, or 0 for the start")
    if number == 0:
        chat.session.rewind(_start(chat))
    else:
        asked = _turn(chat, number)
        chat.session.rewind(next(node for node in chat.session.path() if node.parent is asked))
    _tell_turn(chat)


def goto(chat: Chat, rest: str) -> None:
    """Go to any reply of the tree."""
    number = _number(
        rest.removeprefix("#"), "the number of a reply, such as /goto #4; /tree shows them"
    )
    numbers = chat.session.conversation.numbers()
    found = next((node for node, shown in numbers.items() if shown == number), None)
    if found is None:
        raise UnknownNodeError(
            f"There is no reply #{number}: /tree shows the replies with their numbers."
        )
    node = chat.session.tree.node(found)
    if node.role in {"user", "system"}:
        raise ConversationError(
            f"#{number} is not a reply: give the number of a reply; /tree shows them."
        )
    chat.session.rewind(node)
    _tell_turn(chat)


def fork(chat: Chat, rest: str) -> None:
    """Begin a branch at the current tip and go to it."""
    former = chat.current
    chat.add_session(rest, lambda: chat.session.fork(name=rest))
    chat.note(
        f"Now on the branch {rest}, which shares the cache of all turns so far; "
        f"/switch {former} goes back."
    )


def switch(chat: Chat, rest: str) -> None:
    """Go to another branch or conversation, or list those that are open."""
    if rest:
        chat.reopen(rest)
        chat.current = rest
        _tell_turn(chat)
        return
    for name, session in chat.sessions.items():
        here = "  (here)" if name == chat.current else ""
        chat.note(f"{name}: {count(session.tip.turns, 'turn')}{here}")


def close(chat: Chat, rest: str) -> None:
    """Close a branch or conversation that is open; a branch stays in its tree."""
    session = chat.require_session(rest)
    if rest == chat.current:
        raise ConversationError(f"{rest} is the current branch: /switch to another one first.")
    session.close()
    del chat.sessions[rest]
    chat.note(f"Closed {rest}. {_way_back(chat, rest, session)}")


def _way_back(chat: Chat, name: str, closed: Session) -> str:
    """Return how to go on with what was closed."""
    conversation = closed.conversation
    if name in chat.tips():
        return f"Its turns stay in the tree: /switch {name} opens it again."
    if conversation.is_saved and conversation.name is not None:
        return f"To go on with it: recollect chat --resume {shlex.quote(conversation.name)}"
    return "Nothing of it was saved."


def regenerate(chat: Chat, _rest: str) -> None:
    """Have the last message answered again, not greedily."""
    chat.say_at(chat.session.last_user(), None, chat.varied_params())


def go_on(chat: Chat, _rest: str) -> None:
    """Go on with a reply that was cut, or answer a message that has no reply."""
    tip = chat.session.tip
    if tip.role == "assistant" and not is_cut(tip):
        raise ConversationError("The last reply has ended by itself: say something to go on.")
    chat.say(None)


def edit(chat: Chat, rest: str) -> None:
    """Say something else in place of an earlier message."""
    number, _, text = rest.partition(" ")
    asked = _turn(chat, _number(number, "the turn whose message to change"))
    assert asked.parent is not None, "a user's message has a parent"
    if text.strip():
        chat.say_at(asked.parent, text.strip())
    else:
        chat.draft = f"/edit {number} {asked.content}"


def tree(chat: Chat, _rest: str) -> None:
    """Draw the conversation."""
    session, tips = chat.session, chat.tips()
    engine = chat.model.engine
    on_disk = None if engine.tier is None else partial(session.warm_tokens, on_disk=True)
    slack = engine.info.reuse.unit + 1
    states = warmth(session.tree, session.warm_tokens, stored=on_disk, slack=slack)
    width, numbers = chat.console.width, session.conversation.numbers()
    closed = tips.keys() - chat.sessions.keys()
    for line in draw_tree(session.tree, tips, chat.current, width, states, numbers, closed):
        chat.console.print(line, highlight=False)
    chat.note(branches(chat))
    if states:
        chat.note(_LEGEND)
    elsewhere = [name for name in chat.sessions if name not in tips]
    if elsewhere:
        chat.note(f"Open in other conversations: {', '.join(elsewhere)}.")


def name(chat: Chat, rest: str) -> None:
    """Show the name of the conversation, or give it another."""
    conversation = chat.session.conversation
    if rest:
        conversation.rename(rest)
        chat.note(f"This conversation is named {rest!r} now.")
    elif not conversation.is_saved:
        chat.note("This conversation is not saved, so it has no name.")
    elif conversation.journal_id is None and conversation.name is None:
        chat.note("With the first turn it gets the date as its name; /name NEW gives it another.")
    elif (called := conversation.current_name()) is None:
        chat.note("This conversation has been deleted: /system begins a new one.")
    else:
        chat.note(f"This conversation is named {called!r}.")


def pin(chat: Chat, _rest: str) -> None:
    """Pin the KV of the current branch in memory."""
    chat.session.pin()
    cached, _ = chat.session.warm_tokens()
    chat.note(
        f"The cache of {chat.current} ({cached:,} tokens) is pinned in memory until /unpin; "
        "later turns need another /pin."
    )


def unpin(chat: Chat, _rest: str) -> None:
    """Unpin the KV of the current branch, so that it can be evicted."""
    chat.session.unpin()
    chat.note(f"The cache of {chat.current} may be evicted when memory runs out.")


def save(chat: Chat, rest: str) -> None:
    """Save a checkpoint, or list the checkpoints."""
    if not chat.session.conversation.is_saved:
        raise ConversationError(
            "This conversation is not saved, so it can have no checkpoint: start a chat without "
            "--no-save."
        )
    if rest:
        made = chat.session.checkpoint(rest)
        chat.note(
            f"Saved the checkpoint {rest!r}, with {made.tokens:,} tokens pinned on disk "
            f"({format_bytes(made.stored_bytes)}): /load {rest} comes back here, also after a restart."
        )
        return
    saved = chat.model.checkpoints()
    if not saved:
        chat.note("There is no checkpoint yet: /save NAME saves one here.")
    for made in saved:
        of = made.conversation or "a deleted conversation"
        chat.note(f"{made.name}: {of}, after turn {made.turns}, {made.tokens:,} tokens")


def load(chat: Chat, rest: str) -> None:
    """Go to a checkpoint."""
    if not rest:
        raise InvalidParameterError("Give the name of a checkpoint: /save lists them.")
    former = chat.current
    chat.load(rest)
    if chat.current == former:
        _tell_turn(chat)
    else:
        other = chat.session.conversation.name
        chat.note(
            f"Now in the conversation {other!r}, which is open here as {chat.current}; "
            f"/switch {former} goes back."
        )


def stats(chat: Chat, _rest: str) -> None:
    """Show what was computed and what was not."""
    rows = definitions(statistics(chat), styles=("dim", ""), indent=0)
    chat.console.print(rows, highlight=False)


def system(chat: Chat, rest: str) -> None:
    """Begin a new conversation with instructions."""
    former = chat.start_anew(rest or None)
    how = "with these instructions" if rest else "without instructions"
    back = f" /switch {former} goes back to the one before." if former else ""
    chat.note(f"A new conversation {how} begins here.{back}")


def new(chat: Chat, _rest: str) -> None:
    """Begin a new conversation with the same instructions."""
    first = chat.session.path()[:1]
    instructions = next((node.content for node in first if node.role == "system"), None)
    former = chat.start_anew(instructions)
    same = " with the same instructions" if instructions else ""
    back = f" /switch {former} goes back to the one before." if former else ""
    chat.note(f"A new conversation{same} begins here.{back}")


def model(chat: Chat, rest: str) -> None:
    """Go on with another model, or say which one replies."""
    if not rest:
        how = chat.model.elsewhere or f"profile {chat.model.profile}"
        chat.note(f"{chat.model.name}, {how}; /model NAME changes it.")
        return
    change_model(chat, rest)
    said = (
        f" It reads {count(chat.session.tip.turns, 'turn')} once." if chat.session.tip.turns else ""
    )
    chat.note(
        f"{chat.model.name} replies from now on, with {chat.model.context_length:,} tokens of "
        f"context.{said}"
    )


def copy(chat: Chat, _rest: str) -> None:
    """Put the last reply on the clipboard."""
    path = chat.session.path()
    reply = next((node.content for node in reversed(path) if node.role == "assistant"), None)
    if not reply:
        raise ConversationError("There is no reply to copy: say something first.")
    taken_by = copy_text(reply, chat.console.file)
    chat.note(f"Copied the last reply, {count(len(reply), 'character')}, by {taken_by}.")


def set_setting(chat: Chat, rest: str) -> None:
    """Change a setting, or list the settings."""
    name, _, value = rest.partition(" ")
    if rest:
        shown = set_value(chat, name, value.strip())
        chat.note(f"{name} is {shown} from the next reply on.")
        return
    chat.console.print(definitions(settings(chat), styles=("bold", "", "dim")), highlight=False)


def help_text(chat: Chat, _rest: str) -> None:
    """List the commands and keys."""
    commands = [
        (f"/{command.name} {command.arguments}".rstrip(), command.help)
        for command in COMMANDS.values()
    ]
    chat.console.print(definitions([*commands, ("", ""), *_KEYS]), highlight=False)


def leave(chat: Chat, _rest: str) -> None:
    """End the chat."""
    chat.leaving = True


_LEGEND: Final = (
    f"{MARKS['warm']} in memory  {MARKS['disk']} on disk  {MARKS['partly']} in part  "
    f"{MARKS['cold']} not cached"
)
_KEYS: Final = (
    ("Alt-Enter", "a new line in the message; so do a \\ at its end and a pasted newline"),
    ('"""', "begins a message of several lines that ends with another"),
    ("Ctrl-C", "stops a reply, of which the text so far stays; at the prompt, clears the line"),
    ("Ctrl-D", "leaves; so does Ctrl-C twice"),
    (HELP, "shows this list"),
)


def thinking(chat: Chat, rest: str) -> None:
    """Show or fold what the model thinks before it answers."""
    if rest not in ("", "on", "off"):
        raise InvalidParameterError(f"/thinking is on or off, not {rest!r}: give one.")
    if rest:
        chat.shows_reasoning = rest == "on"
    is_shown = chat.shows_reasoning
    chat.note(
        f"What the model thinks is {'shown' if is_shown else 'not shown, only that it does'}."
    )


COMMANDS: Final[dict[str, Command]] = {
    command.name: command
    for command in (
        Command("undo", "[N]", "go back by one turn, or by N; the turns stay in the tree", undo),
        Command("rewind", "N", "go to after turn N; 0 is the start", rewind),
        Command("edit", "N [TEXT]", "replace the message of turn N by TEXT, or edit it", edit),
        Command(
            "regenerate",
            "",
            f"generate another reply, at temperature {REGENERATE_TEMPERATURE} or more, with a new seed",
            regenerate,
        ),
        Command("continue", "", "go on with a reply that was cut, where it stopped", go_on),
        Command("fork", "NAME", "begin a new branch here and go to it; costs nothing", fork),
        Command("switch", "[NAME]", "go to another branch or conversation, or list them", switch),
        Command(
            "close", "NAME", "close a branch or conversation; what is saved of it stays", close
        ),
        Command("tree", "", "draw all branches with their turns, and show what is in memory", tree),
        Command("goto", "#ID", "go to any reply of the tree, also one that was undone", goto),
        Command("name", "[NEW]", "show the name of this conversation, or change it", name),
        Command("pin", "", "keep the cache of this branch in memory", pin),
        Command("unpin", "", "allow it to be evicted when memory runs out", unpin),
        Command("save", "[NAME]", "save a checkpoint here, or list the checkpoints", save),
        Command("load", "NAME", "go to a checkpoint", load),
        Command("stats", "", "show what was computed, reused and restored, and the memory", stats),
        Command("system", "[TEXT]", "begin a new conversation, with these instructions", system),
        Command("new", "", "begin a new conversation, with the same instructions", new),
        Command(
            "set",
            "[NAME VALUE]",
            "list how replies are sampled, and what a full context does; or change one",
            set_setting,
        ),
        Command("model", "[NAME]", "go on with another model, or show which one replies", model),
        Command(
            "thinking",
            "[on|off]",
            "show what the model thinks, dim, or only that it does",
            thinking,
        ),
        Command("copy", "", "put the last reply on the clipboard", copy),
        Command("help", "", "show this list", help_text),
        Command("quit", "", "end the chat; so do /exit and /bye", leave),
    )
}


def do_safely(chat: Chat, action: Callable[[], object]) -> None:
    """Do something, and print an error of recollect's in one line instead of raising it."""
    try:
        action()
        chat.follow_tips()
    except KeyboardInterrupt:  # in what is no reply, such as /pin
        chat.note("Stopped.")
    except RecollectError as error:
        chat.console.print(Text(printable(f"recollect: {error}"), "red"), highlight=False)
        if isinstance(error, ContextFullError):
            chat.note(ways_out(chat))
