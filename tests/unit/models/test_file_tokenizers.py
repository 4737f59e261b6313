"""Tokenizers that are read from the files of a model: here, because they need such files."""

import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recollect.conversation.formats import load_tokenizer
from recollect.errors import UnsupportedModelError
from recollect.models.prepare import prepare
from recollect.text.detokenizer import Detokenizer
from recollect.text.file_tokenizers import HfTokenizer, OpenVinoTokenizer
from recollect.text.tokenizer import Tokenizer


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(number) for number in ids), detokenizer.finish()]


@pytest.fixture
def openvino_tokenizer(converted_once: Path, tmp_path: Path) -> Tokenizer:
    return load_tokenizer(prepare(str(converted_once), home=tmp_path / "home"))


def test_an_openvino_tokenizer_does_what_the_byte_tokenizer_does(
    openvino_tokenizer: Tokenizer,
) -> None:
    tokenizer = openvino_tokenizer
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""
    for text in ("hello", " leading", "trailing \n\n", "é🎉€", "a\x00b", "<|im_start|>user\n"):
        ids = tokenizer.encode(text)
        assert all(type(number) is int for number in ids)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)
    assert tokenizer.token_id("<|im_end|>") == 2
    assert tokenizer.token_id("two") is None
    assert tokenizer.eos_token_ids == {0, 2}
    assert tokenizer.vocab_size == 261
    assert tokenizer.decode([10**6]) == ""
    assert tokenizer.encode("\ud83d") == tokenizer.encode("?")


@pytest.mark.slow
def test_the_pieces_of_an_openvino_tokenizer_joined_are_the_text(
    openvino_tokenizer: Tokenizer,
) -> None:
    """Whole characters, parts of some, special tokens and ids that stand for nothing, in any order."""
    dice = random.Random(1)  # noqa: S311 - not for secrets
    likely = [*openvino_tokenizer.encode(" a€he🎉"), 0, 2]
    for _ in range(200):
        ids = [dice.choice([dice.randrange(270), *likely]) for _ in range(dice.randint(1, 12))]
        assert "".join(pieces(openvino_tokenizer, ids)) == openvino_tokenizer.decode(ids), ids


def test_the_text_that_an_id_adds_is_known_of_whole_characters_only(
    openvino_tokenizer: Tokenizer,
) -> None:
    added = openvino_tokenizer.added_text
    (word,) = openvino_tokenizer.encode("he")
    assert added(word) == "he"
    assert added(word) == "he"  # from what was found out
    assert [added(part) for part in openvino_tokenizer.encode("€")] == [None] * 3
    assert added(2) is None
    assert added(10**6) is None


def test_a_text_longer_than_the_context_is_encoded_whole(openvino_tokenizer: Tokenizer) -> None:
    """The converter writes a limit of 512 tokens into this one, which drops the head in silence."""
    assert len(openvino_tokenizer.encode("abc" * 1000)) == 3000


@pytest.fixture
def fast_tokenizer(make_gguf: Callable[..., Path], tmp_path: Path) -> HfTokenizer:
    """Return Hugging Face's tokenizer with the vocabulary of the OpenVINO one."""
    tokenizers = pytest.importorskip("tokenizers")
    fields = gguf.GGUFReader(make_gguf(tensors=False)).fields
    names = {name: number for number, name in enumerate(fields["tokenizer.ggml.tokens"].contents())}
    merges = [tuple(merge.split()) for merge in fields["tokenizer.ggml.merges"].contents()]
    fast = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=names, merges=merges))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = tokenizers.decoders.ByteLevel()
    fast.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    fast.save(str(tmp_path / "tokenizer.json"))
    return HfTokenizer(tmp_path / "tokenizer.json", frozenset({2}))


SPOKEN = st.lists(
    st.one_of(
        st.text(alphabet="he <|_>ims\né🎉", max_size=6),
        st.sampled_from(["<|im_start|>", "<|im_end|>", "<|endoftext|>", "</s>", "<|im_", "end|>"]),
    ),
    max_size=6,
).map("".join)


