"""
Options that several commands share, and how they become a loaded model.

Nothing here is read from the terminal; the imports at the top are only those that `--help` needs.
"""

from typing import TYPE_CHECKING, Annotated, Final

import typer

from recollect.cli.passphrase import unlock_home
from recollect.cli.progress import progress_bar
from recollect.types import Profile

if TYPE_CHECKING:  # see open_model
    from recollect.conversation.model import Model

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
