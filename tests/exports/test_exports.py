"""
What other people's tools make of models, against what transformers computes for them.

The folders are made once by `make_exports.py`, in an environment of its own (see `conftest.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import recollect
from recollect.errors import ConfigError, UnsupportedModelError
from recollect.proof.openvino_reference import open_openvino
from recollect.proof.reference_model import NotCompared, logits_at
from recollect.proof.verify import compare_with_file, verify
from recollect.runtime.base import Logits

pytestmark = pytest.mark.model

SAME = 1e-3
"""f32 in another order is 5e-5 off at a standard deviation of 8 to 18; each fault that was planted 0.01
or more."""
LONG_ROPE = ("phi3-128k", "phi4-mini")
SERVED = (
    "gemma3", "gemma3-multimodal", "gpt-oss", "llama31", "mistral-window", "phi3-4k", "qwen2", "qwen3",
    "qwen3-moe", *LONG_ROPE,
)  # fmt: skip
COMPARED = tuple(name for name in SERVED if name not in ("gpt-oss", "qwen3-moe"))


@dataclass(frozen=True)
class Export:
    """A folder, and the logits of transformers after each of its tokens."""

    folder: Path
    ids: list[int]
    logits: Logits
    short: Logits
    """Of the first 50 tokens alone: a model with LongRoPE takes other factors for these."""


@pytest.fixture
def export(exports_folder: Path) -> Callable[[str], Export]:
    def read(name: str) -> Export:
        made = np.load(exports_folder / name / "logits.npz")
        return Export(exports_folder / name, made["ids"].tolist(), made["logits"], made["short"])

    return read


def our_logits(model: recollect.Model, ids: list[int], ends: list[int]) -> Logits:
    """Return the logits after these lengths, computed in passes that end there."""
    with_kv = model.engine.new_sequence(namespace=None)
    rows = []
    for start, end in zip([0, *ends], ends, strict=False):
        with_kv.append(ids[start:end])
        model.engine.compute([with_kv])
        assert with_kv.logits is not None
        rows.append(with_kv.logits.copy())
    with_kv.release()
    return np.stack(rows)


@pytest.mark.parametrize("name", SERVED)
def test_an_export_computes_what_transformers_does(
    name: str, export: Callable[[str], Export], tmp_path: Path
) -> None:
    """As a prompt, in pieces and token by token, across windows and first contexts."""
    made = export(name)
    is_long = name in LONG_ROPE
    ends = [1, 2, 3, 30, 31, 32, 33, 34, 50, 63, 64, 65, 66, 96, 159, 160]
    with recollect.load(
        made.folder, profile="exact", home=tmp_path, kv_disk=0, long_context=is_long
    ) as model:
        found = our_logits(model, made.ids, ends)
        whole = our_logits(model, made.ids, [160])
    expected = made.logits[[end - 1 for end in ends]]
    assert np.abs(found - expected).max() < SAME
    assert np.abs(whole[0] - made.logits[-1]).max() < SAME


@pytest.mark.parametrize("name", LONG_ROPE)
def test_long_rope_has_its_first_context_unless_it_is_asked_for_the_long_one(
    name: str, export: Callable[[str], Export], tmp_path: Path
) -> None:
    made = export(name)
    with recollect.load(made.folder, profile="exact", home=tmp_path, kv_disk=0) as model:
        assert model.context_length == 64
        short = model.fingerprint
        assert np.abs(our_logits(model, made.ids, [20, 50]) - made.short[[19, 49]]).max() < SAME
    with recollect.load(
        made.folder, profile="exact", home=tmp_path, kv_disk=0, long_context=True
    ) as model:
        assert model.context_length == 1024
        assert model.fingerprint != short


@pytest.mark.parametrize("name", SERVED)
def test_a_long_sequence_changes_no_short_one_beside_it(
    name: str, export: Callable[[str], Export], tmp_path: Path
) -> None:
    made = export(name)
    with recollect.load(
        made.folder, profile="exact", home=tmp_path, kv_disk=0, long_context=name in LONG_ROPE
    ) as model:
        alone = our_logits(model, made.ids, [20])[0]
        short, long = (model.engine.new_sequence(namespace=None) for _ in range(2))
        short.append(made.ids[:20])
        long.append(made.ids)
        model.engine.compute([long, short])
        assert short.logits is not None
        assert np.abs(short.logits - alone).max() < SAME


@pytest.mark.parametrize("name", COMPARED)
def test_the_reference_computes_what_transformers_does(
    name: str, export: Callable[[str], Export]
) -> None:
    made = export(name)
    description, tensors = open_openvino(made.folder, long_context=name in LONG_ROPE)
    places = [0, 1, 31, 32, 33, 63, 64, 65, 159]
    found = logits_at(description, tensors, made.ids, places)
    assert np.abs(found - made.logits[places]).max() < SAME


@pytest.mark.parametrize("name", LONG_ROPE)
def test_the_reference_knows_the_first_context(name: str, export: Callable[[str], Export]) -> None:
    made = export(name)
    found = logits_at(*open_openvino(made.folder), made.ids[:50], [0, 30, 49])
    assert np.abs(found - made.short[[0, 30, 49]]).max() < SAME


def test_the_reference_knows_caps_that_the_export_leaves_out(
    export: Callable[[str], Export], tmp_path: Path
) -> None:
    """The exporter traces attention that has none; so this is a folder that `verify` has to fail."""
    made = export("gemma2")
    found = logits_at(*open_openvino(made.folder), made.ids, [0, 50, 159])
    assert np.abs(found - made.logits[[0, 50, 159]]).max() < SAME
    with recollect.load(made.folder, profile="exact", home=tmp_path, kv_disk=0) as model:
        report = compare_with_file(model)
    assert report.outcome == "FAIL"


@pytest.mark.parametrize("name", COMPARED)
def test_verify_passes_what_is_right(
    name: str, export: Callable[[str], Export], tmp_path: Path
) -> None:
    made = export(name)
    with recollect.load(made.folder, profile="exact", home=tmp_path, kv_disk=0) as model:
        report = compare_with_file(model)
        assert report.outcome == "PASS", report.reason
        assert report.tokens >= 48
        assert verify(model, operations=25).passed


@pytest.mark.parametrize("name", ["gpt-oss", "qwen3-moe"])
def test_what_the_reference_does_not_know_is_not_passed(
    name: str, export: Callable[[str], Export], tmp_path: Path
) -> None:
    made = export(name)
    with pytest.raises(NotCompared, match="architecture"):
        open_openvino(made.folder)
    with recollect.load(made.folder, profile="exact", home=tmp_path, kv_disk=0) as model:
        report = compare_with_file(model)
    assert report.outcome == "NOT COMPARED"
    assert "architecture" in report.reason


def test_a_hybrid_is_refused_in_one_sentence(
    export: Callable[[str], Export], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=r"more than a KV cache.*llama\.cpp"):
        recollect.load(export("lfm2").folder, home=tmp_path, kv_disk=0)


def test_a_model_without_a_choice_has_no_long_context(
    export: Callable[[str], Export], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="leave --long-context out"):
        recollect.load(export("qwen3").folder, home=tmp_path, kv_disk=0, long_context=True)
