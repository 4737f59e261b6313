from hypothesis import given
from hypothesis import strategies as st

from recollect.text.tokenizer import SPECIAL_TOKENS, ByteTokenizer


@given(st.text(alphabet=st.characters(codec="utf-8")))
def test_decoding_gives_back_the_text(text: str) -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_special_tokens_in_the_text_are_one_id_each() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("<|im_start|>a<|im_end|>") == [256, 97, 257]
    assert tokenizer.decode([256, 97, 257]) == "a"
    assert tokenizer.token_id("<|im_end|>") == 257
    assert tokenizer.token_id("<|none|>") is None


def test_no_text_has_no_ids() -> None:
    assert ByteTokenizer().encode("") == []


def test_ids_outside_the_vocabulary_stand_for_no_text() -> None:
    assert ByteTokenizer().decode([-1, 97, 259, 10**9], skip_special_tokens=False) == "a"


def test_half_a_surrogate_pair_becomes_a_question_mark() -> None:
    assert ByteTokenizer().encode("\ud83d") == [ord("?")]


@given(text=st.lists(st.one_of(st.text(), st.sampled_from(SPECIAL_TOKENS))).map("".join))
def test_as_text_control_tokens_are_bytes(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode_text(text)
    assert all(number < 256 for number in ids)
    assert tokenizer.decode(ids) == text.encode("utf-8", "replace").decode()
