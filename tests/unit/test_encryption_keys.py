"""A folder opens with its own key, wherever that is kept, and with no other."""

import hashlib
import json
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keyring
import pytest
from keyring.backend import KeyringBackend
from keyring.backends import fail, null

from recollect import encryption
from recollect.encryption import KEY_FILE, PASSPHRASE_VARIABLE, Cipher, Scrypt
from recollect.errors import (
    ConfigError,
    MissingPackageError,
    StoreCorruptError,
    StoreError,
    StoreVersionError,
)

QUICK = Scrypt(n=2)


class Ring(KeyringBackend):
    """A keyring in memory."""

    priority = 1

    def __init__(self) -> None:
        self.kept: dict[tuple[str, str], str] = {}

    def get_password(self, service: str, username: str) -> str | None:
        return self.kept.get((service, username))

    def set_password(self, service: str, username: str, password: str) -> None:
        self.kept[service, username] = password


@pytest.fixture(autouse=True)
def _no_passphrase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PASSPHRASE_VARIABLE, raising=False)


@pytest.fixture
def use_keyring() -> Iterator[Callable[[KeyringBackend], None]]:
    """Return what makes a keyring the one of this system."""
    before = keyring.get_keyring()
    yield keyring.set_keyring
    keyring.set_keyring(before)


def encrypted(home: Path, passphrase: str = "open sesame") -> Cipher:
    cipher, key_file = encryption.new_key("passphrase", passphrase=passphrase, scrypt=QUICK)
    encryption.save(home, key_file)
    return cipher


def same(one: Cipher | None, other: Cipher) -> bool:
    return one is not None and one.name_secret == other.name_secret


def test_a_folder_without_the_file_is_not_encrypted(tmp_path: Path) -> None:
    assert not encryption.is_encrypted(tmp_path)
    assert encryption.source(tmp_path) is None
    assert encryption.unlock(tmp_path) is None


def test_who_gives_a_passphrase_does_not_get_a_plain_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not encrypted"):
        encryption.unlock(tmp_path, passphrase="open sesame")


def test_the_passphrase_opens_it_and_no_other_does(tmp_path: Path) -> None:
    cipher = encrypted(tmp_path / "home")
    before = (tmp_path / "home" / KEY_FILE).read_bytes()
    assert encryption.is_encrypted(tmp_path / "home")
    assert same(encryption.unlock(tmp_path / "home", passphrase="open sesame"), cipher)
    for wrong in ("open sesam", "Open sesame", ""):
        with pytest.raises(ConfigError, match="try again; nothing was changed"):
            encryption.unlock(tmp_path / "home", passphrase=wrong)
    assert (tmp_path / "home" / KEY_FILE).read_bytes() == before


def test_the_passphrase_comes_from_the_caller_then_the_environment_then_a_person(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cipher = encrypted(tmp_path)
    assert same(encryption.unlock(tmp_path, ask=lambda: "open sesame"), cipher)
    monkeypatch.setenv(PASSPHRASE_VARIABLE, "open sesame")
    assert same(encryption.unlock(tmp_path, ask=lambda: "wrong"), cipher)
    with pytest.raises(ConfigError, match="not the passphrase"):
        encryption.unlock(tmp_path, passphrase="wrong")


def test_without_a_passphrase_it_says_how_to_give_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=PASSPHRASE_VARIABLE):
        encryption.new_key("passphrase")
    with pytest.raises(ConfigError, match=PASSPHRASE_VARIABLE):
        encryption.new_key("passphrase", ask=lambda: "")
    encrypted(tmp_path)
    with pytest.raises(ConfigError, match=PASSPHRASE_VARIABLE):
        encryption.unlock(tmp_path)


def test_an_accent_may_be_written_either_way(tmp_path: Path) -> None:
    cipher = encrypted(tmp_path, "caf\u00e9")
    assert same(encryption.unlock(tmp_path, passphrase="cafe\u0301"), cipher)


def test_bytes_that_are_no_text_are_a_passphrase_too(tmp_path: Path) -> None:
    cipher = encrypted(tmp_path, b"\xff\xfe".decode(errors="surrogateescape"))
    assert same(encryption.unlock(tmp_path, passphrase="\udcff\udcfe"), cipher)


def test_two_folders_with_the_same_passphrase_have_different_keys(tmp_path: Path) -> None:
    one, other = encrypted(tmp_path / "one"), encrypted(tmp_path / "other")
    assert not same(one, other)
    encryption.require(tmp_path / "one", one)
    with pytest.raises(ConfigError, match="another key"):
        encryption.require(tmp_path / "one", other)
    with pytest.raises(ConfigError, match="not encrypted"):
        encryption.require(tmp_path, one)


def test_the_file_holds_neither_key_nor_passphrase(tmp_path: Path) -> None:
    encrypted(tmp_path)
    salt, cost = bytes.fromhex(fields(tmp_path)["salt"]), {"n": QUICK.n, "r": QUICK.r, "p": QUICK.p}
    secret = hashlib.scrypt(b"open sesame", salt=salt, dklen=32, **cost)
    text = (tmp_path / KEY_FILE).read_text()
    assert "sesame" not in text
    assert secret.hex() not in text
    assert set(fields(tmp_path)) == {"format", "source", "salt", "scrypt", "verifier"}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such bits")
