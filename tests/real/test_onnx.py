"""An ONNX GenAI folder does what a model on OpenVINO does, but for KV on disk."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import recollect
from recollect.models.onnx_folder import Precision
from recollect.proof.scenarios import load_scenarios, play, run_rewind_test
from recollect.proof.verify import EXACT_LIMIT, verify

pytestmark = pytest.mark.model

SHORT = recollect.SamplingParams(max_tokens=24)


@pytest.fixture
def load(
    onnx_folder: Callable[[Precision], Path], tmp_path: Path
) -> Callable[..., recollect.Model]:
    """Return what loads the folder in fp32, with a home of the test's own."""

    def load(kv_disk: int | None = None) -> recollect.Model:
        folder = onnx_folder("fp32")
        return recollect.load(folder, profile="exact", kv_disk=kv_disk, home=tmp_path)

    return load


@pytest.fixture
def model(load: Callable[..., recollect.Model]) -> Iterator[recollect.Model]:
    with load() as loaded:
        yield loaded


def test_random_conversations_equal_a_fresh_prefill(model: recollect.Model) -> None:
    report = verify(model, operations=12, seed=7, boundary_s=1)
    assert report.passed
    assert report.largest.logits < EXACT_LIMIT / 2


def test_an_answer_after_a_rewind_is_that_of_a_fresh_prefill(model: recollect.Model) -> None:
    result = run_rewind_test(model)
    assert result.rewind_differs_at is None
    assert result.fresh_differs_at is None


def test_reuse_changes_nothing_in_a_scenario(model: recollect.Model) -> None:
    result = play(model, load_scenarios()[0])
    assert [turn.changed_by_reuse for turn in result.turns] == [()] * len(result.turns)


def test_a_conversation_goes_on_after_a_restart(load: Callable[..., recollect.Model]) -> None:
    with load() as model:
        session = model.session(name="talk", params=SHORT)
        session.respond("My name is Alex.")
        ids = session.typed_ids()
        uninterrupted = session.fork().respond("What is my name?")
    with load() as model:
        session = model.resume("talk", params=SHORT)
        assert session.typed_ids() == ids
        reply = session.respond("What is my name?")
        assert reply.text == uninterrupted.text
        assert reply.usage.computed_tokens == reply.usage.prompt_tokens
        assert reply.usage.reason == "evicted"


def test_kv_on_disk_is_told_to_be_impossible(
    load: Callable[..., recollect.Model], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), load(kv_disk=1 << 30) as model:
        assert model.engine.tier is None
    assert "does not give its KV out" in caplog.text
    assert not (tmp_path / "kv").exists()
