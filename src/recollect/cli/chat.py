"""
`recollect chat`: talk to a model at a terminal, ask it once, or have it answer a pipe.

Decides which of these it is, and in which conversation: a new one, or one in the journal. That is
read before a model is loaded, so that a mistake is told at once. What happens at a terminal is in
`repl`, what needs none in `batch`.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer
from rich.console import Console
from typer.core import TyperCommand

from recollect import config, encryption
from recollect.cli.batch import answer_all, one_message, open_prompts, read_text
from recollect.cli.display import format_bytes
from recollect.cli.options import (
    MAKERS,
    USUAL,
    EncryptOption,
    ModelOptions,
    TemperatureOption,
    conversation_names,
    model_option,
    open_checkpoints,
    open_journal,
    sampling_option,
    takes_model_options,
    unlock_home,
)
from recollect.conversation.model import Model
from recollect.conversation.session import Session
from recollect.conversation.tree import Overflow
from recollect.errors import ConfigError, NameTakenError, StoreError, UnknownConversationError
from recollect.journal.journal import JOURNAL_NAME, Journal
from recollect.journal.records import ConversationInfo, Page
from recollect.models.catalog import CATALOG, DEFAULT_MODEL
from recollect.models.listing import installed
from recollect.types import SamplingParams

app = typer.Typer()

SOFT_LIMIT: Final = 2048
"""Most tokens of a reply at a terminal where nothing else is asked for; /continue goes on."""

LAST = ""
"""Stands for the name of the conversation that was used last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """The conversation that the options of a chat ask for."""

    keep: bool
    """Whether it is saved even without a name."""
    name: str | None = None
    """The name of a new conversation."""
    resume: str | None = None
    """The name of the conversation to go on with, or `LAST`; None begins a new one."""
    checkpoint: str | None = None
    """The checkpoint to go on at; `resume` is not needed then."""
    system: str | None = None
    overflow: Overflow = "error"

    def __post_init__(self) -> None:
        if self.resume is None and self.checkpoint is None:
            return
        goes_on = "--checkpoint" if self.resume is None else "--resume"
        for option, value, remedy in (
            ("--system", self.system, "the instructions stay as they are"),
            ("--name", self.name, "/name gives it another one"),
        ):
            if value is not None:
                raise ConfigError(
                    f"{option} is for a new conversation: leave it out with {goes_on}; {remedy}."
                )

    def find(self) -> ConversationInfo | None:
        """
        Return the conversation to resume; None if a new one begins.

        Raises:
            UnknownConversationError: There is none to resume.
            UnknownCheckpointError: There is no checkpoint of that name.
            NameTakenError: The name of the new conversation is taken.
            StoreError: The journal cannot be used.
        """
        if not self.keep and self.name is None and self.resume is None and self.checkpoint is None:
            return None
        with self._journal() as journal:
            if self.name is not None and journal.find(self.name) is not None:
                raise NameTakenError(
                    f"There is a conversation {self.name!r} already: take another name, or go on "
                    f"with that one: --resume {self.name}."
                )
            resume = self._of_checkpoint() if self.resume in (None, LAST) else self.resume
            if resume is None:
                return None
            found = _last(journal) if resume == LAST else journal.find(resume)
            if found is None:
                raise UnknownConversationError(_not_there(resume))
            return found

    def open(self, model: Model, found: ConversationInfo | None, params: SamplingParams) -> Session:
        """
        Return the session to talk to.

        Args:
            model: The model that replies.
            found: What `find` has returned.
            params: How replies are sampled.

        Raises:
            RecollectError: As `Model.session` and `Model.resume` do.
        """
        if found is not None:
            return model.resume(
                found.name, checkpoint=self.checkpoint, params=params, overflow=self.overflow
            )
        return model.session(
            self.system, params=params, keep=self.keep, name=self.name, overflow=self.overflow
        )

    def _of_checkpoint(self) -> str | None:
        """Return the name of the conversation with the checkpoint, or `resume` if none is given."""
        if self.checkpoint is None:
            return self.resume
        with open_checkpoints() as checkpoints:
            return checkpoints.find(self.checkpoint).conversation

    @contextmanager
    def _journal(self) -> Iterator[Journal]:

        try:
            with open_journal() as journal:
                yield journal
        except StoreError as error:
            if (self.name, self.resume, self.checkpoint) != (None, None, None):
                raise
            raise type(error)(f"{error} A chat with --no-save works without it.") from error


def _last(journal: Journal) -> ConversationInfo | None:
    return next(iter(journal.conversations(page=Page(limit=1))), None)


def _not_there(name: str) -> str:
    if name == LAST:
        return "There is no conversation yet: begin one without --resume."
    return f"There is no conversation {name!r}; `recollect conversations` lists those that exist."


