"""
The options that several commands share, and what they mean: a model to load, how to sample.

`ModelOptions` is a value: its fields are both the options of a command line and what was typed.
Nothing here reads the terminal, and importing it loads no runtime.
"""

import inspect
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Final, get_args

import typer

from recollect import config, files
from recollect.cli.home import unlock_home
from recollect.cli.printing import progress_bar
from recollect.config import DEFAULT_PROFILE
from recollect.conversation.loading import load
from recollect.conversation.model import Model
from recollect.errors import ConfigError
from recollect.models.prepare import prepare
from recollect.types import Profile

ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="NAME",
        help="A name that `recollect models` lists, a .gguf file, an OpenVINO or ONNX folder, or "
        "org/repo:file.",
    ),
]
OfflineOption = Annotated[
    bool,
    typer.Option(
        "--offline",
        help="Download nothing: a model that is not on this disk is an error. RECOLLECT_OFFLINE=1 "
        "does the same.",
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
    typer.Option(
        "--json", help="Print JSON in place of the list, with sizes in bytes and times in UTC."
    ),
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
            help="Most memory for the cache, such as 2GB or 512MiB.",
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

    def check(self) -> None:
        """
        Raise what is wrong with the sizes and with the setting for offline use.

        Raises:
            ConfigError: One of them has no meaning.
        """
        self._sizes()
        config.is_offline()

    def prepare(self, name: str) -> None:
        """
        Have a model on this disk before something that cannot be undone, such as encrypting.

        Raises:
            ModelError: It cannot be had or read.
            ConfigError: The data folder cannot be written to, a size is none, or the model has no
                long context.
        """
        self._sizes()
        with progress_bar(f"Preparing {name}") as progress:
            local = prepare(
                name,
                home=config.home(),
                allow_native_code=self.allow_native_code,
                progress=progress,
                offline=self.offline or None,
            )
        if self.long_context:
            local.for_long_context()  # raises if there is none

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
            return load(
                name,
                profile=self.profile or DEFAULT_PROFILE,
                kv_memory=kv_memory,
                kv_disk=kv_disk,
                cipher=cipher,
                allow_native_code=self.allow_native_code,
                long_context=self.long_context,
                progress=progress,
                offline=self.offline or None,
            )

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


def sampling_option(
    *names: str, about: str, metavar: str | None = "X", default: bool | str = True
) -> Any:
    """Return an option of the panel "Sampling"."""
    return typer.Option(
        *names, metavar=metavar, help=about, show_default=default, rich_help_panel="Sampling"
    )


TemperatureOption = Annotated[
    float,
    sampling_option(
        "--temperature", "-t", about="0 always takes the likeliest token; above 1 is more random."
    ),
]

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
