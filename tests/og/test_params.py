"""Search options: names, defaults, types and refusals, alike in the original and here."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from random_model import Shape, write_bytes_as_vocabulary, write_random_model
from recollect import og

DEFAULTS = {
    "batch_size": 1.0,
    "chunk_size": 0.0,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": True,
    "length_penalty": 1.0,
    "max_length": 8192.0,
    "min_length": 0.0,
    "no_repeat_ngram_size": 0.0,
    "num_beams": 1.0,
    "num_return_sequences": 1.0,
    "past_present_share_buffer": True,
    "random_seed": -1.0,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_k": 50.0,
    "top_p": 1.0,
}


def test_the_names_and_defaults(library: Any) -> None:
    options = library.og.GeneratorParams(library.model).get_search_options()
    assert options == DEFAULTS
    assert {name: type(value) for name, value in options.items()} == {
        name: type(value) for name, value in DEFAULTS.items()
    }


def test_what_was_set_is_given_back(library: Any) -> None:
    params = library.og.GeneratorParams(library.model)
    params.set_search_options(do_sample=True, top_k=7, top_p=0.5, max_length=20, random_seed=3)
    options = params.get_search_options()
    assert options["do_sample"] is True
    assert (options["top_k"], options["top_p"], options["max_length"]) == (7.0, 0.5, 20.0)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"nonsense": 1}, 'Unknown value "nonsense"'),
        ({"top_k": "many"}, "Unknown search option type, can be float/bool/int:top_k"),
        ({"top_k": 3.7}, "Field 'top_k' value 3.7 is not an integer"),
        ({"do_sample": 1}, "do_sample - Expected a bool but saw a number"),
        ({"top_k": True}, "top_k - Expected a number but saw a bool"),
    ],
)
def test_refusals_have_the_original_s_words(library: Any, option: Any, words: str) -> None:
    params = library.og.GeneratorParams(library.model)
    with pytest.raises(RuntimeError, match=words.replace("'", ".")):
        params.set_search_options(**option)
    assert params.get_search_options() == DEFAULTS


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"max_length": 9000}, r"max_length \(9000\) cannot be greater than model context_length"),
        ({"max_length": 0}, "max_length is 0"),
    ],
)
def test_a_length_that_cannot_be_is_refused(library: Any, option: Any, words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        library.generator(**option)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"top_p": 2.0}, "top_p must be between 0.0 and 1.0"),
        ({"top_k": -1}, "top_k must be 0 or greater"),
    ],
)
def test_a_value_out_of_range_is_refused_at_the_latest_when_sampling(
    library: Any, option: Any, words: str
) -> None:
    def sample() -> None:
        generator = library.generator(do_sample=True, **option)
        generator.append_tokens([5, 6])
        generator.generate_next_token()

    with pytest.raises(RuntimeError, match=words):
        sample()


def test_a_config_s_overlay_changes_the_defaults(library: Any) -> None:
    if library.is_original:
        pytest.skip("loads the model a second time")
    config = library.og.Config("reference")
    config.overlay('{"search": {"top_k": 7}}')
    config.clear_providers()
    config.append_provider("cpu")
    model = library.og.Model(config)
    assert library.og.GeneratorParams(model).get_search_options()["top_k"] == 7
    model.close()


@pytest.mark.parametrize("option", ["batch_size", "num_beams", "num_return_sequences"])
def test_several_sequences_are_refused_with_a_remedy(own: Any, option: str) -> None:
    with pytest.raises(RuntimeError, match="make several Generators"):
        own.generator(**{option: 2})


def test_a_model_that_is_not_there_is_a_runtime_error(own: Any) -> None:
    with pytest.raises(RuntimeError, match="no model"):
        own.og.Model("./not-here")


@pytest.mark.slow
def test_device_and_kv_type_are_those_of_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECOLLECT_HOME", str(tmp_path / "home"))
    letters = write_bytes_as_vocabulary(tmp_path / "letters.gguf")
    file = write_random_model(tmp_path / "random.gguf", Shape(head_size=32), vocabulary_of=letters)
    open_model = partial(og.Model, file, runtime="llama")
    model = open_model(device="cpu", kv_type="q8_0")
    info = model.loaded.engine.info
    assert info.device == "CPU"
    assert info.kv_format.startswith("q8_0,")
    model.close()
    with pytest.raises(RuntimeError, match="has no device 'Metal' here: it has CPU"):
        open_model(device="Metal")
    with pytest.raises(RuntimeError, match="no KV type 'f12': choose one of f32"):
        open_model(kv_type="f12")
