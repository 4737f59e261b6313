"""Control tokens are found wherever they begin, and so is what could complete one."""

import json
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from recollect.text.tokenizer import (
    ControlTokens,
    UnknownCharacters,
    control_tokens,
    encode_in_pieces,
)

TOKENS = ("<|im_end|>", "<|im_start|>", "<s>", "</s>", "[X]", "[X]]")
CONTROL = ControlTokens({text: number for number, text in enumerate(TOKENS)})
TEXTS = st.lists(
    st.one_of(st.sampled_from(["<", "|", "im", "_end", "|>", ">", "]", " ", *TOKENS]), st.text()),
    max_size=8,
).map("".join)


def test_the_longest_of_those_at_one_place_is_found() -> None:
    assert CONTROL.find("a[X]]b") == (1, 5)
    assert CONTROL.find("a[X]]b", 2) is None
    assert list(ControlTokens({"aa": 0}).begins("aaa")) == [0, 1]


def test_a_token_of_one_character_is_a_letter() -> None:
    assert ControlTokens({"x": 1, "xy": 2}).ids == {"xy": 2}


def test_without_control_tokens_nothing_is_found() -> None:
    nothing = ControlTokens({})
    assert list(nothing.begins("<|im_end|>")) == []
    assert not nothing.may_begin_before(">")
    assert not nothing.may_end_after("<")


def test_marks_of_turns_count_that_only_the_template_calls_so() -> None:
    added = {"<|im_start|>": 1, "<|fim|>": 2, "<think>": 3}
    found = control_tokens({"</s>": 0, "<tool_call>": 4}, added, "<|im_start|>{{ x }}<think>")
    assert found.ids == {"</s>": 0, "<|im_start|>": 1}
    assert control_tokens({}, added, None).ids == {}


@given(text=TEXTS)
def test_every_beginning_is_told(text: str) -> None:
    expected = [i for i in range(len(text)) if any(text.startswith(t, i) for t in TOKENS)]
    assert list(CONTROL.begins(text)) == expected


@given(before=TEXTS, said=TEXTS.filter(bool), after=TEXTS)
def test_a_token_is_only_completed_by_texts_that_may_complete_one(
    before: str, said: str, after: str
) -> None:
    whole, start = before + said + after, len(before)
    end = start + len(said)
    spans = [(i, i + len(t)) for t in TOKENS for i in range(len(whole)) if whole.startswith(t, i)]
    if any(begin < start < stop for begin, stop in spans):
        assert CONTROL.may_begin_before(said)
    if any(begin < end < stop for begin, stop in spans):
        assert CONTROL.may_end_after(said)


@given(text=TEXTS)
def test_the_pieces_of_a_text_are_the_text_and_none_has_a_token(text: str) -> None:
    pieces: list[str] = []

    def encode(piece: str) -> list[int]:
        pieces.append(piece)
        return [len(piece)]

    encode_in_pieces(text, CONTROL, encode)
    assert "".join(pieces) == text
    assert not any(token in piece for piece in pieces for token in TOKENS)


def test_a_character_is_asked_about_once() -> None:
    asked: list[str] = []

    def are_unknown(characters: Sequence[str]) -> list[bool]:
        asked.extend(characters)
        return [one in "xy" for one in characters]

    unknown = UnknownCharacters(are_unknown)
    assert unknown.replaced("axbxa") == "a\ufffdb\ufffda"
    assert unknown.replaced("aybz") == "a\ufffdbz"
    assert unknown.replaced("abz\ud800") == "abz\ud800"
    assert sorted(asked) == ["a", "b", "x", "y", "z", "\ufffd"]
    assert UnknownCharacters(lambda some: [True] * len(some)).replaced("ab") == "??"


@given(texts=st.lists(TEXTS, max_size=5))
def test_the_quick_look_misses_nothing(texts: list[str]) -> None:
    """Also as JSON, where what is said stands between quotation marks."""
    closely = any(
        next(CONTROL.begins(text), None) is not None
        or (
            (core := text.strip())
            and (CONTROL.may_begin_before(core) or CONTROL.may_end_after(core))
        )
        for text in texts
    )
    if closely:
        assert CONTROL.may_be_in(texts)
        plain = [text for text in texts if '"' not in text]
        if len(plain) == len(texts):
            assert CONTROL.may_be_in_json(json.dumps(texts, ensure_ascii=False))


def test_ordinary_texts_pass_the_quick_look() -> None:
    assert not CONTROL.may_be_in(
        ["Hello, world!", "It says that something is <b>bold<b>, and more of it.", "", '"']
    )
    tools = {"type": "function", "name": "weather", "minimum": 3}
    assert not CONTROL.may_be_in_json(json.dumps(tools))
    assert CONTROL.may_be_in_json(json.dumps({"s": "q"}))
    assert not CONTROL.may_be_in_json(json.dumps({"s": "q"}), except_for=["s"])
