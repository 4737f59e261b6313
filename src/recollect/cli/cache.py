"""
`recollect cache`: what KV is kept on disk, what it was good for, whether it is sound; and room.

Works on the store alone: no model is loaded.
"""

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from recollect import config
from recollect.cli.home import has_store, open_store, store_folder
from recollect.errors import ConfigError, StoreCorruptError, StoreError

if TYPE_CHECKING:  # imported where they are used: `--help` answers without LMDB and tables
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

    from recollect.cli import cache_view as view  # noqa: PLC0415
    from recollect.kv import maintenance  # noqa: PLC0415
    from recollect.models.listing import names_by_fingerprint  # noqa: PLC0415

    names = names_by_fingerprint(config.home())
    with open_store() as store:
        found, pins = maintenance.holdings(store), maintenance.pins(store)
    digests = view.names_by_digest(found, names)
    if as_json:
        kept = [view.holding_as_dict(holding, names) for holding in found]
        pinned = [view.pin_as_dict(pin, digests) for pin in pins]
        typer.echo(json.dumps({"kept": kept, "pins": pinned}, ensure_ascii=False, indent=2))
        return
    console = Console()
    console.print(view.holdings_table(found, names))
    if pins:
        console.print(view.pins_table(pins, digests))


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
    from recollect.cli.progress import progress_bar  # noqa: PLC0415 - see above
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
