"""
A file that carries a conversation, and the KV of one of its branches, to another machine.

The file is a safetensors file; docs/store-format.md describes it. Everything that is read from it is checked
first. Knows no model and no journal.
"""

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy
import xxhash

from recollect import config, files
from recollect.errors import ConfigError, ConversationError, ConversationFileError
from recollect.journal.conversation_files import MOST_JSON_BYTES, from_json, to_json
from recollect.journal.records import MAX_TOKEN_ID, ConversationRecord, require_text
from recollect.kv.record import Identity, Key, chained_key, namespace_key
from recollect.types import Profile

FORMAT_NAME: Final = "recollect-portable"
FORMAT_VERSION: Final = 1
"""Incremented with each change that older versions of recollect would misread."""

_CHECKSUM_BYTES: Final = 16
_MOST_BLOCK_SIZE: Final = 4096
_TEXT: Final = "conversation"
"""Name of the tensor that holds the conversation as JSON, `(bytes,)`."""
_KV: Final = {"token_ids": ("I32", 1), "kv": ("U8", 2), "kv_checksums": ("U8", 2)}
"""Element type and number of dimensions of the tensors of a file with KV, by their names."""
_MOST: Final = {
    _TEXT: MOST_JSON_BYTES,
    "token_ids": 1 << 24,  # sixteen times the longest context there is
    "kv": 1 << 30,  # a block of a model of 70 billion parameters has 21 MB in f32
    "kv_checksums": _CHECKSUM_BYTES,
}
"""Largest length of the last dimension of each tensor, which is what is read at once."""
_REMEDY: Final = "write it again with `recollect export`"


@dataclass(frozen=True, slots=True)
class BranchHead:
    """What the KV in a file belongs to."""

    tip: str
    """Name of the branch; empty: it had none."""
    identity: Identity
    """Model, runtime and precision that computed the KV."""
    profile: Profile
    block_size: int
    """Tokens per block."""


@dataclass(frozen=True, slots=True)
class Branch:
    """The KV of one path through a conversation."""

    head: BranchHead
    token_ids: list[int]
    """The prompt up to the branch's tip, `(n,)`, n >= 1."""
    blocks: npt.NDArray[np.uint8]
    """KV of these tokens, `(ceil(n / block_size), bytes per block)`."""


@dataclass(frozen=True, slots=True)
class CarriedBlock:
    """A block that was read from a file, and whose checksum is right."""

    token_ids: list[int]
    """The block's tokens, `(m,)`, 1 <= m <= block size; only the last block has fewer than the block size."""
    payload: npt.NDArray[np.uint8]
    """Its KV, `(bytes per block,)`."""


def require_new(path: Path) -> None:
    """
    Check that a file can be created; called before its KV is computed, which can take minutes.

    Raises:
        ConversationFileError: A file of that name exists, or its folder does not.
    """
    if not path.parent.is_dir():
        raise ConversationFileError(
            f"{path} cannot be written: there is no folder {path.parent}; create it first."
        )
    if path.exists():
        raise ConversationFileError(
            f"{path} exists already: choose another name, or remove it first."
        )


def write(path: Path, conversation: ConversationRecord, branch: Branch | None) -> None:
    """
    Write a file that only its owner can read, by one rename: it is complete, or does not exist.

    Args:
        path: Where the file is created.
        conversation: The whole conversation.
        branch: The KV to be carried with it; None: none.

    Raises:
        ConversationFileError: The file exists already, or cannot be written.
    """
    require_new(path)
    text = to_json(conversation).encode()
    metadata = {"format": FORMAT_NAME, "version": str(FORMAT_VERSION)}
    tensors: dict[str, npt.NDArray[Any]] = {_TEXT: np.frombuffer(text, np.uint8)}
    if branch is not None:
        metadata["branch"] = json.dumps(asdict(branch.head), sort_keys=True)
        tensors["token_ids"] = np.asarray(branch.token_ids, np.int32)
        tensors["kv"] = np.ascontiguousarray(branch.blocks)
        tensors["kv_checksums"] = _checksums(branch)
    metadata["checksum"] = head_checksum(metadata, text)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        safetensors.numpy.save_file(tensors, temporary, metadata)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, safetensors.SafetensorError) as cause:
        reason = getattr(cause, "strerror", None) or cause
        raise ConversationFileError(
            f"{path} cannot be written ({reason}): see that the folder is there, and that its disk "
            "has room."
        ) from cause
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


