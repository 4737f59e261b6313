"""
What a model keeps on disk under names: places in conversations, and texts that were read ahead.

Knows the store and the journal through the model that it is a part of.
"""

from abc import ABC, abstractmethod
from typing import Final

from recollect.conversation.checkpoints import Checkpoint, Checkpoints
from recollect.conversation.journal import Journal
from recollect.conversation.prompt import PromptEncoder
from recollect.conversation.warming import Warmed, warm
from recollect.engine.engine import Engine
from recollect.engine.pinning import require_tier
from recollect.types import Progress, no_progress


class Keeping(ABC):
    """The part of a `Model` that pins KV on disk, and lets it go."""

    def __init__(self, engine: Engine, prompts: PromptEncoder) -> None:
        self.engine: Final = engine
        self.prompts: Final = prompts

    @property
    @abstractmethod
    def journal(self) -> Journal:
        """Return the journal that named conversations are kept in."""

    @property
    def places(self) -> Checkpoints:
        """
        Return what keeps checkpoints.

        Raises:
            StoreError: No KV is kept on disk here, or the journal cannot be used.
        """
        return Checkpoints(require_tier(self.engine).store, self.journal)

    def warm(
        self,
        text: str = "",
        *,
        system: str | None = None,
        name: str,
        progress: Progress = no_progress,
    ) -> Warmed:
        """
        Read a text once and keep its KV on disk, so that first messages which begin so start warm.

        Args:
            text: What they begin with; empty: only the instructions.
            system: Instructions before it.
            name: Of what is kept; a text that has changed takes the place of the one before.
            progress: Called with tokens while they are read.

        Raises:
            NameTakenError: Something else is kept under that name.
            StoreError: No KV is kept on disk here, or there is no room for it.
            ContextFullError: It does not fit the context.
        """
        return warm(self.engine, self.prompts, text, system=system, name=name, progress=progress)

    def checkpoints(self) -> list[Checkpoint]:
        """
        Return the places that `Session.checkpoint` has kept, by name; also those of other models.

        Raises:
            StoreError: No KV is kept on disk here, or it cannot be read.
        """
        return self.places.all()

    def drop_checkpoint(self, name: str) -> None:
        """
        Let the KV of a checkpoint be evicted; the conversation stays as it is.

        Raises:
            UnknownCheckpointError: There is none of that name.
            StoreError: No KV is kept on disk here, or it cannot be written.
        """
        self.places.drop(name)
