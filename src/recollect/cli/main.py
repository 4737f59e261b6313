"""
The command `recollect`: its sub-commands, and how an error becomes an exit status.

Help and version are answered from the table here; the module of a command is imported when it runs.
Also repairs standard input, output and errors that are closed, full or without a reader.
"""

import os
import re
import sys
from contextlib import redirect_stdout, suppress
from importlib import import_module
from inspect import cleandoc
from io import StringIO
from typing import Annotated, Any, Final, NoReturn, TextIO, cast

import typer
from typer.core import TyperGroup
from typer.main import get_group

from recollect import __version__, starting
from recollect.errors import RecollectError

COMMANDS: Final = {
    "chat": ("chat", "Talk to a model."),
    "serve": ("serve", "Serve the APIs of OpenAI, Anthropic and Ollama, for any client."),
    "web": ("web", "Look at conversations as trees, in a browser."),
    "explain": ("serve", "Explain where prompts of a server's clients part from earlier ones."),
    "keys": ("serve", "Manage the API keys of `recollect serve`."),
    "conversations": (
        "conversations",
        "List, search, show, rename, delete, export and import conversations.",
    ),
    "checkpoints": ("checkpoints", "List and delete the checkpoints that /save has made."),
    "cache": ("cache", "Show, check and clear the cache (KV) on disk."),
    "warm": ("cache", "Read a document or instructions once, and keep their KV on disk."),
    "encrypt": ("options", "Encrypt conversations and the cache on disk."),
    "export": ("conversations", "Write a conversation and the KV of one branch into a file."),
    "import": ("conversations", "Add a conversation from a file that `recollect export` wrote."),
    "models": ("models", "List the models that have a name, and those on this disk."),
    "pull": ("models", "Fetch a model and convert it, so that it loads without a network."),
    "doctor": ("doctor", "Show what this machine has, what would be used of it, and why."),
    "convert": ("models", "Convert a model for another runtime."),
    "verify": ("prove", "Check a model against its file, and reused KV against computed KV."),
    "bench": ("prove", "Measure what reuse saves on this machine."),
    "scenarios": ("prove", "Play six conversations with reuse, without it, and rewound."),
    "rewind-test": ("prove", "Check that a rewound conversation answers as it did before."),
}
"""Of each command the module of this package that holds it, and its line in `recollect --help`."""

COMPLETION_VARIABLE: Final = "_RECOLLECT_COMPLETE"
COMPLETES_IN_BASH: Final = "complete_bash"
"""The variable by which a shell asks for completions, and its value in bash. Source: Typer."""
_READ, _WRITE = os.O_RDONLY, os.O_WRONLY
# Opened the other way round: using a stream that was closed fails, as it would have. Nobody could
# be told where errors cannot be written, so those are let go.
_MISSING: Final = ((0, _WRITE), (1, _READ), (2, _WRITE))


def open_missing() -> None:
    """
    See that descriptors 0 to 2 are taken, and that Python has its three streams.

    Otherwise the next file, such as a database, gets the number, and whatever is written to the
    stream goes into it.
    """
    for number, flags in _MISSING:
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, flags)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
    if sys.stdin is None:
        sys.stdin = _stream(0, "r")
    if sys.stdout is None:
        sys.stdout = _stream(1, "w")
    if sys.stderr is None:
        sys.stderr = _stream(2, "w")


