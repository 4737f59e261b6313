"""
`recollect checkpoints`: list and drop the places that were kept.

Works on the journal and the KV store alone: no model is loaded.
"""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from recollect.cli.options import has_store, open_places

if TYPE_CHECKING:
    from rich.table import Table

    from recollect.journal.checkpoints import Checkpoint


app = typer.Typer(
    name="checkpoints",
    help="List and drop places that /save has kept.",
    context_settings={"help_option_names": ["-h", "--help"]},
)

JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON list, sizes in bytes, times in UTC.")
]


@app.callback(invoke_without_command=True)
def checkpoints(context: typer.Context, as_json: JsonOption = False) -> None:
    """List and drop places that /save has kept."""
    if context.invoked_subcommand is None:
        list_all(as_json=as_json)


@app.command("list")
def list_all(as_json: JsonOption = False) -> None:
    """List all checkpoints, by name. Also what no command does."""
    found, of_servers = [], 0
    if has_store():
        with open_places() as places:
            found, of_servers = places.all(), places.of_servers()
    if as_json:
        typer.echo(json.dumps([_as_dict(made) for made in found], ensure_ascii=False, indent=2))
    elif not found:
        typer.echo("There is no checkpoint yet: /save NAME in a chat makes one.")
    else:
        from rich.console import Console  # noqa: PLC0415 - see the imports for type checking

        Console().print(_table(found))
    if of_servers and not as_json:
        typer.echo(
            f"Clients of `recollect serve` have {of_servers:,} more: `recollect cache` lists them."
        )


@app.command()
def drop(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="As `recollect checkpoints` lists it.")
    ],
) -> None:
    """Let the KV of a checkpoint go when room is needed; its conversation stays."""
    with open_places() as places:
        places.drop(name)
    typer.echo(f"{name!r} is no checkpoint any more; its conversation is as it was.")


def _table(found: "list[Checkpoint]") -> "Table":
    from rich import box  # noqa: PLC0415 - see the imports for type checking
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    from recollect.cli.models import format_bytes  # noqa: PLC0415

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("name", overflow="fold")
    table.add_column("conversation", overflow="fold")
    for heading in ("turns", "tokens", "size"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("made", no_wrap=True)
    for made in found:
        lost = made.tokens - made.stored_tokens
        table.add_row(
            Text(made.name),
            Text("deleted", "red") if made.conversation is None else Text(made.conversation),
            f"{made.turns:,}",
            f"{made.tokens:,}" + (f" ({lost:,} lost)" if lost else ""),
            format_bytes(made.stored_bytes),
            Text(made.created_at.astimezone().strftime("%Y-%m-%d %H:%M")),
        )
    return table


def _as_dict(made: "Checkpoint") -> dict[str, object]:
    return {
        "name": made.name,
        "conversation": made.conversation,
        "turns": made.turns,
        "tokens": made.tokens,
        "stored_tokens": made.stored_tokens,
        "stored_bytes": made.stored_bytes,
        "created_at": made.created_at.isoformat(),
    }
