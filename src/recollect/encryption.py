"""
Encryption of a data folder: the cipher that encrypts bytes, and the key file that tells the right key.

`Cipher` encrypts ("seals") and decrypts ("opens") bytes. `KeyFile` is the content of the key file in the
folder, which does not hold the key. `unlock` returns the cipher of an encrypted folder, from a passphrase or
from the system's keyring; `new_key` and `save` encrypt a folder for the first time. This module does not know
what is encrypted, and asks nobody for a passphrase: callers that can ask pass a function.

AES-256-GCM, HKDF and scrypt come from the library `cryptography`, which is imported with the first key.
"""

import base64
import json
import os
import secrets
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from recollect import config, files
from recollect.errors import (
    ConfigError,
    MissingPackageError,
    StoreCorruptError,
    StoreError,
    StoreVersionError,
)

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM


KEY_BYTES: Final = 32
NONCE_BYTES: Final = 12
TAG_BYTES: Final = 16
OVERHEAD_BYTES: Final = NONCE_BYTES + TAG_BYTES
"""How many bytes longer a sealed value is than the plain one: nonce and tag."""
KV_PURPOSE: Final = "kv"
"""The purpose, for `Cipher.for_purpose`, of the cipher for KV on disk."""

KEY_FILE: Final = "encryption.json"
FORMAT: Final = 1
"""Version of the key file."""
PASSPHRASE_VARIABLE: Final = "RECOLLECT_PASSPHRASE"  # noqa: S105 - the name of one

Source = Literal["passphrase", "keyring"]
"""Where a key comes from."""
Ask = Callable[[], str]
"""Returns the passphrase that somebody typed."""

_LABEL: Final = b"recollect 1 "
"""Precedes the purpose in the derivation of each key. The number is the version of the scheme."""
_VERIFIER: Final = b"recollect key"
"""Context under which the verifier, an empty value, is sealed; only the right key opens it."""
_SERVICE: Final = "recollect"
"""Name of the service under which the keyring stores keys."""


class Cipher:
    """
    Authenticated encryption with one key: without it, sealed bytes cannot be read, and changes are detected.

    Immutable; safe from any thread. Each call of `seal` draws a random nonce of 96 bits. While one key seals
    at most 2**32 values, the probability of two equal nonces is below 2**-32; each purpose has a key of its
    own. Source: NIST SP 800-38D, 8.3.
    """

    __slots__ = ("_aes", "_key", "name_secret")

    def __init__(self, key: bytes) -> None:
        """
        Create the cipher of a key.

        Args:
            key: `KEY_BYTES` bytes that cannot be guessed: random, or derived by scrypt.

        Raises:
            MissingPackageError: The library `cryptography` is not installed.
            ValueError: The key has another length.
        """
        if len(key) != KEY_BYTES:
            raise ValueError(f"A key has {KEY_BYTES} bytes, and this one {len(key)}.")
        self._key: Final = key
        self._aes: Final = _aes_gcm(_derived(key, b"seal"))
        self.name_secret: Final = _derived(key, b"names")
        """32 bytes to mix into names that are hashes of content, so that nobody can test guesses of it."""

    def for_purpose(self, purpose: str) -> "Cipher":
        """Return the cipher for one kind of content, whose key is derived from this one's."""
        return Cipher(_derived(self._key, b"purpose " + purpose.encode()))

    def seal(self, plain: bytes | memoryview, *, context: bytes) -> bytes:
        """
        Return nonce, encrypted content and tag: `OVERHEAD_BYTES` more than *plain*.

        Args:
            plain: Any bytes.
            context: What the bytes are and where they are stored. It is authenticated but not stored: `open`
                needs the same, so bytes that were moved to another place do not open there.
        """
        nonce = os.urandom(NONCE_BYTES)
        return nonce + self._aes.encrypt(nonce, memoryview(plain).cast("B"), context)

    def open(self, sealed: bytes | memoryview, *, context: bytes) -> bytes:
        """
        Return the bytes that were sealed with that context.

        Raises:
            StoreCorruptError: They were changed, or sealed with another context or another key.
        """
        from cryptography.exceptions import InvalidTag  # noqa: PLC0415 - an extra

        view = memoryview(sealed).cast("B")
        try:
            return self._aes.decrypt(view[:NONCE_BYTES], view[NONCE_BYTES:], context)
        except (InvalidTag, ValueError):  # ValueError: too short for a nonce
            raise StoreCorruptError(
                "Encrypted bytes are not as they were written, or the key is another one: put a "
                "backup in their place, or give the right key."
            ) from None

    def __repr__(self) -> str:
        return "Cipher(…)"  # so that no key gets into a log


