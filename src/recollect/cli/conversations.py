"""
`recollect conversations`: list, show, rename, delete, export and import what was said.

Works on the journal alone: no model is loaded, and none has to be there.

`recollect export` and `recollect import`: a conversation with its KV in one file.

Decides which model is needed and says what came of it; the file is `conversation/portable.py`'s.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from recollect.cli import options
from recollect.cli.options import (
    EncryptOption,
    has_store,
    open_journal,
    open_store,
    progress_bar,
    unlock_home,
)
from recollect.config import DEFAULT_PROFILE
from recollect.errors import ConfigError, ConversationError, ConversationFileError, StoreError
from recollect.types import Profile

if TYPE_CHECKING:
    from rich.table import Table

    from recollect.conversation.model import Model
    from recollect.journal.portable import PortableFile
    from recollect.journal.records import ConversationInfo, StoredConversation


Format = Literal["markdown", "json"]

app = typer.Typer(
    name="conversations",
    help="List, show, rename, delete, export and import conversations.",
    context_settings={"help_option_names": ["-h", "--help"]},
)

NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="As `recollect conversations` lists it.")
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON list, sizes in bytes, times in UTC.")
]


@app.callback(invoke_without_command=True)
def conversations(context: typer.Context, as_json: JsonOption = False) -> None:
    """List, show, rename, delete, export and import conversations."""
    if context.invoked_subcommand is None:
        list_all(as_json=as_json)


@app.command("list")
def list_all(as_json: JsonOption = False) -> None:
    """List all conversations, the one that was used last first. Also what no command does."""
    with open_journal() as journal:
        found = journal.conversations()
    if as_json:
        typer.echo(json.dumps([_as_dict(info) for info in found], ensure_ascii=False, indent=2))
    elif not found:
        typer.echo("There is no conversation yet: `recollect chat` begins one.")
    else:
        from rich.console import Console  # noqa: PLC0415 - see the imports for type checking

        Console().print(conversations_table(found))


@app.command()
def show(name: NameArgument) -> None:
    """Draw a conversation as a tree, one line a turn."""
    with open_journal() as journal:
        conversation = journal.load(name)
    from rich.console import Console  # noqa: PLC0415 - see the imports for type checking

    from recollect.cli.display import draw_tree  # noqa: PLC0415
    from recollect.conversation.tree import grown  # noqa: PLC0415

    tree, nodes = grown(conversation.nodes)
    tips = {tip: nodes[node_id] for tip, node_id in conversation.tips.items()}
    here = _current_tip(conversation)
    console = Console()
    for line in draw_tree(tree, tips, here, console.width):
        console.print(line, highlight=False, soft_wrap=True)


@app.command()
def rename(
    old: Annotated[str, typer.Argument(metavar="OLD", help="What it is called.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="What it shall be called.")],
) -> None:
    """Give a conversation another name."""
    with open_journal() as journal:
        journal.rename(old, new)
    typer.echo(f"{old!r} is {new!r} now.")


@app.command()
def delete(
    name: NameArgument,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete a conversation for good: its branches and checkpoints, and what was typed of it."""
    with open_journal() as journal:
        conversation = journal.load(name)
        if not yes:
            if not sys.stdin.isatty():
                raise ConversationError(
                    f"Nobody can be asked whether to delete {name!r}: say so with --yes."
                )
            if not typer.confirm(
                f"Delete {name!r} with {_count(conversation.turns, 'turn')} for good?"
            ):
                typer.echo("Nothing was deleted.")
                return
        journal.delete(name)
    typer.echo(f"{name!r} was deleted.")
    if has_store():
        _drop_checkpoints(conversation)


@app.command()
def export(
    name: NameArgument,
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="Where to; must be new.", show_default="print it"),
    ] = None,
    to: Annotated[
        Format | None,
        typer.Option(
            "--format",
            help="markdown: one path, to read. json: everything, to import.",
            show_default="json for a file that ends in .json, else markdown",
        ),
    ] = None,
    tip: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Where the path ends, in Markdown.", show_default="main"),
    ] = None,
) -> None:
    """Write a conversation as Markdown or JSON."""
    from recollect.journal.conversation_files import to_json, to_markdown  # noqa: PLC0415 - as above

    with open_journal() as journal:
        conversation = journal.load(name)
    if to is None:
        to = "json" if file is not None and file.suffix.lower() == ".json" else "markdown"
    text = to_json(conversation) if to == "json" else to_markdown(conversation, tip=tip)
    if file is None:
        from recollect.cli.display import printable  # noqa: PLC0415 - as above

        # As bytes: a pipe gets UTF-8 whatever the terminal's encoding is, so JSON stays whole.
        typer.echo(printable(text) if sys.stdout.isatty() else text.encode(), nl=False)
        return
    with _file_errors(file):
        _write_new(file, text)
    typer.echo(f"{name!r} is in {file}, which only you can read.")