class PortableFile:
    """
    A file that was read and checked completely.

    Raises:
        ConversationFileError: It cannot be read, or is not as it was written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = _open(path)
        self._names = set(self._file.keys())
        metadata: dict[str, str] = self._file.metadata() or {}
        self._check_format(metadata)
        self._check_sizes()
        text = self._tensor(_TEXT, "U8", 1).tobytes()
        claimed = metadata.pop("checksum", "")
        if claimed != head_checksum(metadata, text):
            self._refuse("its text is not as it was written")
        self.conversation: Final = from_json(text.decode(errors="replace"))
        self.head: Final = self._branch_head(metadata)
        """What the KV belongs to; None: the file has no KV."""
        self.token_ids: Final[list[int]] = [] if self.head is None else self._token_ids()
        self.bytes_per_block: Final[int] = (
            0 if self.head is None else self._file.get_slice("kv").get_shape()[1]
        )
        for _ in self.blocks():  # checks each
            pass

    def blocks(self) -> Iterator[CarriedBlock]:
        """
        Yield the blocks in order, each checked.

        Raises:
            ConversationFileError: One is not as it was written.
        """
        if self.head is None:
            return
        kv, checksums = self._file.get_slice("kv"), self._tensor("kv_checksums", "U8", 2)
        key, size = _root(self.head), self.head.block_size
        for number in range(len(checksums)):
            tokens = self.token_ids[number * size : (number + 1) * size]
            payload: npt.NDArray[np.uint8] = kv[number : number + 1].reshape(-1)
            key = chained_key(key, tokens)
            if checksums[number].tobytes() != _checksum(key, payload):
                self._refuse(f"block {number + 1} of its KV is not as it was written")
            yield CarriedBlock(tokens, payload)

    def _check_format(self, metadata: dict[str, str]) -> None:
        if metadata.get("format") != FORMAT_NAME:
            self._refuse("there is no conversation in it")
        version = metadata.get("version", "")
        if version != str(FORMAT_VERSION):
            raise ConversationFileError(
                f"{self._path} has version {version!r} and only {FORMAT_VERSION} is known: update "
                "recollect, or export the conversation again with the one installed here."
            )
        expected = {_TEXT, *(_KV if "branch" in metadata else ())}
        if self._names != expected:
            self._refuse("it has other parts than it should")
        if "branch" in metadata:
            for name, (kind, dimensions) in _KV.items():
                self._require(name, kind, dimensions)

    def _check_sizes(self) -> None:
        """Check the sizes before anything is read: a sparse file can claim more bytes than the disk has."""
        for name, most in _MOST.items():
            if name in self._names:
                shape = self._file.get_slice(name).get_shape()
                if shape and shape[-1] > most:
                    self._refuse(f"{name!r} has {shape[-1]:,} of at most {most:,} in a row")

    def _branch_head(self, metadata: dict[str, str]) -> BranchHead | None:
        if "branch" not in metadata:
            return None
        try:  # the checksum is right, but somebody may have computed it for fields made by hand
            fields = json.loads(metadata["branch"])
            identity = Identity(**{name: _text(text) for name, text in fields["identity"].items()})
            profile = config.parse_profile(fields["profile"])
            head = BranchHead(_text(fields["tip"]), identity, profile, _whole(fields["block_size"]))
        except (
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            RecursionError,
            ConfigError,
            ConversationError,
        ):
            self._refuse("it does not say what its KV is of")
        if not 1 <= head.block_size <= _MOST_BLOCK_SIZE:
            self._refuse(f"its blocks have {head.block_size} tokens")
        return head

    def _token_ids(self) -> list[int]:
        assert self.head is not None, "token ids come with KV"
        ids = self._tensor("token_ids", *_KV["token_ids"])
        blocks, size = self._file.get_slice("kv").get_shape()
        checksums = self._file.get_slice("kv_checksums").get_shape()
        if not len(ids) or blocks != -(-len(ids) // self.head.block_size) or not size:
            self._refuse(f"{blocks} blocks of {size} bytes are not those of {len(ids)} tokens")
        if checksums != [blocks, _CHECKSUM_BYTES]:
            self._refuse("it has not one checksum for each block")
        if ids.min() < 0 or ids.max() > MAX_TOKEN_ID:
            self._refuse("it has a token id that is none")
        return [int(token_id) for token_id in ids]

    def _tensor(self, name: str, kind: str, dimensions: int) -> npt.NDArray[Any]:
        self._require(name, kind, dimensions)
        tensor: npt.NDArray[Any] = self._file.get_tensor(name)
        return tensor

    def _require(self, name: str, kind: str, dimensions: int) -> None:
        part = self._file.get_slice(name)
        if part.get_dtype() != kind or len(part.get_shape()) != dimensions:
            self._refuse(f"{name!r} is {part.get_dtype()} of shape {part.get_shape()}")

    def _refuse(self, what: str) -> NoReturn:
        raise ConversationFileError(f"{self._path} cannot be imported, {what}: {_REMEDY}.")


def _open(path: Path) -> Any:
    """Return the open file; safetensors has checked its layout, and has no types."""
    try:
        files.require_regular(path)
        return safetensors.safe_open(path, framework="np")
    except OSError as cause:
        raise ConversationFileError(
            f"{path} cannot be read ({cause.strerror or cause}): check the path."
        ) from cause
    except safetensors.SafetensorError as cause:
        raise ConversationFileError(
            f"{path} is no portable conversation, or was cut short ({cause}): {_REMEDY}."
        ) from cause


def _text(value: object) -> str:
    """
    Return *value* if it is valid Unicode text.

    Raises:
        TypeError: It is not a text.
        ConversationError: It holds a lone surrogate.
    """
    if not isinstance(value, str):
        raise TypeError("no text")
    require_text(value)
    return value


def _whole(value: object) -> int:
    """
    Return *value* if its type is `int`, which excludes true and false.

    Raises:
        TypeError: It has another type.
    """
    if type(value) is not int:
        raise TypeError("no whole number")
    return value


def _checksums(branch: Branch) -> npt.NDArray[np.uint8]:
    """Return the checksum of each block, over its bytes and all tokens up to its end; `(blocks, 16)`."""
    key, size = _root(branch.head), branch.head.block_size
    found = np.empty((len(branch.blocks), _CHECKSUM_BYTES), np.uint8)
    for number, payload in enumerate(branch.blocks):
        key = chained_key(key, branch.token_ids[number * size : (number + 1) * size])
        found[number] = np.frombuffer(_checksum(key, payload), np.uint8)
    return found


def _root(head: BranchHead) -> Key:
    """Return the first key of the chain. It differs from that of every store, whose keys may be secret."""
    return namespace_key(head.identity.text(), str(head.block_size))


def _checksum(key: Key, payload: npt.NDArray[np.uint8]) -> bytes:
    state = xxhash.xxh3_128(key)
    state.update(np.ascontiguousarray(payload).data)
    return state.digest()


def head_checksum(metadata: dict[str, str], text: bytes) -> str:
    """Return the checksum of metadata and conversation; KV and token ids are in the blocks' checksums."""
    state = xxhash.xxh3_128(json.dumps(metadata, sort_keys=True).encode())
    state.update(text)
    return state.hexdigest()
