"""
The linear runtime's bookkeeping, on a stand-in for the library.

The stand-in's KV really holds what was appended, with the side of the position encoding that it was
computed on; its logits are a hash of that. What the library itself does is tested in tests/og.
"""

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from recollect.engine.engine import Engine
from recollect.engine.pinning import require_tier
from recollect.engine.sampling import Generator
from recollect.errors import RuntimeFailure, StoreError, UnsupportedModelError
from recollect.runtime.base import Row
from recollect.runtime.sequences import GenAiRuntime, SequenceAdapter
from recollect.types import SamplingParams

VOCAB, PAD, CONTEXT = 50, 7, 64


class StandIn:
    """What the runtime uses of onnxruntime_genai, and the tokens that it was given to compute."""

    __version__ = "0"

    def __init__(self) -> None:
        self.appended = 0
        self.made = 0
        self.can_rewind = True
        self.fails = False
        self.short_rope_length: int | None = None

    def Model(self, _path: str) -> Any:  # noqa: N802 - the library's name
        return SimpleNamespace(device_type="CPU")

    def GeneratorParams(self, _model: Any) -> Any:  # noqa: N802
        return SimpleNamespace(set_search_options=lambda **_: None)

    def Generator(self, _model: Any, _params: Any) -> Any:  # noqa: N802
        self.made += 1
        return StandInGenerator(self)


class StandInGenerator:
    def __init__(self, library: StandIn) -> None:
        self._library = library
        self._kv: list[tuple[int, bool]] = []
        self._last = 0

    def append_tokens(self, tokens: np.ndarray) -> None:
        library = self._library
        most = library.short_rope_length
        beyond = most is not None and len(self._kv) + len(tokens) > most
        self._kv += [(int(token), beyond) for token in tokens]
        self._last = len(tokens)
        library.appended += len(tokens)
        if library.fails:
            library.fails = False
            raise RuntimeError("injected")

    def rewind_to(self, length: int) -> None:
        if not self._library.can_rewind:
            raise RuntimeError("RewindTo is currently not supported")
        del self._kv[length:]

    def get_output(self, _name: str) -> np.ndarray:
        """Return the logits after each of the tokens appended last."""
        ends = range(len(self._kv) - self._last + 1, len(self._kv) + 1)
        return np.array([[logits_of(self._kv[:end]) for end in ends]])

    def get_logits(self) -> np.ndarray:
        """Return those after the last that is not padding, which is the library's fault."""
        rows = self.get_output("logits")
        tokens = [token for token, _ in self._kv[-self._last :]]
        last = max((n for n, token in enumerate(tokens) if token != PAD), default=0)
        return rows[:, last : last + 1]


def logits_of(kv: list[tuple[int, bool]]) -> np.ndarray:
    digest = hashlib.blake2b(repr(kv).encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "little")).random(VOCAB, np.float32)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", stand_in)
    return stand_in


