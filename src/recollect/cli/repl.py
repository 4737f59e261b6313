"""
The chat at the terminal: reads a line, does it, and goes on.

What a line does is in `commands` and `state`; how it is typed, in `keys`.
"""

from prompt_toolkit import PromptSession
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import History, InMemoryHistory
from rich.console import Console

from recollect import config, encryption
from recollect.cli.commands import COMMANDS, PREFIX, do_safely, is_command, run_command
from recollect.cli.keys import WordsCompleter, history_at, make_prompt, typed_message
from recollect.cli.state import FIRST_SESSION, Chat
from recollect.cli.typed import TypedText
from recollect.cli.welcome import farewell, welcome
from recollect.conversation.model import Model
from recollect.conversation.session import Session
from recollect.journal.journal import unquote


def talk(model: Model, session: Session, *, keep_history: bool) -> None:
    """
    Talk until the user leaves.

    Args:
        model: Speaks.
        session: Where to begin.
        keep_history: Whether what is typed can be called back in later chats, too.
    """
    chat = Chat(model, Console(), session)
    completer = WordsCompleter(
        [PREFIX + name for name in COMMANDS],
        names=chat.sessions.keys,
        names_after={f"{PREFIX}load": chat.checkpoint_names},
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
        else:
            handle_line(chat, line)
    farewell(chat)


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
