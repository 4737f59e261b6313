"""
Which conversation a chat is held in: a new one or one that is kept, as the options say.

Reads the journal before a model is loaded, so that a mistake is told at once.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from recollect.errors import ConfigError, NameTakenError, StoreError, UnknownConversationError

if TYPE_CHECKING:  # imported where they are used: `--help` answers without SQLite
    from recollect.cipher import Cipher
    from recollect.conversation.model import Model
    from recollect.conversation.records import ConversationInfo
    from recollect.conversation.session import Session
    from recollect.conversation.window import Overflow
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
    system: str | None = None
    overflow: "Overflow" = "error"

    def __post_init__(self) -> None:
        if self.resume is None:
            return
        for option, value, remedy in (
            ("--system", self.system, "its instructions stay as they are"),
            ("--name", self.name, "/name gives it another one"),
        ):
            if value is not None:
                raise ConfigError(
                    f"{option} is for a new conversation: leave it out of --resume; {remedy}."
                )

    def find(self, cipher: "Cipher | None" = None) -> "ConversationInfo | None":
        """
        Return what is to be resumed; None where a conversation begins.

        Args:
            cipher: Of the data folder.

        Raises:
            UnknownConversationError: There is none to resume.
            NameTakenError: There is one of the name that a new one shall have.
            StoreError: The journal cannot be used.
        """
        if not self.keep and self.name is None and self.resume is None:
            return None
        by_name = {info.name: info for info in self._kept(cipher)}
        if self.name is not None and self.name in by_name:
            raise NameTakenError(
                f"There is a conversation {self.name!r} already: take another name, or go on with "
                "that one by --resume."
            )
        if self.resume is None:
            return None
        if self.resume == LAST and by_name:
            return next(iter(by_name.values()))
        if self.resume not in by_name:
            raise UnknownConversationError(_not_there(self.resume))
        return by_name[self.resume]

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
            return model.resume(found.name, params=params, overflow=self.overflow)
        return model.session(
            self.system, params=params, keep=self.keep, name=self.name, overflow=self.overflow
        )

    def _kept(self, cipher: "Cipher | None") -> "list[ConversationInfo]":
        from recollect import config  # noqa: PLC0415 - see the imports for type checking
        from recollect.conversation.journal import JOURNAL_NAME, Journal  # noqa: PLC0415

        try:
            with Journal.open(config.home() / JOURNAL_NAME, cipher=cipher) as journal:
                return journal.conversations()
        except StoreError as error:
            if self.name is not None or self.resume is not None:
                raise
            raise type(error)(f"{error} A chat with --no-save does without it.") from error


def _not_there(name: str) -> str:
    if name == LAST:
        return "No conversation is kept yet: begin one without --resume."
    return f"There is no conversation {name!r}: `recollect conversations` lists those there are."
