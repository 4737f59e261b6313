"""
`recollect warm`: read a text once, so that every later session on it starts warm.
"""

from pathlib import Path
from typing import Annotated

import typer

from recollect.cli import options
from recollect.cli.progress import progress_bar
from recollect.cli.text_file import read_text
from recollect.config import DEFAULT_PROFILE
from recollect.errors import ConfigError
from recollect.models.catalog import DEFAULT_MODEL


def warm(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="Text that first messages will begin with."),
    ] = None,
    system: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Instructions, before the text or alone."),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="What it is kept as.", show_default="the name of the file"
        ),
    ] = None,
    model: options.ModelOption = DEFAULT_MODEL,
    profile: options.ProfileOption = DEFAULT_PROFILE,
    kv_memory: options.KvMemoryOption = None,
    kv_disk: options.KvDiskOption = None,
    offline: options.OfflineOption = False,
) -> None:
    """
    Read a document or instructions once, and keep their KV on disk.

    Every later session that begins with them, with this model and profile, starts warm.
    `recollect cache` lists what is kept, `recollect cache unpin NAME` lets it go.
    """
    named = file or system
    if named is None:
        raise ConfigError("There is nothing to read: give a file, or --system with one.")
    text = "" if file is None else read_text(file)
    instructions = None if system is None else read_text(system)
    with options.open_model(
        model, profile=profile, kv_memory=kv_memory, kv_disk=kv_disk, offline=offline
    ) as loaded:
        with progress_bar(f"Reading {named.name}", tokens=True) as progress:
            made = loaded.warm(
                text, system=instructions, name=name or named.name, progress=progress
            )
        from recollect.cli.models import format_bytes  # noqa: PLC0415 - see options.open_model
        from recollect.cli.state import format_duration  # noqa: PLC0415

    on_disk = f"{made.tokens:,} tokens, {format_bytes(made.stored_bytes)} on disk"
    if not made.computed_tokens:
        since = made.since.astimezone().strftime("%Y-%m-%d %H:%M")
        typer.echo(f"{made.name!r} is warm already, since {since}: {on_disk}.")
        return
    typer.echo(
        f"{made.name!r} is warm: {on_disk}; {made.computed_tokens:,} of them were read in "
        f"{format_duration(made.seconds)}."
    )
