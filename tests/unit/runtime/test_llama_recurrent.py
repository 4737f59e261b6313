"""Recurrent models and hybrids on llama.cpp: a state goes on in full, from block ends and ends of turns."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from random_model import SHAPES, write_random_model
from recollect.engine.engine import Engine
from recollect.errors import RuntimeFailure
from recollect.kv.disk import DiskStore
from recollect.runtime.base import Logits, Row
from recollect.runtime.llama_model import LlamaOptions
from recollect.runtime.llama_state import Layout
from recollect.runtime.llamacpp import LlamaCppRuntime, load_llama
from recollect.runtime.sequences import SequenceAdapter

SIZE = 32
OPTIONS = LlamaOptions(profile="exact", threads=1, recurrent_block_size=SIZE)
ELSEWHERE = 1e-3
"""Beyond rounding; a wrong state is off by more than 1."""


@pytest.fixture(scope="module", params=["hybrid", "recurrent"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(
        tmp_path_factory.mktemp("llama") / "random.gguf", SHAPES[request.param]
    )


def opened(path: Path, blocks: int = 80) -> LlamaCppRuntime:
    runtime = load_llama(path, context_length=512, options=OPTIONS)
    runtime.allocate(blocks)
    assert isinstance(runtime, LlamaCppRuntime)
    return runtime


@pytest.fixture
def runtime(path: Path) -> Iterator[LlamaCppRuntime]:
    runtime = opened(path)
    yield runtime
    runtime.close()


def ids_of(length: int, seed: int = 0) -> list[int]:
    return [int(one) for one in np.random.default_rng(seed).integers(10, 250, length)]


def run(runtime: LlamaCppRuntime, ids: list[int], blocks: list[int], past: int = 0) -> Logits:
    logits: Logits = runtime.forward([Row(ids[past:], past, blocks)]).logits[0]
    runtime.check()
    return logits


def lose_all_lanes(runtime: LlamaCppRuntime) -> None:
    for number in range(runtime.info.pace.most_rows):
        run(runtime, ids_of(5, 50 + number), [60 + number])


def differs(first: Logits, second: Logits) -> float:
    return float(np.abs(first - second).max())


def test_what_the_engine_is_told(runtime: LlamaCppRuntime) -> None:
    reuse = runtime.info.reuse
    assert (reuse.unit, reuse.whole_tails, reuse.as_bytes) == (SIZE, True, True)
    assert runtime.layout.recurrent > 1000
    assert runtime.info.bytes_per_block == runtime.layout.bytes_per_block > runtime.layout.recurrent


def test_a_state_is_kept_at_the_end_of_each_block_and_of_a_turn(runtime: LlamaCppRuntime) -> None:
    ids, more = ids_of(70), ids_of(9, 1)
    run(runtime, ids, [0, 1, 2])
    runtime.copy_blocks([(2, 3)])  # as for whoever goes on from there
    for past, table in ((32, [0, 10, 11]), (64, [0, 1, 12]), (70, [0, 1, 3])):
        expected = run(runtime, ids[:past] + more, [20, 21, 22])
        lose_all_lanes(runtime)
        assert differs(run(runtime, ids[:past] + more, table, past), expected) < ELSEWHERE, past


def test_a_state_that_nobody_kept_is_no_other(runtime: LlamaCppRuntime) -> None:
    """Neither the one at the block's end, nor that of a lane which went on."""
    ids = ids_of(70)
    run(runtime, ids, [0, 1, 2])
    for past in (50, 63, 66):
        with pytest.raises(RuntimeFailure, match="no recurrent state was kept"):
            run(runtime, ids, [0, 1, 2], past)


def test_a_lane_that_went_on_leaves_what_others_go_on_from(runtime: LlamaCppRuntime) -> None:
    ids, more, other = ids_of(40), ids_of(3, 1), ids_of(4, 2)
    run(runtime, ids, [0, 1])
    runtime.copy_blocks([(1, 2)])
    first = run(runtime, ids + more, [0, 2], 40)
    second = run(runtime, ids + other, [0, 1], 40)
    assert differs(first, run(runtime, ids + more, [20, 21])) < ELSEWHERE
    assert differs(second, run(runtime, ids + other, [20, 21])) < ELSEWHERE


