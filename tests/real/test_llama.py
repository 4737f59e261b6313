"""smollm2 on llama.cpp: its file's values, its tokenizer, and reuse that survives a restart."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

import recollect
from recollect import config
from recollect.conversation.formats import load_tokenizer
from recollect.models.prepare import prepare
from recollect.proof.verify import compare_with_file, verify
from recollect.types import SamplingParams

pytestmark = pytest.mark.model

TEXTS = [
    "Hello world",
    "  two  spaces and a\n\n\nblank line",
    "<|im_start|>user\nhi<|im_end|>\n",
    "ünïcode 図書館はどこですか \U0001f600",
    "x\x04y",
    "12345 678, don't I'll",
    "<think>hm</think>",
    "\ud800 half",
    "def f(x):\n\treturn x**2\n",
    "",
    " ",
    "<|im_start",
]


def test_its_tokenizer_is_the_one_that_the_file_is_converted_with() -> None:
    as_it_is = load_tokenizer(prepare("smollm2", home=config.home(), runtime="llama"))
    converted = load_tokenizer(prepare("smollm2", home=config.home(), runtime="openvino"))
    for text in TEXTS:
        assert as_it_is.encode(text) == converted.encode(text), text
        assert as_it_is.encode_text(text) == converted.encode_text(text), text
        assert as_it_is.decode(as_it_is.encode(text)) == converted.decode(converted.encode(text))
    assert as_it_is.vocabulary == converted.vocabulary
    assert as_it_is.control_tokens.ids == converted.control_tokens.ids


@pytest.fixture(scope="module")
def model() -> Iterator[recollect.Model]:
    with recollect.load("smollm2", profile="exact", runtime="llama", kv_disk=0) as model:
        yield model


def test_the_model_that_runs_is_the_one_in_the_file(model: recollect.Model) -> None:
    report = compare_with_file(model)
    assert report.outcome == "PASS", report.reason
    assert report.largest < 5e-4


def test_reuse_equals_a_fresh_prefill(model: recollect.Model) -> None:
    assert verify(model, operations=12, seed=3, boundary_s=5).passed


def test_a_conversation_goes_on_from_the_disk(tmp_path: Path) -> None:
    load = partial(
        recollect.load,
        "smollm2",
        profile="exact",
        runtime="llama",
        kv_disk=1 << 30,
        home=tmp_path,
    )
    params = SamplingParams(temperature=0, max_tokens=12)
    (tmp_path / "sources").symlink_to(config.home() / "sources")
    with load() as model:
        session = model.session("You are brief.", name="kept", params=params)
        session.respond("Name a river.")
        before = len(session.typed_ids())
        expected = session.fork().respond("And another?")
    with load() as model:
        again = model.resume("kept", params=params).respond("And another?")
    assert again.text == expected.text
    assert again.usage.reused_tokens >= before - 1
    assert again.usage.computed_tokens <= expected.usage.computed_tokens + 1
