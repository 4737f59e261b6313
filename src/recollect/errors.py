"""
Every exception that recollect raises on purpose.

    RecollectError
    ├── ConfigError                 a setting cannot be used
    │   └── InvalidParameterError   a sampling or request parameter is out of range
    ├── ModelError                  a model cannot be had or read
    │   ├── UnknownModelError       nothing goes by that name
    │   ├── FetchError              it could not be downloaded
    │   │   ├── ChecksumError       what was downloaded is not what was asked for
    │   │   └── OfflineError        it is not here, and nothing may be fetched
    │   ├── UnsupportedModelError   it is there, but this runtime cannot run it
    │   └── TemplateError           its chat template is missing, or refuses the conversation
    ├── RuntimeFailure              the forward pass failed
    │   └── TokenIdError            a token id is outside the vocabulary, or there is none
    ├── MemoryLimitError            it does not fit
    │   ├── ContextFullError        into the model's context
    │   └── OutOfBlocksError        into the KV memory budget
    ├── StoreError                  what is kept on disk cannot be read or written
    │   ├── StoreBusyError          somebody else holds it for too long
    │   ├── StoreCorruptError       it is damaged
    │   ├── StoreEncryptedError     it was encrypted after it was opened
    │   ├── StoreFullError          there is no room for more
    │   ├── StoreUnavailableError   the disk or the system does not let it be used
    │   ├── TooShortError           it fills no block, and nothing less can be kept
    │   └── StoreVersionError       a newer version wrote it
    └── ConversationError           the tree of turns
        ├── UnknownNodeError        that node is not in this conversation
        ├── RewindError             that place is not in this history
        ├── SessionBusyError        a reply is being generated in this session
        ├── UnknownConversationError  no conversation goes by that name
        ├── UnknownCheckpointError  no checkpoint goes by that name
        ├── NameTakenError          something else goes by that name
        └── ConversationFileError   a file is no conversation, or cannot be written
    MisuseError                     a bug in the calling code (a RuntimeError, not a RecollectError)

Each message is one sentence with a remedy; numbers are attributes too. Stops, cancellation and
cache misses are results, not exceptions.
"""

from pathlib import Path


class RecollectError(Exception):
    """Base of every error that a caller, a file or a runtime can cause."""


class ConfigError(RecollectError):
    """A setting cannot be used as it is."""


class InvalidParameterError(ConfigError, ValueError):
    """A parameter is out of its range."""


class ModelError(RecollectError):
    """A model cannot be had or read."""


class UnknownModelError(ModelError):
    """Nothing goes by that name."""


class FetchError(ModelError):
    """A model could not be downloaded."""


class ChecksumError(FetchError):
    """What was downloaded is not what was asked for; it was set aside at `kept`."""

    def __init__(self, message: str, *, expected: str, actual: str, kept: Path) -> None:
        super().__init__(message)
        self.expected = expected
        self.actual = actual
        self.kept = kept


class OfflineError(FetchError):
    """The model is not on this disk, and nothing may be fetched; nothing was asked of a network."""


class UnsupportedModelError(ModelError):
    """The model is there, but this runtime cannot run it; the message names what it is about."""


class TemplateError(ModelError):
    """The chat template is missing, broken, or refuses the conversation."""


class RuntimeFailure(RecollectError):  # noqa: N818 - RuntimeError is taken, and means something else
    """The runtime failed; the cause is chained."""


class TokenIdError(RuntimeFailure, ValueError):
    """No token was given, or one outside the vocabulary."""


class MemoryLimitError(RecollectError):
    """It does not fit."""


class ContextFullError(MemoryLimitError):
    """The tokens do not fit into the model's context; nothing was changed."""

    def __init__(self, *, needed: int, limit: int) -> None:
        super().__init__(
            f"This needs {needed:,} tokens, and the context holds {limit:,}: shorten the prompt, "
            "rewind, or begin a new conversation."
        )
        self.needed = needed
        self.limit = limit


class OutOfBlocksError(MemoryLimitError):
    """The KV memory budget is used up; nothing was changed."""

    def __init__(self, *, needed: int, free: int, total: int) -> None:
        super().__init__(
            f"This needs {needed:,} more KV blocks, and {free:,} of {total:,} are free: wait for other "
            "replies, unpin something, or give the cache more memory (--kv-memory)."
        )
        self.needed = needed
        self.free = free
        self.total = total


class StoreError(RecollectError):
    """What is kept on disk cannot be read or written; what was there before is as it was."""


class StoreBusyError(StoreError):
    """Somebody else has held the store for longer than the timeout; nothing was changed."""


class StoreCorruptError(StoreError):
    """The store is damaged; it was left untouched."""


class StoreEncryptedError(StoreError):
    """The store was encrypted by another program after it was opened; nothing was changed."""


class StoreFullError(StoreError):
    """There is no room for more; nothing was changed."""


class StoreUnavailableError(StoreError):
    """The disk or the system does not let the store be used, or not be written; nothing was changed."""


class TooShortError(StoreError):
    """The prefix fills no block of KV, and this runtime keeps whole ones only; nothing was kept."""

    def __init__(self, *, tokens: int, least: int) -> None:
        super().__init__(
            f"This is {tokens:,} tokens, and {least:,} are the least whose KV can be kept here: make "
            "it longer, or use the profile `fast`."
        )
        self.tokens = tokens
        self.least = least


class StoreVersionError(StoreError):
    """A newer version of recollect wrote this; it was left untouched."""


class ConversationError(RecollectError):
    """The tree of turns was asked for something that it does not have."""


class UnknownNodeError(ConversationError):
    """That node is not in this conversation."""


class RewindError(ConversationError, ValueError):
    """That place is not in this history; nothing was changed."""


class SessionBusyError(ConversationError):
    """A reply is being generated in this session; finish or stop it first."""


class UnknownConversationError(ConversationError):
    """No conversation goes by that name, or it has been deleted."""


class UnknownCheckpointError(ConversationError):
    """No checkpoint goes by that name, or its conversation has been deleted."""


class NameTakenError(ConversationError):
    """Another conversation, or something else of the kind, goes by that name; nothing was changed."""


class ConversationFileError(ConversationError):
    """A file holds no conversation that can be imported, or one cannot be written to it."""


class MisuseError(RuntimeError):
    """The calling code has a bug, such as using a closed sequence."""