def _aes_gcm(key: bytes) -> "AESGCM":
    with _library("cryptography"):
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415 - an extra
    return AESGCM(key)


def _derived(key: bytes, purpose: bytes) -> bytes:
    """Return the key for a purpose by HKDF-Expand; neither *key* nor other purposes' keys follow from it."""
    with _library("cryptography"):
        from cryptography.hazmat.primitives.hashes import SHA256  # noqa: PLC0415 - an extra
        from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand  # noqa: PLC0415
    return HKDFExpand(SHA256(), KEY_BYTES, _LABEL + purpose).derive(key)


@contextmanager
def _library(name: str) -> Iterator[None]:
    """
    Turn an ImportError in the block, which imports a library of the extra `encrypt`, into ours.

    Raises:
        MissingPackageError: The library is not installed.
    """
    try:
        yield
    except ImportError:
        raise MissingPackageError(
            f"Encryption needs the library {name}, which is not installed: "
            'python -m pip install "recollect-llm[encrypt]".'
        ) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scrypt:
    """
    Parameters of scrypt. With the defaults a try of a passphrase takes 128 MiB, and 0.75 s on a slow core.

    Source of the defaults: OWASP Password Storage Cheat Sheet, scrypt.

    Raises:
        ValueError: A parameter is out of its range, or `n` is no power of two.
    """

    n: int = 2**17
    r: int = 8
    p: int = 1

    def __post_init__(self) -> None:
        # The parameters are read from a file; a changed file must not make scrypt take all memory.
        if not (1 < self.n <= 2**20 and 1 <= self.r <= 16 and 1 <= self.p <= 16):
            raise ValueError("out of range")
        if self.n & (self.n - 1):
            raise ValueError("no power of two")


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyFile:
    """The content of the key file: what is needed besides the passphrase or the keyring's key."""

    source: Source
    salt: bytes
    """Salt of the passphrase; for a keyring, the user name under which the key is stored."""
    scrypt: Scrypt
    verifier: bytes
    """An empty value that the right key has sealed."""

    def check(self, cipher: Cipher) -> None:
        """
        Check that a cipher has the folder's key.

        Raises:
            StoreCorruptError: It has another one.
        """
        cipher.for_purpose("verifier").open(self.verifier, context=_VERIFIER)

    def cipher(self, secret: bytes) -> Cipher:
        """
        Return the folder's cipher, whose key is *secret*.

        Raises:
            StoreCorruptError: It is not the folder's key.
            ValueError: It does not have `KEY_BYTES` bytes.
        """
        cipher = Cipher(secret)
        self.check(cipher)
        return cipher


def is_encrypted(home: Path | None = None) -> bool:
    """Return whether a data folder is encrypted; None: that of `config.home()`."""
    return ((home or config.home()) / KEY_FILE).exists()


def source(home: Path | None = None) -> Source | None:
    """
    Return where the key of a data folder comes from; None if the folder is not encrypted.

    Raises:
        StoreError: The key file cannot be read.
    """
    key_file = _read((home or config.home()) / KEY_FILE)
    return None if key_file is None else key_file.source


def missing(home: Path) -> ConfigError:
    """Return the error for a folder that has encrypted content but no key file."""
    return ConfigError(
        f"{home / KEY_FILE} is missing, and what is kept there is encrypted: put that file back from "
        "a copy; without it nothing can be decrypted."
    )


