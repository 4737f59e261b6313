"""
What several commands share: the options for a model and for sampling, and the user's data folder.

`ModelOptions` is a value: its fields are both the options of a command line and what was typed.
The data folder is unlocked or encrypted, and its journal and KV store are opened; commands that load a model
only unlock it, since the model opens the rest. The passphrase is asked for on the terminal, wherever stdin
and stdout lead, and once for each process: a process is one command, which may open several files.
Also the command `recollect encrypt`, and the names that a shell completes. Importing this loads no runtime.
"""

import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from copy import copy
from dataclasses import dataclass, fields, replace
from functools import partial
from getpass import getpass
from pathlib import Path
from typing import Annotated, Any, Final, get_args

import typer

from recollect import config, encryption
from recollect.cli.display import progress_bar
from recollect.config import DEFAULT_PROFILE
from recollect.conversation.loading import llama_build, load, require_guesses, which_llama
from recollect.conversation.model import Model
from recollect.encryption import KV_PURPOSE, Cipher
from recollect.errors import ConfigError, DraftModelError, RecollectError, StoreError
from recollect.journal.home import Checkpoints
from recollect.journal.home import encrypt as encrypt_home
from recollect.journal.journal import JOURNAL_NAME, Journal
from recollect.journal.records import Page
from recollect.kv.disk import STORE_FOLDER, DiskStore, is_there, open_existing
from recollect.models import stores
from recollect.models.catalog import REFERENCE_NAME, LocalModel
from recollect.models.listing import installed
from recollect.models.prepare import prepare
from recollect.text import tool_formats
from recollect.types import Profile, RuntimeChoice

_log = logging.getLogger(__name__)

NO_KV: Final = "There is no cache on this disk yet: `recollect chat` makes one."

_COPY: Final = (
    "Keep a copy of {} somewhere else: it is not secret, but without it nothing can be decrypted."
)
_DELETED: Final = (
    "The cache on disk and the history of typed lines were deleted: the model reads a conversation "
    "once more when it goes on."
)
_unlocked: dict[Path, Cipher] = {}
"""What each folder was unlocked with, so that nobody is asked twice."""

app = typer.Typer()


