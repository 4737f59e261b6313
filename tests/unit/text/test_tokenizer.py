from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recollect.text.detokenizer import Detokenizer, whole_ids
from recollect.text.tokenizer import ByteTokenizer, Tokenizer


class DroppingTokenizer(ByteTokenizer):
    """Leaves out bytes that are no character, as OpenVINO's detokenizers for GGUF do."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return bytes(number for number in ids if number < 256).decode("utf-8", "ignore")


class PerByteTokenizer(ByteTokenizer):
    """Writes one replacement character for each byte that is no character."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        data = bytes(number for number in ids if number < 256)
        text = data.decode("utf-8", "surrogateescape")
        return "".join("\ufffd" if "\ud800" <= letter <= "\udfff" else letter for letter in text)


class SpaceStrippingTokenizer(ByteTokenizer):
    """Drops one space at the very start of a text, as sentencepiece does."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return super().decode(ids).removeprefix(" ")


TOKENIZERS = (ByteTokenizer, DroppingTokenizer, PerByteTokenizer, SpaceStrippingTokenizer)


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(number) for number in ids), detokenizer.finish()]


IDS = st.lists(
    st.one_of(st.integers(0, 258), st.sampled_from(b" a\xe2\x82\xac\xf0\x9f\x8e\x89\xef\xbf\xbd"))
)


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(ids=IDS)
def test_the_pieces_joined_are_the_text_of_all_ids(
    kind: type[ByteTokenizer], ids: list[int]
) -> None:
    tokenizer = kind()
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(text=st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\ufffd")))
def test_valid_text_never_shows_a_replacement_character(
    kind: type[ByteTokenizer], text: str
) -> None:
    tokenizer = kind()
    assert "\ufffd" not in "".join(pieces(tokenizer, tokenizer.encode(text))[:-1])


def test_a_character_comes_out_with_its_last_byte() -> None:
    assert pieces(ByteTokenizer(), list("a€b".encode())) == ["a", "", "", "€", "b", ""]


def test_a_genuine_replacement_character_comes_out_with_what_follows() -> None:
    assert pieces(ByteTokenizer(), list("\ufffdx".encode())) == ["", "", "", "\ufffdx", ""]


def test_broken_bytes_are_not_held_back_for_ever() -> None:
    shown = pieces(ByteTokenizer(), [0x80] * 10)
    assert "".join(shown[:-1]) == "\ufffd" * 7


def test_an_unfinished_character_comes_out_at_the_end() -> None:
    assert pieces(ByteTokenizer(), [0xE2, 0x82]) == ["", "", "\ufffd"]


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(ids=IDS, cuts=st.lists(st.integers(0, 20), max_size=3))
def test_what_goes_on_anywhere_joins_to_the_text_of_all_ids(
    kind: type[ByteTokenizer], ids: list[int], cuts: list[int]
) -> None:
    tokenizer, text, before = kind(), "", 0
    for cut in [*sorted(cuts), len(ids)]:
        detokenizer = Detokenizer(tokenizer)
        detokenizer.follow(ids[:before], text)
        text += "".join(detokenizer.push(number) for number in ids[before:cut])
        before = max(before, min(cut, len(ids)))
    assert text + detokenizer.finish() == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("told", ["\ufffd", "\ufffd" * 4, "x" + "\ufffd" * 40, "ab\ufffd"])
def test_signs_that_a_client_sent_are_not_told_again(kind: type[ByteTokenizer], told: str) -> None:
    tokenizer = kind()
    detokenizer, ids = Detokenizer(tokenizer), tokenizer.encode(told)
    detokenizer.follow(ids, told)
    rest = [detokenizer.push(number) for number in tokenizer.encode(" cd")]
    assert "".join(rest) == tokenizer.decode([*ids, *tokenizer.encode(" cd")])[len(told) :]


def test_ids_of_a_part_that_was_not_told_can_be_left_out() -> None:
    tokenizer, ids = ByteTokenizer(), list("a🎉".encode())
    for count in (2, 3, 4):
        assert whole_ids(ids[:count], "a", tokenizer) == [ord("a")]
    assert whole_ids(ids, "a🎉", tokenizer) == ids
    assert whole_ids(ids[:2], "a\ufffd", tokenizer) == ids[:2]


def test_a_sign_for_half_a_character_that_is_out_is_not_told_twice() -> None:
    """As replies that were cut were saved before, and as a text of a client may end."""
    detokenizer = Detokenizer(ByteTokenizer())
    detokenizer.follow(b"a\xef\xbf\xbd", "a\ufffd")
    assert detokenizer.push(ord("b")) == "b"


def test_a_long_reply_is_decoded_in_short_windows() -> None:
    class Counting(ByteTokenizer):
        longest = 0

        def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
            self.longest = max(self.longest, len(ids))
            return super().decode(ids)

    tokenizer = Counting()
    pieces(tokenizer, tokenizer.encode("one two three €" * 100))
    assert tokenizer.longest <= 8


def test_whole_characters_are_not_decoded_one_by_one() -> None:
    class Counting(ByteTokenizer):
        count = 0

        def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
            self.count += 1
            return super().decode(ids)

    tokenizer = Counting()
    text = "plain text " * 50
    assert "".join(pieces(tokenizer, tokenizer.encode(text))) == text
    assert tokenizer.count <= 3