def unlock(
    home: str | os.PathLike[str] | None = None,
    *,
    passphrase: str | None = None,
    ask: Ask | None = None,
) -> Cipher | None:
    """
    Return the cipher of a data folder; None for one that is not encrypted.

    Args:
        home: The data folder; None: `RECOLLECT_HOME` or the platform's user data folder.
        passphrase: The passphrase; None: `RECOLLECT_PASSPHRASE`. Ignored if the key is in the keyring.
        ask: Called for a passphrase if none is given.

    Raises:
        ConfigError: The passphrase is wrong or missing; it is given, and the folder is not encrypted; the
            keyring does not have the key; or a library is not installed.
        StoreError: The key file cannot be read.
    """
    home = config.data_folder(home)
    key_file = _read(home / KEY_FILE)
    if key_file is None:
        if (
            passphrase is not None
        ):  # whoever gives one expects that nothing is written as plain text
            raise _not_encrypted(home)
        return None
    if key_file.source == "keyring":
        return _unlock_by_keyring(home, key_file)
    text = passphrase if passphrase is not None else _given(ask)
    if text is None:
        raise ConfigError(
            f"{home} is encrypted: give its passphrase in {PASSPHRASE_VARIABLE}, or on a terminal."
        )
    try:
        return key_file.cipher(_stretched(text, key_file.salt, key_file.scrypt))
    except StoreCorruptError:
        raise ConfigError(
            f"That is not the passphrase of {home}: try again; nothing was changed."
        ) from None


def require(home: Path, cipher: Cipher) -> None:
    """
    Check that a cipher has the key of a folder.

    Raises:
        ConfigError: The folder is not encrypted, or is encrypted with another key.
        StoreError: The key file cannot be read.
    """
    key_file = _read(home / KEY_FILE)
    if key_file is None:
        raise _not_encrypted(home)
    try:
        key_file.check(cipher)
    except StoreCorruptError:
        raise ConfigError(
            f"{home} is encrypted with another key: unlock that folder itself."
        ) from None


def new_key(
    kept_in: Source,
    *,
    passphrase: str | None = None,
    ask: Ask | None = None,
    scrypt: Scrypt | None = None,
) -> tuple[Cipher, KeyFile]:
    """
    Return the cipher of a new key, and the key file that `save` writes into its folder.

    Args:
        kept_in: Where `unlock` will get the key from. It is in the keyring when this returns.
        passphrase: As for `unlock`.
        ask: As for `unlock`.
        scrypt: None: the defaults of `Scrypt`.

    Raises:
        ConfigError: There is no passphrase or no keyring, or a library is not installed.
    """
    salt, scrypt = secrets.token_bytes(16), scrypt or Scrypt()
    if kept_in == "keyring":
        secret = secrets.token_bytes(KEY_BYTES)
    else:
        text = passphrase if passphrase is not None else _given(ask)
        if not text:
            raise ConfigError(
                f"There is no passphrase: give one in {PASSPHRASE_VARIABLE}, or on a terminal."
            )
        secret = _stretched(text, salt, scrypt)
    cipher = Cipher(secret)
    verifier = cipher.for_purpose("verifier").seal(b"", context=_VERIFIER)
    if kept_in == "keyring":
        _into_keyring(salt, secret)
    return cipher, KeyFile(source=kept_in, salt=salt, scrypt=scrypt, verifier=verifier)


