"""Any order of append, rewind, fork and forgetting on llama.cpp gives the logits of a fresh prefill."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from random_model import WITH_EXPERTS, WITH_WINDOW, Shape, write_random_model
from recollect.engine.engine import Engine
from recollect.engine.sequence import Sequence
from recollect.kv.disk import DiskStore
from recollect.runtime import llamacpp
from recollect.runtime.base import Row
from recollect.runtime.llama_model import LlamaOptions
from recollect.runtime.llamacpp import LlamaCppRuntime, load_llama

SHAPES = {
    "plain": Shape(),
    "window": WITH_WINDOW,
    "experts": WITH_EXPERTS,
}
CONTEXT = 320
NUM_BLOCKS = 40
LIMIT = 1e-2
"""Six layers of random weights turn rounding into 1e-3; a wrong slot is off by more than 1."""
TOKENS = st.lists(st.integers(5, 290), min_size=1, max_size=70)
WHICH = st.integers(0, 99)


def opened(path: Path) -> LlamaCppRuntime:
    options = LlamaOptions(profile="exact", threads=1, lanes=2)
    runtime = load_llama(path, context_length=CONTEXT, options=options)
    assert isinstance(runtime, LlamaCppRuntime)
    return runtime


class LlamaMachine(RuleBasedStateMachine):
    """An engine with two lanes and little room; the dumb model of a sequence is the list of its ids."""

    path: ClassVar[Path]
    fresh: ClassVar[LlamaCppRuntime]
    new_store: ClassVar[Callable[[], DiskStore]]

    def __init__(self) -> None:
        super().__init__()
        self.runtime = opened(self.path)
        self.engine = Engine(
            self.runtime, num_blocks=NUM_BLOCKS, fingerprint="random", store=type(self).new_store()
        )
        self.known: list[tuple[Sequence, list[int]]] = []

    def teardown(self) -> None:
        self.engine.check()
        self.engine.close()

    @rule(ids=TOKENS)
    def begin(self, ids: list[int]) -> None:
        if len(self.known) == 4:
            self.known.pop(0)[0].release()
        self.known.append((self.engine.new_sequence(), []))
        self.append(len(self.known) - 1, ids)

    @precondition(lambda self: self.known)
    @rule(which=WHICH, ids=TOKENS)
    def append(self, which: int, ids: list[int]) -> None:
        sequence, model = self.known[which % len(self.known)]
        ids = ids[: CONTEXT - len(model) - 1]
        if ids:
            sequence.append(ids)
            model += ids
            self.compare([(sequence, model)])

    @precondition(lambda self: self.known)
    @rule(which=WHICH, length=st.integers(1, CONTEXT))
    def rewind(self, which: int, length: int) -> None:
        sequence, model = self.known[which % len(self.known)]
        length = min(length, len(model))
        sequence.rewind_to(length)
        del model[length:]
        self.compare([(sequence, model)])

    @precondition(lambda self: 0 < len(self.known) < 4)
    @rule(which=WHICH, ids=TOKENS)
    def fork(self, which: int, ids: list[int]) -> None:
        sequence, model = self.known[which % len(self.known)]
        self.known.append((sequence.fork(), [*model]))
        self.append(len(self.known) - 1, ids)

    @precondition(lambda self: self.known)
    @rule()
    def together(self) -> None:
        for sequence, model in self.known:
            if len(model) < CONTEXT - 1:
                sequence.append([7])
                model.append(7)
        self.compare(self.known)

    @rule()
    def forget(self) -> None:
        """What comes back after that comes from the disk."""
        assert self.engine.tier is not None
        self.engine.tier.writer.flush()
        for sequence, _ in self.known:
            sequence.release()
        self.known.clear()
        self.engine.forget()

    def compare(self, some: list[tuple[Sequence, list[int]]]) -> None:
        self.engine.compute([sequence for sequence, _ in some])
        self.runtime.check()
        for sequence, model in some:
            row = Row(model, 0, range(NUM_BLOCKS))
            expected = self.fresh.forward([row]).logits[0]
            assert sequence.logits is not None
            assert float(np.abs(sequence.logits - expected).max()) < LIMIT


@pytest.fixture(params=sorted(SHAPES))
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[type[LlamaMachine]]:
    made = iter(range(10_000))
    file = write_random_model(tmp_path / "random.gguf", SHAPES[request.param])

    class Machine(LlamaMachine):
        path = file
        fresh = opened(file)
        new_store = staticmethod(
            lambda: DiskStore(tmp_path / f"kv{next(made) % 2}", budget_bytes=64 << 20)
        )

    Machine.fresh.allocate(NUM_BLOCKS)
    yield Machine
    Machine.fresh.close()


def test_any_order_gives_fresh_logits(machine: type[LlamaMachine]) -> None:
    run_state_machine_as_test(
        machine, settings=settings(max_examples=8, stateful_step_count=15, deadline=None)
    )


@pytest.mark.parametrize("machine", ["plain"], indirect=True)
def test_a_lane_that_serves_too_much_is_found(
    machine: type[LlamaMachine],
    fault_search: Callable[[int], settings],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where lanes were matched by how long they are."""
    monkeypatch.setattr(llamacpp, "common_length", lambda lane, wanted: min(len(lane), len(wanted)))
    with pytest.raises(AssertionError):
        run_state_machine_as_test(machine, settings=fault_search(60))
