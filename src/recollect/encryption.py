"""
Encryption of a data folder: the cipher that seals bytes, and the key file that says which key is right.

Read from the top: `Cipher` seals and opens bytes. `KeyFile` is what the file in the folder says, without
the key itself. `unlock` gives the cipher of an encrypted folder, from a passphrase or the keyring of the
system; `new_key` and `save` encrypt a folder for the first time. Does not know what is encrypted, and
asks nobody: whoever can ask passes a function.

AES-256-GCM, HKDF and scrypt are those of the library `cryptography`, which is loaded with the first key.
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
from recollect.errors import ConfigError, StoreCorruptError, StoreError, StoreVersionError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM


KEY_BYTES: Final = 32
NONCE_BYTES: Final = 12
TAG_BYTES: Final = 16
OVERHEAD_BYTES: Final = NONCE_BYTES + TAG_BYTES
"""By how much sealed bytes are longer than plain ones."""
KV_PURPOSE: Final = "kv"
"""The purpose of the cipher for KV on disk; the journal has the folder's own."""

KEY_FILE: Final = "encryption.json"
FORMAT: Final = 1
"""Version of the key file."""
PASSPHRASE_VARIABLE: Final = "RECOLLECT_PASSPHRASE"  # noqa: S105 - the name of one

Source = Literal["passphrase", "keyring"]
"""Where a key comes from."""
Ask = Callable[[], str]
"""Asks somebody for the passphrase."""

_LABEL: Final = b"recollect 1 "
"""Precedes the purpose of each derived key; another number is another scheme."""
_VERIFIER: Final = b"recollect key"
"""Context of the sealed nothing that tells whether a key is the right one."""
_SERVICE: Final = "recollect"
"""Under what a key is filed in the keyring."""


class Cipher:
    """
    Seals bytes with one key, so that without it they can be neither read nor changed unseen.

    Immutable; safe from any thread. Each call draws a random nonce of 96 bits. Two equal nonces are
    less likely than 2**-32 as long as one key seals at most 2**32 times, which is 4 billion blocks or
    messages; each purpose has a key of its own. Source: NIST SP 800-38D, 8.3.
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
        """32 bytes to mix into names that are hashes of content, so that nobody can try which content."""

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


def _aes_gcm(key: bytes) -> "AESGCM":
    with _library("cryptography"):
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415 - an extra
    return AESGCM(key)


def _derived(key: bytes, purpose: bytes) -> bytes:
    """Return another key, from which neither the first nor any other can be found."""
    with _library("cryptography"):
        from cryptography.hazmat.primitives.hashes import SHA256  # noqa: PLC0415 - an extra
        from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand  # noqa: PLC0415
    return HKDFExpand(SHA256(), KEY_BYTES, _LABEL + purpose).derive(key)


@contextmanager
def _library(name: str) -> Iterator[None]:
    """
    Import a library of the extra `encrypt` inside the block.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        yield
    except ImportError:
        raise ConfigError(
            f"Encryption needs the library {name}, which is not installed: "
            'python -m pip install "recollect-llm[encrypt]".'
        ) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scrypt:
    """
    How much work it takes to try a passphrase: 128 MiB, and 0.75 s on a slow core.

    Source: OWASP Password Storage Cheat Sheet, scrypt.
    """

    n: int = 2**17
    r: int = 8
    p: int = 1

    def __post_init__(self) -> None:
        # A file that somebody has changed must not take all memory.
        if not (1 < self.n <= 2**20 and 1 <= self.r <= 16 and 1 <= self.p <= 16):
            raise ValueError("out of range")
        if self.n & (self.n - 1):
            raise ValueError("no power of two")


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyFile:
    """What the key file says: all that is needed besides the secret, which is in nobody's file."""

    source: Source
    salt: bytes
    """Salt of the passphrase; for a keyring, the name of the key there."""
    scrypt: Scrypt
    verifier: bytes
    """Sealed nothing, which opens with the right key alone."""

    def check(self, cipher: Cipher) -> None:
        """
        Check that a cipher is that of the folder.

        Raises:
            StoreCorruptError: It has another key.
        """
        cipher.for_purpose("verifier").open(self.verifier, context=_VERIFIER)

    def cipher(self, secret: bytes) -> Cipher:
        """
        Return the cipher of the folder.

        Raises:
            StoreCorruptError: The key is another one.
        """
        cipher = Cipher(secret)
        self.check(cipher)
        return cipher


def is_encrypted(home: Path | None = None) -> bool:
    """Return whether a data folder, `config.home()` without one, is encrypted."""
    return ((home or config.home()) / KEY_FILE).exists()


def source(home: Path | None = None) -> Source | None:
    """Return where the key of a data folder is; None for one that is not encrypted."""
    key_file = _read((home or config.home()) / KEY_FILE)
    return None if key_file is None else key_file.source


def missing(home: Path) -> ConfigError:
    """Return the error for a folder with encrypted content and no key file."""
    return ConfigError(
        f"{home / KEY_FILE} is missing, and what is kept there is encrypted: put that file back from "
        "a copy; without it nothing can be decrypted."
    )


def unlock(
    home: Path | None = None, *, passphrase: str | None = None, ask: Ask | None = None
) -> Cipher | None:
    """
    Return the cipher of a data folder; None for one that is not encrypted.

    Args:
        home: None: `RECOLLECT_HOME` or the user's data folder.
        passphrase: None: `RECOLLECT_PASSPHRASE`. Not needed where the key is in the keyring.
        ask: Called for a passphrase where there is none.

    Raises:
        ConfigError: The passphrase is wrong or missing, or is given and the folder is not
            encrypted; the keyring does not have the key; a library is not installed.
        StoreError: What says which key it is cannot be read.
    """
    home = home or config.home()
    key_file = _read(home / KEY_FILE)
    if key_file is None:
        if passphrase is not None:  # who gives one does not want to write plain text
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
    Check that a cipher is that of a folder.

    Raises:
        ConfigError: The folder is not encrypted, or with another key.
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
    Return the cipher of a new key, and the key file to `save` in the folder that it is for.

    Args:
        kept_in: Where the key comes from later on; a keyring has it when this returns.
        passphrase: As for `unlock`.
        ask: As for `unlock`.
        scrypt: None: the default of `Scrypt`.

    Raises:
        ConfigError: There is no passphrase, no keyring or no library.
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
    Write the key file of a folder, all or nothing; one that is there is never replaced.

    Args:
        home: The folder; it is made where there is none.
        key_file: From `new_key`.

    Raises:
        StoreError: It cannot be written, or another process was faster. The folder is as it was.
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
        path.hardlink_to(unfinished)  # and not `replace`: a key that is there must stay
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
    """Return the key that a passphrase gives; slow on purpose."""
    with _library("cryptography"):
        from cryptography.hazmat.primitives.kdf.scrypt import Scrypt as Kdf  # noqa: PLC0415 - an extra
    # Systems encode the same letters differently, and an environment variable can hold any bytes.
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
    if kept != text:  # some back ends keep nothing and raise nothing
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
    """Return the first sentence of an error; the next recommends a keyring that encrypts nothing."""
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
        ValueError, KeyError, TypeError: They describe none.
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
    """Make the name of a new file survive a power cut."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