def save(home: Path, key_file: KeyFile) -> None:
    """
    Write the key file of a folder, by one operation that never replaces an existing one.

    Args:
        home: The folder; it is created if it does not exist.
        key_file: From `new_key`.

    Raises:
        StoreError: The file cannot be written, or another process has written one. The folder is as it was.
    """
    path = home / KEY_FILE
    fields = {
        "format": FORMAT,
        "source": key_file.source,
        "salt": key_file.salt.hex(),
        "scrypt": asdict(key_file.scrypt),
        "verifier": key_file.verifier.hex(),
    }
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(fields, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        path.hardlink_to(unfinished)  # fails if the file exists; `replace` would replace it
        _sync_folder(path.parent)
    except OSError as error:
        if path.exists():
            raise StoreError(f"Another program has just encrypted {home}: try again.") from None
        raise StoreError(
            f"{path} cannot be written ({error.strerror}): see that this is allowed, and that the disk "
            "has room."
        ) from error
    finally:
        with suppress(OSError):
            unfinished.unlink()


def _not_encrypted(home: Path) -> ConfigError:
    return ConfigError(
        f"{home} is not encrypted: do that first, by recollect.encrypt(), or, if it was, put its "
        f"{KEY_FILE} back from a copy."
    )


def _given(ask: Ask | None) -> str | None:
    text = os.environ.get(PASSPHRASE_VARIABLE)
    return text or (None if ask is None else ask())


def _stretched(passphrase: str, salt: bytes, scrypt: Scrypt) -> bytes:
    """Return the key that scrypt derives from a passphrase."""
    with _library("cryptography"):
        from cryptography.hazmat.primitives.kdf.scrypt import Scrypt as Kdf  # noqa: PLC0415 - an extra
    # NFC, because systems compose accented letters differently. surrogateescape, because an environment
    # variable can hold bytes that are not UTF-8.
    text = unicodedata.normalize("NFC", passphrase).encode(errors="surrogateescape")
    return Kdf(salt=salt, length=KEY_BYTES, n=scrypt.n, r=scrypt.r, p=scrypt.p).derive(text)


def _unlock_by_keyring(home: Path, key_file: KeyFile) -> Cipher:
    text = _from_keyring(key_file.salt)
    if text is None:
        raise ConfigError(
            f"The keyring of this system has no key for {home}: log in as who encrypted it, where "
            "that was done."
        )
    try:
        return key_file.cipher(base64.b64decode(text, validate=True))
    except (StoreCorruptError, ValueError):
        raise ConfigError(
            f"The key for {home} in the keyring of this system is another one: put "
            f"{KEY_FILE} back, from a backup."
        ) from None


def _from_keyring(salt: bytes) -> str | None:
    keyring = _keyring()
    try:
        text: str | None = keyring.get_password(_SERVICE, salt.hex())
    except keyring.errors.KeyringError as error:
        raise ConfigError(
            f"The keyring of this system cannot be read ({_reason(error)}): unlock it, or log in "
            "where there is one."
        ) from error
    return text


def _into_keyring(salt: bytes, secret: bytes) -> None:
    keyring, text = _keyring(), base64.b64encode(secret).decode()
    try:
        keyring.set_password(_SERVICE, salt.hex(), text)
        kept = keyring.get_password(_SERVICE, salt.hex())
    except keyring.errors.KeyringError as error:
        raise _no_keyring(_reason(error)) from error
    if kept != text:  # some back ends store nothing and raise nothing
        raise _no_keyring("it does not keep anything")


def _keyring() -> Any:
    with _library("keyring"):
        import keyring.errors  # noqa: PLC0415 - an extra
    return keyring


def _no_keyring(why: str) -> ConfigError:
    return ConfigError(
        f"The keyring of this system cannot keep a key ({why}): unlock it, or encrypt with a "
        f"passphrase instead, in {PASSPHRASE_VARIABLE} or on a terminal."
    )


def _reason(error: Exception) -> str:
    """Return the first sentence of an error; the second one of keyring recommends to store keys plain."""
    return " ".join(str(error).split()).partition(". ")[0].rstrip(".") or type(error).__name__


def _read(path: Path) -> KeyFile | None:
    try:
        return _parsed(path, json.loads(files.read_bytes(path, most_bytes=files.MIB)))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"{path} cannot be read ({error.strerror}): allow it.") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StoreCorruptError(
            f"{path} is damaged, and without it nothing can be decrypted: put a backup in its place."
        ) from error


def _parsed(path: Path, fields: Any) -> KeyFile:
    """
    Return the key file that JSON fields describe.

    Raises:
        StoreVersionError: A newer version wrote them.
        ValueError, KeyError, TypeError: The fields are not those of a key file.
    """
    if fields["format"] > FORMAT:
        raise StoreVersionError(
            f"{path} has version {fields['format']} and this recollect knows {FORMAT} at most: "
            "take a newer recollect, or set RECOLLECT_HOME elsewhere."
        )
    if fields["source"] not in get_args(Source):
        raise ValueError(fields["source"])
    return KeyFile(
        source=fields["source"],
        salt=bytes.fromhex(fields["salt"]),
        scrypt=Scrypt(**fields["scrypt"]),
        verifier=bytes.fromhex(fields["verifier"]),
    )


def _sync_folder(folder: Path) -> None:
    """Write a folder's entries to the disk, so that a new file in it survives a power cut."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
