"""
The loop of a chat at the terminal: read a line, do it, and go on.

Here is how a line is typed: Enter ends a message or begins a new line, earlier lines come back from
the history, names are completed. When the user pauses, what is typed so far is handed to the session,
which reads it ahead. What a line does is in `commands` and `state`.
"""

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Timer
from typing import Final

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.key_binding.key_processor import KeyPressEvent
from prompt_toolkit.output import Output
from prompt_toolkit.shortcuts import CompleteStyle
from rich.console import Console

from recollect import config, encryption
from recollect.cli.chat_settings import NAMES
from recollect.cli.commands import (
    ALIASES,
    COMMANDS,
    PREFIX,
    do_safely,
    is_command,
    run_command,
)
from recollect.cli.state import FIRST_SESSION, Chat, farewell, welcome
from recollect.conversation.model import Model
from recollect.conversation.session import Session
from recollect.journal.journal import QUOTES, is_open, unquote

PAUSE_S: Final = 0.5
"""How long nothing is typed before what stands there is read: shorter than most thinking, longer
than the time between two keys."""
FEWEST_WORDS: Final = 4
"""Of fewer the reply reads the tokens in a moment, and they are likely to change."""


class TypedText:
    """
    Hands on a text that has not changed for a while, from a thread of its own.

    Used from the thread that reads the keys.
    """

    def __init__(self, hand_on: Callable[[str], None], *, pause_s: float = PAUSE_S) -> None:
        self._hand_on = hand_on
        self._pause_s = pause_s
        self._timers: list[Timer] = []  # those that may still hand on, the newest last

    def begin(self) -> None:
        """Hand on that nothing is typed yet."""
        self._after(0.0, "")

    def changed(self, text: str) -> None:
        """Note what stands there now."""
        self._cancel()
        if len(text.split()) >= FEWEST_WORDS:
            self._after(self._pause_s, text)

    def stop(self) -> None:
        """Hand nothing more on; returns when nothing is being handed on any more."""
        self._cancel()
        for timer in self._timers:
            timer.join()

    def _after(self, seconds: float, text: str) -> None:
        timer = Timer(seconds, self._hand_on, [text])
        timer.daemon = True
        self._timers = [one for one in self._timers if one.is_alive()]  # that had begun before
        self._timers.append(timer)
        timer.start()

    def _cancel(self) -> None:
        for timer in self._timers:
            timer.cancel()


LEAVING_WORDS: Final = {"exit", "quit"}
"""Alone on a line they are hardly meant for the model; a prompt elsewhere takes them as commands."""

_MINE: Final = 0o600
_MY_FOLDER: Final = 0o700


def typed_message(text: str) -> str:
    """Return what of a text being typed belongs to the message: not the quotes around a block."""
    inner = unquote(text) if not is_open(text) else text.lstrip()[len(QUOTES) :]
    return inner.strip()


def history_at(path: Path) -> History:
    """
    Return what was typed before, kept in a file of the data folder that only its owner can read.

    Where the file cannot be had the history lasts as long as the process: no reason not to talk.
    """
    try:
        path.parent.mkdir(mode=_MY_FOLDER, parents=True, exist_ok=True)
        _make_private(path)
    except OSError:
        return InMemoryHistory()
    return PrivateHistory(str(path))


class PrivateHistory(FileHistory):
    """
    A history in a file that its owner alone can read, and that no encrypted folder ever holds.

    The folder may be encrypted by another process while a chat is open, so each append looks.
    """

    def store_string(self, string: str) -> None:
        """Append an entry to the file; nothing where the folder is encrypted, or the disk full."""
        path = Path(os.fsdecode(self.filename))
        if encryption.is_encrypted(path.parent):
            return
        with suppress(OSError):  # it is still called back in this chat
            _make_private(path)
            super().store_string(string)
        if encryption.is_encrypted(path.parent):  # since the first look
            with suppress(OSError):
                path.unlink()


def _make_private(path: Path) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, _MINE))
    path.chmod(_MINE)


class WordsCompleter(Completer):
    """Completes the first word of a command, and the names that can follow it."""

    def __init__(
        self,
        commands: Iterable[str],
        names: Callable[[], Iterable[str]],
        *,
        names_after: Mapping[str, Callable[[], Iterable[str]]] | None = None,
    ) -> None:
        """
        Complete these.

        Args:
            commands: With their slashes.
            names: Return what can follow a command.
            names_after: The same, for commands that other names follow.
        """
        self._commands = sorted(commands)
        self._names = names
        self._names_after = names_after or {}

    def get_completions(
        self, document: Document, complete_event: CompleteEvent
    ) -> Iterable[Completion]:
        """Yield what can stand at the cursor; `complete_event` makes no difference."""
        del complete_event
        before = document.text_before_cursor
        if not before.startswith("/"):
            return
        first, space, typed = before.partition(" ")
        names = self._names_after.get(first, self._names)
        words = names() if space else self._commands
        start = typed if space else first
        for word in words:
            if word.startswith(start):
                yield Completion(word, start_position=-len(start))


