"""
`recollect serve` and `recollect keys`: the engine behind the API that every tool speaks.

Reads options and says where it listens; the server itself is `recollect.server`.
"""

import logging
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from recollect.cli import options
from recollect.cli.passphrase import EncryptOption, unlock_home
from recollect.cli.text_file import read_text
from recollect.config import DEFAULT_PROFILE
from recollect.errors import ConfigError
from recollect.models.catalog import DEFAULT_MODEL

if TYPE_CHECKING:  # the server takes a second to import, which `--help` need not wait for
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
    from recollect.cli.served import (  # noqa: PLC0415
        aliases,
        default_references,
        public_names,
        weight_bytes,
    )
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
