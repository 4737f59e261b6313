"""A format is decided in one table."""

from pathlib import Path
from typing import get_args

from recollect.conversation.formats import FORMATS, RunOptions, load_runtime, load_tokenizer
from recollect.models.catalog import Format, reference_model


def test_every_format_that_a_model_can_have_has_a_row() -> None:
    assert set(FORMATS) == set(get_args(Format))


def test_runtime_and_tokenizer_of_a_model_have_one_vocabulary(tmp_path: Path) -> None:
    model = reference_model()
    runtime = load_runtime(model, RunOptions(profile="exact", home=tmp_path))
    assert runtime.info.vocab_size == load_tokenizer(model).vocab_size
    assert runtime.info.context_length == model.context_length
