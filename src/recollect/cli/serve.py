"""
`recollect serve` and `recollect keys`: the engine behind the API that every tool speaks.

Reads options and says where it listens; the server itself is `recollect.server`.

Which models a server offers: what clients call them, and what they weigh.

Reads folders and notes; loads nothing.
"""

import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from recollect.cli import options
from recollect.cli.options import EncryptOption, read_text, unlock_home
from recollect.config import DEFAULT_PROFILE
from recollect.errors import ConfigError, UnknownModelError
from recollect.models.catalog import CATALOG, DEFAULT_MODEL, REFERENCE_NAME, resolve
from recollect.models.prepare import installed, size_bytes

if TYPE_CHECKING:
    from recollect.server.access import KeyFile
    from recollect.server.settings import Settings


_ACCESS: Final = "Access"
_LIMITS: Final = "Limits"
_KEY_VARIABLE: Final = "RECOLLECT_API_KEY"

keys_app = typer.Typer(
    name="keys", help="API keys of `recollect serve`.", no_args_is_help=True, add_completion=False
)


def serve(
    *,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME",
            help="As in `recollect chat`; several: the first is the default.",
            show_default=f"{DEFAULT_MODEL}, and what `recollect models` shows as installed",
        ),
    ] = None,
    alias: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=MODEL]",
            help="Another name for a model, such as the one that a tool has built in.",
            show_default=False,
        ),
    ] = None,
    profile: options.ProfileOption = DEFAULT_PROFILE,
    kv_memory: options.KvMemoryOption = None,
    kv_disk: options.KvDiskOption = None,
    offline: options.OfflineOption = False,
    allow_native_code: options.AllowNativeCodeOption = None,
    long_context: options.LongContextOption = False,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Most memory for all models and their KV; the least recently used goes.",
            show_default="no limit",
        ),
    ] = None,
    temperature: options.TemperatureOption = 0.0,
    host: Annotated[
        str,
        typer.Option(
            metavar="H",
            help="Where to listen; other than 127.0.0.1 needs a key.",
            rich_help_panel=_ACCESS,
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(
            metavar="P",
            min=0,
            max=65535,  # ports are numbers of 16 bits
            help="0 takes a free one.",
            rich_help_panel=_ACCESS,
        ),
    ] = 8765,
    public: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="A system prompt that all keys may reuse, as text; several.",
            show_default=False,
            rich_help_panel=_ACCESS,
        ),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="K",
            help="A key that clients have to send. `ps` shows it: set the variable, or use "
            "`recollect keys add`.",
            envvar=_KEY_VARIABLE,
            show_default=False,
            rich_help_panel=_ACCESS,
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A name that this machine goes by, beside localhost.",
            show_default=False,
            rich_help_panel=_ACCESS,
        ),
    ] = None,
    cors: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="A web page that may call, such as http://localhost:3000.",
            show_default=False,
            rich_help_panel=_ACCESS,
        ),
    ] = None,
    concurrent: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, help="Replies generated at once.", rich_help_panel=_LIMITS
        ),
    ] = 16,
    queue: Annotated[
        int,
        typer.Option(metavar="N", min=0, help="Requests that may wait.", rich_help_panel=_LIMITS),
    ] = 64,
    encrypt: EncryptOption = False,
) -> None:
    """
    Serve the APIs of OpenAI and Anthropic, for any client, with conversations that stay warm.

    Point a client at http://127.0.0.1:8765/v1; /openapi.json there describes every call.
    """
    _require_packages()
    from recollect import config, encryption  # noqa: PLC0415 - see the imports for type checking
    from recollect.server.access import KeyFile, keyring  # noqa: PLC0415
    from recollect.server.app import serve as run_server  # noqa: PLC0415
    from recollect.server.hub import ModelHub, publish_later  # noqa: PLC0415
    from recollect.server.settings import Limits, Settings  # noqa: PLC0415

    prompts = [read_text(file) for file in public or ()]
    home = config.home()
    references = public_names(model or default_references(home))
    names = tuple(references)
    _require_readable(references.values(), kv_memory, kv_disk, temperature)
    keys = keyring(KeyFile.in_home(home), _given_keys(api_key))
    if encrypt and not encryption.is_encrypted(home):
        for reference in references.values():
            options.make_ready(
                reference,
                kv_memory=kv_memory,
                kv_disk=kv_disk,
                offline=offline,
                allow_native_code=allow_native_code,
                long_context=long_context,
            )
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
        has_keys=len(keys) > 0,
        limits=Limits(concurrent=concurrent, queue=queue),
    )
    hub = ModelHub(
        lambda name: options.open_model(
            references[name],
            profile=profile,
            kv_memory=kv_memory,
            kv_disk=kv_disk,
            allow_native_code=allow_native_code,
            long_context=long_context,
            offline=offline,
        ),
        names,
        aliases=settings.aliases,
        memory_bytes=None if memory is None else config.parse_size(memory),
        weight_bytes=lambda name: weight_bytes(references[name], home),
        on_load=lambda model: publish_later(model, prompts),
    )
    _log_to_stderr()
    run_server(
        settings,
        hub,
        keys,
        on_listening=lambda port: _say_where(settings, port),
        on_stopping=lambda replies: _say_stopping(settings, replies),
    )
    if hub.is_loading:
        # Python would end under a thread that is in the runtime's own code, which then aborts.
        logging.shutdown()
        os._exit(0)


