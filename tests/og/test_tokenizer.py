"""Text to ids and back, alike in the original and here."""

import json
from typing import Any

import numpy as np
import pytest

TEXT = "naïve 🎉 日本語 and more."


def test_ids_are_int32_arrays(library: Any) -> None:
    ids = library.tokenizer().encode("Hello world")
    assert ids.dtype == np.int32
    assert ids.ndim == 1
    assert library.tokenizer().encode("").shape == (0,)


@pytest.mark.parametrize("kind", [list, lambda ids: np.array(ids, np.int64), lambda ids: ids])
def test_lists_and_arrays_decode_to_the_text(library: Any, kind: Any) -> None:
    tokenizer = library.tokenizer()
    assert tokenizer.decode(kind(tokenizer.encode(TEXT))) == TEXT
    assert tokenizer.decode([]) == ""


def test_special_tokens_are_ids_and_no_text(library: Any) -> None:
    tokenizer = library.tokenizer()
    ids = tokenizer.encode("<|im_start|>Hi<|im_end|>")
    assert ids[-1] == tokenizer.to_token_id("<|im_end|>")
    assert tokenizer.decode(ids) == "Hi"


def test_a_batch_is_padded_at_its_end(library: Any) -> None:
    tokenizer = library.tokenizer()
    batch = tokenizer.encode_batch(["Hello world", "Hi"])
    array = batch.as_numpy()
    assert list(batch.shape()) == list(array.shape)
    assert array.dtype == np.int32
    assert array[1, -1] == tokenizer.pad_token_id
    assert tokenizer.decode_batch(batch) == ["Hello world", "Hi"]


def test_a_stream_gives_the_text_piece_by_piece(library: Any) -> None:
    tokenizer = library.tokenizer()
    stream = tokenizer.create_stream()
    pieces = [stream.decode(token) for token in tokenizer.encode(TEXT)]
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)


def test_the_special_ids(library: Any) -> None:
    tokenizer = library.tokenizer()
    assert tokenizer.eos_token_ids.dtype == np.int32
    assert tokenizer.to_token_id("<|im_end|>") in tokenizer.eos_token_ids
    assert isinstance(tokenizer.pad_token_id, int)
    assert tokenizer.to_token_id("these are several words") == -1


def test_the_beginning_of_a_text_has_an_id(with_weights: Any) -> None:
    tokenizer = with_weights.tokenizer()
    assert tokenizer.bos_token_id == tokenizer.to_token_id("<|im_start|>")


def test_a_conversation_is_rendered(library: Any) -> None:
    tokenizer = library.tokenizer()
    messages = json.dumps([{"role": "user", "content": "Hi"}])
    text = tokenizer.apply_chat_template(messages)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    closed = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    assert text == closed + "<|im_start|>assistant\n"
    own = tokenizer.apply_chat_template(messages, template_str="{{ messages[0].content }}")
    assert own == "Hi"
    with pytest.raises(RuntimeError):
        tokenizer.apply_chat_template("no json")
    with pytest.raises(TypeError):
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