@pytest.fixture
def make_runtime(library: StandIn, tmp_path: Path) -> Callable[..., SequenceAdapter]:
    def make(*, contexts: float = 4, architecture: str = "llama") -> SequenceAdapter:
        decoder = {"num_hidden_layers": 2, "num_key_value_heads": 1, "head_size": 8}
        config = {
            "type": architecture,
            "vocab_size": VOCAB,
            "pad_token_id": PAD,
            "decoder": decoder,
        }
        runtime = SequenceAdapter(GenAiRuntime(tmp_path, {"model": config}, context_length=CONTEXT))
        runtime.allocate(int(contexts * CONTEXT) // runtime.info.block_size)
        return runtime

    return make


def fresh(ids: list[int]) -> np.ndarray:
    return logits_of([(token, False) for token in ids])


def test_kv_is_as_large_as_the_config_says(make_runtime: Callable[..., SequenceAdapter]) -> None:
    runtime = make_runtime()
    assert runtime.info.bytes_per_block == 32 * 2 * 2 * 8 * 4
    assert runtime.info.pace.most_rows == 4


@pytest.mark.parametrize(("contexts", "expected"), [(1, 1), (2.5, 2), (9, 4)])
def test_as_many_are_live_as_the_budget_has_room_for(
    make_runtime: Callable[..., SequenceAdapter], contexts: float, expected: int
) -> None:
    assert make_runtime(contexts=contexts).info.pace.most_rows == expected


def test_a_history_that_goes_on_is_appended_to(
    make_runtime: Callable[..., SequenceAdapter], library: StandIn
) -> None:
    runtime = make_runtime()
    runtime.forward([Row([1, 2, 3], 0, [0])])
    result = runtime.forward([Row([4], 3, [0])])
    assert (library.made, library.appended) == (1, 4)
    assert result.starts == [3]
    assert np.array_equal(result.logits[0], fresh([1, 2, 3, 4]))


def test_what_was_given_up_is_computed_anew_and_told(
    make_runtime: Callable[..., SequenceAdapter], library: StandIn
) -> None:
    runtime = make_runtime(contexts=2)
    for block, first in enumerate((1, 2, 3)):  # the third makes the first go
        runtime.forward([Row([first, 9, 9], 0, [block])])
    library.appended = 0
    result = runtime.forward([Row([5], 3, [0])])
    assert (result.starts, library.appended) == ([0], 4)
    assert np.array_equal(result.logits[0], fresh([1, 9, 9, 5]))


def test_two_rows_of_one_pass_keep_a_generator_each(
    make_runtime: Callable[..., SequenceAdapter], library: StandIn
) -> None:
    runtime = make_runtime()
    runtime.forward([Row([1, 2, 3], 0, [0])])
    runtime.copy_blocks([(0, 1)])
    for step in range(3):
        rows = [Row([10 + step], 3 + step, [0]), Row([20 + step], 3 + step, [1])]
        result = runtime.forward(rows)
    assert library.made == 2
    assert result.starts == [5, 5]
    assert np.array_equal(result.logits[1], fresh([1, 2, 3, 20, 21, 22]))


def test_where_the_library_cannot_rewind_the_history_is_computed_anew(
    make_runtime: Callable[..., SequenceAdapter], library: StandIn
) -> None:
    library.can_rewind = False
    runtime = make_runtime()
    runtime.forward([Row([1, 2, 3, 4], 0, [0])])
    result = runtime.forward([Row([9], 3, [0])])
    assert (result.starts, library.made) == ([0], 2)
    assert np.array_equal(result.logits[0], fresh([1, 2, 3, 9]))


def test_a_generator_that_failed_is_not_used_again(
    make_runtime: Callable[..., SequenceAdapter], library: StandIn
) -> None:
    runtime = make_runtime()
    runtime.forward([Row([1, 2, 3], 0, [0])])
    library.fails = True
    with pytest.raises(RuntimeFailure, match="injected"):
        runtime.forward([Row([4], 3, [0])])
    result = runtime.forward([Row([4], 3, [0])])
    assert np.array_equal(result.logits[0], fresh([1, 2, 3, 4]))


def test_the_logits_after_padding_are_those_after_it(
    make_runtime: Callable[..., SequenceAdapter],
) -> None:
    result = make_runtime().forward([Row([1, 2, PAD], 0, [0])])
    assert np.array_equal(result.logits[0], fresh([1, 2, PAD]))


def test_slots_that_nothing_was_written_to_are_refused(
    make_runtime: Callable[..., SequenceAdapter],
) -> None:
    with pytest.raises(RuntimeFailure, match="nothing was ever written"):
        make_runtime().forward([Row([1], 3, [0])])


def test_a_longrope_history_is_all_of_one_side(
    make_runtime: Callable[..., SequenceAdapter], library: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules["recollect.runtime.sequences"].SHORT_ROPE_LENGTHS, "phi3", 8)
    library.short_rope_length = 8
    runtime = make_runtime(architecture="phi3")
    ids = list(range(10, 22))
    runtime.forward([Row(ids[:6], 0, [0])])
    result = runtime.forward([Row(ids[6:10], 6, [0])])  # crosses
    assert result.starts == [0]
    assert np.array_equal(result.logits[0], logits_of([(token, True) for token in ids[:10]]))
    result = runtime.forward([Row(ids[10:], 10, [0])])  # stays beyond
    assert result.starts == [10]
    assert np.array_equal(result.logits[0], logits_of([(token, True) for token in ids]))
    result = runtime.forward([Row([9], 7, [0])])  # comes back
    assert result.starts == [6]  # what the first generator has still, computed on this side
    assert np.array_equal(result.logits[0], fresh([*ids[:7], 9]))


def test_the_engine_counts_what_was_computed_anew(
    make_runtime: Callable[..., SequenceAdapter], library: StandIn
) -> None:
    """Three conversations take turns where two are live: the library sees what the engine counts."""
    engine = Engine(make_runtime(contexts=2), num_blocks=4)
    library.appended = 0
    greedy = SamplingParams(ignore_eos=True)
    talks = [Generator(engine, greedy, namespace=None) for _ in range(3)]
    for number, talk in enumerate(talks):
        talk.append_tokens([number, 5, 6])
        talk.generate_next_token()
    for talk in talks:
        history = talk.get_sequence()
        assert talk.generate_next_token() == int(fresh(history).argmax())
    assert engine.computed_tokens == library.appended
    assert sum(talk.sequence.fed_tokens for talk in talks) == library.appended
    assert library.appended > 3 * 4
    engine.check()
    engine.close()


def test_kv_on_disk_is_refused_in_a_sentence(make_runtime: Callable[..., SequenceAdapter]) -> None:
    engine = Engine(make_runtime(), num_blocks=4)
    with pytest.raises(StoreError, match="does not give its KV out"):
        require_tier(engine)
    engine.close()


def test_without_the_library_a_folder_is_refused_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    with pytest.raises(UnsupportedModelError, match=r"recollect-llm\[genai\]"):
        GenAiRuntime(tmp_path, {"model": {}}, context_length=CONTEXT)


def test_a_folder_that_the_library_refuses_names_the_reason(
    library: StandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(_path: str) -> Any:
        raise RuntimeError("Unknown provider name 'RyzenAI'")

    monkeypatch.setattr(library, "Model", refuse)
    with pytest.raises(UnsupportedModelError, match="Unknown provider name 'RyzenAI'"):
        GenAiRuntime(tmp_path, {"model": {}}, context_length=CONTEXT)
