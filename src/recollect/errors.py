"""
Every exception that recollect raises on purpose.

    RecollectError
    ├── ConfigError                 a setting cannot be used
    │   ├── InvalidParameterError   a sampling or request parameter is out of range
    │   └── MissingPackageError     it takes a package that is not installed
    ├── ModelError                  a model cannot be found, downloaded or read
    │   ├── UnknownModelError       nothing goes by that name
    │   ├── FetchError              it cannot be downloaded
    │   │   ├── ChecksumError       the downloaded file has another checksum
    │   │   └── OfflineError        it is not on this disk, and downloads are forbidden
    │   ├── UnsupportedModelError   it exists, but cannot be converted or run
    │   │   └── DraftModelError     it cannot guess for the other one, which loads without it
    │   └── TemplateError           its chat template is missing or broken, or refuses the conversation
    ├── RuntimeFailure              the forward pass failed
    │   ├── TokenIdError            a token id is outside the vocabulary, or no token was given
    │   └── EngineUnavailableError  no engine elsewhere answers, or it broke off
    ├── MemoryLimitError            something does not fit
    │   ├── ContextFullError        tokens do not fit into the model's context
    │   └── OutOfBlocksError        KV does not fit into its memory budget
    ├── StoreError                  the journal, KV or keys on disk cannot be read or written
    │   ├── StoreBusyError          another program holds it for too long
    │   ├── StoreCorruptError       it is damaged
    │   ├── StoreEncryptedError     it was encrypted after it was opened
    │   ├── StoreFullError          the disk or the budget is full
    │   ├── StoreUnavailableError   the disk or the system refuses access
    │   ├── TooShortError           a prefix is shorter than a block, and only whole blocks are stored
    │   └── StoreVersionError       another version of recollect wrote it
    └── ConversationError           an operation on a conversation is not possible
        ├── UnknownNodeError        the conversation has no such node
        ├── RewindError             the history has no such place
        ├── SessionBusyError        a reply is being generated in this session
        ├── UnknownConversationError  there is no such conversation
        ├── UnknownCheckpointError  there is no such checkpoint
        ├── NameTakenError          the name is taken
        └── ConversationFileError   a file is not a conversation, or cannot be written
    MisuseError                     a bug in the calling code (a RuntimeError, not a RecollectError)

Each message is one sentence with a remedy; numbers in it are attributes, too. A reply that is stopped or
cancelled, and a cache miss, are results and not exceptions.
"""

from pathlib import Path


class RecollectError(Exception):
    """Base class of the errors that arguments, files, runtimes or the system cause."""


class ConfigError(RecollectError):
    """A setting, an option or an argument cannot be used."""


