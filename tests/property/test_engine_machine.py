"""Any order of append, compute, generate, rewind, fork, release and failure gives fresh logits."""

import contextlib
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Final

import numpy as np
import pytest
from hypothesis import settings
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

from recollect.engine.decoder import Task
from recollect.engine.engine import Engine
from recollect.engine.pinning import PublicPrefixes
from recollect.engine.sampling import Generator, choose_token
from recollect.engine.sequence import Sequence as TokenSequence
from recollect.errors import MemoryLimitError, OutOfBlocksError, RuntimeFailure, StoreError
from recollect.kv import disk as disk_module
from recollect.kv.blocks import BlockPool, CachedBlock, Siblings, blocks_for
from recollect.kv.disk import DiskStore
from recollect.kv.prefix import PrefixCache
from recollect.kv.record import Buffer, Entry, Identity, Names, chained_key
from recollect.runtime.base import Pace, PassResult, ReferenceRuntime, Row
from recollect.types import SamplingParams, common_prefix_length

VOCAB: Final = 8
SIZE: Final = 4
CONTEXT: Final = 40
NUM_BLOCKS: Final = 16
MOST_PUBLISHED: Final = 2
CHUNK: Final = 6
BLOCK_BYTES: Final = SIZE * 4 * 8
Ids = tuple[int, ...]
Replay = Callable[[type[RuleBasedStateMachine], str], None]
Take = Callable[[int, Buffer], None]
TABLES = st.sampled_from(["blocks", "entries"])
NAMESPACES = st.sampled_from(["", "other", None])
TOKENS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9)


class FailingRuntime(ReferenceRuntime):
    """Fails when told to, after it has written the wrong tokens into the slots."""

    fail_forward = False
    fail_copy = False
    fail_write = False
    _cancel: tuple[int, Task] | None = None

    def cancel_after(self, passes: int, task: Task) -> None:
        self._cancel = (passes, task)

    def forward(self, rows: Sequence[Row]) -> PassResult:
        if self._cancel is not None:
            passes, task = self._cancel
            self._cancel = (passes - 1, task) if passes > 1 else None
            if passes == 1:
                task.cancel()
        if self.fail_forward:
            self.fail_forward = False
            super().forward(
                [replace(row, token_ids=[VOCAB - 1 - t for t in row.token_ids]) for row in rows]
            )
            raise RuntimeFailure("injected while writing")
        return super().forward(rows)

    def write_block(self, block: int, content: memoryview) -> None:
        if self.fail_write:
            self.fail_write = False
            super().write_block(block, memoryview(bytes(content.nbytes)))
            raise RuntimeFailure("injected while restoring")
        super().write_block(block, content)

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
    return bytes(runtime.forward([row]).logits[0].tobytes())


