"""
`recollect cache`: what KV is kept on disk, what it was good for, whether it is sound; and room.

Works on the store alone: no model is loaded.

How `recollect cache` shows what a store has: for people, and as JSON.

Pure: values in, tables and dictionaries out.

`recollect warm`: read a text once, so that every later session on it starts warm.
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from recollect import config
from recollect.cli import options
from recollect.cli.models import format_bytes
from recollect.cli.options import has_store, open_store, progress_bar, read_text, store_folder
from recollect.config import DEFAULT_PROFILE
from recollect.errors import ConfigError, StoreCorruptError, StoreError
from recollect.kv.accounts import Pin
from recollect.kv.maintenance import Holding
from recollect.kv.record import Identity
from recollect.models.catalog import DEFAULT_MODEL

if TYPE_CHECKING:
    from recollect.kv.blocks import Key
    from recollect.kv.disk import DiskStore


_EMPTY = "No KV is kept on disk here yet: `recollect chat` does that."

app = typer.Typer(
    name="cache",
    help="Show, check and clear the KV that is kept on disk.",
    context_settings={"help_option_names": ["-h", "--help"]},
)

JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object, sizes in bytes, times in UTC.")
]


@app.callback(invoke_without_command=True)
def cache(context: typer.Context, as_json: JsonOption = False) -> None:
    """Show, check and clear the KV that is kept on disk."""
    if context.invoked_subcommand is None:
        ls(as_json=as_json)


@app.command()
def ls(as_json: JsonOption = False) -> None:
    """List what is kept, by model, and what is pinned. Also what no command does."""
    if not has_store():
        typer.echo('{"kept": [], "pins": []}' if as_json else _EMPTY)
        return
    from rich.console import Console  # noqa: PLC0415 - see the imports for type checking

    from recollect.kv import maintenance  # noqa: PLC0415
    from recollect.models.listing import names_by_fingerprint  # noqa: PLC0415

    names = names_by_fingerprint(config.home())
    with open_store() as store:
        found, pins = maintenance.holdings(store), maintenance.pins(store)
    digests = names_by_digest(found, names)
    if as_json:
        kept = [holding_as_dict(holding, names) for holding in found]
        pinned = [pin_as_dict(pin, digests) for pin in pins]
        typer.echo(json.dumps({"kept": kept, "pins": pinned}, ensure_ascii=False, indent=2))
        return
    console = Console()
    console.print(holdings_table(found, names))
    if pins:
        console.print(pins_table(pins, digests))


@app.command()
def stats(as_json: JsonOption = False) -> None:
    """Say what was restored instead of computed so far, and what room it takes."""
    if not has_store():
        typer.echo("{}" if as_json else _EMPTY)
        return
    from recollect.cli.models import format_bytes  # noqa: PLC0415 - see above
    from recollect.cli.state import format_duration  # noqa: PLC0415
    from recollect.kv import maintenance, pins  # noqa: PLC0415

    with open_store() as store:
        found = maintenance.holdings(store)
        file_bytes, pinned_bytes = store.env.file_bytes, pins.pinned_bytes(store)
    values = {
        "restored_tokens": sum(holding.savings.tokens for holding in found),
        "saved_s": sum(holding.savings.seconds for holding in found),
        "blocks": sum(holding.blocks for holding in found),
        "tokens": sum(holding.tokens for holding in found),
        "stored_bytes": sum(holding.stored_bytes for holding in found),
        "pinned_bytes": pinned_bytes,
        "file_bytes": file_bytes,
        "default_budget_bytes": config.default_kv_disk_bytes(store_folder()),
    }
    if as_json:
        typer.echo(json.dumps(values, indent=2))
        return
    saved = f"{format_duration(values['saved_s'])} of computing, by the speed measured here"
    if values["restored_tokens"] and not values["saved_s"]:
        saved = "unknown until a long prompt has been computed here"
    for name, value in (
        ("restored", f"{values['restored_tokens']:,} tokens instead of computing them"),
        ("saved", saved),
        ("kept", f"{values['tokens']:,} tokens in {values['blocks']:,} blocks"),
        (
            "size",
            f"{format_bytes(int(values['stored_bytes']))}, {format_bytes(pinned_bytes)} pinned",
        ),
        ("file", format_bytes(file_bytes)),
        ("budget", f"{format_bytes(int(values['default_budget_bytes']))} without --kv-disk"),
    ):
        typer.echo(f"{name:<9} {value}")


@app.command()
def verify(
    repair: Annotated[
        bool, typer.Option("--repair", help="Remove what is not as it was written.")
    ] = False,
) -> None:
    """Read everything and check it; status 1 where something is not as it was written."""
    if not has_store():
        typer.echo(_EMPTY)
        return
    from recollect.kv.maintenance import remove_wrong  # noqa: PLC0415 - see above

    with open_store() as store:
        blocks, unchecked, wrong = _problems(store)
        for key, sentence in wrong:
            typer.echo(f"{f'block {key.hex()[:16]}' if key else 'the accounts'}: {sentence}")
        if unchecked:
            typer.echo(f"{_blocks(unchecked, 'is', 'are')} encrypted, and not looked into.")
        if wrong and repair:
            removed = remove_wrong(store, [key for key, _ in wrong])
            typer.echo(
                f"{_blocks(removed, 'was', 'were')} removed: what was in there is computed again."
            )
            return
    if wrong:
        typer.echo(
            f"{len(wrong):,} of {blocks:,} blocks are not as they were written: --repair removes those."
        )
        raise typer.Exit(1)
    typer.echo(f"All of {blocks:,} blocks are as they were written.")


@app.command()
def evict(
    size: Annotated[str, typer.Argument(metavar="SIZE", help="How much to free, such as 2GB.")],
) -> None:
    """Give up what was used least recently, and give the disk space back; pins stay."""
    wanted = config.parse_size(size)
    with open_store() as store:
        freed = store.evict(wanted)
    _give_back(freed)


@app.command()
def clear(
    pinned: Annotated[
        bool, typer.Option("--pinned", help="Checkpoints and warm texts, too.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """
    Remove all KV that is not pinned; conversations stay, and are read once more.

    Stores that were damaged and put aside go too.
    """
    from recollect.kv.rewriting import damaged_stores  # noqa: PLC0415 - see above

    if not has_store() and not damaged_stores(store_folder()):
        typer.echo(_EMPTY)
        return
    what = "all KV with all checkpoints" if pinned else "all KV that is not pinned"
    if not yes:
        if not sys.stdin.isatty():
            raise ConfigError(f"Nobody can be asked whether to remove {what}: say so with --yes.")
        if not typer.confirm(f"Remove {what} from the disk?"):
            typer.echo("Nothing was removed.")
            return
    if has_store():
        _clear(pinned=pinned)
    _remove_damaged()  # afterwards: one that is opened may be put aside only then


@app.command()
def unpin(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As `recollect cache` lists it.")],
) -> None:
    """Let a checkpoint or a warm text go when room is needed."""
    from recollect.kv import pins  # noqa: PLC0415 - see above

    with open_store() as store:
        if not pins.drop(store, name):
            raise StoreError(f"Nothing is kept as {name!r}: `recollect cache` lists what is.")
    typer.echo(f"{name!r} may go when room is needed.")


def _problems(store: "DiskStore") -> "tuple[int, int, list[tuple[Key, str]]]":
    """Return how many blocks there are, how many cannot be looked into, and what is wrong."""
    from recollect.cli.options import progress_bar  # noqa: PLC0415 - see above
    from recollect.kv import accounts, maintenance  # noqa: PLC0415

    with store.env.reading() as txn:
        heads = accounts.heads(txn, store.env)
    sealed = {key for key, head in heads.items() if head.is_sealed and store.sealer is None}
    with progress_bar("Reading all blocks"):
        found = list(maintenance.problems(store))
    return len(heads), len(sealed), [(key, wrong) for key, wrong in found if key not in sealed]


def _clear(*, pinned: bool) -> None:
    try:
        with open_store() as store:
            before = store.env.file_bytes
            blocks = store.clear(pinned=pinned)
    except StoreCorruptError:
        _discard()
        return
    typer.echo(f"{_blocks(blocks, 'was', 'were')} removed.")
    _give_back(before)


def _give_back(freed: int) -> None:
    """Shorten the file where that can be done, and say what came of it."""
    from recollect.cli.models import format_bytes  # noqa: PLC0415 - see above
    from recollect.kv.rewriting import shrink  # noqa: PLC0415

    given_back = shrink(store_folder())
    if given_back is None:
        typer.echo(
            f"Another process has the file open: its {format_bytes(freed)} are used again by what is "
            "kept next, and given back to the disk by the same command once that is closed."
        )
    else:
        typer.echo(f"{format_bytes(given_back)} were given back to the disk.")


def _remove_damaged() -> None:
    """Delete the damaged stores that were put aside, and say so."""
    from recollect.kv.rewriting import remove_damaged  # noqa: PLC0415 - see above

    try:
        removed = remove_damaged(store_folder())
    except OSError as error:
        raise StoreError(
            f"{error.filename} cannot be deleted ({error.strerror}): delete it, since replies can be "
            "read in it."
        ) from error
    if removed:
        stores = "1 damaged store" if removed == 1 else f"{removed:,} damaged stores"
        typer.echo(f"{stores} that had been put aside {'was' if removed == 1 else 'were'} removed.")


def _blocks(number: int, one: str, many: str) -> str:
    """Return a number of blocks with the verb."""
    return f"1 block {one}" if number == 1 else f"{number:,} blocks {many}"


def _discard() -> None:
    from recollect.kv.rewriting import discard  # noqa: PLC0415 - see above

    if not discard(store_folder()):
        raise StoreError("The KV store is damaged and open in another process: close that first.")
    typer.echo("The KV store was damaged; it was removed, with all that was pinned.")


_ELEMENT_TYPE: Final = re.compile(r":([a-z]+\d+)")
_SHORT: Final = 12
"""Of a fingerprint that no model here has."""


def holdings_table(found: Sequence[Holding], names: Mapping[str, str]) -> Table:
    """Return what is stored of each model, runtime and precision."""
    table = _table(
        "model", "runtime", "KV", "blocks", "tokens", "size", "last used", right=range(3, 6)
    )
    for holding in found:
        table.add_row(
            Text(model_name(holding.identity, names)),
            Text(holding.identity.runtime),
            precision(holding.identity),
            f"{holding.blocks:,}",
            f"{holding.tokens:,}",
            format_bytes(holding.stored_bytes),
            _local(holding.last_used) if holding.last_used else "",
        )
    return table


def pins_table(found: Sequence[Pin], names: Mapping[str, str]) -> Table:
    """Return what is kept from eviction."""
    table = _table("kept", "what", "model", "tokens", "since", right=[3])
    for pin in found:
        table.add_row(
            Text(pin.name),
            str(pin.about.get("kind", "")),
            Text(names.get(pin.identity, pin.identity[:_SHORT])),
            f"{pin.tokens:,}",
            _local(pin.created),
        )
    return table


def holding_as_dict(holding: Holding, names: Mapping[str, str]) -> dict[str, object]:
    """Return what is stored of one model, runtime and precision as JSON values."""
    identity, savings = holding.identity, holding.savings
    last = datetime.fromtimestamp(holding.last_used, UTC).isoformat() if holding.last_used else None
    return {
        "model": names.get(identity.fingerprint),
        "fingerprint": identity.fingerprint,
        "runtime": identity.runtime,
        "precision": precision(identity),
        "blocks": holding.blocks,
        "tokens": holding.tokens,
        "stored_bytes": holding.stored_bytes,
        "last_used_at": last,
        "restored_tokens": savings.tokens,
        "saved_s": savings.seconds,
    }


def pin_as_dict(pin: Pin, names: Mapping[str, str]) -> dict[str, object]:
    """Return a pin as JSON values."""
    return {
        "name": pin.name,
        "kind": pin.about.get("kind"),
        "model": names.get(pin.identity),
        "tokens": pin.tokens,
        "created_at": datetime.fromtimestamp(pin.created, UTC).isoformat(),
    }


def names_by_digest(found: Sequence[Holding], names: Mapping[str, str]) -> dict[str, str]:
    """Return what models are called by what pins know of them."""
    return {
        holding.identity.digest().hex(): model_name(holding.identity, names) for holding in found
    }


def model_name(identity: Identity, names: Mapping[str, str]) -> str:
    """Return what a model is called here, or the beginning of its fingerprint."""
    return names.get(identity.fingerprint, identity.fingerprint[:_SHORT])


def precision(identity: Identity) -> str:
    """Return the element types of KV."""
    types = sorted(set(_ELEMENT_TYPE.findall(identity.kv_format)))
    return "+".join(types) or identity.kv_format


def _table(*headings: str, right: Sequence[int]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, heading in enumerate(headings):
        if number in right:
            table.add_column(heading, justify="right", no_wrap=True)
        else:
            table.add_column(heading, overflow="fold")
    return table


def _local(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).astimezone().strftime("%Y-%m-%d %H:%M")


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
