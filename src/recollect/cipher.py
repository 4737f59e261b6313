"""
Seal bytes so that without the key they can be neither read nor changed unseen.

AES-256-GCM and HKDF of the library `cryptography`, which is loaded with the first key. Knows no file
and not where keys come from.
"""

import os
from typing import TYPE_CHECKING, Final

from recollect.errors import ConfigError, StoreCorruptError

if TYPE_CHECKING:  # an extra; see `_aes_gcm`
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_BYTES: Final = 32
NONCE_BYTES: Final = 12
TAG_BYTES: Final = 16
OVERHEAD_BYTES: Final = NONCE_BYTES + TAG_BYTES
"""By which sealed bytes are longer than plain ones."""

KV_PURPOSE: Final = "kv"

_LABEL: Final = b"recollect 1 "
"""Before the purpose of each derived key; another number is another scheme."""


class Cipher:
    """
    A key, and what is done with it. Immutable; safe from any thread.

    Nonces are drawn at random, 96 bits for each call. Up to 2**32 calls under one key two equal ones
    are less likely than 2**-32 (NIST SP 800-38D, 8.3), which are 4 billion blocks or messages; each
    purpose has a key of its own.
    """

    __slots__ = ("_aes", "_key", "name_secret")

    def __init__(self, key: bytes) -> None:
        """
        Take a key of `KEY_BYTES` that nobody can guess: drawn at random, or derived by scrypt.

        Raises:
            ConfigError: The library is not installed.
            ValueError: It has another length.
        """
        if len(key) != KEY_BYTES:
            raise ValueError(f"A key has {KEY_BYTES} bytes, and this one {len(key)}.")
        self._key: Final = key
        self._aes: Final = _aes_gcm(_derived(key, b"seal"))
        self.name_secret: Final = _derived(key, b"names")
        """32 bytes to mix into names that are hashes of content, so that nobody can guess the content."""

    def for_purpose(self, purpose: str) -> "Cipher":
        """Return a cipher of its own for one kind of content; what one seals, no other opens."""
        return Cipher(_derived(self._key, b"purpose " + purpose.encode()))

    def seal(self, plain: bytes | memoryview, *, context: bytes) -> bytes:
        """
        Return the bytes sealed, `OVERHEAD_BYTES` longer: nonce, content, tag.

        Args:
            plain: Any bytes.
            context: What they are and where they belong. Not stored: `open` has to be told the same, so
                bytes that were moved to another place do not open there.
        """
        nonce = os.urandom(NONCE_BYTES)
        return nonce + self._aes.encrypt(nonce, memoryview(plain).cast("B"), context)

    def open(self, sealed: bytes | memoryview, *, context: bytes) -> bytes:
        """
        Return what was sealed under that context.

        Raises:
            StoreCorruptError: It was changed, moved, or sealed with another key.
        """
        from cryptography.exceptions import InvalidTag  # noqa: PLC0415 - an extra

        view = memoryview(sealed).cast("B")
        try:
            return self._aes.decrypt(view[:NONCE_BYTES], view[NONCE_BYTES:], context)
        except (InvalidTag, ValueError):  # a wrong tag; too short for a nonce
            raise StoreCorruptError(
                "Encrypted bytes are not as they were written, or the key is another one: put a "
                "backup in their place, or give the right key."
            ) from None

    def __repr__(self) -> str:
        return "Cipher(…)"  # a key has no place in a log


def missing_library(name: str) -> ConfigError:
    """Return the error for a library of the extra that is not installed."""
    return ConfigError(
        f"Encryption needs the library {name}, which is not installed: "
        'python -m pip install "recollect-llm[encrypt]".'
    )


def _aes_gcm(key: bytes) -> "AESGCM":
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415 - an extra
    except ImportError:
        raise missing_library("cryptography") from None
    return AESGCM(key)


def _derived(key: bytes, purpose: bytes) -> bytes:
    """Return another key, from which neither the first nor any other can be found."""
    try:
        from cryptography.hazmat.primitives.hashes import SHA256  # noqa: PLC0415 - an extra
        from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand  # noqa: PLC0415
    except ImportError:
        raise missing_library("cryptography") from None
    return HKDFExpand(SHA256(), KEY_BYTES, _LABEL + purpose).derive(key)