def unlock_home(*, encrypt: bool = False) -> Cipher | None:
    """
    Return what reads and writes the data folder; None if it is not encrypted.

    Args:
        encrypt: Whether to encrypt the folder first if it is not encrypted yet.

    Raises:
        ConfigError: The passphrase is wrong, or there is no terminal to ask on. Nothing was changed.
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


@app.command()
def encrypt(
    keyring: Annotated[
        bool,
        typer.Option(
            "--keyring", help="Make a random key and keep it in the keyring of this system."
        ),
    ] = False,
) -> None:
    """
    Encrypt conversations and the cache on disk.

    The key comes from a passphrase: RECOLLECT_PASSPHRASE, or you are asked for one.
    From then on, every command that reads the data folder needs it. A lost passphrase cannot be
    replaced.
    """
    was_encrypted = encryption.is_encrypted()
    _encrypt(keyring=keyring)
    where = (
        "in the keyring of this system" if encryption.source() == "keyring" else "the passphrase"
    )
    typer.echo(
        f"{config.home()} is encrypted. The key is {where}: without it nobody can read the folder."
    )
    typer.echo(_COPY.format(config.home() / encryption.KEY_FILE))
    if not was_encrypted:
        typer.echo(_DELETED)


def store_folder() -> Path:
    """Return the folder of the KV store."""
    return config.home() / STORE_FOLDER


def has_store() -> bool:
    """Return whether there is a KV store."""
    return is_there(store_folder())


@contextmanager
def open_store() -> Iterator[DiskStore]:
    """
    Open the KV store.

    Raises:
        StoreError: There is none, or it cannot be opened.
    """
    if not has_store():
        raise StoreError(NO_KV)
    cipher = unlock_home()
    sealer = None if cipher is None else cipher.for_purpose(KV_PURPOSE)
    with closing(open_existing(store_folder(), sealer)) as store:
        yield store


@contextmanager
def open_journal() -> Iterator[Journal]:
    """
    Open the conversations.

    Raises:
        StoreError: They cannot be opened.
    """
    with Journal.open(config.home() / JOURNAL_NAME, cipher=unlock_home()) as journal:
        yield journal


@contextmanager
def open_checkpoints() -> Iterator[Checkpoints]:
    """
    Open the checkpoints.

    Raises:
        StoreError: There is no KV store, or it or the journal cannot be opened.
    """
    with open_store() as store, open_journal() as journal:
        yield Checkpoints(store, journal)


def _encrypt(*, keyring: bool) -> Cipher:
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


MOST_NAMES: Final = 1_000
"""Most names that a shell is told: more than that nobody reads."""


def model_names(incomplete: str) -> list[str]:
    """Return the models that a shell can complete a name to; nothing where they cannot be read."""
    try:
        names = [status.name for status in installed(config.home())]
    except (RecollectError, OSError):
        return []
    kept = [one.name for one in stores.stored() if one.fault is None]
    return _beginning(list(dict.fromkeys([*names, REFERENCE_NAME, *kept])), incomplete)


def conversation_names(incomplete: str) -> list[str]:
    """
    Return the saved conversations that a shell can complete a name to, the one used last first.

    Nothing where the folder is encrypted, since nobody can be asked for its passphrase, and where there
    is no journal; none is made.
    """
    try:
        home = config.home()
        if encryption.is_encrypted(home) or not (home / JOURNAL_NAME).is_file():
            return []
        with Journal.open(home / JOURNAL_NAME) as journal:
            found = journal.conversations(page=Page(limit=MOST_NAMES))
    except (RecollectError, OSError):
        return []
    return _beginning([info.name for info in found], incomplete)


def _beginning(names: Sequence[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)][:MOST_NAMES]


def model_option(about: str = "", *, default: bool | str = True) -> Any:
    """Return the option that names one model; without *about*, its help lists what can be named."""
    names = "A name that `recollect models` lists, a .gguf file, an OpenVINO or ONNX folder, or "
    return typer.Option(
        *("--model", "-m"),
        metavar="NAME",
        help=about or f"{names}org/repo:file.",
        show_default=default,
        autocompletion=model_names,
    )


ModelOption = Annotated[str, model_option()]
OfflineOption = Annotated[
    bool,
    typer.Option(
        "--offline",
        help="Download nothing: a model that is not on this disk is an error. Also RECOLLECT_OFFLINE=1.",
    ),
]
EncryptOption = Annotated[
    bool,
    typer.Option(
        "--encrypt",
        help="Encrypt the data folder with a passphrase first, if it is not encrypted yet; see "
        "`recollect encrypt`.",
    ),
]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
JsonOption = Annotated[
    bool,
    typer.Option("--json", help="Print JSON, not the list, with sizes in bytes and times in UTC."),
]
"""Of commands that list what there is."""
JsonFileOption = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="FILE",
        help="Write the whole result to FILE as JSON, besides what is printed.",
    ),
]
"""Of commands that measure for minutes and print their findings meanwhile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """How to load a model, as it was typed; a size is text such as "2GB"."""

    profile: Annotated[
        Profile | None,
        typer.Option(help="exact: f32 throughout. fast: f16 KV. small: u8 KV, half the memory."),
    ] = DEFAULT_PROFILE
    kv_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Most memory for KV, such as 2GB or 512MiB.",
            show_default="a quarter of what is free",
        ),
    ] = None
    kv_disk: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Most disk for the cache, shared by all models; 0 neither writes nor reads any.",
            show_default="10GB, or a tenth of what is free",
        ),
    ] = None
    offline: OfflineOption = False
    allow_native_code: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The one native library that an ONNX folder may run: a file in it, or a path.",
            show_default="none",
        ),
    ] = None
    long_context: Annotated[
        bool,
        typer.Option(
            "--long-context",
            help="Use the whole context of a model with LongRoPE, such as Phi-3 128k.",
        ),
    ] = False
    tool_format: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"How the model writes calls of tools: {', '.join(tool_formats.FORMATS)}.",
            show_default="as its chat template shows",
        ),
    ] = None
    runtime: Annotated[
        RuntimeChoice,
        typer.Option(
            help="What runs a GGUF file. auto: OpenVINO where it can, llama.cpp with a graphics card."
        ),
    ] = "auto"
    device: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What computes: CPU, GPU, or a name that `recollect doctor` shows.",
            show_default="the runtime's choice",
        ),
    ] = None
    gpu_layers: Annotated[
        str | None,
        typer.Option(
            metavar="auto|N",
            help="For llama.cpp: layers in the memory of the graphics card.",
            show_default="auto, as many as fit",
        ),
    ] = None
    kv_type: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="For llama.cpp: type of keys and values, f32, f16, bf16, q8_0 or q4_0.",
            show_default="as the profile says",
        ),
    ] = None

    engine: Annotated[
        str | None,
        typer.Option(
            metavar="KIND=URL",
            help="An engine elsewhere that computes: vllm=URL, vllm=URL,URL or llama=URL.",
            show_default="the model runs here",
        ),
    ] = None

    no_draft: Annotated[
        bool,
        typer.Option(
            "--no-draft",
            help="Compute each token in a pass of its own, also where a reply repeats what was said.",
        ),
    ] = False

    draft_model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A smaller model with the same vocabulary that guesses what comes next, for speed. Its KV "
            "is part of --kv-memory.",
            show_default="none",
        ),
    ] = None

    def check(self) -> None:
        """
        Raise what is wrong with the sizes, the layers, the format of calls, guesses and offline use.

        Raises:
            ConfigError: One of them has no meaning.
        """
        self._sizes()
        self._layers()
        tool_formats.named(self.tool_format)
        require_guesses(self.draft_model, self.profile or DEFAULT_PROFILE, draft=not self.no_draft)
        if self.engine is not None:
            from recollect.remote.probe import parsed  # noqa: PLC0415 - loads HTTP, which few need

            parsed(self.engine)
        config.is_offline()

    def prepare(self, name: str) -> None:
        """
        Have a model on this disk before something that cannot be undone, such as encrypting.

        Raises:
            ModelError: It cannot be had or read.
            ConfigError: As in `check`; or the data folder cannot be written to, or the model has no long
                context.
        """
        self.check()
        if self.engine is not None:
            return  # only a tokenizer is needed, which takes no time
        local = self._found(name)
        if self.long_context:
            local.for_long_context()  # raises if there is none
        if self.draft_model is not None:
            self._found(self.draft_model)

    def _found(self, name: str) -> LocalModel:
        """Return a model that is on this disk then, with a progress bar on a terminal's stderr."""
        with progress_bar(f"Preparing {name}") as progress:
            return prepare(
                name,
                home=config.home(),
                allow_native_code=self.allow_native_code,
                progress=progress,
                offline=self.offline or None,
                runtime=self.runtime,
                llama=partial(which_llama, self.device),
                llama_build=llama_build,
            )

    def load_another(self, name: str) -> Model:
        """Return a model as `load` does, without the draft model where that cannot guess for it."""
        try:
            return self.load(name)
        except DraftModelError as error:
            _log.warning("%s Loaded without a draft model: %s.", error, name)
            return replace(self, draft_model=None).load(name)

    def load(self, name: str) -> Model:
        """
        Return the model, fetched, converted and loaded, with a progress bar on a terminal's stderr.

        Raises:
            ModelError: It cannot be had or read.
            ConfigError: A size is none, or holds no block; or the data folder is encrypted, and there
                is no key.
            StoreError: The cache cannot be kept on disk.
        """
        cipher = unlock_home()  # before the bar is drawn: it may ask
        with progress_bar(f"Loading {name}") as progress:
            kv_memory, kv_disk = self._sizes()
            model = load(
                name,
                profile=self.profile or DEFAULT_PROFILE,
                kv_memory=kv_memory,
                kv_disk=kv_disk,
                cipher=cipher,
                allow_native_code=self.allow_native_code,
                long_context=self.long_context,
                runtime=self.runtime,
                device=self.device,
                gpu_layers=self._layers(),
                kv_type=self.kv_type,
                tool_format=self.tool_format,
                progress=progress,
                offline=self.offline or None,
                engine=self.engine,
                draft=not self.no_draft,
                draft_model=self.draft_model,
            )
        if self.engine is None and self.runtime == "auto" and model.local.format == "gguf":
            device = model.engine.info.device
            why = "OpenVINO does not read it" if device == "CPU" else f"{device} is quicker"
            typer.echo(f"{name} runs on llama.cpp ({device}), because {why}.", err=True)
        return model

    def _layers(self) -> int | None:
        """Return the layers on graphics cards; None: as many as fit."""
        if self.gpu_layers is None or self.gpu_layers == "auto":
            return None
        if not self.gpu_layers.isdecimal() or len(self.gpu_layers) > 4:
            raise ConfigError(
                f"--gpu-layers is {self.gpu_layers!r}: give auto, or how many layers, such as 0 or 20."
            )
        return int(self.gpu_layers)

    def _sizes(self) -> tuple[int | None, int | None]:
        """Return the budgets in memory and on disk, in bytes; None: the default of `load`."""
        return (
            None if self.kv_memory is None else config.parse_size(self.kv_memory),
            None if self.kv_disk is None else config.parse_disk_size(self.kv_disk),
        )