def test_only_the_owner_can_read_the_file_and_nothing_lies_beside_it(tmp_path: Path) -> None:
    encrypted(tmp_path / "home")
    assert stat.S_IMODE((tmp_path / "home").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "home" / KEY_FILE).stat().st_mode) == 0o600
    assert [file.name for file in (tmp_path / "home").iterdir()] == [KEY_FILE]


def test_a_key_that_is_there_is_never_replaced(tmp_path: Path) -> None:
    cipher = encrypted(tmp_path)
    with pytest.raises(StoreError, match="just encrypted"):
        encrypted(tmp_path, "another")
    assert same(encryption.unlock(tmp_path, passphrase="open sesame"), cipher)
    assert [file.name for file in tmp_path.iterdir()] == [KEY_FILE]


def test_a_place_that_cannot_be_written_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file where the folder should be")
    with pytest.raises(StoreError, match="cannot be written"):
        encrypted(tmp_path / "home")


def fields(home: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((home / KEY_FILE).read_text())
    return found


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"format": 2}, StoreVersionError),
        ({"source": "elsewhere"}, StoreCorruptError),
        ({"salt": "no hex"}, StoreCorruptError),
        ({"scrypt": {"n": 2**30, "r": 8, "p": 1}}, StoreCorruptError),
        ({"scrypt": {"n": 3, "r": 8, "p": 1}}, StoreCorruptError),
        ({"scrypt": {"n": 2, "r": 8, "p": 10**6}}, StoreCorruptError),
        ({"scrypt": {"n": "2", "r": 8, "p": 1}}, StoreCorruptError),
        ({"scrypt": None}, StoreCorruptError),
        ({"verifier": "00"}, ConfigError),
        ({"salt": "00"}, ConfigError),
    ],
)
def test_a_file_that_was_changed_is_refused(
    tmp_path: Path, change: dict[str, Any], error: type[Exception]
) -> None:
    encrypted(tmp_path)
    (tmp_path / KEY_FILE).write_text(json.dumps(fields(tmp_path) | change))
    with pytest.raises(error):
        encryption.unlock(tmp_path, passphrase="open sesame")


@pytest.mark.parametrize("text", ["", "[]", "{}", "no JSON", "{" * 10, "3"])
def test_a_file_that_is_something_else_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / KEY_FILE).write_text(text)
    with pytest.raises(StoreCorruptError, match="backup"):
        encryption.unlock(tmp_path, passphrase="x")


def test_the_keyring_keeps_a_key_that_nobody_has_to_type(
    tmp_path: Path, use_keyring: Callable[[KeyringBackend], None]
) -> None:
    ring = Ring()
    use_keyring(ring)
    ciphers = []
    for name in ("one", "other"):
        cipher, key_file = encryption.new_key("keyring")
        encryption.save(tmp_path / name, key_file)
        assert encryption.source(tmp_path / name) == "keyring"
        assert same(encryption.unlock(tmp_path / name), cipher)
        ciphers.append(cipher)
    assert not same(*ciphers)
    assert {service for service, _ in ring.kept} == {"recollect"}
    for key in ring.kept.values():
        assert key not in (tmp_path / "one" / KEY_FILE).read_text()


def test_a_keyring_without_the_key_or_with_another_is_refused(
    tmp_path: Path, use_keyring: Callable[[KeyringBackend], None]
) -> None:
    ring = Ring()
    use_keyring(ring)
    encryption.save(tmp_path, encryption.new_key("keyring")[1])
    ring.kept = dict.fromkeys(ring.kept, "A" * 43 + "=")
    with pytest.raises(ConfigError, match="another one"):
        encryption.unlock(tmp_path)
    ring.kept = dict.fromkeys(ring.kept, "no key")
    with pytest.raises(ConfigError, match="another one"):
        encryption.unlock(tmp_path)
    ring.kept.clear()
    with pytest.raises(ConfigError, match="has no key"):
        encryption.unlock(tmp_path)


@pytest.mark.parametrize("kind", [fail.Keyring, null.Keyring])
def test_where_no_keyring_can_be_used_it_names_the_passphrase(
    tmp_path: Path,
    use_keyring: Callable[[KeyringBackend], None],
    kind: Callable[[], KeyringBackend],
) -> None:
    use_keyring(kind())
    with pytest.raises(ConfigError, match=PASSPHRASE_VARIABLE):
        encryption.new_key("keyring")


def test_a_keyring_that_has_gone_is_told(
    tmp_path: Path, use_keyring: Callable[[KeyringBackend], None]
) -> None:
    use_keyring(Ring())
    encryption.save(tmp_path, encryption.new_key("keyring")[1])
    gone: Callable[[], KeyringBackend] = fail.Keyring
    use_keyring(gone())
    with pytest.raises(ConfigError, match="cannot be read"):
        encryption.unlock(tmp_path)


@pytest.mark.parametrize("source", ["passphrase", "keyring"])
def test_without_the_libraries_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, source: encryption.Source
) -> None:
    for name in [*sys.modules, "cryptography", "keyring"]:
        if name.split(".")[0] in {"cryptography", "keyring"}:
            monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingPackageError, match=r"recollect-llm\[encrypt\]"):
        encryption.new_key(source, passphrase="x", scrypt=QUICK)


def test_trying_a_passphrase_takes_long_by_default() -> None:
    """The work of scrypt is n times r times p, and its memory 128 n r bytes."""
    default = Scrypt()
    assert default.n * default.r * default.p >= 2**20
    assert 128 * default.n * default.r == 128 * 2**20
