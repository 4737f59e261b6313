"""
Which conversation a chat is held in: a new one or one that is kept, as the options say.

Reads the journal before a model is loaded, so that a mistake is told at once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from recollect.cli.passphrase import unlock_home
from recollect.errors import ConfigError, NameTakenError, StoreError, UnknownConversationError

if TYPE_CHECKING:  # imported where they are used: `--help` answers without SQLite
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
        from recollect.cli.home import open_places  # noqa: PLC0415 - see the imports for types

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