def test_a_foreign_state_and_a_zeroed_one_are_seen(runtime: LlamaCppRuntime) -> None:
    ids, other = ids_of(70), ids_of(64, 7)
    expected = run(runtime, ids, [0, 1, 2])
    run(runtime, other, [10, 11])
    assert differs(run(runtime, ids, [0, 11, 5], 64), expected) > 0.1
    content = bytearray(runtime.info.bytes_per_block)
    runtime.read_block(1, memoryview(content))
    runtime.write_block(6, memoryview(content))
    assert differs(run(runtime, ids, [0, 6, 5], 64), expected) < ELSEWHERE
    runtime.write_block(6, memoryview(bytes(len(content))))
    with pytest.raises(RuntimeFailure, match="no recurrent state"):
        run(runtime, ids, [0, 6, 5], 64)


def test_after_a_pass_that_failed_only_what_it_changed_is_computed_again(
    runtime: LlamaCppRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = ids_of(75)
    expected = run(runtime, ids, [10, 11, 12])
    run(runtime, ids[:70], [0, 1, 2])
    with monkeypatch.context() as patched:
        patched.setattr(runtime.model.lib, "llama_decode", lambda *_: 2)
        with pytest.raises(RuntimeFailure, match="running the model"):
            run(runtime, ids, [0, 1, 2], 70)
    with pytest.raises(RuntimeFailure, match="nothing was ever written"):
        run(runtime, ids, [0, 1, 2], 70)
    assert differs(run(runtime, ids, [0, 1, 2], 64), expected) < ELSEWHERE


@pytest.mark.few(1)
def test_a_conversation_goes_on_from_the_disk_at_the_end_of_its_turn(
    path: Path, tmp_path: Path
) -> None:
    ids, new, edited = ids_of(150), ids_of(20, 1), ids_of(12, 2)

    def computed(history: list[int]) -> tuple[int, Logits]:
        """Return what a new process computes of a history, and its logits."""
        store = DiskStore(tmp_path / "kv", budget_bytes=64 << 20)
        engine = Engine(opened(path), num_blocks=80, fingerprint="random", store=store)
        sequence = engine.new_sequence()
        sequence.append(history)
        engine.compute([sequence])
        assert sequence.logits is not None
        counted, logits = engine.computed_tokens, sequence.logits
        sequence.release()
        engine.check()
        engine.close()
        return counted, logits

    assert computed(ids)[0] == 150
    counted, logits = computed(ids + new)
    assert counted == 20
    fresh = opened(path)
    assert differs(logits, run(fresh, ids + new, list(range(6)))) < ELSEWHERE
    # Before the end of a turn there is the end of a block: what is replayed is counted.
    counted, logits = computed(ids[:140] + edited)
    assert counted == 140 - 128 + 12
    assert differs(logits, run(fresh, ids[:140] + edited, list(range(10, 16)))) < ELSEWHERE
    # What came later does not take the place of the end of that turn.
    counted, _ = computed(ids + ids_of(5, 3))
    assert counted == 5
    fresh.close()


def test_an_arrangement_that_another_state_does_not_have_is_replayed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    explains = Layout.explains
    lengths: list[int] = []

    def refuses(self: Layout, state: Any, sequence: int, length: int) -> bool:
        lengths.append(length)
        return length == min(lengths) and explains(self, state, sequence, length)

    with monkeypatch.context() as patched:
        patched.setattr(Layout, "explains", refuses)
        runtime = load_llama(path, context_length=512, options=OPTIONS)
    assert isinstance(runtime, SequenceAdapter)
    info = runtime.info
    assert not info.reuse.as_bytes
    runtime.allocate(80)
    ids = ids_of(70)
    first = runtime.forward([Row(ids, 0, [0, 1, 2])])
    again = runtime.forward([Row(ids[40:], 40, [0, 1, 2])])
    assert list(again.starts) == [0]  # all of it was replayed, and said so
    assert differs(again.logits[0], first.logits[0]) < ELSEWHERE
    runtime.close()
    # What 16 blocks take is what the library takes for a context of as many tokens.
    understood = opened(path)
    fixed, per_token = understood.model.state_bytes
    assert abs(16 * info.bytes_per_block - (fixed + 512 * per_token)) <= 16
    understood.close()
