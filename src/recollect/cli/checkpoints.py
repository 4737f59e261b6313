"""
`recollect checkpoints`: the checkpoints that /save has made in chats.

Works on the journal and the KV store; loads no model.
"""

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from recollect.cli.display import format_bytes, format_time, make_table
from recollect.cli.options import JsonOption, has_store, open_checkpoints
from recollect.journal.home import Checkpoint

app = typer.Typer()
_checkpoints = typer.Typer(name="checkpoints")


@_checkpoints.callback(invoke_without_command=True)
def checkpoints(context: typer.Context, as_json: JsonOption = False) -> None:
    """List and delete the checkpoints that /save has made."""
    if context.invoked_subcommand is None:
        list_checkpoints(as_json=as_json)


@_checkpoints.command("list")
def list_checkpoints(as_json: JsonOption = False) -> None:
    """List all checkpoints by name. This is what happens without a command."""
    found, of_servers = [], 0
    if has_store():
        with open_checkpoints() as kept:
            found, of_servers = kept.all(), kept.of_servers()
    if as_json:
        typer.echo(
            json.dumps([_checkpoint_as_dict(made) for made in found], ensure_ascii=False, indent=2)
        )
    elif not found:
        typer.echo("There is no checkpoint yet: /save NAME in a chat saves one.")
    else:
        Console().print(checkpoints_table(found))
    if of_servers and not as_json:
        typer.echo(
            f"Clients of `recollect serve` have {of_servers:,} more; `recollect cache` lists them."
        )


@_checkpoints.command()
def drop(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A name that `recollect checkpoints` lists.")
    ],
) -> None:
    """Delete a checkpoint. Its conversation stays, and its KV stays until space runs out."""
    with open_checkpoints() as kept:
        kept.drop(name)
    typer.echo(f"The checkpoint {name!r} was deleted; its conversation is unchanged.")


def checkpoints_table(found: list[Checkpoint]) -> Table:
    """Return the checkpoints as a table for people."""
    table = make_table(
        *("name", "conversation", "turns", "tokens", "size", "made"),
        right=("turns", "tokens", "size"),
        whole=("made",),
    )
    for made in found:
        lost = made.tokens - made.stored_tokens
        table.add_row(
            Text(made.name),
            Text("deleted", "red") if made.conversation is None else Text(made.conversation),
            f"{made.turns:,}",
            f"{made.tokens:,}" + (f" ({lost:,} lost)" if lost else ""),
            format_bytes(made.stored_bytes),
            format_time(made.created_at),
        )
    return table


def _checkpoint_as_dict(made: Checkpoint) -> dict[str, object]:
    return {
        "name": made.name,
        "conversation": made.conversation,
        "turns": made.turns,
        "tokens": made.tokens,
        "stored_tokens": made.stored_tokens,
        "stored_bytes": made.stored_bytes,
        "created_at": made.created_at.isoformat(),
    }


app.add_typer(_checkpoints)