def make_prompt(
    history: History,
    completer: Completer,
    *,
    source: Input | None = None,
    screen: Output | None = None,
) -> "PromptSession[str]":
    """
    Return the input line.

    Args:
        source: Where keys come from; None: the terminal.
        screen: Where it is drawn; None: the terminal.
    """
    return PromptSession(
        history=history,
        completer=completer,
        complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE,
        multiline=True,
        key_bindings=_bindings(),
        prompt_continuation=_continuation,
        input=source,
        output=screen,
    )


def _continuation(width: int, _line: int, is_soft_wrap: int) -> str:
    return ("" if is_soft_wrap else "... ").rjust(width)


def _bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("enter")
    def _enter(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        at_end = buffer.document.is_cursor_at_the_end
        if at_end and buffer.text.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        elif is_open(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings


def talk(
    model: Model,
    session: Session,
    *,
    keep_history: bool,
    load_model: Callable[[str], Model] | None = None,
    chosen: Collection[str] = (),
    plain: bool = False,
) -> None:
    """
    Talk until the user leaves.

    Args:
        model: Speaks.
        session: Where to begin.
        keep_history: Whether what is typed can be called back in later chats, too.
        load_model: Loads another model by its name, for `/model`; closed here.
        chosen: The sampling parameters that another model keeps, because somebody asked for them.
        plain: Whether replies are shown as the text that they are, and not as Markdown.
    """
    chat = Chat(model, Console(), session, load_model=load_model, chosen=chosen, plain=plain)
    try:
        _talk(chat, keep_history=keep_history)
    finally:
        if chat.model is not model:
            chat.model.close()


def _talk(chat: Chat, *, keep_history: bool) -> None:
    completer = WordsCompleter(
        [PREFIX + name for name in (*COMMANDS, *ALIASES)],
        names=chat.sessions.keys,
        names_after={f"{PREFIX}load": chat.checkpoint_names, f"{PREFIX}set": lambda: NAMES},
    )
    prompt = make_prompt(_history(keep=keep_history), completer)

    def prewarm(text: str) -> None:
        chat.session.prewarm_later(text)  # of the session that is current by then

    typed = TypedText(prewarm)
    prompt.default_buffer.on_text_changed += lambda buffer: typed.changed(_message(buffer.text))
    welcome(chat)
    while not chat.leaving:
        typed.begin()
        try:
            line = read_line(chat, prompt)
        finally:
            typed.stop()
        if line is None:
            chat.leaving = True
        elif line.strip().lower() in LEAVING_WORDS:
            chat.leaving = confirms_leaving(prompt)
            if not chat.leaving:
                chat.note("To send it as a message, say it in a sentence; /quit leaves at once.")
        else:
            handle_line(chat, line)
    farewell(chat)


def confirms_leaving(prompt: "PromptSession[str]") -> bool:
    """Ask whether to leave, where `prompt` reads its keys; Enter and Ctrl-D mean yes."""
    question: PromptSession[str] = PromptSession(input=prompt.input, output=prompt.output)
    try:
        return question.prompt("Leave the chat? [Y/n] ").strip().lower() in {"", "y", "yes"}
    except EOFError:
        return True
    except KeyboardInterrupt:
        return False


def handle_line(chat: Chat, line: str) -> None:
    """Do what was typed, a command or a message; errors of recollect's are printed."""
    if not line.strip():
        return
    if is_command(line):
        do_safely(chat, lambda: run_command(chat, line))
    else:
        do_safely(chat, lambda: chat.say(unquote(line).strip()))


def _history(*, keep: bool) -> History:
    """Return what was typed before; in an encrypted folder that is nowhere."""
    if not keep or encryption.is_encrypted():
        return InMemoryHistory()
    return history_at(config.home() / config.HISTORY_NAME)


def _message(text: str) -> str:
    """Return what of a line being typed will be said; nothing of a command."""
    return "" if is_command(text) else typed_message(text)


def read_line(chat: Chat, prompt: "PromptSession[str]") -> str | None:
    """Return what was typed; None where the user wants to leave: Ctrl-D, or Ctrl-C twice."""
    draft, chat.draft = chat.draft, ""
    name = "you" if chat.current == FIRST_SESSION else f"you ({chat.current})"
    message = FormattedText([("bold", f"{name}> ")])
    was_cleared = False
    while True:
        try:
            return prompt.prompt(message, default=draft)
        except EOFError:
            return None
        except KeyboardInterrupt:
            if was_cleared:
                return None
            was_cleared, draft = True, ""
            chat.note("Ctrl-C again, or Ctrl-D, to leave.")
