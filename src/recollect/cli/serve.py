"""
`recollect serve` and `recollect keys`: the server, and the API keys that it accepts.

Decides which models are offered, and under which names; the server itself is `recollect.server`.
"""

import logging
import os
import sys
import webbrowser
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from recollect import config, encryption
from recollect.cli.batch import read_text
from recollect.cli.display import count
from recollect.cli.options import (
    USUAL,
    EncryptOption,
    ModelOptions,
    TemperatureOption,
    takes_model_options,
    unlock_home,
)
from recollect.errors import ConfigError, MissingPackageError, UnknownModelError
from recollect.journal import requests
from recollect.models import stores
from recollect.models.catalog import CATALOG, DEFAULT_MODEL, REFERENCE_NAME, resolve
from recollect.models.gguf_weights import part_names
from recollect.models.listing import installed, size_bytes
from recollect.models.prepare import known_context_length
from recollect.server.settings import (
    DEFAULT_HOST,
    DEFAULT_MAX_TOKENS,
    DEFAULT_PORT,
    Limits,
    Settings,
)
from recollect.types import SamplingParams

if TYPE_CHECKING:  # its libraries are an extra
    from recollect.server.access import KeyFile

app = typer.Typer()
_keys = typer.Typer(name="keys", no_args_is_help=True)

_KEY_VARIABLE: Final = "RECOLLECT_API_KEY"


def _option(panel: str, *, about: str, metavar: str, **how: Any) -> Any:
    return typer.Option(metavar=metavar, help=about, rich_help_panel=panel, **how)


def _several(panel: str | None, *names: str, about: str, metavar: str, **how: Any) -> Any:
    """Return an option that may be given several times."""
    about = f"{about} May be given several times."
    how = {"show_default": False, "rich_help_panel": panel} | how
    return typer.Option(*names, metavar=metavar, help=about, **how)


