"""
The command `recollect`: its sub-commands, and how errors become an exit status.

Imports nothing that loads a runtime, so that `--help` and mistakes in options answer at once.

Standard input, output and errors as they may be: closed, full, or with nobody who reads.
"""

import os
import sys
from contextlib import suppress
from typing import Annotated, Any, Final, NoReturn, TextIO, cast

import typer
from typer.core import TyperGroup

from recollect import starting
from recollect._version import __version__
from recollect.cli.bench_command import bench
from recollect.cli.cache import app as cache
from recollect.cli.cache import warm
from recollect.cli.chat import ChatCommand, chat
from recollect.cli.checkpoints_command import app as checkpoints
from recollect.cli.conversations import app as conversations
from recollect.cli.conversations import export_with_kv, import_with_kv
from recollect.cli.models import convert, models, pull
from recollect.cli.options import encrypt
from recollect.cli.prove import rewind_test, scenarios, verify
from recollect.cli.serve import keys_app, serve
from recollect.errors import RecollectError

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
    """Write a line to stderr, where that can be done."""
    try:
        print(message, file=sys.stderr, flush=True)
    except OSError:
        let_go(sys.stderr)


def _stream(number: int, mode: str) -> TextIO:
    stream = os.fdopen(number, mode, encoding="utf-8", errors="replace", closefd=False)
    return cast("TextIO", stream)  # a text mode


class _PlainErrors(TyperGroup):
    """The command, with what is wrong with an option in words, and without a name of Python's."""

    def invoke(self, ctx: Any) -> object:  # Typer names no type of it
        """Run a sub-command."""
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
    cls=_PlainErrors,
    help="Conversations with local language models that never read a token twice, and prove it.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,  # a bug shows Python's own traceback, which can be reported
)
app.command(cls=ChatCommand)(chat)
app.command()(serve)
app.add_typer(keys_app)
app.add_typer(conversations)
app.add_typer(checkpoints)
app.add_typer(cache)
app.command()(warm)
app.command()(encrypt)
app.command("export")(export_with_kv)
app.command("import")(import_with_kv)
app.command()(models)
app.command()(pull)
app.command()(convert)
app.command()(verify)
app.command()(bench)
app.command()(scenarios)
app.command("rewind-test")(rewind_test)


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
    finally:
        starting.end_on_interrupt()


def _run() -> None:
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character shows a question mark and not a traceback.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        try:
            app()
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
