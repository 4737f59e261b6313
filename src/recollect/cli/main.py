"""
The command `recollect`: its sub-commands, and how errors become an exit status.

Imports nothing that loads a runtime, so that `--help` and mistakes in options answer at once.
"""

import sys
from typing import Annotated, Final

import typer

from recollect._version import __version__
from recollect.cli.bench import bench
from recollect.cli.cache import app as cache
from recollect.cli.carry import export, import_file
from recollect.cli.chat import ChatCommand, chat
from recollect.cli.checkpoints import app as checkpoints
from recollect.cli.conversations import app as conversations
from recollect.cli.convert import convert
from recollect.cli.models import models, pull
from recollect.cli.passphrase import encrypt
from recollect.cli.rewind import rewind_test
from recollect.cli.scenarios import scenarios
from recollect.cli.serve import keys_app, serve
from recollect.cli.verify import verify
from recollect.cli.warm import warm
from recollect.errors import RecollectError

EXIT_ERROR: Final = 2
"""Also what a wrong option gives."""

app = typer.Typer(
    name="recollect",
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
app.command()(export)
app.command("import")(import_file)
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
    """Run the command line; an error that recollect knows is one line on stderr and status 2."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character shows a question mark and not a traceback.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        app()
    except RecollectError as error:
        sys.stdout.flush()
        print(f"recollect: {error}", file=sys.stderr)
        sys.exit(EXIT_ERROR)
