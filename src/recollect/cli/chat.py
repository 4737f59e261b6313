"""
`recollect chat`: talk to a model, by hand or by pipe.

Decides which of the two it is, and what is kept; the work is done in `repl` and `batch`.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer
from typer.core import TyperCommand

from recollect import encryption
from recollect.cli import options
from recollect.cli.opening import LAST, Opening
from recollect.cli.passphrase import EncryptOption, unlock_home
from recollect.cli.text_file import read_text
from recollect.config import DEFAULT_PROFILE
from recollect.errors import ConfigError
from recollect.models.catalog import DEFAULT_MODEL
from recollect.types import SamplingParams

if TYPE_CHECKING:  # see options.open_model
    from recollect.conversation.model import Model

_CONVERSATION: Final = "Conversation"
_RESUME: Final = "--resume"


class ChatCommand(TyperCommand):
    """A command whose `--resume` may stand without a name."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the command line; the context's own type is one that Typer keeps to itself."""
        return super().parse_args(ctx, with_resume_value(args))


def with_resume_value(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with `LAST` for the value of a `--resume` that has none."""
    return [
        f"{_RESUME}={LAST}"
        if argument == _RESUME and (not following or following[0].startswith("-"))
        else argument
        for argument, following in (
            (argument, arguments[index + 1 : index + 2]) for index, argument in enumerate(arguments)
        )
    ]


def chat(
    *,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME",
            help="A name of `recollect models`, a .gguf file, an OpenVINO folder, or org/repo:file.",
            show_default=f"{DEFAULT_MODEL}, or that of the conversation",
        ),
    ] = None,
    profile: options.ProfileOption = DEFAULT_PROFILE,
    kv_memory: options.KvMemoryOption = None,
    kv_disk: options.KvDiskOption = None,
    offline: options.OfflineOption = False,
    allow_native_code: options.AllowNativeCodeOption = None,
    long_context: options.LongContextOption = False,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Say the lines of a file, blank ones skipped."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a turn, and nothing else.")
    ] = False,
    resume: Annotated[
        str | None,
        typer.Option(
            _RESUME,
            metavar="[NAME]",
            help="Go on with the conversation of that name, or with the last one.",
            rich_help_panel=_CONVERSATION,
        ),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Go on at a place that /save has kept.",
            rich_help_panel=_CONVERSATION,
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Keep this new conversation under that name.",
            show_default="the date",
            rich_help_panel=_CONVERSATION,
        ),
    ] = None,
    no_save: Annotated[
        bool,
        typer.Option(
            "--no-save",
            help="Leave nothing on disk of what is said: no turns, no history, and no KV unless "
            "--kv-disk is given. A pipe without a name keeps no turns, but KV and the replies.",
            rich_help_panel=_CONVERSATION,
        ),
    ] = False,
    system: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Instructions before the first message.",
            rich_help_panel=_CONVERSATION,
        ),
    ] = None,
    system_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The same, from a text file.",
            rich_help_panel=_CONVERSATION,
        ),
    ] = None,
    overflow: Annotated[
        Literal["error", "drop-oldest"],
        typer.Option(
            help="When the context is full: stop, or leave the oldest turns out.",
            rich_help_panel=_CONVERSATION,
        ),
    ] = "error",
    encrypt: EncryptOption = False,
    max_tokens: options.MaxTokensOption = None,
    temperature: options.TemperatureOption = 0.0,
    top_k: options.TopKOption = 0,
    top_p: options.TopPOption = 1.0,
    min_p: options.MinPOption = 0.0,
    seed: options.SeedOption = None,
    repetition_penalty: options.RepetitionPenaltyOption = 1.0,
    presence_penalty: options.PresencePenaltyOption = 0.0,
    frequency_penalty: options.FrequencyPenaltyOption = 0.0,
    stop: options.StopOption = None,
    ignore_eos: options.IgnoreEosOption = False,
) -> None:
    """
    Talk to a model.

    On a terminal: line editing, history, and commands such as /undo, /fork, /tree.
    /help lists them. What is said is kept: --resume goes on with it.
    From a pipe or a file: a line is a prompt, replies are plain text.
    """
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        stop=tuple(stop or ()),
        ignore_eos=ignore_eos,
    )
    by_hand = prompts is None and not as_json and sys.stdin.isatty() and sys.stdout.isatty()
    if no_save and (name is not None or resume is not None or checkpoint is not None):
        raise ConfigError("--no-save keeps nothing: leave it out, or what names a conversation.")
    if system_file is not None:
        if system is not None:
            raise ConfigError("--system and --system-file say the same: leave one of them out.")
        system = read_text(system_file)
    if no_save and kv_disk is None:
        kv_disk = "0"  # KV on disk comes with the token ids that it is of
    opening = Opening(
        keep=by_hand and not no_save,
        name=name,
        resume=resume,
        checkpoint=checkpoint,
        system=system,
        overflow="drop_oldest" if overflow == "drop-oldest" else "error",
    )
    if encrypt and not encryption.is_encrypted():
        found = opening.find()  # a mistake in the options is told before anything is changed
        if prompts is not None:
            from recollect.cli import batch  # noqa: PLC0415 - see `_talk`

            with batch.open_prompts(prompts):
                pass
        options.make_ready(
            model or (DEFAULT_MODEL if found is None else found.model),
            kv_memory=kv_memory,
            kv_disk=kv_disk,
            offline=offline,
            allow_native_code=allow_native_code,
            long_context=long_context,
        )
    unlock_home(encrypt=encrypt)
    open_model = partial(
        options.open_model,
        profile=profile,
        kv_memory=kv_memory,
        kv_disk=kv_disk,
        allow_native_code=allow_native_code,
        long_context=long_context,
        offline=offline,
    )
    _talk(opening, params, model, open_model, prompts, by_hand=by_hand, as_json=as_json)


def _talk(
    opening: Opening,
    params: SamplingParams,
    model: str | None,
    open_model: Callable[[str], "Model"],
    prompts: Path | None,
    *,
    by_hand: bool,
    as_json: bool,
) -> None:
    found = opening.find()
    model = model or (DEFAULT_MODEL if found is None else found.model)
    if by_hand:
        # Each imported where it is needed: a pipe has no use for line editing.
        from recollect.cli import repl  # noqa: PLC0415

        with open_model(model) as loaded:
            repl.talk(loaded, opening.open(loaded, found, params), keep_history=opening.keep)
        return
    from recollect.cli import batch  # noqa: PLC0415

    with (
        batch.open_prompts(prompts) as lines,
        open_model(model) as loaded,
        opening.open(loaded, found, params) as session,
    ):
        batch.answer_all(session, lines, as_json=as_json)
