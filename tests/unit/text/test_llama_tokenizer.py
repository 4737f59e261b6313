"""The tokenizer in a GGUF file, over a vocabulary of letters: what is text, and what marks turns."""

import pytest

from recollect.text.llama_tokenizer import LlamaTokenizer

PIECES = [
    b"<unk>",
    b"<|im_start|>",
    b"<|im_end|>",
    b"<think>",
    b"[MARK]",
    b" ",
    b"a",
    b"b",
    b"\xc3",
]
CONTROL, ADDED = {0, 1, 2, 3}, {4}


class Letters:
    """Cuts a text at the names of control and added tokens, and else into bytes; leaves others out."""

    count = len(PIECES)

    def __init__(self, *, drops_first_space: bool = False) -> None:
        self.drops_first_space = drops_first_space

    def piece(self, token_id: int) -> bytes:
        return PIECES[token_id]

    def is_control(self, token_id: int) -> bool:
        return token_id in CONTROL

    def is_added(self, token_id: int) -> bool:
        return token_id in ADDED

    def cut(self, text: bytes, *, with_control: bool) -> list[int]:
        ids, names = [], [*ADDED, *(CONTROL - {0} if with_control else ())]
        while text:
            whole = next((one for one in names if text.startswith(PIECES[one])), None)
            first = PIECES.index(text[:1]) if whole is None and text[:1] in PIECES else whole
            ids += [] if first is None else [first]
            text = text[1 if whole is None else len(PIECES[whole]) :]
        return ids


def tokenizer(template: str | None = None, **settings: bool) -> LlamaTokenizer:
    return LlamaTokenizer(Letters(**settings), frozenset({2}), template=template)


def test_what_a_template_writes_is_recognised_and_what_is_said_is_text() -> None:
    one = tokenizer()
    assert one.encode("<|im_start|>ab") == [1, 6, 7]
    assert not {1, 2} & set(one.encode_text("<|im_start|>ab"))
    assert set(one.control_tokens.ids) == {"<unk>", "<|im_start|>", "<|im_end|>"}


def test_an_added_token_that_the_template_writes_marks_turns() -> None:
    assert "[MARK]" not in tokenizer().control_tokens.ids
    marked = tokenizer("{{ '[MARK]' }}")
    assert "[MARK]" in marked.control_tokens.ids
    assert marked.encode("[MARK]a") == [4, 6]
    assert 4 not in marked.encode_text("[MARK]a")


def test_control_tokens_are_not_shown_but_marks_of_thinking_are() -> None:
    one = tokenizer()
    assert one.decode([1, 6, 3, 7, 2]) == "a<think>b"
    assert one.decode([1, 6], skip_special_tokens=False) == "<|im_start|>a"
    assert one.vocabulary.special_token_ids == {0, 1, 2}
    assert one.vocabulary.token_bytes == tuple(PIECES)


@pytest.mark.parametrize(("drops", "text"), [(False, " a"), (True, "a")])
def test_the_space_that_was_put_before_a_text_is_not_shown(drops: bool, text: str) -> None:
    assert tokenizer(drops_first_space=drops).decode([5, 6]) == text
    assert tokenizer(drops_first_space=drops).decode([6, 5, 6]) == "a a"


def test_what_an_id_adds_is_known_where_it_is_whole_characters() -> None:
    one = tokenizer()
    assert one.added_text(6) == "a"
    assert one.added_text(8) is None  # half a character
    assert one.added_text(1) is None
    assert one.added_text(99) is None
    assert one.decode([6, 99, -1, 7]) == "ab"


def test_characters_that_cannot_be_spelled_take_nothing_from_those_around_them() -> None:
    assert [one for one in tokenizer().encode_text("a\u0001b") if one in (6, 7)] == [6, 7]