USUAL: Final = ModelOptions()


def takes_model_options(command: Callable[..., None]) -> Callable[..., None]:
    """
    Return *command* with an option for each field of `ModelOptions`, for Typer to find.

    The command declares one keyword parameter `loading: ModelOptions = X`; X gives the defaults.
    """
    signature = inspect.signature(command, eval_str=True)
    defaults: ModelOptions = signature.parameters["loading"].default
    shared = _as_parameters(defaults)

    def run(**given: Any) -> None:
        typed = {one.name: given.pop(one.name) for one in shared if one.name in given}
        command(**given, loading=replace(defaults, **typed))

    parameters = []
    for name, parameter in signature.parameters.items():
        keyword = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        parameters += shared if name == "loading" else [keyword]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined] # for inspect
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    return run


def _as_parameters(defaults: ModelOptions) -> list[inspect.Parameter]:
    """Return a parameter for each field, as Typer reads the parameters of a command."""
    parameters = []
    for field in fields(ModelOptions):
        kind, option = get_args(field.type)
        default = getattr(defaults, field.name)
        if default is not None:  # an option's own words for its default describe None
            option = copy(option)
            option.show_default = True
        parameters.append(
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=default,
                annotation=Annotated[kind, option],
            )
        )
    return parameters


MAKERS: Final = "what the model's makers recommend"


def sampling_option(
    *names: str, about: str, metavar: str | None = "X", default: bool | str = True
) -> Any:
    """Return an option of the panel "Sampling"."""
    return typer.Option(
        *names, metavar=metavar, help=about, show_default=default, rich_help_panel="Sampling"
    )


TemperatureOption = Annotated[
    float | None,
    sampling_option(
        *("--temperature", "-t"),
        about="0 always takes the likeliest token; above 1 is more random.",
        default=MAKERS,
    ),
]
