"""
`recollect export` and `recollect import`: a conversation with its KV in one file.

Decides which model is needed and says what came of it; the file is `conversation/portable.py`'s.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recollect.cli import options
from recollect.cli.home import open_journal
from recollect.cli.progress import progress_bar
from recollect.config import DEFAULT_PROFILE
from recollect.errors import ConfigError, StoreError
from recollect.types import Profile

if TYPE_CHECKING:  # imported where they are used: `--help` answers without a runtime
    from recollect.conversation.model import Model
    from recollect.journal.portable import PortableFile

_ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="NAME",
        help="Whose KV it is.",
        show_default="that of the conversation",
    ),
]
_NoKvOption = Annotated[
    bool, typer.Option("--no-kv", help="The text alone, all branches of it; loads no model.")
]


def export(
    name: Annotated[
        str, typer.Argument(metavar="CONVERSATION", help="As `recollect conversations` lists it.")
    ],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to; must be new.")],
    tip: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The branch whose KV goes along.", show_default="main"),
    ] = None,
    model: _ModelOption = None,
    profile: options.ProfileOption = DEFAULT_PROFILE,
    no_kv: _NoKvOption = False,
    kv_memory: options.KvMemoryOption = None,
    kv_disk: options.KvDiskOption = None,
    offline: options.OfflineOption = False,
) -> None:
    """
    Write a conversation and the KV of one branch into a file, to go on elsewhere without reading.

    The file is not encrypted: whoever has it can read the conversation.
    """
    if no_kv and tip is not None:
        raise ConfigError("--tip says whose KV goes along: leave it out, or --no-kv.")
    from recollect.cli.models import format_bytes  # noqa: PLC0415 - as above
    from recollect.conversation.loading import collect  # noqa: PLC0415
    from recollect.journal.portable import require_new, write  # noqa: PLC0415
    from recollect.journal.records import DEFAULT_TIP  # noqa: PLC0415

    require_new(file)
    with open_journal() as journal:
        conversation = journal.load(name)
    branch = None
    if not no_kv:
        with options.open_model(
            model or conversation.model,
            profile=profile,
            kv_memory=kv_memory,
            kv_disk=kv_disk,
            offline=offline,
        ) as loaded:
            session = loaded.resume(name, tip=tip or DEFAULT_TIP)
            with progress_bar("Collecting KV", tokens=True) as progress:
                branch = collect(loaded, session, progress=progress)
    write(file, conversation, branch)
    size = format_bytes(file.stat().st_size)
    kv = "without KV" if branch is None else f"with the KV of {len(branch.token_ids):,} tokens"
    typer.echo(f"{name!r} is in {file}, {kv} ({size}).")


def import_file(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="That `recollect export` wrote.")],
    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="What to call it.", show_default="as the file says"),
    ] = None,
    model: _ModelOption = None,
    profile: Annotated[
        Profile | None,
        typer.Option(help="That the KV is of.", show_default="as the file says"),
    ] = None,
    no_kv: _NoKvOption = False,
    kv_memory: options.KvMemoryOption = None,
    kv_disk: options.KvDiskOption = None,
    offline: options.OfflineOption = False,
) -> None:
    """
    Add a conversation from a file that `recollect export` wrote, with its KV where it fits here.

    Nobody can see whether KV is what the text gives: take it from those you trust, else --no-kv.
    """
    from recollect.journal.portable import PortableFile  # noqa: PLC0415 - as above

    portable = PortableFile(file)
    with open_journal() as journal:
        info = journal.add(portable.conversation, name)
    turns = "1 turn" if info.turns == 1 else f"{info.turns:,} turns"
    typer.echo(f"{info.name!r} was imported, with {turns}.")
    if no_kv:
        return
    wanted = model or portable.conversation.model
    why_not = _why_not_loaded(portable, wanted, is_asked_for=model is not None)
    if why_not is None:
        assert portable.head is not None, "a file without KV needs no model"
        with options.open_model(
            wanted,
            profile=profile or portable.head.profile,
            kv_memory=kv_memory,
            kv_disk=kv_disk,
            offline=offline,
        ) as loaded:
            why_not = _bring_in(loaded, portable)
    if why_not is not None:
        typer.echo(f"Its KV was not: {why_not}. The conversation is read once when it goes on.")


def _why_not_loaded(portable: "PortableFile", model: str, *, is_asked_for: bool) -> str | None:
    """Return why there is no point in loading the model; None: there is."""
    from recollect import config  # noqa: PLC0415 - as above
    from recollect.models.listing import is_here  # noqa: PLC0415

    if portable.head is None:
        return "the file has none"
    if not is_asked_for and not is_here(model, config.home()):
        return f"{model} is not here"
    return None


def _bring_in(model: "Model", portable: "PortableFile") -> str | None:
    """Put the KV on disk and say so; return why that was not done."""
    from recollect.conversation.loading import bring_in, why_not  # noqa: PLC0415 - as above

    reason = why_not(model, portable)
    if reason is not None:
        return reason
    try:
        tokens = bring_in(model, portable)
    except StoreError as error:
        return str(error).rstrip(".")
    typer.echo(f"So was its KV: {tokens:,} tokens that {model.name} need not read.")
    return None