_RESUME: Final = "--resume"


class ChatCommand(TyperCommand):
    """A command whose `--resume` needs no name."""

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


def _option(
    *names: str,
    about: str,
    metavar: str | None = None,
    completed_by: Callable[[str], list[str]] | None = None,
) -> Any:
    return typer.Option(
        *names,
        metavar=metavar,
        help=about,
        rich_help_panel="Conversation",
        show_default=False,
        autocompletion=completed_by,
    )


@app.command(cls=ChatCommand)
@takes_model_options
def chat(
    *,
    question: Annotated[
        str | None,
        typer.Argument(
            metavar="QUESTION",
            help="Answer this once and end. What comes through a pipe is sent before it, as the text "
            "that it is about.",
        ),
    ] = None,
    model: Annotated[
        str | None, model_option(default=f"{DEFAULT_MODEL}, or that of the conversation")
    ] = None,
    loading: ModelOptions = USUAL,
    lines: Annotated[
        bool,
        typer.Option(
            "--lines",
            help="Send each line of standard input as a message; blank lines are skipped.",
        ),
    ] = False,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The same for each line of a file.")
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print one JSON object for each turn, and nothing else; without QUESTION, each line "
            "of standard input is a message.",
        ),
    ] = False,
    plain: Annotated[
        bool,
        typer.Option(
            "--plain",
            help="Show replies as plain text, and not as Markdown where a terminal has colours; NO_COLOR "
            "and TERM=dumb do the same.",
        ),
    ] = False,
    resume: Annotated[
        str | None,
        _option(
            _RESUME,
            metavar="[NAME]",
            about="Go on with the conversation of that name, or with the last one.",
            completed_by=conversation_names,
        ),
    ] = None,
    checkpoint: Annotated[
        str | None, _option(metavar="NAME", about="Go on at a checkpoint that /save has made.")
    ] = None,
    name: Annotated[
        str | None,
        _option(metavar="NAME", about="Name of the new conversation; the date if there is none."),
    ] = None,
    web: Annotated[
        bool,
        _option("--web", about="Chat in a browser, where conversations are shown as trees."),
    ] = False,
    no_save: Annotated[
        bool,
        _option(
            "--no-save",
            about="Save nothing: no conversation, no history of typed lines, and no cache on disk "
            "unless --kv-disk is given. Without --name, a pipe and a QUESTION save no conversation "
            "either, but they write the cache.",
        ),
    ] = False,
    system: Annotated[
        str | None, _option(metavar="TEXT", about="Instructions before the first message.")
    ] = None,
    system_file: Annotated[
        Path | None, _option(metavar="FILE", about="The instructions, from a text file.")
    ] = None,
    overflow: Annotated[
        Literal["error", "drop-oldest"],
        typer.Option(
            help="When the context is full: stop, or leave out the oldest turns.",
            rich_help_panel="Conversation",
        ),
    ] = "error",
    encrypt: EncryptOption = False,
    max_tokens: Annotated[
        int | None,
        sampling_option(
            *("--max-tokens", "-n"),
            about="Most tokens in one reply.",
            metavar="N",
            default=f"{SOFT_LIMIT:,} at a terminal, or else what the context holds",
        ),
    ] = None,
    temperature: TemperatureOption = None,
    top_k: Annotated[
        int | None,
        sampling_option(
            about="Choose among the N likeliest tokens; 0: all.", metavar="N", default=MAKERS
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        sampling_option(
            about="Choose among the likeliest tokens that add up to X.", default=MAKERS
        ),
    ] = None,
    min_p: Annotated[
        float | None,
        sampling_option(
            about="Choose among tokens at least X times as likely as the best.", default=MAKERS
        ),
    ] = None,
    seed: Annotated[
        int | None,
        sampling_option(
            about="The same seed gives the same reply.",
            metavar="N",
            default="a new one for each reply",
        ),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        sampling_option(
            about="Above 1: make tokens that occurred before less likely.", default=MAKERS
        ),
    ] = None,
    presence_penalty: Annotated[
        float, sampling_option(about="Subtracted once for a token that the reply has already.")
    ] = 0.0,
    frequency_penalty: Annotated[
        float, sampling_option(about="Subtracted for each time that the reply has a token.")
    ] = 0.0,
    stop: Annotated[
        list[str] | None,
        sampling_option(
            about="End the reply before this text; may be given several times.",
            metavar="TEXT",
            default=False,
        ),
    ] = None,
    ignore_eos: Annotated[
        bool,
        sampling_option(
            "--ignore-eos",
            about="Ignore the token by which the model ends its reply.",
            metavar=None,
        ),
    ] = False,
) -> None:
    """
    Talk to a model.

    At a terminal there is line editing, a history, and commands such as /undo, /fork and /tree; /help
    lists them. The conversation is saved, and --resume goes on with it.
    With a QUESTION it is answered once, about what comes through a pipe: cat log | recollect chat
    "What failed?". A pipe alone is one message; with --lines, --json or --prompts each line is one.
    What does not go to a terminal is plain text.
    """
    if web:
        from recollect.cli.web import open_page  # noqa: PLC0415 - loads HTTP, which few need

        open_page(None if model is None else [model], loading)
        return
    values: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }
    named = {option: value for option, value in values.items() if value is not None}
    params = SamplingParams(
        max_tokens=max_tokens,
        seed=seed,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        stop=tuple(stop or ()),
        ignore_eos=ignore_eos,
        **named,
    )
    by_lines = question is None and (lines or as_json or prompts is not None)
    by_hand = question is None and not by_lines and sys.stdin.isatty() and sys.stdout.isatty()
    if by_hand and max_tokens is None:
        params = replace(params, max_tokens=SOFT_LIMIT)
    if question is not None and (lines or prompts is not None):
        raise ConfigError(
            f"A question is answered once, and {'--lines' if lines else '--prompts'} sends one message "
            "a line: leave one of them out."
        )
    if no_save and (name is not None or resume is not None or checkpoint is not None):
        raise ConfigError(
            "--no-save saves nothing: leave it out, or leave out --name, --resume and --checkpoint."
        )
    if system_file is not None:
        if system is not None:
            raise ConfigError(
                "--system and --system-file both give the instructions: leave one of them out."
            )
        system = read_text(system_file)
    if no_save and loading.kv_disk is None:
        loading = replace(loading, kv_disk="0")  # KV on disk comes with the token ids that it is of
    opening = Opening(
        keep=by_hand and not no_save,
        name=name,
        resume=resume,
        checkpoint=checkpoint,
        system=system,
        overflow="drop_oldest" if overflow == "drop-oldest" else "error",
    )
    message = None if by_hand or by_lines else one_message(question)
    if encrypt and not encryption.is_encrypted():
        _check_before_encrypting(opening, model, loading, prompts)
    unlock_home(encrypt=encrypt)
    found = opening.find()
    reference = _reference(model, found)
    if by_hand:
        if reference == DEFAULT_MODEL and model is None and _is_first_chat():
            for line in about_default_model():
                Console().print(line, style="dim", markup=False, highlight=False)
        # Here and not above: a pipe need not wait 0.2 s for the library that edits lines.
        from recollect.cli.repl import talk  # noqa: PLC0415

        with loading.load(reference) as loaded:
            session = opening.open(
                loaded, found, params.with_recommended(loaded.local.sampling, named)
            )
            talk(
                loaded,
                session,
                keep_history=opening.keep,
                load_model=loading.load_another,
                chosen=named,
                plain=plain,
            )
        return
    with (
        open_prompts(prompts) if message is None else nullcontext([message]) as said,
        loading.load(reference) as loaded,
        opening.open(
            loaded, found, params.with_recommended(loaded.local.sampling, named)
        ) as session,
    ):
        answer_all(session, said, as_json=as_json, plain=plain)