@app.command()
@takes_model_options
def serve(
    *,
    model: Annotated[
        list[str] | None,
        _several(
            None,
            *("--model", "-m"),
            about="A model as in `recollect chat`; the first one is the default.",
            metavar="NAME",
            show_default=f"{DEFAULT_MODEL}, and what `recollect models` shows as installed",
        ),
    ] = None,
    alias: Annotated[
        list[str] | None,
        _several(
            None,
            about="Another name for a model, such as the one that a tool has built in.",
            metavar="NAME[=MODEL]",
        ),
    ] = None,
    loading: ModelOptions = USUAL,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Most memory for all models and their KV; the least recently used one is unloaded.",
            show_default="no limit",
        ),
    ] = None,
    temperature: TemperatureOption = None,
    max_tokens: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="Most tokens of a reply whose request sets no limit; 0: what the context holds.",
        ),
    ] = DEFAULT_MAX_TOKENS,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Refuse requests with fields that are not known, instead of ignoring these fields.",
        ),
    ] = False,
    host: Annotated[
        str,
        _option(
            "Access",
            about="The address to listen on; any other than 127.0.0.1 needs a key.",
            metavar="H",
        ),
    ] = DEFAULT_HOST,
    port: Annotated[
        int,
        # Ports are numbers of 16 bits.
        _option(
            "Access",
            about="The port to listen on; 0 takes a free one, 11434 is where clients of Ollama look.",
            metavar="P",
            min=0,
            max=65535,
        ),
    ] = DEFAULT_PORT,
    public: Annotated[
        list[Path] | None,
        _several(
            "Access",
            about="A text file with a system prompt whose KV all keys may reuse.",
            metavar="FILE",
        ),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        _several(
            "Access",
            about="A key that clients have to send. `ps` shows it: set the variable, or use "
            "`recollect keys add`.",
            metavar="K",
            envvar=_KEY_VARIABLE,
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        _several(
            "Access",
            about="A name of this machine that clients use, besides localhost.",
            metavar="NAME",
        ),
    ] = None,
    cors: Annotated[
        list[str] | None,
        _several(
            "Access",
            about="A web page that may send requests, such as http://localhost:3000.",
            metavar="ORIGIN",
        ),
    ] = None,
    concurrent: Annotated[
        int, _option("Limits", about="Most replies generated at once.", metavar="N", min=1)
    ] = 16,
    queue: Annotated[
        int, _option("Limits", about="Most requests that wait.", metavar="N", min=0)
    ] = 64,
    encrypt: EncryptOption = False,
    keep_chats: Annotated[
        bool,
        typer.Option(
            "--keep-chats",
            help="Keep chats of clients that send all of it each time as conversations.",
        ),
    ] = False,
    web: Annotated[
        bool,
        typer.Option("--web", help="Open the page of conversations in a browser."),
    ] = False,
    no_save: Annotated[
        bool,
        typer.Option(
            "--no-save",
            help="Keep no words of prompts for `recollect explain`, only counts and places.",
        ),
    ] = False,
) -> None:
    """
    Serve the APIs of OpenAI, Anthropic and Ollama, for any client.

    Conversations are read only once, also those of clients that send all of it each time.
    Point a client at http://127.0.0.1:8765/v1; /openapi.json there describes every request.
    """
    if keep_chats and no_save:
        raise ConfigError(
            "--keep-chats keeps what clients say, and --no-save keeps none of their words: leave one of "
            "them out."
        )
    _require_packages()
    from recollect.server import app as server  # noqa: PLC0415 - its libraries are an extra
    from recollect.server import hub as hubs  # noqa: PLC0415
    from recollect.server.access import KeyFile, keyring  # noqa: PLC0415

    prompts = [read_text(file) for file in public or ()]
    home = config.home()
    references = public_names(model or default_references(home))
    names = tuple(references)
    for reference in references.values():
        resolve(reference)
    if loading.draft_model is not None:
        resolve(loading.draft_model)
    loading.check()
    SamplingParams(temperature=temperature or 0.0)
    keys = keyring(KeyFile.in_home(home), _given_keys(api_key))
    if encrypt and not encryption.is_encrypted(home):
        for reference in references.values():
            loading.prepare(reference)
    settings = Settings(
        home=home,
        cipher=unlock_home(encrypt=encrypt),
        models=names,
        aliases=aliases(alias or (), references),
        host=host,
        port=port,
        allowed_hosts=tuple(allow_host or ()),
        cors_origins=tuple(cors or ()),
        temperature=temperature,
        max_tokens=max_tokens or None,
        is_strict=strict,
        keeps_words=not no_save,
        keeps_chats=keep_chats,
        has_keys=len(keys) > 0,
        limits=Limits(concurrent=concurrent, queue=queue),
    )
    hub = hubs.ModelHub(
        lambda name: loading.load_another(references[name]),
        names,
        aliases=settings.aliases,
        memory_bytes=None if memory is None else config.parse_size(memory),
        weight_bytes=lambda name: weight_bytes(references[name], home),
        draft_bytes=0 if loading.draft_model is None else weight_bytes(loading.draft_model, home),
        context_length=cache(lambda name: known_context_length(references[name], home)),
        on_load=lambda model: hubs.publish_later(model, prompts),
    )
    _log_to_stderr()
    server.serve(
        settings,
        hub,
        keys,
        on_listening=lambda port: _say_where(settings, port, opens=web),
        on_stopping=lambda replies: _say_stopping(settings, replies),
    )
    if hub.is_loading:
        # Python would end under a thread that is in the runtime's own code, which then aborts.
        logging.shutdown()
        os._exit(0)


@_keys.callback()
def keys() -> None:
    """Manage the API keys of `recollect serve`."""


_MOST_CLIENTS: Final = 20
"""That are explained at once, those first that have read most again, then those that computed most."""


