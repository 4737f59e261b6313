"""
Options that several commands share, and how they become a loaded model.

Nothing here is read from the terminal; the imports at the top are only those that `--help` needs.

Progress of something long, drawn on stderr while it lasts.

Draws on terminals only, and leaves nothing behind; does not know what is being done.

Unlock the data folder for a command, and `recollect encrypt`.

Asks for a passphrase on the terminal, where there is one, whatever stdin and stdout are.

What lies in the user's data folder, opened for commands that load no model.

A text that an option names by its file.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from getpass import getpass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as Bars
from rich.text import Text

from recollect import config, encryption, files
from recollect.encryption import KV_PURPOSE
from recollect.errors import ConfigError, StoreError
from recollect.types import Profile, Progress

if TYPE_CHECKING:
    from recollect.conversation.model import Model
    from recollect.encryption import Cipher
    from recollect.journal.checkpoints import Checkpoints
    from recollect.journal.journal import Journal
    from recollect.kv.disk import DiskStore


class _SizeColumn(ProgressColumn):
    """Bytes or tokens done, for what is counted; nothing for what is only waited for."""

    def __init__(self, sizes: DownloadColumn | MofNCompleteColumn) -> None:
        super().__init__()
        self._sizes = sizes

    def render(self, task: Task) -> Text:
        """Return the sizes as text."""
        counted = task.total is not None and task.total > 1
        return self._sizes.render(task) if counted else Text("")


@contextmanager
def progress_bar(waiting: str, *, tokens: bool = False) -> Iterator[Progress]:
    """
    Show a spinner beside *waiting*, and a bar for each thing that progress is reported of.

    Args:
        waiting: What is being done.
        tokens: Whether tokens are counted, and not bytes.

    Yields:
        What to pass as `progress`.
    """
    console = Console(stderr=True)
    bars = Bars(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        _SizeColumn(MofNCompleteColumn() if tokens else DownloadColumn()),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    tasks: dict[str, TaskID] = {}

    def report(what: str, done: int, total: int | None) -> None:
        if what not in tasks:
            tasks[what] = bars.add_task(what, total=total)
        bars.update(tasks[what], completed=done, total=total)

    with bars:
        bars.add_task(waiting, total=None)
        yield report


EncryptOption = Annotated[
    bool,
    typer.Option(
        "--encrypt",
        help="Encrypt what is kept with a passphrase, if it is not yet; `recollect encrypt` says more.",
    ),
]


_COPY: Final = (
    "Keep a copy of {} somewhere else: it is no secret, and without it nothing can be read either."
)
_DELETED: Final = (
    "KV on disk and the history of what was typed were deleted: conversations are read once more when "
    "they go on."
)
_unlocked: "dict[Path, Cipher]" = {}
"""A process is one command, which opens several files and asks once."""


def unlock_home(*, encrypt: bool = False) -> "Cipher | None":
    """
    Return what reads and writes the data folder; None for one that is not encrypted.

    Args:
        encrypt: Whether to encrypt it first where it is not.

    Raises:
        ConfigError: The passphrase is wrong, or there is nobody to ask for it. Nothing was changed.
        StoreError: The folder cannot be encrypted.
    """
    home = config.home()
    if encrypt:
        was_encrypted = encryption.is_encrypted(home)
        encrypted = _encrypt(keyring=False)
        if not was_encrypted and sys.stderr.isatty():
            typer.echo(f"{_COPY.format(home / encryption.KEY_FILE)}\n{_DELETED}", err=True)
        return encrypted
    if home in _unlocked and encryption.is_encrypted(home):
        return _unlocked[home]
    cipher = encryption.unlock(home, ask=_ask if _has_terminal() else None)
    if cipher is not None:
        _unlocked[home] = cipher
    return cipher


def encrypt(
    keyring: Annotated[
        bool,
        typer.Option("--keyring", help="Draw a key and keep it in the keyring of this system."),
    ] = False,
) -> None:
    """
    Encrypt what is kept: conversations, and KV on disk.

    The key comes from a passphrase: that in RECOLLECT_PASSPHRASE, or one that is asked for.
    From then on every command that reads what is kept needs it. A lost passphrase cannot be replaced.
    """
    was_encrypted = encryption.is_encrypted()
    _encrypt(keyring=keyring)
    where = (
        "in the keyring of this system" if encryption.source() == "keyring" else "the passphrase"
    )
    typer.echo(
        f"{config.home()} is encrypted. The key is {where}: without it nobody can read what is kept."
    )
    typer.echo(_COPY.format(config.home() / encryption.KEY_FILE))
    if not was_encrypted:
        typer.echo(_DELETED)


def _encrypt(*, keyring: bool) -> "Cipher":
    from recollect.journal.encrypt import encrypt as encrypt_home  # noqa: PLC0415 - as above

    ask = _ask if encryption.is_encrypted() else _ask_for_a_new_one
    cipher = encrypt_home(keyring=keyring, ask=ask if _has_terminal() else None)
    _unlocked[config.home()] = cipher
    return cipher


def _ask() -> str:
    return getpass(f"Passphrase of {config.home()}: ")


def _ask_for_a_new_one() -> str:
    first = getpass(f"New passphrase for {config.home()}: ")
    if getpass("The same again: ") != first:
        raise ConfigError("The two passphrases differ: try again; nothing was changed.")
    return first


def _has_terminal() -> bool:
    """Return whether somebody can be asked; getpass would read a pipe that holds prompts."""
    if sys.platform == "win32":
        return sys.stdin.isatty()
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


_SAMPLING: Final = "Sampling"

ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="NAME",
        help="A name of `recollect models`, a .gguf file, an OpenVINO or ONNX folder, or org/repo:file.",
    ),
]
ProfileOption = Annotated[
    Profile,
    typer.Option(help="exact: f32 throughout. fast: f16 KV. small: u8 KV, half the memory."),
]
KvMemoryOption = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Most memory for KV, such as 2GB or 512MiB.",
        show_default="a quarter of what is free",
    ),
]
KvDiskOption = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Most disk for KV, shared by all models; 0: none is kept.",
        show_default="10GB, or a tenth of what is free",
    ),
]
AllowNativeCodeOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="The one native library that an ONNX folder may run: a file in it, or a path.",
        show_default="none",
    ),
]
ProofKvDiskOption = Annotated[
    str,
    typer.Option(
        metavar="SIZE",
        help="Most disk for KV; 0: none is written or read, so that nothing but computing counts.",
    ),
]
OfflineOption = Annotated[
    bool,
    typer.Option(
        "--offline",
        help="Fetch nothing: a model that is not here is an error. RECOLLECT_OFFLINE=1 says so too.",
    ),
]

MaxTokensOption = Annotated[
    int | None,
    typer.Option(
        "--max-tokens",
        "-n",
        metavar="N",
        help="Most tokens in one reply.",
        show_default="what the context holds",
        rich_help_panel=_SAMPLING,
    ),
]
TemperatureOption = Annotated[
    float,
    typer.Option(
        "--temperature", "-t", metavar="X", help="0 is greedy.", rich_help_panel=_SAMPLING
    ),
]
TopKOption = Annotated[
    int,
    typer.Option(metavar="N", help="Only the N likeliest; 0 is off.", rich_help_panel=_SAMPLING),
]
TopPOption = Annotated[
    float,
    typer.Option(
        metavar="X", help="Only the likeliest that add up to X.", rich_help_panel=_SAMPLING
    ),
]
MinPOption = Annotated[
    float,
    typer.Option(
        metavar="X",
        help="Only those at least X times as likely as the likeliest.",
        rich_help_panel=_SAMPLING,
    ),
]
SeedOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="The same seed gives the same reply.",
        show_default="a new one for each reply",
        rich_help_panel=_SAMPLING,
    ),
]
RepetitionPenaltyOption = Annotated[
    float,
    typer.Option(
        metavar="X", help="Above 1: less of what is there already.", rich_help_panel=_SAMPLING
    ),
]
PresencePenaltyOption = Annotated[
    float,
    typer.Option(
        metavar="X", help="Taken from what the reply has once.", rich_help_panel=_SAMPLING
    ),
]
FrequencyPenaltyOption = Annotated[
    float,
    typer.Option(
        metavar="X", help="Taken from it for each time it has it.", rich_help_panel=_SAMPLING
    ),
]
StopOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT",
        help="A reply ends before this; may be given several times.",
        show_default=False,
        rich_help_panel=_SAMPLING,
    ),
]
IgnoreEosOption = Annotated[
    bool,
    typer.Option(
        "--ignore-eos", help="Go on where the model would end.", rich_help_panel=_SAMPLING
    ),
]


LongContextOption = Annotated[
    bool,
    typer.Option(
        "--long-context",
        help="Use the whole context of a model with LongRoPE, such as Phi-3 128k.",
    ),
]


def make_ready(
    name: str,
    *,
    kv_memory: str | None = None,
    kv_disk: str | None = None,
    offline: bool = False,
    allow_native_code: str | None = None,
    long_context: bool = False,
) -> None:
    """
    Have a model on this disk before something is done for good, such as encrypting for a chat with it.

    Args:
        kv_memory, kv_disk, offline, allow_native_code, long_context: As for `open_model`.

    Raises:
        ModelError: It cannot be had or read.
        ConfigError: The data folder cannot be written to, `kv_memory` or `kv_disk` is no size, or the
            model has no long context.
    """
    from recollect import config  # noqa: PLC0415 - see `open_model`
    from recollect.models.prepare import prepare  # noqa: PLC0415

    if kv_memory is not None:
        config.parse_size(kv_memory)
    if kv_disk is not None:
        config.parse_disk_size(kv_disk)
    with progress_bar(f"Preparing {name}") as progress:
        local = prepare(
            name,
            home=config.home(),
            allow_native_code=allow_native_code,
            progress=progress,
            offline=offline or None,
        )
    if long_context:
        local.for_long_context()  # raises where there is none


def open_model(
    name: str,
    *,
    profile: Profile,
    kv_memory: str | None = None,
    kv_disk: str | None = None,
    offline: bool = False,
    allow_native_code: str | None = None,
    long_context: bool = False,
) -> "Model":
    """
    Return the model, fetched, converted and loaded, with a progress bar on a terminal's stderr.

    Args:
        kv_memory: As it was typed, such as "2GB"; None: the library's default.
        kv_disk: Likewise; "0": none.
        offline: Whether nothing may be fetched; otherwise `RECOLLECT_OFFLINE` says whether.
        allow_native_code: As `recollect.load` takes it.
        long_context: Likewise.

    Raises:
        ModelError: It cannot be had or read.
        ConfigError: `kv_memory` or `kv_disk` is no size, or holds no block; or the data folder is
            encrypted, and there is no key.
        StoreError: KV cannot be kept on disk.
    """
    cipher = unlock_home()  # before the bar is drawn: it may ask
    with progress_bar(f"Loading {name}") as progress:
        # Imported here: the runtime takes half a second, which neither `--help` nor a misspelt
        # option should wait for.
        from recollect import config  # noqa: PLC0415
        from recollect.conversation.loading import load  # noqa: PLC0415

        return load(
            name,
            profile=profile,
            kv_memory=None if kv_memory is None else config.parse_size(kv_memory),
            kv_disk=None if kv_disk is None else config.parse_disk_size(kv_disk),
            cipher=cipher,
            allow_native_code=allow_native_code,
            long_context=long_context,
            progress=progress,
            offline=offline or None,
        )


def store_folder() -> Path:
    """Return where KV is kept."""
    from recollect.kv.disk import STORE_FOLDER  # noqa: PLC0415 - see above

    return config.home() / STORE_FOLDER


def has_store() -> bool:
    """Return whether any KV was ever kept here."""
    from recollect.kv.maintenance import is_there  # noqa: PLC0415 - see above

    return is_there(store_folder())


@contextmanager
def open_store() -> "Iterator[DiskStore]":
    """
    Open the KV that is kept on disk.

    Raises:
        StoreError: There is none, or it cannot be opened.
    """
    from recollect.kv.maintenance import open_existing  # noqa: PLC0415 - see above

    if not has_store():
        raise StoreError("No KV is kept on disk here yet: `recollect chat` does that.")
    cipher = unlock_home()
    sealer = None if cipher is None else cipher.for_purpose(KV_PURPOSE)
    with closing(open_existing(store_folder(), sealer)) as store:
        yield store


@contextmanager
def open_journal() -> "Iterator[Journal]":
    """
    Open the conversations.

    Raises:
        StoreError: They cannot be opened.
    """
    from recollect.journal.journal import JOURNAL_NAME, Journal  # noqa: PLC0415 - see above

    with Journal.open(config.home() / JOURNAL_NAME, cipher=unlock_home()) as journal:
        yield journal


@contextmanager
def open_places() -> "Iterator[Checkpoints]":
    """
    Open the checkpoints.

    Raises:
        StoreError: No KV is kept, or it or the journal cannot be opened.
    """
    from recollect.journal.checkpoints import Checkpoints  # noqa: PLC0415 - see above

    with open_store() as store, open_journal() as journal:
        yield Checkpoints(store, journal)


MOST_BYTES: Final = 64 * files.MIB
"""Sixteen million tokens: more than any context holds."""


def read_text(file: Path) -> str:
    """
    Return what is in a file, without the line ends after it.

    Raises:
        ConfigError: It cannot be read, is no file or too large, is not UTF-8 text, or has nothing in it.
    """
    try:
        text = files.read_text(file, most_bytes=MOST_BYTES, encoding="utf-8-sig").rstrip()
    except OSError as cause:
        raise ConfigError(f"{file} cannot be read ({cause.strerror}): check the path.") from cause
    except UnicodeDecodeError as cause:
        raise ConfigError(f"{file} is not UTF-8 text: convert it first.") from cause
    if not text:
        raise ConfigError(f"{file} has no text in it: give another file.")
    return text
