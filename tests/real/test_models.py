"""The default model, as people get it."""

import time

import pytest

from recollect import config
from recollect.models.catalog import CATALOG
from recollect.models.local import LocalModel
from recollect.models.prepare import prepare
from recollect.models.template import ChatTemplate
from recollect.models.tokenizer import Detokenizer, Tokenizer, load_tokenizer

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def model() -> LocalModel:
    return prepare("smollm2", home=config.home())


@pytest.fixture(scope="module")
def tokenizer(model: LocalModel) -> Tokenizer:
    return load_tokenizer(model)


def test_it_is_what_the_catalog_says(model: LocalModel) -> None:
    assert model.name == "smollm2"
    assert model.context_length == CATALOG["smollm2"].context_length
    assert model.bos_token == "<|im_start|>"  # noqa: S105 - a token, not a password
    assert model.eos_token == "<|im_end|>"  # noqa: S105
    assert model.eos_token_ids == {0, 2}


def test_the_second_time_takes_a_fifth_of_a_second_at_most(model: LocalModel) -> None:
    start = time.perf_counter()
    again = prepare("smollm2", home=config.home())
    assert time.perf_counter() - start < 0.2
    assert again == model


def test_its_template_is_rendered_as_it_was_trained(
    model: LocalModel, tokenizer: Tokenizer
) -> None:
    template = ChatTemplate(
        model.chat_template, bos_token=model.bos_token, eos_token=model.eos_token
    )
    text = template.render([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer.encode(text)
    assert ids.count(1) == 3
    assert ids.count(2) == 2
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "plain",
        "  two\n\n\tlines ",
        "naïve 🎉 日本語 👩‍👩‍👧",
        "a\x00b",
        "1234567890",
        "don 't .",
    ],
)
def test_text_comes_back_whole_and_streams_without_loss(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    detokenizer = Detokenizer(tokenizer)
    pieces = [*(detokenizer.push(number) for number in ids), detokenizer.finish()]
    assert "".join(pieces) == text


def test_any_ids_stream_to_what_they_decode_to(tokenizer: Tokenizer) -> None:
    """Stride through the vocabulary: half characters, control tokens, all of it."""
    ids = [number * 7919 % tokenizer.vocab_size for number in range(3000)]
    detokenizer = Detokenizer(tokenizer)
    pieces = [*(detokenizer.push(number) for number in ids), detokenizer.finish()]
    assert "".join(pieces) == tokenizer.decode(ids)


def test_a_text_longer_than_the_context_keeps_its_head(
    model: LocalModel, tokenizer: Tokenizer
) -> None:
    text = "The first words. " + "more and more " * 6000
    ids = tokenizer.encode(text)
    assert len(ids) > model.context_length
    assert tokenizer.decode(ids) == text
