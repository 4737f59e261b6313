"""The bytes of each id, however a tokenizer's table names them."""

import pytest

from recollect.text.tokenizer import ByteTokenizer, decode_with_marks, make_vocabulary


@pytest.mark.parametrize(
    ("name", "shown", "expected"),
    [
        (b"word", "word", b"word"),
        ("é".encode(), "é", "é".encode()),
        (b"\xa9", "", b"\xa9"),  # half a character is shown as nothing
        (b"\xa9", "\ufffd", b"\xa9"),
        (b"<0x0A>", "\n", b"\n"),
        (b"<0xE2>", "\ufffd", b"\xe2"),
        (b"<0x0A>", "<0x0A>", b"<0x0A>"),  # text that only looks like it
        ("▁the".encode(), "the", b" the"),
        ("▁".encode(), "▁", "▁".encode()),
    ],
)
def test_an_entry_stands_for_the_bytes_that_it_adds(
    name: bytes, shown: str, expected: bytes
) -> None:
    assert make_vocabulary({name: 0}, [shown], [shown]).token_bytes == (expected,)


def test_special_is_what_is_shown_only_when_asked_for() -> None:
    vocabulary = make_vocabulary({b"<s>": 1, b"a": 0}, ["a", "<s>", ""], ["a", "", ""])
    assert vocabulary.special_token_ids == {1}
    assert vocabulary.token_bytes == (b"a", b"<s>", b"")


def test_the_byte_tokenizer_knows_its_bytes() -> None:
    vocabulary = ByteTokenizer().vocabulary
    text = "Grüße <|im_end|>"
    ids = ByteTokenizer().encode(text)
    assert b"".join(vocabulary.token_bytes[id_] for id_ in ids).decode() == text
    assert {id_ for id_ in ids if id_ in vocabulary.special_token_ids} == {ids[-1]}


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([], ""),
        ([97, 98], "ab"),
        ([300], "<mark>"),
        ([300, 97, 300, 300, 98], "<mark>a<mark><mark>b"),
        ([0xC3, 0xA9, 300, 97], "é<mark>a"),
    ],
)
def test_marks_that_a_tokenizer_leaves_out_are_put_back(ids: list[int], expected: str) -> None:
    assert decode_with_marks(ids, {300: "<mark>"}, ByteTokenizer().decode) == expected
