"""Any order of append, compute, generate, rewind, fork, release and failure gives fresh logits."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Final
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from recollect.engine import engine as engine_module
from recollect.engine.engine import Engine
from recollect.engine.generator import Generator
from recollect.engine.sequence import Sequence as TokenSequence
from recollect.errors import MemoryLimitError, OutOfBlocksError, RuntimeFailure
from recollect.kv.blocks import BlockPool
from recollect.runtime.base import Logits, Row
from recollect.runtime.reference import ReferenceRuntime
from recollect.types import SamplingParams

VOCAB: Final = 8
SIZE: Final = 4
CONTEXT: Final = 40
NUM_BLOCKS: Final = 16
CHUNK: Final = 6
TOKENS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9)


class FailingRuntime(ReferenceRuntime):
    """Fails when told to, after it has written the wrong tokens into the slots."""

    fail_forward = False
    fail_copy = False

    def forward(self, rows: Sequence[Row]) -> Logits:
        if self.fail_forward:
            self.fail_forward = False
            super().forward(
                [replace(row, token_ids=[VOCAB - 1 - t for t in row.token_ids]) for row in rows]
            )
            raise RuntimeFailure("injected while writing")
        return super().forward(rows)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        if self.fail_copy:
            self.fail_copy = False
            raise RuntimeFailure("injected while copying")
        super().copy_blocks(pairs)


@lru_cache(20_000)
def fresh(ids: tuple[int, ...], whole_blocks_only: bool) -> bytes:
    """Return the logits of one prefill on a runtime of its own, without any engine."""
    runtime = ReferenceRuntime(
        vocab_size=VOCAB, block_size=SIZE, whole_blocks_only=whole_blocks_only
    )
    runtime.allocate(-(-len(ids) // SIZE))
    row = Row(list(ids), 0, range(-(-len(ids) // SIZE)))
    return bytes(runtime.forward([row])[0].tobytes())


class EngineMachine(RuleBasedStateMachine):
    """Generators over one small pool; the dumb model of each is the list of its ids."""

    whole_blocks_only = False
    generators = Bundle("generators")

    def __init__(self) -> None:
        super().__init__()
        self.chunk = mock.patch.object(engine_module, "PREFILL_CHUNK", CHUNK)
        self.chunk.start()
        self.runtime = FailingRuntime(
            vocab_size=VOCAB,
            context_length=CONTEXT,
            block_size=SIZE,
            whole_blocks_only=self.whole_blocks_only,
        )
        self.engine = Engine(self.runtime, num_blocks=NUM_BLOCKS, eos_token_ids=[0])
        self.model: dict[Generator, list[int]] = {}

    def teardown(self) -> None:
        self.chunk.stop()
        self.runtime.fail_forward = self.runtime.fail_copy = False
        for generator in self.model:
            self.probe(generator)
        for generator in self.model:
            generator.close()
        assert self.engine.pool.used_blocks == 0

    @initialize(target=generators)
    def first(self) -> Generator:
        return self._born()

    @rule(target=generators)
    def new(self) -> Generator:
        return self._born()

    def _born(self) -> Generator:
        generator = Generator(self.engine, SamplingParams(temperature=1.0, seed=1))
        self.model[generator] = []
        return generator

    @rule(generator=generators, ids=TOKENS)
    def append(self, generator: Generator, ids: list[int]) -> None:
        if len(self.model[generator]) + len(ids) > CONTEXT:
            with pytest.raises(MemoryLimitError):
                generator.append_tokens(ids)
        else:
            generator.append_tokens(ids)
            self.model[generator] += ids

    @rule(generator=generators, count=st.integers(1, 6))
    def generate(self, generator: Generator, count: int) -> None:
        for _ in range(count):
            if generator.is_done() or not self.model[generator]:
                return
            try:
                token = generator.generate_next_token()
            except (OutOfBlocksError, RuntimeFailure):
                return
            if token is None:
                assert generator.is_done()
            else:
                assert token != 0
                self.model[generator].append(token)

    @rule(chosen=st.lists(generators, max_size=4))
    def compute(self, chosen: list[Generator]) -> None:
        sequences = [one.sequence for one in chosen if self.model[one]]
        before = {sequence: sequence.computed for sequence in sequences}
        fed = self.engine.computed_tokens
        try:
            self.engine.compute(sequences)
        except OutOfBlocksError:
            assert self.engine.computed_tokens == fed, "refused before anything was computed"
            assert {sequence: sequence.computed for sequence in sequences} == before
        except RuntimeFailure:
            pass
        else:
            assert all(sequence.logits is not None for sequence in sequences)

    @rule(chosen=st.lists(generators, max_size=3))
    def step(self, chosen: list[Generator]) -> None:
        """One pass only: a prefill that is cancelled between its chunks."""
        with tolerated():
            self.engine.step([one.sequence for one in chosen if self.model[one]])

    @rule(generator=generators, back=st.integers(0, 12))
    def rewind(self, generator: Generator, back: int) -> None:
        length = max(0, len(self.model[generator]) - back)
        generator.rewind_to(length)
        del self.model[generator][length:]

    @rule(target=generators, generator=generators)
    def fork(self, generator: Generator) -> Generator:
        return self._fork(generator)

    def _fork(self, generator: Generator) -> Generator:
        passes, used = self.engine.forward_passes, self.engine.pool.used_blocks
        other = generator.fork()
        assert (self.engine.forward_passes, self.engine.pool.used_blocks) == (passes, used)
        self.model[other] = self.model[generator][:]
        return other

    @rule(generator=consumes(generators))
    def close(self, generator: Generator) -> None:
        generator.close()
        del self.model[generator]

    @rule()
    def fail_the_next_pass(self) -> None:
        self.runtime.fail_forward = True

    @rule()
    def fail_the_next_copy(self) -> None:
        self.runtime.fail_copy = True

    @rule(
        target=generators, generator=generators, ours=TOKENS, theirs=TOKENS, together=st.booleans()
    )
    def part_ways(
        self, generator: Generator, ours: list[int], theirs: list[int], together: bool
    ) -> Generator:
        """Fork in the middle of a block and write on both sides: where sharing can go wrong."""
        other = self._fork(generator)
        self.append(generator, ours)
        self.append(other, theirs)
        if together:
            self.compute([generator, other])
        else:
            self.compute([generator])
            self.compute([other])
        return other

    @rule(generator=generators)
    def probe(self, generator: Generator) -> None:
        """Feed the last token once more in a fork, which must not disturb the original."""
        ids = self.model[generator]
        if not ids:
            return
        other = generator.sequence.fork()
        other.rewind_to(len(ids) - 1)
        other.append(ids[-1:])
        with tolerated():
            self.engine.compute([other])
        self._compare(other, ids)
        other.release()

    @invariant()
    def the_bookkeeping_is_right(self) -> None:
        self.engine.check()

    @invariant()
    def histories_are_the_lists_and_known_logits_are_fresh(self) -> None:
        for generator, ids in self.model.items():
            assert generator.get_sequence() == ids
            self._compare(generator.sequence, ids)

    def _compare(self, sequence: TokenSequence, ids: list[int]) -> None:
        if sequence.logits is not None:
            assert sequence.logits.tobytes() == fresh(tuple(ids), self.whole_blocks_only)


class WholeBlocksMachine(EngineMachine):
    """The same where only whole blocks can be kept."""

    whole_blocks_only = True


def tolerated() -> contextlib.suppress:
    """Return a context in which what was planned may go wrong does so in silence."""
    return contextlib.suppress(OutOfBlocksError, RuntimeFailure)


TestEngine = EngineMachine.TestCase
TestEngineWithWholeBlocksOnly = WholeBlocksMachine.TestCase


# The machines must be able to fail: each of these faults is planted, and has to be found.


def _leave_a_token_without_kv(patch: pytest.MonkeyPatch) -> None:
    """The classic: a sampled token counts as computed as soon as it is in the history."""
    append = TokenSequence.append

    def forgetful(self: TokenSequence, ids: Sequence[int]) -> None:
        known = self.logits is not None and len(ids) == 1
        append(self, ids)
        if known and len(self) % SIZE != 1:  # inside a block, so that the table still fits
            self._computed = len(self)

    patch.setattr(TokenSequence, "append", forgetful)


def _write_into_shared_blocks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockPool, "is_shared", lambda _self, _block: False)


def _skip_the_copy(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(FailingRuntime, "copy_blocks", lambda _self, _pairs: None)


def _trust_kv_after_a_failure(patch: pytest.MonkeyPatch) -> None:
    """What a failed pass wrote counts as computed up to where it began, copies included."""
    crop = TokenSequence.crop_kv

    def forgiving(self: TokenSequence, computed: int) -> None:
        if computed % SIZE == 0 and computed < self._computed < len(self):
            self._table.crop(self._computed)
            return
        crop(self, computed)

    patch.setattr(TokenSequence, "crop_kv", forgiving)


def _keep_logits_after_a_rewind(patch: pytest.MonkeyPatch) -> None:
    rewind = TokenSequence.rewind_to

    def stale(self: TokenSequence, length: int) -> None:
        logits = self.logits
        rewind(self, length)
        if logits is not None and length == self.computed:
            self._logits = logits

    patch.setattr(TokenSequence, "rewind_to", stale)


def _leak(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockPool, "drop", lambda _self, _blocks: None)


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "a token without KV": _leave_a_token_without_kv,
    "writing into shared blocks": _write_into_shared_blocks,
    "skipping the copy": _skip_the_copy,
    "trusting KV after a failure": _trust_kv_after_a_failure,
    "stale logits": _keep_logits_after_a_rewind,
    "a leak": _leak,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    FAULTS[fault](monkeypatch)
    search = settings(
        max_examples=200,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    with pytest.raises((AssertionError, ExceptionGroup)):
        run_state_machine_as_test(EngineMachine, settings=search)


def test_the_oracle_tells_histories_apart() -> None:
    seen = {fresh(tuple(ids), False) for ids in ([1], [1, 1], [1, 2], [2, 1], [1, 2, 3])}
    assert len(seen) == 5
    assert fresh((1, 2), True) != fresh((2, 1), True)
    assert np.frombuffer(fresh((1,), False), np.float32).shape == (VOCAB,)