def _check_before_encrypting(
    opening: Opening, model: str | None, loading: ModelOptions, prompts: Path | None
) -> None:
    """Raise what is wrong with the options before anything is changed that cannot be undone."""
    found = opening.find()
    if prompts is not None:
        with open_prompts(prompts):
            pass
    loading.prepare(_reference(model, found))


def _is_first_chat() -> bool:
    """Return whether no conversation was ever saved here; nothing is made to find that out."""
    if not (config.home() / JOURNAL_NAME).is_file():
        return True
    with open_journal() as journal:
        return _last(journal) is None


def about_default_model() -> list[str]:
    """Return what a person who named no model should know of the one that replies, a line each."""
    entry = CATALOG[DEFAULT_MODEL]
    here = {status.name for status in installed(config.home()) if status.is_installed}
    fetched = "" if entry.name in here else " It is fetched once, now."
    better = [
        f"{other.name} ({format_bytes(other.bytes)}: {other.description.partition(': ')[2]})"
        for other in CATALOG.values()
        if other.bytes > entry.bytes
    ]
    return [
        f"No model was named, so {entry.name} replies ({format_bytes(entry.bytes)}): "
        f"{entry.description}.{fetched}",
        f"Better ones: {'; '.join(better)}. `recollect chat --model NAME` takes one, or /model NAME in "
        "the chat; `recollect models` lists all.",
    ]


def _reference(model: str | None, found: ConversationInfo | None) -> str:
    """Return the model to load: the one that was asked for, or that of the conversation."""
    return model or (DEFAULT_MODEL if found is None else found.model)