@keys_app.command("add")
def add_key(
    name: Annotated[str, typer.Argument(help="Whom it is for.")],
    operator: Annotated[
        bool, typer.Option("--operator", help="May read /metrics, and make prompts public.")
    ] = False,
) -> None:
    """Make a key and print it, once: only its hash is kept."""
    typer.echo(_key_file().add(name, is_operator=operator))
    typer.echo(
        "Keep it: it cannot be shown again. A running server does not know it yet.", err=True
    )


@keys_app.command("list")
def list_keys() -> None:
    """Show whom there are keys for."""
    found = _key_file().read()
    if not found:
        typer.echo("There is no key yet: `recollect keys add NAME` makes one.")
    for stored in found:
        typer.echo(f"{stored.name}{'  (operator)' if stored.is_operator else ''}")


@keys_app.command("remove")
def remove_key(name: Annotated[str, typer.Argument(help="Whom it was for.")]) -> None:
    """Refuse a key from the server's next start on."""
    _key_file().remove(name)
    typer.echo(
        f"The key {name!r} was removed. A server that is running takes it until it is restarted."
    )


def _key_file() -> "KeyFile":
    from recollect import config  # noqa: PLC0415 - see the imports for type checking
    from recollect.server.access import KeyFile  # noqa: PLC0415

    return KeyFile.in_home(config.home())


def _require_packages() -> None:
    try:
        import fastapi  # noqa: F401, PLC0415 - only whether it is there
        import httptools  # noqa: F401, PLC0415
        import prometheus_client  # noqa: F401, PLC0415
        import uvicorn  # noqa: F401, PLC0415
    except ImportError as cause:
        raise ConfigError(
            f"The server needs the package {cause.name}: `python -m pip install "
            '"recollect-llm[server]"`.'
        ) from cause


def _require_readable(
    references: Iterable[str], kv_memory: str | None, kv_disk: str | None, temperature: float
) -> None:
    """
    Check what only a load would read otherwise, when clients believe in the server already.

    Raises:
        RecollectError: A model goes by no such name, or a size or a number is none.
    """
    from recollect import config  # noqa: PLC0415 - see the imports for type checking
    from recollect.models.catalog import resolve  # noqa: PLC0415
    from recollect.types import SamplingParams  # noqa: PLC0415

    for reference in references:
        resolve(reference)
    if kv_memory is not None:
        config.parse_size(kv_memory)
    if kv_disk is not None:
        config.parse_disk_size(kv_disk)
    config.is_offline()
    SamplingParams(temperature=temperature)


def _given_keys(api_key: list[str] | None) -> Sequence[str]:
    """
    Return the keys that were given by hand.

    Of a blank variable Typer makes no key at all, which would let everybody in. It is returned as it
    is, to be refused.
    """
    blank = os.environ.get(_KEY_VARIABLE)
    return api_key or (() if blank is None else (blank,))


def _log_to_stderr() -> None:
    logging.basicConfig(
        stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s"
    )
    logging.getLogger("recollect").setLevel(logging.INFO)


def _say_where(settings: "Settings", port: int) -> None:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    keys = "an API key" if settings.has_keys else "no API key"
    print(
        f"Listening on http://{host}:{port}/v1 ({keys}); Ctrl-C stops.", file=sys.stderr, flush=True
    )


def _say_stopping(settings: "Settings", replies: int) -> None:
    text = "Stopping."
    if replies:
        what, them = ("1 reply", "it") if replies == 1 else (f"{replies:,} replies", "them")
        seconds = settings.limits.shutdown_s
        text = f"Stopping: waiting up to {seconds:g} s for {what}; Ctrl-C again ends {them} now."
    print(text, file=sys.stderr, flush=True)


def public_names(references: Iterable[str]) -> dict[str, str]:
    """
    Return models by what clients call them, which need not know where they lie.

    A file is called by its name without the ending, a folder by its name. Where two would be called
    the same, the ending stays, and then the folder that it lies in comes before it.

    Args:
        references: As `recollect.load` takes them; what comes twice is one.

    Raises:
        ConfigError: Two are called the same with all that.
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
    """Return what is offered where nothing is named: the default, and what is installed and still there."""
    names = [one.name for one in installed(home) if one.is_installed]
    return [DEFAULT_MODEL, *(name for name in names if _leads_somewhere(name))]


def _leads_somewhere(name: str) -> bool:
    try:
        resolve(name)
    except UnknownModelError:  # converted from a file that is gone since
        return False
    return True


def weight_bytes(reference: str, home: Path) -> int:
    """Return what a model takes on disk, which is about what its weights take in memory."""
    path = _path(reference)
    name = reference if path is None else str(path)
    status = next((one for one in installed(home) if one.name == name), None)
    if status is not None and status.is_installed:
        return status.disk_bytes - status.source_bytes
    if path is not None:
        return size_bytes(path)
    return 0 if status is None else status.download_bytes or 0


def _path(reference: str) -> Path | None:
    """Return where a model lies that was given by its place; None for one that has a name."""
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
