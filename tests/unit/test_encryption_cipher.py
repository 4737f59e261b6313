"""What is sealed opens with its key and in its place, and nowhere else."""

import os
import sys
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recollect.encryption import OVERHEAD_BYTES, Cipher
from recollect.errors import MissingPackageError, StoreCorruptError

KEY = bytes(range(32))
DERIVED = "f14c2a08f1866fc8d04e1f33931f10320c5a73181abd5a3e8a6f2bd69ab1c552"
SEALED = "2c21cc8f178cc5f56307c64d1150bbf3e61396e36d3934dc7ea98c3c9a4cb8b8"


@given(plain=st.binary(max_size=200), context=st.binary(max_size=20))
def test_what_is_sealed_opens_under_its_context(plain: bytes, context: bytes) -> None:
    sealed = Cipher(KEY).seal(plain, context=context)
    assert len(sealed) == len(plain) + OVERHEAD_BYTES
    assert Cipher(KEY).open(sealed, context=context) == plain
    assert Cipher(KEY).open(memoryview(bytearray(sealed)), context=context) == plain


def test_an_array_is_sealed_as_its_bytes() -> None:
    sealed = Cipher(KEY).seal(memoryview(array("i", [1, 2, 3])), context=b"")
    assert Cipher(KEY).open(sealed, context=b"") == array("i", [1, 2, 3]).tobytes()


@given(plain=st.binary(max_size=50), bit=st.integers(0))
def test_any_flipped_bit_is_found(plain: bytes, bit: int) -> None:
    sealed = bytearray(Cipher(KEY).seal(plain, context=b"here"))
    bit %= 8 * len(sealed)
    sealed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(StoreCorruptError, match="give the right key"):
        Cipher(KEY).open(bytes(sealed), context=b"here")


@pytest.mark.parametrize("length", [0, 5, 11, 12, 27, 28, 31])
def test_what_is_cut_short_does_not_open(length: int) -> None:
    sealed = Cipher(KEY).seal(b"1234", context=b"")
    with pytest.raises(StoreCorruptError):
        Cipher(KEY).open(sealed[:length], context=b"")


def test_neither_another_place_nor_another_key_opens_it() -> None:
    cipher = Cipher(KEY)
    sealed = cipher.seal(b"secret", context=b"here")
    others = [Cipher(os.urandom(32)), cipher.for_purpose("journal"), cipher.for_purpose("kv")]
    with pytest.raises(StoreCorruptError):
        cipher.open(sealed, context=b"there")
    for other in others:
        with pytest.raises(StoreCorruptError):
            other.open(sealed, context=b"here")


def test_the_same_bytes_are_never_sealed_the_same_way() -> None:
    cipher = Cipher(KEY)
    assert len({cipher.seal(b"secret", context=b"") for _ in range(1000)}) == 1000


def test_all_derived_keys_differ_and_depend_on_the_key_alone() -> None:
    ciphers = [Cipher(KEY), Cipher(KEY).for_purpose("kv"), Cipher(KEY).for_purpose("journal")]
    secrets = [cipher.name_secret for cipher in ciphers]
    assert len({KEY, *secrets}) == 4
    assert all(len(secret) == 32 for secret in secrets)
    assert Cipher(bytes(KEY)).for_purpose("kv").name_secret == secrets[1]


def test_the_scheme_is_the_one_that_stored_bytes_were_written_with() -> None:
    """Fixed values: a change of labels or order would make every encrypted folder unreadable."""
    cipher = Cipher(KEY).for_purpose("journal")
    assert cipher.name_secret.hex() == DERIVED
    assert cipher.open(bytes.fromhex(SEALED), context=b"here") == b"kept"


def test_a_key_is_not_shown() -> None:
    assert repr(Cipher(KEY)) == "Cipher(…)"


def test_a_key_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        Cipher(b"short")


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.split(".")[0] == "cryptography":
            monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingPackageError, match=r"recollect-llm\[encrypt\]"):
        Cipher(KEY)
