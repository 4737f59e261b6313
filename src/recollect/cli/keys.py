"""
The input line: when Enter ends a message and when it begins a new line, history, completion.

Does not know what a message is for.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.key_binding.key_processor import KeyPressEvent
from prompt_toolkit.output import Output
from prompt_toolkit.shortcuts import CompleteStyle

from recollect import encryption
from recollect.journal.journal import QUOTES, is_open, unquote

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
