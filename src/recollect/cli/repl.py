"""
The chat at the terminal: reads a line, does it, and goes on.

What a line does is in `commands` and `state`; how it is typed, in `keys`.
"""

from prompt_toolkit import PromptSession
from prompt_toolkit.formatted_text import FormattedText
from rich.console import Console

from recollect import config
from recollect.cli.commands import COMMANDS, PREFIX, do_safely, is_command, run_command
from recollect.cli.keys import WordsCompleter, history_at, make_prompt, unquote
from recollect.cli.state import FIRST_SESSION, Chat
from recollect.conversation.model import Model
from recollect.types import SamplingParams


def talk(model: Model, params: SamplingParams, system: str | None) -> None:
    """Talk until the user leaves."""
    chat = Chat(model, Console(), params=params, system=system)
    completer = WordsCompleter([PREFIX + name for name in COMMANDS], names=chat.sessions.keys)
    prompt = make_prompt(history_at(config.home() / "history"), completer)
    chat.note(
        f"{model.name} · {model.profile} · {model.context_length:,} tokens of context · "
        "/help lists commands, Ctrl-D leaves"
    )
    chat.warm_up()
    while not chat.leaving:
        line = read_line(chat, prompt)
        chat.wait_until_warm()
        if line is None:
            chat.leaving = True
        else:
            handle_line(chat, line)


def handle_line(chat: Chat, line: str) -> None:
    """Do what was typed, a command or a message; errors of recollect's are printed."""
    if not line.strip():
        return
    if is_command(line):
        do_safely(chat, lambda: run_command(chat, line))
    else:
        do_safely(chat, lambda: chat.say(unquote(line).strip()))


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
