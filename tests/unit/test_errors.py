"""Errors carry their numbers, and a remedy in the sentence."""

from pathlib import Path

from recollect.errors import ChecksumError, ContextFullError, OutOfBlocksError


def test_context_full_carries_its_numbers_and_says_what_to_do() -> None:
    error = ContextFullError(needed=5000, limit=4096)
    assert (error.needed, error.limit) == (5000, 4096)
    assert "5,000" in str(error)
    assert "4,096" in str(error)
    assert "rewind" in str(error)


def test_out_of_blocks_carries_its_numbers_and_says_what_to_do() -> None:
    error = OutOfBlocksError(needed=3, free=1, total=10)
    assert (error.needed, error.free, error.total) == (3, 1, 10)
    assert "--kv-memory" in str(error)


def test_a_checksum_error_says_where_the_file_was_kept() -> None:
    error = ChecksumError("It is damaged.", expected="aa", actual="bb", kept=Path("x.part"))
    assert (error.expected, error.actual, error.kept) == ("aa", "bb", Path("x.part"))