@app.command("import")
def import_file(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSON that `export` wrote.")],
    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="What to call it.", show_default="as the file says"),
    ] = None,
    encrypt: EncryptOption = False,
) -> None:
    """Add a conversation from a JSON file, with all its branches."""
    from recollect import files  # noqa: PLC0415 - as above
    from recollect.journal.conversation_files import MOST_JSON_BYTES, from_json  # noqa: PLC0415

    with _file_errors(file):
        data = files.read_bytes(file, most_bytes=MOST_JSON_BYTES)
    try:
        text = data.decode("utf-8-sig")  # some editors put a mark before it
    except UnicodeDecodeError:
        raise ConversationFileError(
            f"{file} is no text: give a file that `recollect conversations export` wrote as JSON."
        ) from None
    conversation = from_json(text)
    unlock_home(encrypt=encrypt)
    with open_journal() as journal:
        info = journal.add(conversation, name)
    typer.echo(f"{info.name!r} was imported, with {_count(info.turns, 'turn')}.")


def conversations_table(found: "list[ConversationInfo]") -> "Table":
    """Return the conversations as a table for people."""
    from rich import box  # noqa: PLC0415 - see the imports for type checking
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    from recollect.cli.models import format_bytes  # noqa: PLC0415

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("name", overflow="fold")
    table.add_column("last used", no_wrap=True)
    table.add_column("turns", justify="right", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("model", overflow="fold")
    table.add_column("tips", overflow="fold")
    for info in found:
        table.add_row(
            Text(info.name),
            Text(_local(info.updated_at)),
            f"{info.turns:,}",
            format_bytes(info.size_bytes),
            Text(info.model),
            Text(", ".join(info.tips), "dim"),
        )
    return table


@contextmanager
def _file_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConversationFileError(
            f"{file} cannot be used ({error.strerror}): check the path and what is allowed there."
        ) from error


def _write_new(file: Path, text: str) -> None:
    """Write a file that has to be new; where that fails, none is left in the way of another try."""
    try:
        stream = open(file, "x", encoding="utf-8", newline="\n", opener=_private)  # noqa: SIM115 - below
    except FileExistsError:
        raise ConversationFileError(
            f"{file} exists already: choose another name, or remove it first."
        ) from None
    try:
        with stream:
            stream.write(text)
    except BaseException:  # also Ctrl-C
        with suppress(OSError):
            file.unlink()
        raise


def _private(path: str, flags: int) -> int:
    """Open a file that its owner alone may read: it shows what was said."""
    return os.open(path, flags, 0o600)


def _drop_checkpoints(conversation: "StoredConversation") -> None:
    """Let go what was kept of a conversation, and say what may be left of it."""
    from recollect.journal.checkpoints import drop_of_conversation  # noqa: PLC0415 - as above

    with open_store() as store:
        names = drop_of_conversation(store, conversation.id, conversation.created_at)
    if names:
        typer.echo(f"With it went its checkpoints: {', '.join(names)}.")
    typer.echo(
        "Its KV may lie on disk until others need the room; `recollect cache clear` removes it now."
    )


def _current_tip(conversation: "StoredConversation") -> str:
    """Return the name of the tip at which a resumed conversation would stand."""
    from recollect.journal.records import DEFAULT_TIP  # noqa: PLC0415 - as above

    tips = conversation.tips
    return DEFAULT_TIP if DEFAULT_TIP in tips else next(iter(tips), DEFAULT_TIP)


def _as_dict(info: "ConversationInfo") -> dict[str, object]:
    return {
        "name": info.name,
        "created_at": info.created_at.isoformat(),
        "updated_at": info.updated_at.isoformat(),
        "model": info.model,
        "fingerprint": info.fingerprint,
        "turns": info.turns,
        "tips": list(info.tips),
        "size_bytes": info.size_bytes,
    }


def _local(moment: datetime) -> str:
    return moment.astimezone().strftime("%Y-%m-%d %H:%M")


def _count(number: int, noun: str) -> str:
    return f"1 {noun}" if number == 1 else f"{number:,} {noun}s"


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


def export_with_kv(
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


def import_with_kv(
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
