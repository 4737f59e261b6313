"""
`recollect conversations`, `recollect export` and `recollect import`.

All work on the journal and the KV store; only exporting and importing KV load a model.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Final, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from recollect import config, files
from recollect.cli.display import (
    confirm,
    count,
    draw_tree,
    format_bytes,
    format_time,
    make_table,
    printable,
    progress_bar,
)
from recollect.cli.options import (
    USUAL,
    EncryptOption,
    JsonOption,
    ModelOptions,
    YesOption,
    conversation_names,
    has_store,
    model_option,
    open_journal,
    open_store,
    takes_model_options,
    unlock_home,
)
from recollect.conversation.loading import bring_in, collect, why_not
from recollect.conversation.model import Model
from recollect.conversation.tree import grown
from recollect.errors import ConfigError, ConversationFileError, StoreError
from recollect.journal.conversation_files import MOST_JSON_BYTES, from_json, to_json, to_markdown
from recollect.journal.home import drop_of_conversation
from recollect.journal.portable import PortableFile, require_new, write
from recollect.journal.records import DEFAULT_TIP, ConversationInfo, Hit, Page, StoredConversation
from recollect.models.listing import is_here

Format = Literal["markdown", "json"]

app = typer.Typer()
_conversations = typer.Typer(name="conversations")

NameArgument = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="A name that `recollect conversations` lists.",
        autocompletion=conversation_names,
    ),
]
NewNameOption = Annotated[
    str | None,
    typer.Option(
        "--name",
        metavar="NAME",
        help="The name that the conversation is to have.",
        show_default="as the file says",
    ),
]
_ModelOption = Annotated[
    str | None,
    model_option("Model that the cache belongs to.", default="that of the conversation"),
]
_LimitOption = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Most conversations to list.", show_default="all"),
]
_AfterOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="List those behind this one, as the next page.", show_default="none"
    ),
]
_AS_THE_FILE: Final = ModelOptions(profile=None)
_NoKvOption = Annotated[
    bool,
    typer.Option(
        "--no-kv", help="Leave the KV out: only the text of all branches. Loads no model."
    ),
]


@_conversations.callback(invoke_without_command=True)
def conversations(
    context: typer.Context,
    as_json: JsonOption = False,
    limit: _LimitOption = None,
    after: _AfterOption = None,
) -> None:
    """List, search, show, rename, delete, export and import conversations."""
    if context.invoked_subcommand is None:
        list_all(as_json=as_json, limit=limit, after=after)


@_conversations.command("list")
def list_all(
    as_json: JsonOption = False, limit: _LimitOption = None, after: _AfterOption = None
) -> None:
    """List all conversations, the last used one first. This is what happens without a command."""
    with open_journal() as journal:
        last = None if after is None else journal.load(after).id
        page = Page(limit=-1 if limit is None else limit, after=last)
        found = journal.conversations(page=page)
    if as_json:
        typer.echo(json.dumps([_as_dict(info) for info in found], ensure_ascii=False, indent=2))
    elif not found:
        typer.echo("There is no conversation yet: `recollect chat` begins one.")
    else:
        Console().print(conversations_table(found))


@_conversations.command()
def search(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="WORDS...",
            help="What a message must have, whatever the case. Quote a phrase: 'two words'.",
        ),
    ],
    as_json: JsonOption = False,
    limit: Annotated[
        int, typer.Option(min=1, max=1_000, metavar="N", help="Most messages to print.")
    ] = 20,
) -> None:
    """Find the messages that have all words, in all conversations and branches, the newest first."""
    with open_journal() as journal:
        # What the shell was told to keep together is a phrase.
        phrases = [f'"{word}"' if " " in word and '"' not in word else word for word in words]
        found = journal.search(" ".join(phrases), limit=limit + 1)
    shown = found[:limit]
    if as_json:
        typer.echo(json.dumps([_hit_as_dict(hit) for hit in shown], ensure_ascii=False, indent=2))
        return
    if not shown:
        typer.echo("No message has all of these words.")
        return
    Console().print(hits_table(shown))
    if len(found) > limit:
        typer.echo(f"These are the newest {limit:,}; --limit shows more.")


def hits_table(found: list[Hit]) -> Table:
    """Return what a search has found as a table for people."""
    table = make_table("conversation", "message", "when", "branch", "text", whole=("when",))
    for hit in found:
        table.add_row(
            Text(hit.conversation),
            f"{hit.number:,} {hit.role}",
            format_time(hit.created_at),
            Text(hit.branch or "", "dim"),
            Text(printable(hit.snippet)),
        )
    return table


def _hit_as_dict(hit: Hit) -> dict[str, object]:
    return {
        "conversation": hit.conversation,
        "branch": hit.branch,
        "message": hit.number,
        "role": hit.role,
        "snippet": hit.snippet,
        "created_at": hit.created_at.isoformat(),
    }


@_conversations.command()
def show(name: NameArgument) -> None:
    """Draw a conversation as a tree, one turn a line."""
    with open_journal() as journal:
        conversation = journal.load(name)
    tree, nodes = grown(conversation.nodes)
    tips = {tip: nodes[node_id] for tip, node_id in conversation.tips.items()}
    here = _current_tip(conversation)
    console = Console()
    for line in draw_tree(tree, tips, here, console.width):
        console.print(line, highlight=False, soft_wrap=True)


@_conversations.command()
def rename(
    old: Annotated[
        str,
        typer.Argument(
            metavar="OLD",
            help="The name that the conversation has.",
            autocompletion=conversation_names,
        ),
    ],
    new: Annotated[str, typer.Argument(metavar="NEW", help="The name that it is to have.")],
) -> None:
    """Give a conversation another name."""
    with open_journal() as journal:
        journal.rename(old, new)
    typer.echo(f"The conversation {old!r} is named {new!r} now.")


@_conversations.command()
def delete(
    name: NameArgument,
    yes: YesOption = False,
) -> None:
    """Delete a conversation for good, with its branches, its checkpoints and its typed lines."""
    with open_journal() as journal:
        conversation = journal.load(name)
        question = f"Delete {name!r} with {count(conversation.turns, 'turn')} for good?"
        if not confirm(question, yes=yes, to="delete"):
            typer.echo("Nothing was deleted.")
            return
        journal.delete(name)
    typer.echo(f"The conversation {name!r} was deleted.")
    if has_store():
        _drop_checkpoints(conversation)


@_conversations.command()
def export(
    name: NameArgument,
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="A new file to write.", show_default="print it"),
    ] = None,
    to: Annotated[
        Format | None,
        typer.Option(
            "--format",
            help="markdown: one branch, to read. json: all branches, to import.",
            show_default="json for a file that ends in .json, else markdown",
        ),
    ] = None,
    branch: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The branch to write as Markdown.", show_default="main"),
    ] = None,
) -> None:
    """Write a conversation as Markdown or JSON."""
    with open_journal() as journal:
        conversation = journal.load(name)
    if to is None:
        to = "json" if file is not None and file.suffix.lower() == ".json" else "markdown"
    text = to_json(conversation) if to == "json" else to_markdown(conversation, tip=branch)
    if file is None:
        # As bytes: a pipe gets UTF-8 whatever the terminal's encoding is, so JSON stays whole.
        typer.echo(printable(text) if sys.stdout.isatty() else text.encode(), nl=False)
        return
    with _file_errors(file):
        _write_new(file, text)
    typer.echo(f"The conversation {name!r} was written to {file}, which only you can read.")


@_conversations.command("import")
def import_file(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="JSON that `recollect conversations export` wrote."),
    ],
    name: NewNameOption = None,
    encrypt: EncryptOption = False,
) -> None:
    """Add a conversation from a JSON file, with all its branches."""
    with _file_errors(file):
        data = files.read_bytes(file, most_bytes=MOST_JSON_BYTES)
    try:
        text = data.decode("utf-8-sig")  # some editors put a mark before it
    except UnicodeDecodeError:
        raise ConversationFileError(
            f"{file} is not UTF-8 text: give a file that `recollect conversations export` wrote as JSON."
        ) from None
    conversation = from_json(text)
    unlock_home(encrypt=encrypt)
    with open_journal() as journal:
        info = journal.add(conversation, name)
    typer.echo(f"The conversation {info.name!r} was imported, with {count(info.turns, 'turn')}.")


def conversations_table(found: list[ConversationInfo]) -> Table:
    """Return the conversations as a table for people."""
    table = make_table(
        *("name", "last used", "turns", "size", "model", "branches"),
        right=("turns", "size"),
        whole=("last used",),
    )
    for info in found:
        table.add_row(
            Text(info.name),
            format_time(info.updated_at),
            f"{info.turns:,}",
            format_bytes(info.size_bytes),
            Text(printable(info.model)),
            Text(", ".join(info.tips), "dim"),
        )
    return table


@contextmanager
def _file_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConversationFileError(
            f"{file} cannot be used ({error.strerror}): check the path and its permissions."
        ) from error


def _write_new(file: Path, text: str) -> None:
    """Write a new file. If that fails, remove it, so that another try finds no file in its way."""
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
    """Open a file that only its owner may read: it holds a conversation."""
    return os.open(path, flags, 0o600)


def _drop_checkpoints(conversation: StoredConversation) -> None:
    """Delete the checkpoints of a deleted conversation, and say what may be left on disk."""
    with open_store() as store:
        names = drop_of_conversation(store, conversation.id, conversation.created_at)
    if names:
        typer.echo(f"Its checkpoints were deleted, too: {', '.join(names)}.")
    typer.echo(
        "Its KV may stay on disk until space runs out; `recollect cache clear` deletes it now."
    )


def _current_tip(conversation: StoredConversation) -> str:
    """Return the branch on which a resumed conversation would go on."""
    tips = conversation.tips
    return DEFAULT_TIP if DEFAULT_TIP in tips else next(iter(tips), DEFAULT_TIP)


def _as_dict(info: ConversationInfo) -> dict[str, object]:
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


@app.command("export")
@takes_model_options
def export_with_kv(
    name: NameArgument,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A new file to write.")],
    branch: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The branch whose KV is written.", show_default="main"),
    ] = None,
    model: _ModelOption = None,
    no_kv: _NoKvOption = False,
    loading: ModelOptions = USUAL,
) -> None:
    """
    Write a conversation and the KV of one branch into a file.

    Another machine with the same model can go on with it and need not read it again. The file is not
    encrypted: whoever has it can read the conversation.
    """
    if no_kv and branch is not None:
        raise ConfigError(
            "--branch names the branch whose KV is written, and --no-kv writes none: leave one of them out."
        )
    require_new(file)
    with open_journal() as journal:
        conversation = journal.load(name)
    collected = None
    if not no_kv:
        with loading.load(model or conversation.model) as loaded:
            session = loaded.resume(name, tip=branch or DEFAULT_TIP)
            with progress_bar("Collecting KV", tokens=True) as progress:
                collected = collect(loaded, session, progress=progress)
    write(file, conversation, collected)
    size = format_bytes(file.stat().st_size)
    tokens = 0 if collected is None else len(collected.token_ids)
    kv = f"with the KV of {tokens:,} tokens" if tokens else "without KV"
    typer.echo(f"The conversation {name!r} was written to {file}, {kv} ({size}).")


@app.command("import")
@takes_model_options
def import_with_kv(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A file that `recollect export` wrote.")
    ],
    name: NewNameOption = None,
    model: _ModelOption = None,
    no_kv: _NoKvOption = False,
    loading: ModelOptions = _AS_THE_FILE,
) -> None:
    """
    Add a conversation from a file that `recollect export` wrote.

    Its KV is added, too, if the model is here and computes the same; without --profile, the model is
    loaded with the profile of the file. Nothing can tell whether KV belongs to the text: import it
    only from people you trust, and use --no-kv otherwise.
    """
    portable = PortableFile(file)
    with open_journal() as journal:
        info = journal.add(portable.conversation, name)
    typer.echo(f"The conversation {info.name!r} was imported, with {count(info.turns, 'turn')}.")
    if no_kv:
        return
    wanted = model or portable.conversation.model
    obstacle = _why_not_loaded(portable, wanted, is_asked_for=model is not None)
    if obstacle is None:
        assert portable.head is not None, "a file without KV needs no model"
        with replace(loading, profile=loading.profile or portable.head.profile).load(
            wanted
        ) as loaded:
            obstacle = _bring_in(loaded, portable)
    if obstacle is not None:
        typer.echo(
            f"Its KV was not imported: {obstacle}. The model reads the conversation once when it goes on."
        )


def _why_not_loaded(portable: PortableFile, model: str, *, is_asked_for: bool) -> str | None:
    """Return why loading the model would be of no use; None if it is of use."""
    if portable.head is None:
        return "the file has none"
    if not is_asked_for and not is_here(model, config.home()):
        return f"{model} is not here"
    return None


def _bring_in(model: Model, portable: PortableFile) -> str | None:
    """Put the KV on disk and say so. Returns the reason if it cannot be done."""
    reason = why_not(model, portable)
    if reason is not None:
        return reason
    try:
        tokens = bring_in(model, portable)
    except StoreError as error:
        return str(error).rstrip(".")
    typer.echo(f"Its KV was imported, too: {model.name} need not read {tokens:,} tokens.")
    return None


app.add_typer(_conversations)