class EngineMachine(RuleBasedStateMachine):
    """
    Generators over one small pool; the dumb model of each is the list of its ids.

    `left` and `seen` are dumb models of the cache: for each namespace the histories that it must
    have while nothing was evicted, and all that it may have. `published` and `ever` are the same of
    what is public.
    """

    whole_blocks_only = False
    whole_tails = False
    generators = Bundle("generators")

    def __init__(self) -> None:
        super().__init__()
        self.runtime = FailingRuntime(
            vocab_size=VOCAB,
            context_length=CONTEXT,
            block_size=SIZE,
            whole_blocks_only=self.whole_blocks_only,
            whole_tails=self.whole_tails,
            pace=Pace(prefill_chunk=CHUNK, shared_chunk=SIZE, most_rows=3),
        )
        self.engine = self._make_engine()
        self.model: dict[Generator, list[int]] = {}
        self.left: defaultdict[str, set[Ids]] = defaultdict(set)
        self.seen: defaultdict[str, set[Ids]] = defaultdict(set)
        self.public = PublicPrefixes(self.engine)
        self.published: list[Ids] = []
        self.ever: set[Ids] = set()
        self.disturbed = False

    def teardown(self) -> None:
        self.runtime.fail_forward = self.runtime.fail_copy = False
        for generator in self.model:
            self.probe(generator)
        for generator in self.model:
            generator.close()
        while self.published:
            self.unpublish()
        assert self.engine.pool.used_blocks == len(self.engine.cache)
        assert self.engine.cache.evictable_blocks == len(self.engine.cache)
        self.engine.close()

    def _make_engine(self) -> Engine:
        return Engine(self.runtime, num_blocks=NUM_BLOCKS, eos_token_ids=[0])

    @initialize(target=generators)
    def first(self) -> Generator:
        return self._born("")

    @rule(target=generators, namespace=NAMESPACES)
    def new(self, namespace: str | None) -> Generator:
        return self._born(namespace)

    def _born(self, namespace: str | None) -> Generator:
        params = SamplingParams(temperature=1.0, seed=1)
        generator = Generator(self.engine, params, namespace=namespace)
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
                with self._counted(generator):
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
        chosen = [one for one in dict.fromkeys(chosen) if self.model[one]]
        try:
            with self._counted(*chosen):
                self.engine.compute([one.sequence for one in chosen])
        except OutOfBlocksError:
            held = {b for one in self.model for b in one.sequence.blocks}
            held |= {cached.block for cached in self.engine.cache.blocks() if cached.pins}
            longest = max(blocks_for(len(self.model[one]), SIZE) for one in chosen)
            assert len(held) + longest + 1 > NUM_BLOCKS, "there was room for each by itself"
        except RuntimeFailure:
            pass
        else:
            assert all(one.sequence.logits is not None for one in chosen)

    @rule(generator=generators, passes=st.integers(1, 2), idle=st.booleans())
    def cancel(self, generator: Generator, passes: int, idle: bool) -> None:
        """A prefill that is given up between its chunks."""
        sequence = generator.sequence
        if not self.model[generator] or sequence.logits is not None:
            return
        self._leaves_tails()
        task = Task(sequence, lambda: False, idle=idle)
        self.runtime.cancel_after(passes, task)
        self.engine.submit(task)
        task.join()
        self._note(generator)

    @rule(generator=generators)
    def park(self, generator: Generator) -> None:
        self._leaves_tail(generator)
        generator.sequence.park()

    @rule(generator=generators, back=st.integers(0, 12))
    def rewind(self, generator: Generator, back: int) -> None:
        length = max(0, len(self.model[generator]) - back)
        if length < generator.sequence.computed:
            self._leaves_tail(generator)
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
        self._leaves_tail(generator)
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

    @rule(
        target=generators,
        generator=generators,
        namespace=NAMESPACES,
        back=st.integers(0, 5),
        ids=TOKENS,
        closes=st.booleans(),
    )
    def say_the_same(
        self,
        generator: Generator,
        namespace: str | None,
        back: int,
        ids: list[int],
        closes: bool,
    ) -> Generator:
        """Begin like another, perhaps in another namespace: what the cache is for."""
        begun = self.model[generator][: max(0, len(self.model[generator]) - back)]
        other = self._born(namespace)
        self.append(other, [*begun, *ids][:CONTEXT])
        if closes:
            self.park(generator)
        self.compute([other])
        return other

    @rule(generator=generators, length=st.integers(0, 6), ids=TOKENS)
    def publish(self, generator: Generator, length: int, ids: list[int]) -> None:
        """Mark what others begin like, or nobody does."""
        marked = (*self.model[generator][:length], *ids)
        if len(self.published) == MOST_PUBLISHED or marked in self.published:
            return
        fails = self.runtime.fail_copy or self.runtime.fail_forward
        self._leaves_tails()
        self.ever.add(marked)
        try:
            self.public.publish(marked)
        except (MemoryLimitError, RuntimeFailure, StoreError):
            pass
        else:
            self.published.append(marked)
        if fails or self.engine.cache.evicted_blocks + self.engine.preemptions > 0:
            self.disturbed = True
        for other in self.model:
            self._note(other)

    @rule()
    def unpublish(self) -> None:
        if self.published:
            assert self.public.unpublish(self.published.pop(0))

    @rule(generator=generators)
    def probe(self, generator: Generator) -> None:
        """Feed the last token once more in a fork, which must not disturb the original."""
        ids = self.model[generator]
        if not ids:
            return
        self._leaves_tails()
        other = generator.sequence.fork()
        other.rewind_to(len(ids) - 1)
        other.append(ids[-1:])
        with tolerated():
            self.engine.compute([other])
        self._compare(other, ids)
        if other.namespace is not None:
            self.seen[other.namespace].add(tuple(ids))
            self.left[other.namespace].add(tuple(ids[: other.computed]))
        other.release()
        self._note(generator)

    @invariant()
    def the_bookkeeping_is_right(self) -> None:
        self.engine.check()

    @invariant()
    def histories_are_the_lists_and_known_logits_are_fresh(self) -> None:
        for generator, ids in self.model.items():
            assert generator.get_sequence() == ids
            self._compare(generator.sequence, ids)

    @contextlib.contextmanager
    def _counted(self, *generators: Generator) -> Iterator[None]:
        """Compare what one sequence costs with the dumb models of the cache."""
        fails = self.runtime.fail_copy or self.runtime.fail_forward
        self._leaves_tails()
        single = generators[0] if len(generators) == 1 else None
        bounds = self._reused_between(single) if single is not None else None
        fed = self.engine.computed_tokens
        try:
            yield
        finally:
            fed = self.engine.computed_tokens - fed
            evicted = self.engine.cache.evicted_blocks + self.engine.preemptions > 0
            if fails or evicted:  # what is lost by that is another's to say
                self.disturbed = True
            for generator in generators:
                self._note(generator)
        if bounds is not None and not fails:
            least, most = bounds
            assert least <= fed, "reused what nobody of this namespace has computed"
            assert self.disturbed or fed <= most, "computed what was in memory"

    def _reused_between(self, generator: Generator) -> tuple[int, int]:
        """Return how many tokens it takes at least and at most to have the logits."""
        sequence, ids = generator.sequence, self.model[generator]
        if sequence.logits is not None:
            return 0, 0
        namespace = sequence.namespace
        # What is public is looked for when a sequence begins.
        public = set(self.published) if sequence.computed < SIZE else set[Ids]()
        least, most = (
            len(ids) - max(sequence.computed, 0 if namespace is None else self._longest(known, ids))
            for known in (
                self.seen[namespace or ""] | self.ever,
                self.left[namespace or ""] | public,
            )
        )
        again = 1  # logits need a forward pass, but after what was read as a prompt
        fewest = 0 if tuple(ids) in self.seen[namespace or ""] else 1
        if self.whole_blocks_only:
            again = (len(ids) - 1) % SIZE + 1
        at_the_end = len(ids) == CONTEXT  # where generating ends without a forward pass
        return 0 if at_the_end else max(fewest, least), most or again

    def _longest(self, known: set[Ids], ids: list[int]) -> int:
        if self.whole_tails and (ends := [one for one in known if tuple(ids[: len(one)]) == one]):
            longest = max(len(one) for one in ends)
            return max(longest, self._longest_cut(known, ids))
        return self._longest_cut(known, ids)

    def _longest_cut(self, known: set[Ids], ids: list[int]) -> int:
        longest = max((common_prefix_length(ids, one) for one in known), default=0)
        return longest // SIZE * SIZE if self.whole_blocks_only else longest

    def _note(self, generator: Generator) -> None:
        """Take note of what was computed: full blocks can be found, and the end of a prompt."""
        sequence, ids = generator.sequence, self.model[generator]
        if sequence.namespace is not None and not sequence.closed:
            done = tuple(ids[: sequence.computed])
            self.seen[sequence.namespace].add(tuple(ids) if self.disturbed else done)
            self.left[sequence.namespace].add(done[: len(done) // SIZE * SIZE])

    def _leaves_tail(self, generator: Generator) -> None:
        sequence = generator.sequence
        if sequence.namespace is not None:
            done = tuple(self.model[generator][: sequence.computed])
            self.seen[sequence.namespace].add(done)
            self.left[sequence.namespace].add(done)

    def _leaves_tails(self) -> None:
        """Take note of what the engine may take from anybody when blocks run short."""
        for generator, ids in self.model.items():
            if generator.sequence.namespace is not None:
                done = tuple(ids[: generator.sequence.computed])
                self.seen[generator.sequence.namespace].add(done)

    def _compare(self, sequence: TokenSequence, ids: list[int]) -> None:
        if sequence.logits is not None:
            assert sequence.logits.tobytes() == fresh(tuple(ids), self.whole_blocks_only)


class WholeBlocksMachine(EngineMachine):
    """The same where only whole blocks can be kept."""

    whole_blocks_only = True


class WholeTailsMachine(WholeBlocksMachine):
    """The same where, besides, one can go on from the end of a prompt or a turn, and nowhere before it."""

    whole_tails = True


class GuessingMachine(EngineMachine):
    """The same where passes are fed guesses, right and wrong ones, which may wait to be judged for long."""

    @rule(
        generator=EngineMachine.generators,
        right=st.integers(0, 5),
        wrong=st.lists(st.integers(0, VOCAB - 1), max_size=5),
    )
    def guess(self, generator: Generator, right: int, wrong: list[int]) -> None:
        """For the pass that computes the last token, whenever that is and whatever was said by then."""
        ids = self.model[generator]
        if not ids or generator.is_done():
            return
        comes = ids[:]
        for _ in range(right):
            logits = np.frombuffer(fresh(tuple(comes), False), np.float32)
            comes.append(
                choose_token(
                    logits,
                    generator.params,
                    history=np.array(comes),
                    reply_start=generator.reply_start,
                    seed=generator.seed,
                )
            )
        guesses = [*comes[len(ids) :], *wrong]
        generator.sequence.draft = guesses[: CONTEXT - len(ids)]

    @rule(
        target=EngineMachine.generators,
        generator=EngineMachine.generators,
        right=st.integers(1, 5),
        count=st.integers(1, 6),
    )
    def guess_and_fork(self, generator: Generator, right: int, count: int) -> Generator:
        """Where only the last token is to be computed, and a part of what was guessed is judged."""
        self.generate(generator, 1)
        self.guess(generator, right, [1, 2, 3, 4])
        self.generate(generator, count)
        return self._fork(generator)

    def _reused_between(self, generator: Generator) -> tuple[int, int]:
        least, most = super()._reused_between(generator)
        return least, most + len(generator.sequence.draft)


class DiskMachine(EngineMachine):
    """
    The same over a disk that blocks go to and come back from, and on which anything may be wrong.

    What memory gave up is on disk, so `disturbed` begins only where something failed.
    """

    def _make_engine(self) -> Engine:
        self.folder = tempfile.mkdtemp()
        store = DiskStore(Path(self.folder) / "kv", budget_bytes=16 << 20)
        return Engine(self.runtime, num_blocks=NUM_BLOCKS, eos_token_ids=[0], store=store)

    def teardown(self) -> None:
        self.runtime.fail_write = False
        try:
            super().teardown()
        finally:
            self.engine.close()
            shutil.rmtree(self.folder)

    @rule()
    def forget_what_is_in_memory_only_for_later(self) -> None:
        """As a restart does: what is used next has to come from disk."""
        assert self.engine.tier is not None
        self.engine.tier.flush()
        with self.engine.lock:
            self.engine.cache.evict(NUM_BLOCKS)

    @rule(
        generator=EngineMachine.generators,
        table=TABLES,
        which=st.integers(0, 60),
        bit=st.integers(0, 4000),
    )
    def flip_a_bit(self, generator: Generator, table: str, which: int, bit: int) -> None:
        """On disk, where what is said again has to come from."""
        assert self.engine.tier is not None
        self.park(generator)
        self.forget_what_is_in_memory_only_for_later()
        env = self.engine.tier.store.env
        with env.writing() as txn:
            items = [(bytes(k), bytearray(v)) for k, v in txn.cursor(env.tables[table])]
            if items:
                key, value = items[which % len(items)]
                value[-1 - bit // 8 % len(value)] ^= 1 << bit % 8
                txn.put(key, bytes(value), db=env.tables[table])
                self.disturbed = True
        self.probe(generator)

    @rule(target=EngineMachine.generators, generator=EngineMachine.generators)
    def say_it_twice(self, generator: Generator) -> Generator:
        """The same tokens after other ones, which is other KV."""
        ids = self.model[generator][:SIZE]
        other = self._born(generator.sequence.namespace)
        if ids:
            self.append(other, ids * 2 + ids[:1])
            self.compute([other])
        return other

    @rule()
    def fail_the_next_restore(self) -> None:
        self.runtime.fail_write = True
        self.disturbed = True


class WholeTailsDiskMachine(DiskMachine, WholeTailsMachine):
    """Whole tails over a disk."""


def tolerated() -> contextlib.suppress:
    """Return a context in which what was planned may go wrong does so in silence."""
    return contextlib.suppress(OutOfBlocksError, RuntimeFailure)


TestEngine = EngineMachine.TestCase
TestEngineWithWholeBlocksOnly = WholeBlocksMachine.TestCase
TestEngineWithADisk = DiskMachine.TestCase
TestEngineWithGuesses = GuessingMachine.TestCase
TestEngineWithWholeTails = WholeTailsMachine.TestCase
TestEngineWithWholeTailsOnADisk = WholeTailsDiskMachine.TestCase


# The machines must be able to fail: each of these faults is planted, and has to be found.


def _leave_a_token_without_kv(patch: pytest.MonkeyPatch) -> None:
    """The classic: a sampled token counts as computed as soon as it is in the history."""
    append = TokenSequence.append

    def forgetful(self: TokenSequence, ids: Sequence[int]) -> None:
        known = self.logits is not None and len(ids) == 1
        append(self, ids)
        if known and self.computed and len(self) % SIZE > 1:  # so that the table still fits
            self.computed = len(self)

    patch.setattr(TokenSequence, "append", forgetful)


def _write_into_shared_blocks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockPool, "is_shared", lambda _self, _block: False)


def _skip_the_copy(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(FailingRuntime, "copy_blocks", lambda _self, _pairs: None)


def _trust_kv_after_a_failure(patch: pytest.MonkeyPatch) -> None:
    """What a failed pass wrote counts as computed up to where it began, copies included."""
    truncate = TokenSequence.truncate
    patch.setattr(TokenSequence, "truncate", lambda self, _: truncate(self, self.computed))


def _keep_logits_after_a_rewind(patch: pytest.MonkeyPatch) -> None:
    rewind = TokenSequence.rewind_to

    def stale(self: TokenSequence, length: int) -> None:
        logits = self.logits
        rewind(self, length)
        if logits is not None and length == self.computed:
            self.logits = logits

    patch.setattr(TokenSequence, "rewind_to", stale)


def _keep_a_stale_slot(patch: pytest.MonkeyPatch) -> None:
    """A rewind that forgets to lower `computed`, for the slot that is written next."""
    rewind, append = TokenSequence.rewind_to, TokenSequence.append
    stale: dict[TokenSequence, int] = {}

    def rewound(self: TokenSequence, length: int) -> None:
        has_more = length < self.computed and length % SIZE > 0
        rewind(self, length)
        if has_more and self.computed == length:
            stale[self] = length

    def appended(self: TokenSequence, ids: Sequence[int]) -> None:
        append(self, ids)
        if stale.pop(self, None) == self.computed < len(self) - 1:
            self.computed += 1

    patch.setattr(TokenSequence, "rewind_to", rewound)
    patch.setattr(TokenSequence, "append", appended)


def _leak(patch: pytest.MonkeyPatch) -> None:
    def truncate(self: TokenSequence, length: int) -> None:
        del self.blocks[blocks_for(length, SIZE) :]
        del self.chain[length // SIZE :]
        self.computed = length

    patch.setattr(TokenSequence, "truncate", truncate)


def _share_across_namespaces(patch: pytest.MonkeyPatch) -> None:
    root = PrefixCache.root
    patch.setattr(PrefixCache, "root", lambda self, _namespace="": root(self, "all"))


def _share_what_is_private(patch: pytest.MonkeyPatch) -> None:
    new = Engine.new_sequence

    def shared(self: Engine, namespace: str | None = "") -> TokenSequence:
        sequence = new(self, namespace or "")
        sequence.namespace = namespace
        return sequence

    patch.setattr(Engine, "new_sequence", shared)


def _find_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(TokenSequence, "reuse", lambda _self: None)


def _forget_the_tail(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(TokenSequence, "leave_tail", lambda _self: None)


def _share_a_wrong_block(patch: pytest.MonkeyPatch) -> None:
    """Blocks are taken for the same where their tokens are, whatever came before."""
    insert = PrefixCache.insert

    def careless(
        self: PrefixCache, after: CachedBlock, ids: Sequence[int], block: int
    ) -> CachedBlock:
        same = (c for c in self.blocks() if c.token_ids == tuple(ids) and len(ids) == SIZE)
        return next(same, None) or insert(self, after, ids, block)

    patch.setattr(PrefixCache, "insert", careless)


def _fork_with_the_blocks_of_guesses(patch: pytest.MonkeyPatch) -> None:
    fork = TokenSequence.fork

    def careless(self: TokenSequence) -> TokenSequence:
        other = fork(self)
        more = self.blocks[len(other.blocks) :]
        self.memory.pool.retain(more)
        other.blocks += more
        return other

    patch.setattr(TokenSequence, "fork", careless)


def _keep_blocks_of_wrong_guesses(patch: pytest.MonkeyPatch) -> None:
    truncate = TokenSequence.truncate

    def careless(self: TokenSequence, length: int) -> None:
        more = self.blocks[blocks_for(length, SIZE) :] if length == self.computed else []
        self.memory.pool.retain(more)
        truncate(self, length)
        self.blocks += more

    patch.setattr(TokenSequence, "truncate", careless)


GUESSING_FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "a fork with the blocks of guesses": _fork_with_the_blocks_of_guesses,
    "keeping blocks of wrong guesses": _keep_blocks_of_wrong_guesses,
}


@pytest.mark.parametrize("fault", GUESSING_FAULTS)
def test_a_planted_fault_of_guesses_is_found(
    fault: str, monkeypatch: pytest.MonkeyPatch, fault_search: Callable[[int], settings]
) -> None:
    GUESSING_FAULTS[fault](monkeypatch)
    with pytest.raises(EXPECTED):
        run_state_machine_as_test(GuessingMachine, settings=fault_search(300))


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "a token without KV": _leave_a_token_without_kv,
    "writing into shared blocks": _write_into_shared_blocks,
    "skipping the copy": _skip_the_copy,
    "trusting KV after a failure": _trust_kv_after_a_failure,
    "a stale slot": _keep_a_stale_slot,
    "stale logits": _keep_logits_after_a_rewind,
    "a leak": _leak,
    "sharing across namespaces": _share_across_namespaces,
    "sharing what is private": _share_what_is_private,
    "finding nothing": _find_nothing,
    "forgetting the tail": _forget_the_tail,
    "sharing a wrong block": _share_a_wrong_block,
}


EXPECTED = (AssertionError, ExceptionGroup, RuntimeFailure)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_by_its_example(
    fault: str, monkeypatch: pytest.MonkeyPatch, replay: Replay
) -> None:
    replay(EngineMachine, fault)
    FAULTS[fault](monkeypatch)
    with pytest.raises(EXPECTED):
        replay(EngineMachine, fault)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(
    fault: str, monkeypatch: pytest.MonkeyPatch, fault_search: Callable[[int], settings]
) -> None:
    FAULTS[fault](monkeypatch)
    with pytest.raises(EXPECTED):
        run_state_machine_as_test(EngineMachine, settings=fault_search(1500))


def _trust_the_disk(patch: pytest.MonkeyPatch) -> None:
    """No checksum, and no look at the key."""

    def trusting(
        _key: bytes, _digest: bytes, _tokens: int, stored: memoryview, _: object
    ) -> object:
        return stored[-BLOCK_BYTES:]

    patch.setattr(disk_module, "unpack_block", trusting)


def _keep_what_a_failed_restore_wrote(patch: pytest.MonkeyPatch) -> None:
    def careless(self: DiskStore, identity: Identity, entries: Sequence[Entry], take: Take) -> int:
        with contextlib.suppress(RuntimeFailure):
            return read(self, identity, entries, take)
        return len(entries)

    read = DiskStore.read
    patch.setattr(DiskStore, "read", careless)


def _find_what_follows_something_else(patch: pytest.MonkeyPatch) -> None:
    """Blocks on disk are told apart by their tokens alone."""
    patch.setattr(disk_module, "chained_key", lambda _parent, ids, _secret: chained_key(b"", ids))
    patch.setattr(Names, "after", lambda _self, _parent, ids: chained_key(b"", ids))


def _share_across_namespaces_on_disk(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Names, "root", lambda self, _: chained_key(self.root_secret, []))


def test_a_tail_that_is_reused_in_part_is_found(
    monkeypatch: pytest.MonkeyPatch, fault_search: Callable[[int], settings]
) -> None:
    def careless(self: Siblings, ids: Ids) -> list[CachedBlock]:
        best, _ = self.nearest(ids)
        return [] if best is None else [best]

    monkeypatch.setattr(Siblings, "parts_of", careless)
    with pytest.raises(EXPECTED):
        run_state_machine_as_test(WholeTailsMachine, settings=fault_search(300))


DISK_FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "trusting the disk": _trust_the_disk,
    "keeping what a failed restore wrote": _keep_what_a_failed_restore_wrote,
    "finding what follows something else": _find_what_follows_something_else,
    "sharing across namespaces on disk": _share_across_namespaces_on_disk,
}


@pytest.mark.parametrize("fault", DISK_FAULTS)
def test_a_planted_fault_of_the_disk_is_found_by_its_example(
    fault: str, monkeypatch: pytest.MonkeyPatch, replay: Replay
) -> None:
    replay(DiskMachine, fault)
    DISK_FAULTS[fault](monkeypatch)
    with pytest.raises(EXPECTED):
        replay(DiskMachine, fault)


@pytest.mark.slow
@pytest.mark.parametrize("fault", DISK_FAULTS)
def test_a_planted_fault_of_the_disk_is_found(
    fault: str, monkeypatch: pytest.MonkeyPatch, fault_search: Callable[[int], settings]
) -> None:
    DISK_FAULTS[fault](monkeypatch)
    with pytest.raises(EXPECTED):
        run_state_machine_as_test(DiskMachine, settings=fault_search(1500))


def test_the_oracle_tells_histories_apart() -> None:
    seen = {fresh(tuple(ids), False) for ids in ([1], [1, 1], [1, 2], [2, 1], [1, 2, 3])}
    assert len(seen) == 5
    assert fresh((1, 2), True) != fresh((2, 1), True)
    assert np.frombuffer(fresh((1,), False), np.float32).shape == (VOCAB,)