class InvalidParameterError(ConfigError, ValueError):
    """
    A parameter is out of its range.

    Attributes:
        param: Which one, by its name in Python, such as `tools`; None: no single one, or it is said.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class MissingPackageError(ConfigError):
    """What was asked for takes a package that is not installed; the message says how to install it."""


class ModelError(RecollectError):
    """A model cannot be found, downloaded or read."""


class UnknownModelError(ModelError):
    """No model has that name."""


class FetchError(ModelError):
    """A model could not be downloaded."""


class ChecksumError(FetchError):
    """
    A downloaded file has another checksum than the catalog, or the hub, says.

    Attributes:
        expected: The hex sha256 that the file should have; of a small file on the hub, its git sha1.
        actual: The hex sha256 that it has.
        kept: Where the file was moved to.
    """

    def __init__(self, message: str, *, expected: str, actual: str, kept: Path) -> None:
        super().__init__(message)
        self.expected = expected
        self.actual = actual
        self.kept = kept


class OfflineError(FetchError):
    """The model is not on this disk, and downloads are forbidden; no connection was made."""


class UnsupportedModelError(ModelError):
    """The model exists, but cannot be converted or run; the message names what is not supported."""


class DraftModelError(UnsupportedModelError):
    """One model cannot guess for another, which can be loaded without."""


class TemplateError(ModelError):
    """The chat template is missing, broken, or refuses the conversation."""


class RuntimeFailure(RecollectError):  # noqa: N818 - RuntimeError is a built-in, with another meaning
    """The runtime failed in a forward pass or while loading; its own error is chained."""


class TokenIdError(RuntimeFailure, ValueError):
    """A token id is outside the vocabulary, or no token was given."""


class EngineUnavailableError(RuntimeFailure):
    """No engine on another machine answers, or it broke off; what was said and generated is kept."""


class MemoryLimitError(RecollectError):
    """Something does not fit into the context or into memory."""


class ContextFullError(MemoryLimitError):
    """
    The tokens do not fit into the model's context; nothing was changed.

    Attributes:
        needed: Tokens of the whole sequence.
        limit: Most tokens of the context.
    """

    def __init__(self, *, needed: int, limit: int) -> None:
        super().__init__(
            f"This needs {needed:,} tokens, and the context holds {limit:,}: shorten the prompt, "
            "rewind, or begin a new conversation."
        )
        self.needed = needed
        self.limit = limit


class OutOfBlocksError(MemoryLimitError):
    """
    The KV memory budget is used up, and nothing can be evicted; nothing was changed.

    Attributes:
        needed: Blocks that were requested.
        free: Blocks that are free.
        total: Blocks of the pool.
    """

    def __init__(self, *, needed: int, free: int, total: int) -> None:
        super().__init__(
            f"This needs {needed:,} more KV blocks, and {free:,} of {total:,} are free: wait for other "
            "replies, unpin something, or give the cache more memory (--kv-memory)."
        )
        self.needed = needed
        self.free = free
        self.total = total


class StoreError(RecollectError):
    """The journal, the KV store or the key file cannot be read or written; what it held is unchanged."""


class StoreBusyError(StoreError):
    """Another program held the store for longer than the timeout; nothing was changed."""


class StoreCorruptError(StoreError):
    """The store is damaged; it was left untouched."""


class StoreEncryptedError(StoreError):
    """The store was encrypted by another program after it was opened; nothing was changed."""


class StoreFullError(StoreError):
    """The disk or the store's budget is full; nothing was changed."""


class StoreUnavailableError(StoreError):
    """The disk or the system refuses to open, read or write the store; nothing was changed."""


class TooShortError(StoreError):
    """
    A prefix is shorter than a block of KV, and the profile stores whole blocks only; nothing was stored.

    Attributes:
        tokens: Tokens of the prefix.
        least: Fewest tokens whose KV can be stored.
    """

    def __init__(self, *, tokens: int, least: int) -> None:
        super().__init__(
            f"This is {tokens:,} tokens, and {least:,} are the least whose KV can be kept here: make "
            "it longer, or use the profile `fast`."
        )
        self.tokens = tokens
        self.least = least


class StoreVersionError(StoreError):
    """Another version of recollect wrote the store, and it cannot be used; it was left untouched."""


class ConversationError(RecollectError):
    """An operation on a conversation is not possible; the subclass or the message says why."""


class UnknownNodeError(ConversationError):
    """The conversation has no such node."""


class RewindError(ConversationError, ValueError):
    """The history has no such place; nothing was changed."""


class SessionBusyError(ConversationError):
    """A reply is being generated in this session; finish or stop it first."""


class UnknownConversationError(ConversationError):
    """There is no conversation of that name or id, or it was deleted."""


class UnknownCheckpointError(ConversationError):
    """There is no checkpoint of that name, or its conversation was deleted."""


class NameTakenError(ConversationError):
    """Another conversation, branch or pin has that name; nothing was changed."""


class ConversationFileError(ConversationError):
    """A file is not a conversation that can be imported, or a conversation cannot be exported to it."""


class MisuseError(RuntimeError):
    """The calling code has a bug, such as using a sequence after it was closed."""