@app.command()
def explain(
    client: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Only clients whose name has this in it."),
    ] = None,
    last: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Only the latest N requests of these clients."),
    ] = None,
) -> None:
    """
    Explain where prompts of a server's clients part from earlier ones.

    Says what that costs, and what to change.

    For example `recollect explain --client opencode --last 50`:

    \b
    opencode: 50 requests, 360,000 tokens of prompts, 91,200 computed,
      75,200 of these again
      Line 3 of the instructions is a date or a time ('Thursday' became 'Friday'):
      18,800 tokens read again in each of 4 requests. Put what changes at the
      end of the instructions, or into a message.
    """
    cipher = unlock_home()
    found = requests.explain(client, last, cipher=cipher)
    if not found and client is not None and (known := requests.explain(cipher=cipher)):
        names = ", ".join(one.client for one in known[:_MOST_CLIENTS])
        typer.echo(f"No request of a client named {client!r} is known: there are those of {names}.")
    elif not found:
        typer.echo("No request is known: `recollect serve` notes each that it answers.")
    for one in found[:_MOST_CLIENTS]:
        typer.echo(
            f"{one.client}: {count(one.requests, 'request')}, {one.prompt_tokens:,} tokens of prompts, "
            f"{one.computed_tokens:,} computed"
            + (f", {one.lost_tokens:,} of these again" if one.lost_tokens else "")
        )
        for finding in one.findings:
            typer.echo(f"  {finding}")
        if not one.findings:
            typer.echo("  Nothing that was read before was read again.")
    if len(found) > _MOST_CLIENTS:
        typer.echo(
            f"{len(found) - _MOST_CLIENTS:,} more clients have lost or computed less: --client shows those "
            "with a name."
        )


@_keys.command("add")
def add_key(
    name: Annotated[str, typer.Argument(help="Who gets the key.")],
    operator: Annotated[
        bool,
        typer.Option("--operator", help="Allow it to read /metrics and to make prompts public."),
    ] = False,
) -> None:
    """Make a key and print it. It is shown only once, because only its hash is saved."""
    typer.echo(_key_file().add(name, is_operator=operator))
    typer.echo(
        "Keep it: it cannot be shown again. A running server accepts it after a restart.", err=True
    )


@_keys.command("list")
def list_keys() -> None:
    """List who has a key."""
    found = _key_file().read()
    if not found:
        typer.echo("There is no key yet: `recollect keys add NAME` makes one.")
    for stored in found:
        typer.echo(f"{stored.name}{'  (operator)' if stored.is_operator else ''}")


@_keys.command("remove")
def remove_key(name: Annotated[str, typer.Argument(help="Whose key it is.")]) -> None:
    """Delete a key. The server refuses it from its next start on."""
    _key_file().remove(name)
    typer.echo(f"The key {name!r} was deleted. A running server accepts it until it is restarted.")


def _key_file() -> "KeyFile":
    from recollect.server.access import KeyFile  # noqa: PLC0415 - its libraries are an extra

    return KeyFile.in_home(config.home())


def _require_packages() -> None:
    try:
        import fastapi  # noqa: F401, PLC0415 - only whether it is there
        import httptools  # noqa: F401, PLC0415
        import prometheus_client  # noqa: F401, PLC0415
        import uvicorn  # noqa: F401, PLC0415
    except ImportError as cause:
        raise MissingPackageError(
            f"The server needs the package {cause.name}: `python -m pip install "
            '"recollect-llm[server]"`.'
        ) from cause


def _given_keys(api_key: list[str] | None) -> Sequence[str]:
    """
    Return the keys of --api-key, or else that of the variable.

    Typer takes a blank variable for no key at all, which would let everybody in. It is returned as it
    is, and then refused.
    """
    blank = os.environ.get(_KEY_VARIABLE)
    return api_key or (() if blank is None else (blank,))


def _log_to_stderr() -> None:
    logging.basicConfig(
        stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s"
    )
    logging.getLogger("recollect").setLevel(logging.INFO)


_OWN_ADDRESSES: Final = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104 - a name, not bound
"""Where a browser on this machine finds a server that listens on all addresses; not all open those."""