def let_go(stream: TextIO) -> None:
    """Forget what a stream could not write, so that the end of the process does not try again."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, _WRITE)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def complain(message: str) -> None:
    """Write a sentence to stderr, where that can be done."""
    try:
        if sys.stderr.isatty():
            # Here and not above: `recollect --help` need not wait for what knows the width of characters.
            from recollect.cli.display import fitted  # noqa: PLC0415

            message = fitted(message, sys.stderr)
        print(message, file=sys.stderr, flush=True)
    except OSError:
        let_go(sys.stderr)


def _stream(number: int, mode: str) -> TextIO:
    stream = os.fdopen(number, mode, encoding="utf-8", errors="replace", closefd=False)
    return cast("TextIO", stream)  # a text mode


def join_at_colons(words: str, current: int) -> tuple[str, int]:
    """
    Return the words of a line, and which of them is completed, as they were before bash split them at colons.

    Source: `COMP_WORDBREAKS` has a colon. Names of models have colons too.

    Args:
        words: The words, one a line.
        current: The number of the word that is completed.
    """
    joined: list[str] = []
    number = at = 0
    for number, word in enumerate(words.split("\n")):
        if joined and (word == ":" or joined[-1].endswith(":")):
            joined[-1] += word
        else:
            joined.append(word)
        if number <= current:
            at = len(joined) - 1
    return "\n".join(joined), at if current <= number else at + 1


def _complete_in_bash() -> None:
    """Print how the word that is completed can go on, without what stands before its last colon."""
    words, current = os.environ["COMP_WORDS"], os.environ["COMP_CWORD"]
    words, at = join_at_colons(words, int(current))
    os.environ |= {"COMP_WORDS": words, "COMP_CWORD": str(at)}
    typed = words.split("\n")[at] if at <= words.count("\n") else ""
    before = typed[: typed.rfind(":") + 1]
    written = StringIO()
    try:
        with redirect_stdout(written):
            app()
    finally:
        for line in written.getvalue().splitlines():
            print(line.removeprefix(before))


def load_command(name: str) -> Any:
    """
    Import the module of a command, and return the command.

    Typer keeps the type of commands to itself.
    """
    module, _ = COMMANDS[name]
    command = get_group(import_module(f"recollect.cli.{module}").app).commands[name]
    for one in (command, *getattr(command, "commands", {}).values()):
        one.help = flowing(one.help or "")
    return command


_INSIDE_SENTENCE: Final = re.compile(r"(?<=[^.:\n])\n(?=\S)")


def flowing(text: str) -> str:
    """Return a docstring without the line ends inside its sentences, for a terminal of any width."""
    paragraphs = cleandoc(text).split("\n\n")
    return "\n\n".join(
        one if "\n " in one else _INSIDE_SENTENCE.sub(" ", one)  # an example stays as it is
        for one in paragraphs
    )


class _LazyGroup(TyperGroup):
    """The group of all commands. Knows their names and help lines, and loads the one that runs."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Return the command that is named first, and what follows it."""
        name, known, rest = super().resolve_command(ctx, args)
        return name, known if name is None else load_command(name), rest

    def invoke(self, ctx: Any) -> object:
        """Run a command; what is wrong with an option is told without the words of Python."""
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            error.message = error.message.removeprefix("Value error, ")
            raise


EXIT_ERROR: Final = 2
"""Also what a wrong option gives."""
EXIT_NOT_READ: Final = 1
"""Where the output's reader has gone. Source: what Typer ends with then."""
EXIT_INTERRUPTED: Final = 130
"""After Ctrl-C, as shells count: 128 and the number of the signal."""

app = typer.Typer(
    name="recollect",
    cls=_LazyGroup,
    help="Conversations with local language models that never read a token twice, and prove it.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,  # a bug shows Python's own traceback, which can be reported
)


def _stand_in() -> None:
    """Stand in the group for a command that is not loaded."""


for _name, (_, _help) in COMMANDS.items():
    app.command(_name, help=_help)(_stand_in)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"recollect {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Hold what comes before the name of a command."""


def run() -> None:
    """
    Run the command line.

    An error that recollect knows, or that the system has with files and streams, is one line on
    stderr and status 2; Ctrl-C is status 130.
    """
    starting.raise_on_interrupt()
    try:
        open_missing()
        _run()
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except RuntimeError as error:
        # Before 3.12, what interrupts Python in `__set_name__`, while an import makes a class, becomes one.
        if not isinstance(error.__cause__, KeyboardInterrupt):
            raise
        sys.exit(EXIT_INTERRUPTED)
    finally:
        starting.end_on_interrupt()


def _run() -> None:
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character shows a question mark and not a traceback.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    completes = os.environ.get(COMPLETION_VARIABLE) == COMPLETES_IN_BASH
    run_command = _complete_in_bash if completes else app
    try:
        try:
            run_command()
        finally:
            sys.stdout.flush()
    except RecollectError as error:
        _fail(str(error))
    except BrokenPipeError:  # whoever read it has seen enough
        let_go(sys.stdout)
        sys.exit(EXIT_NOT_READ)
    except OSError as error:
        let_go(sys.stdout)
        _fail(_refusal(error))


def _fail(message: str) -> NoReturn:
    complain(f"recollect: {message}")
    sys.exit(EXIT_ERROR)


def _refusal(error: OSError) -> str:
    """Return what the system refuses, and what to do about it."""
    reason = error.strerror or error
    if error.filename is None:
        return (
            f"Input or output failed ({reason}): see that both are open, and that what takes the "
            "output has room."
        )
    return (
        f"{error.filename} cannot be used ({reason}): see that it is there, that you may use it, "
        "and that its disk has room."
    )
