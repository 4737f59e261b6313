"""
API keys: who a request is from.

A key is a namespace of its own: what is said, kept and computed under one is neither visible to nor
reused by another. The key itself is never written down; the file holds hashes of keys that we drew
at random, so that a fast hash is enough.
"""

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Self

from recollect import files
from recollect.errors import ConfigError, StoreCorruptError, StoreError

KEYS_NAME: Final = "api-keys.json"
_MOST_BYTES: Final = 16 * files.MIB
"""Of the file: a hundred thousand keys."""
_PREFIX: Final = "rk-"


@dataclass(frozen=True, slots=True)
class Client:
    """Who a request is from."""

    name: str
    """For logs."""
    namespace: str
    """Under which everything of the client's is kept; empty on a server without keys."""
    is_operator: bool = False
    """Whether the client may read the metrics, which count what all do, and make prefixes public."""


ANYBODY: Final = Client("local", "", is_operator=True)
"""The client of a server without keys: whoever can reach this machine's own interface."""


@dataclass(frozen=True, slots=True)
class StoredKey:
    """What is kept of a key."""

    name: str
    hash: str
    is_operator: bool = False


def hash_key(key: str) -> str:
    """Return what may be kept of a key."""
    return _digest(key, b"recollect key")


def namespace_of(key: str) -> str:
    """Return the namespace of a key; says nothing about the key, and nothing about its hash."""
    return _digest(key, b"recollect space")


def _digest(key: str, purpose: bytes) -> str:
    data = key.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(data, digest_size=32, person=purpose).hexdigest()


class Keyring:
    """The keys that a server takes. Immutable, so any thread may ask."""

    def __init__(self, keys: Iterable[StoredKey] = ()) -> None:
        self._keys: Final = tuple(keys)

    def __len__(self) -> int:
        """Return how many there are; 0: everybody is let in."""
        return len(self._keys)

    def client(self, key: str | None) -> Client | None:
        """Return who has a key; None where nobody has. Takes as long whether and whoever has."""
        if not self._keys:
            return ANYBODY
        presented = hash_key(key or "")
        found = None
        for stored in self._keys:
            if hmac.compare_digest(presented, stored.hash):
                found = stored
        if found is None or not key:
            return None
        return Client(found.name, namespace_of(key), found.is_operator)


class KeyFile:
    """
    The keys in a file, which its owner alone can read.

    A key is in the file as its hash; `add` returns the key itself, once.
    """

    def __init__(self, path: Path) -> None:
        self.path: Final = path

    @classmethod
    def in_home(cls, home: Path) -> Self:
        """Return the file of a home folder."""
        return cls(home / KEYS_NAME)

    def read(self) -> list[StoredKey]:
        """
        Return the keys; none where there is no file.

        Raises:
            StoreCorruptError: It holds something else.
        """
        try:
            text = files.read_text(self.path, most_bytes=_MOST_BYTES)
        except FileNotFoundError:
            return []
        except OSError as cause:
            raise StoreError(
                f"{self.path} cannot be read ({cause.strerror or cause}): allow it."
            ) from cause
        try:
            return [StoredKey(**entry) for entry in json.loads(text)["keys"]]
        except (ValueError, TypeError, KeyError, RecursionError) as cause:
            raise StoreCorruptError(
                f"{self.path} does not hold keys: repair it, or remove it and add keys anew."
            ) from cause

    def add(self, name: str, *, is_operator: bool = False) -> str:
        """
        Draw a key, keep its hash, and return it: it cannot be shown again.

        Raises:
            ConfigError: There is a key of that name, or that is no name.
            StoreError: The file cannot be written; it is as it was.
        """
        keys = self.read()
        if not name.isprintable() or not name.strip():
            raise ConfigError(f"{name!r} cannot be the name of a key: take printable characters.")
        if any(stored.name == name for stored in keys):
            raise ConfigError(f"There is a key {name!r} already: remove it, or take another name.")
        key = _PREFIX + secrets.token_urlsafe(32)
        self._write([*keys, StoredKey(name, hash_key(key), is_operator)])
        return key

    def remove(self, name: str) -> None:
        """
        Let a key be refused from the next start on; what was kept under it stays.

        Raises:
            ConfigError: There is none of that name.
            StoreError: The file cannot be written; it is as it was.
        """
        keys = self.read()
        left = [stored for stored in keys if stored.name != name]
        if len(left) == len(keys):
            raise ConfigError(f"There is no key {name!r}: `recollect keys list` shows them.")
        self._write(left)

    def _write(self, keys: Iterable[StoredKey]) -> None:
        text = json.dumps({"keys": [asdict(stored) for stored in keys]}, indent=1)
        temporary = self.path.with_suffix(f".{secrets.token_hex(8)}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text + "\n")
            temporary.replace(self.path)
        except OSError as cause:
            raise StoreError(
                f"{self.path} cannot be written ({cause.strerror or cause}): see that this is allowed, "
                "and that the disk has room."
            ) from cause
        finally:
            with suppress(OSError):
                temporary.unlink()


def keyring(file: KeyFile, given: Iterable[str]) -> Keyring:
    """
    Return the keys in a file and those given by hand, which are an operator's.

    Raises:
        ConfigError: No request can carry one of those given by hand.
        StoreError: The file cannot be read.
    """
    by_hand = [
        StoredKey(f"key {n}", hash_key(_require_key(key)), True) for n, key in enumerate(given, 1)
    ]
    return Keyring([*file.read(), *by_hand])


def _require_key(key: str) -> str:
    """
    Return a key that a header can carry; the error does not quote it.

    Raises:
        ConfigError: It is empty or blank, has blanks around it, which headers lose, or characters
            that not every client sends the same.
    """
    if not key.strip():
        raise ConfigError(
            "The API key in --api-key or RECOLLECT_API_KEY is empty: give a key, or leave both out."
        )
    if not (key.isascii() and key.isprintable() and key == key.strip()):
        raise ConfigError(
            "No request can carry the API key in --api-key or RECOLLECT_API_KEY: take printable "
            "ASCII characters, with no blank before or after them."
        )
    return key