def _say_where(settings: Settings, port: int, *, opens: bool) -> None:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    keys = "an API key" if settings.has_keys else "no API key"
    print(f"Listening on http://{host}:{port}/v1 ({keys}); Ctrl-C stops.", file=sys.stderr)
    page = f"http://{_OWN_ADDRESSES.get(host, host)}:{port}/"
    print(f"Conversations as trees: {page}", file=sys.stderr, flush=True)
    if opens:
        webbrowser.open(page)


def _say_stopping(settings: Settings, replies: int) -> None:
    text = "Stopping."
    if replies:
        what, them = count(replies, "reply", "replies"), "it" if replies == 1 else "them"
        seconds = settings.limits.shutdown_s
        text = f"Stopping: waiting up to {seconds:g} s for {what}; Ctrl-C again ends {them} now."
    print(text, file=sys.stderr, flush=True)


def public_names(references: Iterable[str]) -> dict[str, str]:
    """
    Return the references of models by the names that clients use, which show no paths.

    A file is called by its name without the suffix, a folder by its name. If two names are the same,
    the suffix is added, and then the folder in which they are.

    Args:
        references: As `recollect.load` takes them; duplicates are dropped.

    Raises:
        ConfigError: Two models still have the same name.
    """
    given = {_identity(reference): _names(reference) for reference in references}
    chosen = dict.fromkeys(given, 0)
    while True:
        called: dict[str, list[str]] = {}
        for reference, names in given.items():
            called.setdefault(names[chosen[reference]], []).append(reference)
        clashes = [group for group in called.values() if len(group) > 1]
        if not clashes:
            return {name: group[0] for name, group in called.items()}
        more = [one for group in clashes for one in group if chosen[one] + 1 < len(given[one])]
        if not more:
            raise ConfigError(
                f"Two models would be called the same: {' and '.join(clashes[0])}. Rename one."
            )
        for one in more:
            chosen[one] += 1


def default_references(home: Path) -> list[str]:
    """Return the models to offer if none is named: the default, and those that are installed."""
    names = [one.name for one in installed(home) if one.is_installed]
    return [DEFAULT_MODEL, *(name for name in names if _leads_somewhere(name))]


def _leads_somewhere(name: str) -> bool:
    try:
        resolve(name)
    except UnknownModelError:  # converted from a file that is gone since
        return False
    return True


def weight_bytes(reference: str, home: Path) -> int:
    """Return the size of a model on disk in bytes, which is about that of its weights in memory."""
    path = _path(reference)
    name = reference if path is None else str(path)
    status = next((one for one in installed(home) if one.name == name), None)
    if status is not None and status.is_installed:
        return status.disk_bytes - status.source_bytes
    if path is not None:  # of a GGUF file all parts
        return sum(size_bytes(path.with_name(part)) for part in part_names(path.name))
    if (kept := stores.find(reference)) is not None:
        return kept.size_bytes
    return 0 if status is None else status.download_bytes or 0


def _path(reference: str) -> Path | None:
    """Return the path of a model that was given by its path; None for one that has a name."""
    if reference in {*CATALOG, REFERENCE_NAME}:
        return None
    path = Path(reference).expanduser()
    return path.resolve() if path.exists() else None


def _identity(reference: str) -> str:
    path = _path(reference)
    return reference if path is None else str(path)


def _names(reference: str) -> list[str]:
    path = _path(reference)
    if path is None:
        return [reference]
    short = path.name if path.is_dir() else path.stem
    return [short, path.name, f"{path.parent.name}/{path.name}"]


def aliases(given: Iterable[str], names: Mapping[str, str]) -> dict[str, str]:
    """
    Return other names of models, from `ALIAS` (of the first) or `ALIAS=MODEL`.

    Raises:
        ConfigError: There is no such model.
    """
    first = next(iter(names))
    found = {}
    for text in given:
        alias, _, name = text.partition("=")
        if (name or first) not in names:
            raise ConfigError(
                f"--alias {text}: there is no model {name!r} among {', '.join(names)}."
            )
        found[alias] = name or first
    return found


app.add_typer(_keys)
