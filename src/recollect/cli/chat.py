"""
`recollect chat`: talk to a model, by hand or by pipe.

Decides which of the two it is, and what is kept; the work is done in `repl` and `batch`.

Which conversation a chat is held in: a new one or one that is kept, as the options say.

Reads the journal before a model is loaded, so that a mistake is told at once.

A chat without a person at the keyboard: prompts from lines, replies to stdout.

Reads and writes streams; knows no commands, and never touches the terminal.
"""

import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TextIO

import typer
from typer.core import TyperCommand

from recollect import encryption
from recollect.cli import options
from recollect.cli.display import printable
from recollect.cli.options import EncryptOption, read_text, unlock_home
from recollect.config import DEFAULT_PROFILE
from recollect.conversation.session import Session
from recollect.errors import ConfigError, NameTakenError, StoreError, UnknownConversationError
from recollect.models.catalog import DEFAULT_MODEL
from recollect.types import SamplingParams

if TYPE_CHECKING:
    from recollect.conversation.model import Model
    from recollect.conversation.session import Session
    from recollect.conversation.tree import Overflow
    from recollect.journal.journal import Journal
    from recollect.journal.records import ConversationInfo
    from recollect.types import SamplingParams


LAST = ""
"""In place of a name: the conversation that was used last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """What the options of a chat say about its conversation."""

    keep: bool
    """Whether it is kept where it has no name either."""
    name: str | None = None
    """Of a new one."""
    resume: str | None = None
    """The name of a kept one, or `LAST`; None: a new one."""
    checkpoint: str | None = None
    """The name of one, to go on there; `resume` need not name its conversation then."""
    system: str | None = None
    overflow: "Overflow" = "error"

    def __post_init__(self) -> None:
        if self.resume is None and self.checkpoint is None:
            return
        goes_on = "--checkpoint" if self.resume is None else "--resume"
        for option, value, remedy in (
            ("--system", self.system, "its instructions stay as they are"),
            ("--name", self.name, "/name gives it another one"),
        ):
            if value is not None:
                raise ConfigError(
                    f"{option} is for a new conversation: leave it out of {goes_on}; {remedy}."
                )

    def find(self) -> "ConversationInfo | None":
        """
        Return what is to be resumed; None where a conversation begins.

        Raises:
            UnknownConversationError: There is none to resume.
            UnknownCheckpointError: There is no checkpoint of that name.
            NameTakenError: There is one of the name that a new one shall have.
            StoreError: The journal cannot be used.
        """
        if not self.keep and self.name is None and self.resume is None and self.checkpoint is None:
            return None
        with self._journal() as journal:
            if self.name is not None and journal.find(self.name) is not None:
                raise NameTakenError(
                    f"There is a conversation {self.name!r} already: take another name, or go on "
                    "with that one by --resume."
                )
            resume = self._of_checkpoint() if self.resume in (None, LAST) else self.resume
            if resume is None:
                return None
            found = _last(journal) if resume == LAST else journal.find(resume)
            if found is None:
                raise UnknownConversationError(_not_there(resume))
            return found

    def open(
        self, model: "Model", found: "ConversationInfo | None", params: "SamplingParams"
    ) -> "Session":
        """
        Return the session to talk to.

        Args:
            model: Speaks in it.
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
        """Return the conversation that the checkpoint is of; what `resume` says without one."""
        if self.checkpoint is None:
            return self.resume
        from recollect.cli.options import open_places  # noqa: PLC0415 - see the imports for types

        with open_places() as places:
            return places.find(self.checkpoint).conversation

    @contextmanager
    def _journal(self) -> "Iterator[Journal]":
        from recollect import config  # noqa: PLC0415 - see the imports for type checking
        from recollect.journal.journal import JOURNAL_NAME, Journal  # noqa: PLC0415

        try:
            with Journal.open(config.home() / JOURNAL_NAME, cipher=unlock_home()) as journal:
                yield journal
        except StoreError as error:
            if (self.name, self.resume, self.checkpoint) != (None, None, None):
                raise
            raise type(error)(f"{error} A chat with --no-save does without it.") from error


def _last(journal: "Journal") -> "ConversationInfo | None":
    from recollect.journal.records import Page  # noqa: PLC0415 - see the imports for type checking

    return next(iter(journal.conversations(page=Page(limit=1))), None)


def _not_there(name: str) -> str:
    if name == LAST:
        return "No conversation is kept yet: begin one without --resume."
    return f"There is no conversation {name!r}: `recollect conversations` lists those there are."


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
            with open_prompts(prompts):
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

    with (
        open_prompts(prompts) as lines,
        open_model(model) as loaded,
        opening.open(loaded, found, params) as session,
    ):
        answer_all(session, lines, as_json=as_json)


MOST_CHARACTERS: Final = 16 * 2**20
"""Of a line. The server takes as many bytes in a request; a device such as /dev/zero is one line."""


@contextmanager
def open_prompts(file: Path | None) -> Iterator[Iterator[str]]:
    """
    Open a file of prompts, one a line, or stdin where there is none.

    Yields:
        The prompts, as they come, without blank lines.

    Raises:
        ConfigError: It cannot be opened, or, from the iterator, is not UTF-8 text, or has a line
            without an end.
    """
    if file is None:
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")
        yield _prompts(sys.stdin, "stdin")
        return
    try:
        stream = file.open(encoding="utf-8-sig")
    except OSError as cause:
        raise ConfigError(f"{file} cannot be read ({cause.strerror}): check the path.") from cause
    with stream:
        yield _prompts(stream, str(file))


def answer_all(session: Session, prompts: Iterable[str], *, as_json: bool) -> None:
    """
    Say each prompt in turn and print its reply: plain text, or one JSON object a line.

    Raises:
        RecollectError: A turn failed; what was printed of the turns before is complete.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and as_json:
        sys.stdout.reconfigure(encoding="utf-8")  # what JSON is written in, whatever the locale
    for prompt in prompts:
        tip = session.name
        if as_json:
            _answer_as_json(session, prompt, sys.stdout)
        else:
            _answer_as_text(session, prompt, sys.stdout)
        if session.name != tip:
            print(
                f"recollect: {tip!r} has gone on in another chat: this one is a branch now, "
                f"{session.name!r}.",
                file=sys.stderr,
            )


def _prompts(stream: TextIO, source: str) -> Iterator[str]:
    try:
        while line := stream.readline(MOST_CHARACTERS):
            if len(line) == MOST_CHARACTERS:
                raise ConfigError(
                    f"{source} has a line of {MOST_CHARACTERS:,} characters or more: a line is a prompt, "
                    "so part it."
                )
            if line.strip():
                yield line.rstrip("\r\n")
    except UnicodeDecodeError as cause:
        raise ConfigError(f"{source} is not UTF-8 text: convert it first.") from cause


def _answer_as_text(session: Session, prompt: str, out: TextIO) -> None:
    with session.stream(prompt) as stream:
        for piece in stream:
            out.write(printable(piece) if out.isatty() else piece)
            out.flush()
    out.write("\n")
    out.flush()


def _answer_as_json(session: Session, prompt: str, out: TextIO) -> None:
    reply = session.respond(prompt)
    turn = {
        "prompt": prompt,
        "reply": reply.text,
        "finish_reason": reply.finish_reason,
        "usage": reply.usage.to_dict(),
    }
    # On a terminal all but ASCII is escaped: some of the rest would be obeyed and not shown.
    out.write(json.dumps(turn, ensure_ascii=out.isatty()) + "\n")
    out.flush()