@pytest.mark.slow
def test_what_is_said_has_no_control_token_and_is_read_as_it_is(
    openvino_tokenizer: Tokenizer, fast_tokenizer: HfTokenizer
) -> None:
    """As Hugging Face's tokenizers have it with `split_special_tokens=True`."""
    assert openvino_tokenizer.control_tokens.ids == fast_tokenizer.control_tokens.ids
    control = set(openvino_tokenizer.control_tokens.ids.values())
    assert control == {0, 1, 2}

    @given(text=SPOKEN)
    def holds(text: str) -> None:
        ids = openvino_tokenizer.encode_text(text)
        assert control.isdisjoint(ids)
        assert openvino_tokenizer.decode(ids, skip_special_tokens=False) == text
        assert fast_tokenizer.encode_text(text) == ids
        if not any(token in text for token in openvino_tokenizer.control_tokens.ids):
            assert openvino_tokenizer.encode(text) == ids

    holds()


@pytest.mark.slow
def test_a_tokenizer_that_does_not_tell_what_it_looks_for_is_worked_around(
    converted_once: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(converted_once, tmp_path / "model")
    file = folder / "openvino_tokenizer.bin"
    known, other = rb"(\<\|im_end\|\>)", rb"(<[|]im_end[|]>)"
    assert file.read_bytes().count(known) == 1
    file.write_bytes(file.read_bytes().replace(known, other))  # the same to what reads it
    tokenizer = OpenVinoTokenizer(folder, frozenset())
    text = "Hi<|im_end|>\n<|im_start|>"
    assert set(tokenizer.control_tokens.ids) >= {"<|im_end|>", "<|im_start|>"}
    assert {1, 2} <= set(tokenizer.encode(text))
    assert {0, 1, 2}.isdisjoint(tokenizer.encode_text(text))
    assert tokenizer.decode(tokenizer.encode_text(text), skip_special_tokens=False) == text


def test_marks_of_turns_that_are_not_special_are_text_too(
    fast_tokenizer: HfTokenizer, tmp_path: Path
) -> None:
    """Many fine-tuned models have such: an ordinary added token that only the template makes a mark."""
    tokenizers = pytest.importorskip("tokenizers")
    file = tmp_path / "tokenizer.json"
    fast = tokenizers.Tokenizer.from_file(str(file))
    fast.add_tokens(["</s>"])
    fast.save(str(file))
    text = "a</s><|im_end|>"
    plain, marked = (HfTokenizer(file, frozenset(), template=one) for one in (None, "{{ x }}</s>"))
    (mark,) = plain.encode("</s>")
    assert mark in plain.encode_text(text)
    assert mark in marked.encode(text)
    assert mark not in marked.encode_text(text)
    assert marked.decode(marked.encode_text(text)) == text


def test_marks_of_reasoning_and_calls_are_text_where_they_are_called_special(
    fast_tokenizer: HfTokenizer, tmp_path: Path
) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    file = tmp_path / "tokenizer.json"
    fast = tokenizers.Tokenizer.from_file(str(file))
    fast.add_special_tokens(["<think>", "</tool_call>", "<|eom|>"])
    fast.save(str(file))
    tokenizer = HfTokenizer(file, frozenset())
    ids = tokenizer.encode("<think>a</tool_call><|eom|>")
    assert len(ids) < len(fast_tokenizer.encode("<think>a</tool_call><|eom|>"))
    assert tokenizer.decode(ids) == "<think>a</tool_call>"
    assert {"<think>", "</tool_call>"}.isdisjoint(tokenizer.control_tokens.ids)
    assert tokenizer.vocabulary.token_bytes[ids[0]] == b"<think>"


@pytest.mark.parametrize("damage", [b"", b"not xml", b"<net/>", b"\xff"])
def test_a_damaged_tokenizer_is_refused(
    converted_once: Path, tmp_path: Path, damage: bytes
) -> None:
    folder = shutil.copytree(converted_once, tmp_path / "model")
    (folder / "openvino_tokenizer.xml").write_bytes(damage)
    with pytest.raises(UnsupportedModelError, match="tokenizer in"):
        OpenVinoTokenizer(folder, frozenset())
