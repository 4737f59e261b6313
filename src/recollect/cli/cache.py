"""
`recollect cache` and `recollect warm`: the cache (KV) on disk.

`cache` shows what is stored and pinned, checks it, and frees space; it works on the KV store alone.
`warm` loads a model to compute and pin the KV of a text before anybody asks.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from recollect import config
from recollect.cli.batch import read_text
from recollect.cli.display import (
    confirm,
    count,
    format_bytes,
    format_duration,
    format_time,
    make_table,
    progress_bar,
)
from recollect.cli.options import (
    NO_KV,
    USUAL,
    JsonOption,
    ModelOption,
    ModelOptions,
    YesOption,
    has_store,
    open_store,
    store_folder,
    takes_model_options,
)
from recollect.errors import ConfigError, StoreCorruptError, StoreError
from recollect.kv.disk import DiskStore
from recollect.kv.environment import damaged_stores, discard, remove_damaged, shrink
from recollect.kv.record import Identity, Key, Pin
from recollect.kv.tables import Holding
from recollect.models.catalog import DEFAULT_MODEL
from recollect.models.listing import names_by_fingerprint

app = typer.Typer()
_cache = typer.Typer(name="cache")


@_cache.callback(invoke_without_command=True)
def cache(context: typer.Context, as_json: JsonOption = False) -> None:
    """Show, check and clear the cache (KV) on disk."""
    if context.invoked_subcommand is None:
        ls(as_json=as_json)


@_cache.command()
def ls(as_json: JsonOption = False) -> None:
    """List what is stored, by model, and what is pinned. This is what happens without a command."""
    if not has_store():
        typer.echo('{"kept": [], "pins": []}' if as_json else NO_KV)
        return
    names = names_by_fingerprint(config.home())
    with open_store() as store:
        found, held = store.holdings(), store.pins()
    digests = names_by_digest(found, names)
    if as_json:
        kept = [holding_as_dict(holding, names) for holding in found]
        pinned = [pin_as_dict(pin, digests) for pin in held]
        typer.echo(json.dumps({"kept": kept, "pins": pinned}, ensure_ascii=False, indent=2))
        return
    console = Console()
    console.print(holdings_table(found, names))
    if held:
        console.print(pins_table(held, digests))


@_cache.command()
def stats(as_json: JsonOption = False) -> None:
    """Print how much was restored instead of computed so far, and the space that it takes."""
    if not has_store():
        typer.echo("{}" if as_json else NO_KV)
        return
    with open_store() as store:
        found = store.holdings()
        file_bytes, pinned_bytes = store.env.file_bytes, store.pinned_bytes()
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
        ("stored", f"{values['tokens']:,} tokens in {values['blocks']:,} blocks"),
        (
            "size",
            f"{format_bytes(int(values['stored_bytes']))}, {format_bytes(pinned_bytes)} pinned",
        ),
        ("file", format_bytes(file_bytes)),
        ("budget", f"{format_bytes(int(values['default_budget_bytes']))} without --kv-disk"),
    ):
        typer.echo(f"{name:<9} {value}")


@_cache.command()
def verify(
    repair: Annotated[
        bool, typer.Option("--repair", help="Delete the blocks that are damaged.")
    ] = False,
) -> None:
    """Read and check all blocks; the exit status is 1 if one is damaged."""
    if not has_store():
        typer.echo(NO_KV)
        return
    with open_store() as store:
        blocks, unchecked, wrong = _problems(store)
        for key, sentence in wrong:
            typer.echo(f"{f'block {key.hex()[:16]}' if key else 'the accounts'}: {sentence}")
        if unchecked:
            typer.echo(f"{_blocks(unchecked, 'is', 'are')} encrypted and could not be checked.")
        if wrong and repair:
            removed = store.remove_wrong([key for key, _ in wrong])
            typer.echo(
                f"{_blocks(removed, 'was', 'were')} deleted: that KV is computed again when it is needed."
            )
            return
    if wrong:
        typer.echo(
            f"{len(wrong):,} of {blocks:,} blocks are not as they were written: --repair deletes them."
        )
        raise typer.Exit(1)
    typer.echo(f"All of {blocks:,} blocks are as they were written.")


@_cache.command()
def evict(
    size: Annotated[str, typer.Argument(metavar="SIZE", help="How much to free, such as 2GB.")],
) -> None:
    """Delete what was used least recently and give its space back; what is pinned stays."""
    wanted = config.parse_size(size)
    with open_store() as store:
        freed = store.evict(wanted)
    _give_back(freed)


@_cache.command()
def clear(
    pinned: Annotated[
        bool, typer.Option("--pinned", help="Delete checkpoints and warm texts, too.")
    ] = False,
    yes: YesOption = False,
) -> None:
    """
    Delete all KV that is not pinned; conversations stay, and the model reads them once more.

    Damaged stores that were put aside are deleted, too.
    """

    if not has_store() and not damaged_stores(store_folder()):
        typer.echo(NO_KV)
        return
    what = "all KV with all checkpoints" if pinned else "all KV that is not pinned"
    if not confirm(f"Delete {what} from the disk?", yes=yes, to="delete"):
        typer.echo("Nothing was deleted.")
        return
    if has_store():
        _clear(pinned=pinned)
    _remove_damaged()  # afterwards: one that is opened may be put aside only then


@_cache.command()
def unpin(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A name that `recollect cache` lists.")
    ],
) -> None:
    """Unpin a checkpoint or a warm text: allow it to be deleted when space runs out."""

    with open_store() as store:
        if not store.drop_pin(name):
            raise StoreError(f"Nothing is pinned as {name!r}; `recollect cache` lists what is.")
    typer.echo(f"{name!r} was unpinned: it may be deleted when space runs out.")


def _problems(store: DiskStore) -> tuple[int, int, list[tuple[Key, str]]]:
    """Return how many blocks there are, how many cannot be checked, and what is wrong with which."""

    with store.reading() as tables:
        heads = tables.heads()
    sealed = {key for key, head in heads.items() if head.is_sealed and store.sealer is None}
    with progress_bar("Reading all blocks"):
        found = list(store.problems())
    return len(heads), len(sealed), [(key, wrong) for key, wrong in found if key not in sealed]


def _clear(*, pinned: bool) -> None:
    try:
        with open_store() as store:
            before = store.env.file_bytes
            blocks = store.clear(pinned=pinned)
    except StoreCorruptError:
        _discard()
        return
    typer.echo(f"{_blocks(blocks, 'was', 'were')} deleted.")
    _give_back(before)


def _give_back(freed: int) -> None:
    """Shorten the file if nobody else has it open, and say how much that gave back."""

    given_back = shrink(store_folder())
    if given_back is None:
        typer.echo(
            f"Another process has the file open. The next KV reuses its {format_bytes(freed)}; to give "
            "them back to the disk, end that process and run this command again."
        )
    else:
        typer.echo(f"{format_bytes(given_back)} were given back to the disk.")


def _remove_damaged() -> None:
    """Delete the damaged stores that were put aside, and say so."""

    try:
        removed = remove_damaged(store_folder())
    except OSError as error:
        raise StoreError(
            f"{error.filename} cannot be deleted ({error.strerror}): delete it yourself, because it "
            "holds what was said."
        ) from error
    if removed:
        verb = "was" if removed == 1 else "were"
        typer.echo(f"{count(removed, 'damaged store')} that had been put aside {verb} deleted.")


def _blocks(number: int, one: str, many: str) -> str:
    """Return a number of blocks with its verb."""
    return f"{count(number, 'block')} {one if number == 1 else many}"


def _discard() -> None:

    if not discard(store_folder()):
        raise StoreError("The KV store is damaged and open in another process: close that first.")
    typer.echo("The KV store was damaged; it was deleted, with all that was pinned.")


_ELEMENT_TYPE: Final = re.compile(r":([a-z]+\d+)")
_SHORT: Final = 12
"""How many characters of a fingerprint stand for a model that is not here."""


def holdings_table(found: Sequence[Holding], names: Mapping[str, str]) -> Table:
    """Return a row for each model, runtime and precision with stored KV."""
    table = make_table(
        *("model", "runtime", "KV", "blocks", "tokens", "size", "last used"),
        right=("blocks", "tokens", "size"),
    )
    for holding in found:
        table.add_row(
            Text(model_name(holding.identity, names)),
            Text(holding.identity.runtime),
            precision(holding.identity),
            f"{holding.blocks:,}",
            f"{holding.tokens:,}",
            format_bytes(holding.stored_bytes),
            format_time(_time(holding.last_used)) if holding.last_used else "",
        )
    return table


def pins_table(found: Sequence[Pin], names: Mapping[str, str]) -> Table:
    """Return what is pinned, which is never evicted."""
    table = make_table("pinned", "what", "model", "tokens", "since", right=("tokens",))
    for pin in found:
        table.add_row(
            Text(pin.name),
            str(pin.about.get("kind", "")),
            Text(names.get(pin.identity, pin.identity[:_SHORT])),
            f"{pin.tokens:,}",
            format_time(_time(pin.created)),
        )
    return table


def holding_as_dict(holding: Holding, names: Mapping[str, str]) -> dict[str, object]:
    """Return one model, runtime and precision with its stored KV as JSON values."""
    identity, savings = holding.identity, holding.savings
    last = _time(holding.last_used).isoformat() if holding.last_used else None
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
        "created_at": _time(pin.created).isoformat(),
    }


def names_by_digest(found: Sequence[Holding], names: Mapping[str, str]) -> dict[str, str]:
    """Return the names of models by the digest of their identity, which is what a pin holds."""
    return {
        holding.identity.digest().hex(): model_name(holding.identity, names) for holding in found
    }


def model_name(identity: Identity, names: Mapping[str, str]) -> str:
    """Return the name of a model, or the beginning of its fingerprint if it is not here."""
    return names.get(identity.fingerprint, identity.fingerprint[:_SHORT])


def precision(identity: Identity) -> str:
    """Return the element types of KV."""
    types = sorted(set(_ELEMENT_TYPE.findall(identity.kv_format)))
    return "+".join(types) or identity.kv_format


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


@app.command()
@takes_model_options
def warm(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="The text that first messages will begin with."),
    ] = None,
    system: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Instructions (a system prompt), alone or before the text."
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="The name of the pin.", show_default="the name of the file"
        ),
    ] = None,
    model: ModelOption = DEFAULT_MODEL,
    loading: ModelOptions = USUAL,
) -> None:
    """
    Read a document or instructions once, and keep their KV on disk.

    Every later conversation that begins with them, with this model and profile, need not read them.
    `recollect cache` lists what is pinned; `recollect cache unpin NAME` unpins it.
    """
    named = file or system
    if named is None:
        raise ConfigError("There is nothing to read: give a file, or --system with one.")
    text = "" if file is None else read_text(file)
    instructions = None if system is None else read_text(system)
    with (
        loading.load(model) as loaded,
        progress_bar(f"Reading {named.name}", tokens=True) as progress,
    ):
        made = loaded.warm(text, system=instructions, name=name or named.name, progress=progress)
    on_disk = f"{made.tokens:,} tokens, {format_bytes(made.stored_bytes)} on disk"
    if not made.computed_tokens:
        typer.echo(f"{made.name!r} is warm already, since {format_time(made.since)}: {on_disk}.")
        return
    typer.echo(
        f"{made.name!r} is warm: {on_disk}; {made.computed_tokens:,} of them were read in "
        f"{format_duration(made.seconds)}."
    )


app.add_typer(_cache)
