"""What is kept of a conversation keeps its meaning."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recollect.journal.records import checksum, pack_token_ids, unpack_token_ids


@pytest.mark.parametrize(
    ("some", "others"),
    [
        (("ab", "c"), ("a", "bc")),
        (("", "a"), ("a", "")),
        ((1,), ("1",)),
        ((None,), ("None",)),
        ((b"a",), ("a",)),
        ((None, 1), (1, None)),
    ],
)
def test_values_that_differ_have_another_checksum(
    some: tuple[str | int | None, ...], others: tuple[str | int | None, ...]
) -> None:
    assert checksum(*some) != checksum(*others)


def test_the_checksum_is_the_same_in_every_version() -> None:
    """It is in the files that people have."""
    assert checksum(1, None, "user", "Grüße 🎉", b"\x01\x00\x00\x00") == 0xAB217067


@given(st.lists(st.integers(0, 2**31 - 1)))
def test_token_ids_come_back_as_they_were(token_ids: list[int]) -> None:
    assert unpack_token_ids(pack_token_ids(token_ids)) == tuple(token_ids)


def test_token_ids_are_little_endian_int32() -> None:
    assert pack_token_ids([1, 2**31 - 1]) == b"\x01\x00\x00\x00\xff\xff\xff\x7f"
