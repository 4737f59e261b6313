"""Any number of threads submit, cancel and fail; each gets what it would get alone."""

import asyncio
import gc
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from recollect.engine import engine as engine_module
from recollect.engine.decoder import Task
from recollect.engine.engine import Engine
from recollect.engine.reply import Stream
from recollect.engine.sampling import Generator
from recollect.engine.scheduler import Scheduler
from recollect.engine.sequence import Sequence as TokenSequence
from recollect.errors import MisuseError, OutOfBlocksError, RecollectError, RuntimeFailure
from recollect.runtime.base import Pace, PassResult, ReferenceRuntime, Row
from recollect.runtime.sequences import common_length
from recollect.types import SamplingParams

WAIT_S = 60  # for what takes milliseconds: a test that would hang fails instead


def ids_of(length: int, seed: int = 0) -> list[int]:
    return [(7 * place + 13 * seed + place * place) % 50 for place in range(length)]


class Talk:
    """A reply of some tokens, generated on the engine's thread."""

    def __init__(
        self, engine: Engine, ids: Sequence[int], count: int, *, namespace: str | None = ""
    ) -> None:
        params = SamplingParams(max_tokens=count, temperature=1.0, seed=3, ignore_eos=True)
        self.generator = Generator(engine, params, namespace=namespace)
        self.generator.append_tokens(ids)
        self.prompt = list(ids)
        sequence = self.generator.sequence
        self.task = Task(sequence, self._on_logits, on_end=sequence.park)
        self.first = threading.Event()
        engine.submit(self.task)

    def _on_logits(self) -> bool:
        self.generator.generate_next_token()
        self.first.set()
        return not self.generator.is_done()

    def tokens(self) -> list[int]:
        assert self.task.join(WAIT_S)
        self.task.wait()
        return self.generator.get_sequence()[len(self.prompt) :]


class Gate:
    """Lets forward passes through one by one, so that a test knows what has happened."""

    def __init__(self, engine: Engine) -> None:
        self.arrived, self.passes = threading.Semaphore(0), threading.Semaphore(0)
        self.rows: list[Sequence[Row]] = []
        self.open = False
        runtime: Any = engine.runtime
        forward = runtime.forward

        def gated(rows: Sequence[Row]) -> PassResult:
            self.rows.append(rows)
            self.arrived.release()
            if not self.open:
                assert self.passes.acquire(timeout=WAIT_S)
            result: PassResult = forward(rows)
            return result

        runtime.forward = gated

    def wait(self) -> None:
        """Wait until a pass has arrived."""
        assert self.arrived.acquire(timeout=WAIT_S)

    def let_all_through(self) -> None:
        self.open = True
        self.passes.release(1000)


small_chunks = pytest.mark.parametrize("pace", [Pace(prefill_chunk=8, shared_chunk=4)], ids=[""])


@pytest.fixture
def gates() -> Iterator[list[Gate]]:
    made: list[Gate] = []
    yield made
    for gate in made:
        gate.let_all_through()


def prompts(count: int) -> list[list[int]]:
    return [ids_of(5 + 7 * (number % 4), number // 2) for number in range(count)]


@pytest.mark.parametrize("at_once", [1, 2, 8])
@pytest.mark.parametrize("whole_blocks_only", [False, True])
@small_chunks
def test_the_same_requests_give_the_same_tokens_alone_and_at_once(
    make_engine: Callable[..., Engine], at_once: int, whole_blocks_only: bool
) -> None:
    oracle = make_engine(whole_blocks_only=whole_blocks_only)
    alone = [Talk(oracle, ids, 12, namespace=None).tokens() for ids in prompts(8)]
    engine = make_engine(num_blocks=256, whole_blocks_only=whole_blocks_only)
    together: list[list[int]] = []
    for start in range(0, 8, at_once):
        talks = [Talk(engine, ids, 12) for ids in prompts(8)[start : start + at_once]]
        together += [talk.tokens() for talk in talks]
        engine.check()
    assert together == alone


def test_replies_share_their_passes(engine: Engine, gates: list[Gate]) -> None:
    gates.append(gate := Gate(engine))
    talks = [Talk(engine, [number, 1], 6) for number in range(4)]
    gate.let_all_through()
    for talk in talks:
        talk.tokens()
    assert engine.forward_passes <= 1 + 2 + 6


@small_chunks
def test_a_long_prompt_does_not_stop_the_replies_of_others(
    engine: Engine, gates: list[Gate]
) -> None:
    gates.append(gate := Gate(engine))
    reply = Talk(engine, [1], 10)
    gate.wait()
    prompt = Talk(engine, ids_of(60), 1)
    gate.let_all_through()
    reply.tokens()
    prompt.tokens()
    beside = [rows for rows in gate.rows if len(rows) == 2]
    assert len(beside) >= 9, "each token of the reply came with a chunk of the prompt"
    assert all(sum(len(row.token_ids) for row in rows) <= 1 + 4 for rows in beside)


@pytest.mark.parametrize("passes", [1, 2, 3])
@small_chunks
def test_what_was_prefilled_before_a_cancel_is_warm_for_the_next(
    engine: Engine, gates: list[Gate], passes: int
) -> None:
    gates.append(gate := Gate(engine))
    talk = Talk(engine, ids_of(40), 5)
    for number in range(passes):
        gate.wait()
        if number + 1 == passes:
            talk.task.cancel()
        gate.passes.release()
    assert talk.tokens() == []
    assert talk.task.state == "cancelled"
    talk.generator.close()
    gate.let_all_through()
    assert engine.warm_tokens(ids_of(40)) == 8 * passes
    fed = engine.computed_tokens
    Talk(engine, ids_of(40), 1).tokens()
    assert engine.computed_tokens - fed == 40 - 8 * passes


@pytest.mark.parametrize("num_blocks", [14, 18, 24])
@small_chunks
def test_a_preempted_reply_is_the_same_as_one_that_was_not(
    make_engine: Callable[..., Engine], gates: list[Gate], num_blocks: int
) -> None:
    oracle = make_engine()
    alone = [Talk(oracle, ids_of(9, seed), 30, namespace=None).tokens() for seed in range(4)]
    engine = make_engine(num_blocks=num_blocks)
    gates.append(gate := Gate(engine))
    talks = [Talk(engine, ids_of(9, seed), 30) for seed in range(4)]
    gate.let_all_through()
    assert [talk.tokens() for talk in talks] == alone
    assert engine.preemptions > 0
    engine.check()
    for talk in talks:
        talk.generator.close()
    assert engine.pool.used_blocks == engine.cache.evictable_blocks == len(engine.cache)


@small_chunks
def test_only_what_cannot_fit_runs_out_of_blocks(make_engine: Callable[..., Engine]) -> None:
    alone = [Talk(make_engine(), ids_of(6, seed), 10, namespace=None).tokens() for seed in range(3)]
    engine = make_engine(num_blocks=10)
    large = Talk(engine, ids_of(60, 9), 5)
    small = [Talk(engine, ids_of(6, seed), 10) for seed in range(3)]
    with pytest.raises(OutOfBlocksError):
        large.tokens()
    assert [talk.tokens() for talk in small] == alone
    engine.check()


def test_a_failing_pass_hurts_only_the_one_whose_row_fails(
    engine: Engine, gates: list[Gate], fresh_logits: Callable[..., Any]
) -> None:
    gates.append(gate := Gate(engine))
    runtime: Any = engine.runtime
    gated = runtime.forward

    def poisoned(rows: Sequence[Row]) -> PassResult:
        if any(49 in row.token_ids for row in rows):
            raise RuntimeFailure("injected")
        result: PassResult = gated(rows)
        return result

    runtime.forward = poisoned
    sequences = [engine.new_sequence() for _ in range(3)]
    for sequence, ids in zip(sequences, ([1, 2, 3], [4, 49, 5], [6, 7, 8]), strict=True):
        sequence.append(ids)
    tasks = [Task(sequence, lambda: False) for sequence in sequences]
    with engine.lock:
        for task in tasks:
            engine.submit(task)
    gate.let_all_through()
    for task in tasks:
        assert task.join(WAIT_S)
    assert [task.state for task in tasks] == ["done", "failed", "done"]
    with pytest.raises(RuntimeFailure, match="injected"):
        tasks[1].wait()
    for sequence in (sequences[0], sequences[2]):
        assert np.array_equal(sequence.logits, fresh_logits(sequence.token_ids))  # type: ignore[arg-type]
    engine.check()


def test_an_exception_in_a_callback_ends_its_own_task_only(engine: Engine) -> None:
    def fail() -> bool:
        raise ZeroDivisionError

    sequence = engine.new_sequence()
    sequence.append([1, 2, 3])
    bad = Task(sequence, fail)
    good = Talk(engine, ids_of(9), 8)
    engine.submit(bad)
    assert len(good.tokens()) == 8
    with pytest.raises(ZeroDivisionError):
        bad.wait()
    assert len(Talk(engine, ids_of(9), 3).tokens()) == 3
    engine.check()


def test_an_exception_at_the_end_leaves_nobody_waiting(engine: Engine) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    sequence = engine.new_sequence()
    sequence.append([1, 2, 3])
    bad = Task(sequence, lambda: False, on_end=fail)
    engine.submit(bad)
    assert bad.join(WAIT_S)
    with pytest.raises(ZeroDivisionError):
        bad.wait()
    assert len(Talk(engine, ids_of(9), 3).tokens()) == 3


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_in_the_engine_leaves_nobody_waiting(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    talks = [Talk(engine, ids_of(9, seed), 100) for seed in range(3)]
    for talk in talks:
        assert talk.first.wait(WAIT_S)

    def broken(_: Scheduler) -> None:
        raise AssertionError("planted")

    monkeypatch.setattr(Scheduler, "plan", broken)
    for talk in talks:
        assert talk.task.join(WAIT_S)
        with pytest.raises(RuntimeFailure, match="planted"):
            talk.task.wait()
    with pytest.raises(RuntimeFailure, match="met a bug"):
        engine.compute([appended(engine, [1])])


def appended(engine: Engine, ids: list[int]) -> TokenSequence:
    sequence = engine.new_sequence()
    sequence.append(ids)
    return sequence


def test_closing_ends_what_is_under_way_and_says_so(engine: Engine, gates: list[Gate]) -> None:
    gates.append(gate := Gate(engine))
    talk = Talk(engine, ids_of(9), 100)
    waiting = appended(engine, [1, 2, 3])
    raised: list[BaseException] = []

    def wait() -> None:
        try:
            engine.compute([waiting])
        except MisuseError as error:
            raised.append(error)

    gate.wait()
    caller, closer = threading.Thread(target=wait), threading.Thread(target=engine.close)
    caller.start()
    while waiting not in [task.sequence for task in engine.tasks()]:
        pass
    closer.start()
    while not all(task.cancelled for task in engine.tasks()):
        pass
    gate.let_all_through()
    for thread in (caller, closer):
        thread.join(WAIT_S)
        assert not thread.is_alive()
    assert talk.task.state == "cancelled"
    assert len(raised) == 1
    assert waiting.token_ids == [1, 2, 3]


def working_threads() -> set[threading.Thread]:
    """Return the threads of engines."""
    return {thread for thread in threading.enumerate() if thread.name == "recollect"}


def test_without_work_the_thread_ends_and_the_next_work_starts_another(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "LINGER_S", 0.0)
    before = working_threads()
    for _ in range(3):
        Talk(engine, ids_of(9), 3).tokens()
        for thread in working_threads() - before:
            thread.join(WAIT_S)
        assert working_threads() <= before
    assert len(Talk(engine, ids_of(9), 3).tokens()) == 3


@pytest.mark.slow
def test_an_engine_that_is_dropped_goes_without_being_closed(
    make_engine: Callable[..., Engine], faults: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "LINGER_S", 0.0)
    before = working_threads()
    engine = Engine(type(make_engine().runtime)(  # type: ignore[call-arg]
        faults,
        vocab_size=50,
        context_length=64,
        block_size=4,
        whole_blocks_only=False,
    ), num_blocks=8)  # fmt: skip
    talk = Talk(engine, [1, 2, 3], 4)
    talk.tokens()
    for thread in working_threads() - before:
        thread.join(WAIT_S)
    gone = weakref.ref(engine)
    del engine, talk
    gc.collect()
    assert gone() is None


@pytest.mark.slow
def test_a_forgotten_sequence_is_not_kept_alive_by_the_thread(engine: Engine) -> None:
    sequence = appended(engine, [1] * 9)
    engine.compute([sequence])
    gone = weakref.ref(sequence)
    del sequence
    engine.check()  # which waits for the pass under way
    gc.collect()
    assert gone() is None


def test_an_interrupt_in_a_waiting_caller_leaves_the_sequence_usable(
    engine: Engine,
    gates: list[Gate],
    fresh_logits: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gates.append(gate := Gate(engine))
    sequence = appended(engine, ids_of(9))

    def interrupted(_: Task) -> None:
        gate.wait()
        gate.passes.release()
        raise KeyboardInterrupt

    with monkeypatch.context() as planted:
        planted.setattr(Task, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.compute([sequence])
    assert engine.tasks() == []
    engine.check()
    gate.let_all_through()
    sequence.append([1])
    engine.compute([sequence])
    assert np.array_equal(sequence.logits, fresh_logits([*ids_of(9), 1]))  # type: ignore[arg-type]


def test_a_sequence_that_is_worked_on_is_refused_and_free_afterwards(
    engine: Engine, gates: list[Gate]
) -> None:
    gates.append(gate := Gate(engine))
    sequence = appended(engine, ids_of(9))
    task = Task(sequence, lambda: False)
    engine.submit(task)
    with pytest.raises(MisuseError, match="worked on already"):
        engine.compute([sequence])
    gate.let_all_through()
    task.wait()
    engine.compute([sequence])


@small_chunks
def test_idle_work_gives_way_and_is_done_in_the_end(engine: Engine, gates: list[Gate]) -> None:
    gates.append(gate := Gate(engine))
    idle = Task(appended(engine, ids_of(40)), lambda: False, idle=True)
    engine.submit(idle)
    gate.wait()
    work = Talk(engine, ids_of(5, 1), 3)
    gate.let_all_through()
    work.tokens()
    assert not idle.join(0) or idle.state == "done"
    idle.wait()
    lengths = [[len(row.token_ids) for row in rows] for rows in gate.rows]
    assert lengths == [[8], [5], [1], [1], [8], [8], [8], [8]]


@pytest.mark.parametrize("whole_blocks_only", [False, True])
@small_chunks
def test_eight_threads_in_a_small_pool_are_right_and_leak_nothing(
    make_engine: Callable[..., Engine], fresh_logits: Callable[..., Any], whole_blocks_only: bool
) -> None:
    engine = make_engine(num_blocks=60, whole_blocks_only=whole_blocks_only)
    wrong: list[object] = []

    def work(number: int) -> None:
        try:
            for turn in range(6):
                name = "ab"[number % 2]
                talk = Talk(engine, ids_of(8 + 5 * turn, number % 3), 6 + number, namespace=name)
                if (number + turn) % 4 == 0:
                    talk.first.wait(WAIT_S)
                    talk.task.cancel()
                talk.tokens()
                sequence = talk.generator.sequence
                sequence.rewind_to(len(sequence) - turn)
                fork = sequence.fork()
                fork.append([number, turn])
                engine.compute([fork])
                expected = fresh_logits(fork.token_ids, whole_blocks_only=whole_blocks_only)
                if not np.array_equal(fork.logits, expected):  # type: ignore[arg-type]
                    wrong.append(fork.token_ids)
                fork.release()
                talk.generator.close()
        except (RecollectError, AssertionError) as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        engine.check()
        threads[0].join(0.002)  # so that the checks do not take all the time
    assert wrong == []
    engine.check()
    assert engine.cache.evicted_blocks > 0
    assert engine.pool.used_blocks == engine.cache.evictable_blocks == len(engine.cache)


def test_a_callback_that_waits_for_the_engine_is_refused_and_not_stuck(engine: Engine) -> None:
    outer, inner = engine.new_sequence(), engine.new_sequence()
    outer.append([1, 2, 3])
    inner.append([4, 5, 6])

    def wait_for_another() -> bool:
        engine.compute([inner])
        return False

    task = Task(outer, wait_for_another)
    engine.submit(task)
    with pytest.raises(MisuseError, match="callback"):
        task.wait()
    engine.compute([inner])
    assert inner.logits is not None


def test_a_thread_that_ends_while_its_engine_is_closed_is_no_error() -> None:
    """Without work it ends by itself, and takes itself away: whoever looks again finds none."""

    class Vanishing(Engine):
        is_closing = False
        _found: threading.Thread | None = None

        @property
        def _thread(self) -> threading.Thread | None:
            found = self._found
            if self.is_closing and threading.current_thread() is threading.main_thread():
                self._found = None
            return found

        @_thread.setter
        def _thread(self, thread: threading.Thread | None) -> None:
            self._found = thread

    engine = Vanishing(
        ReferenceRuntime(vocab_size=50, context_length=64, block_size=4), num_blocks=4
    )
    engine.wait_until_warm()
    engine.is_closing = True
    engine.close()
    with pytest.raises(MisuseError):
        engine.start()


def test_a_callback_cannot_close_its_engine_and_is_told(engine: Engine) -> None:
    sequence = engine.new_sequence()
    sequence.append([1, 2])

    def closing() -> bool:
        engine.close()
        return False

    task = Task(sequence, closing)
    engine.submit(task)
    with pytest.raises(MisuseError, match="callback"):
        task.wait()
    engine.check()
    engine.close()


def streaming(sequence: TokenSequence, on_logits: Callable[[], bool], stream: Stream) -> Task:
    """Return a task that puts results into a stream."""
    return Task(sequence, on_logits, hand_over=stream.hand_over, on_end=stream.close)


def counting(engine: Engine, count: int) -> tuple[Task, Stream]:
    """Return a task whose results are the numbers below *count*, and what they are read from."""
    sequence, said, stream = appended(engine, ids_of(9)), list[int](), Stream()

    def on_logits() -> bool:
        stream.put(len(said))
        said.append(len(said))
        sequence.append([1])
        return len(said) < count

    return streaming(sequence, on_logits, stream), stream


async def read(stream: Stream, most: int) -> list[int]:
    results: list[int] = []
    async for result in stream:
        results.append(result)
        if len(results) == most:
            break
    return results


@pytest.mark.parametrize("late", [False, True])
def test_a_thread_reads_all_results_of_a_task_and_then_the_end(engine: Engine, late: bool) -> None:
    task, stream = counting(engine, 5)
    engine.submit(task)
    if late:
        task.wait()
    assert list(stream) == [0, 1, 2, 3, 4]
    assert list(stream) == []


def test_two_readers_share_the_results_and_both_come_to_the_end(engine: Engine) -> None:
    task, stream = counting(engine, 50)
    read_by: list[list[int]] = [[], []]

    def read_into(results: list[int]) -> None:
        results.extend(stream)

    readers = [threading.Thread(target=read_into, args=[one], daemon=True) for one in read_by]
    for reader in readers:
        reader.start()
    engine.submit(task)
    for reader in readers:
        reader.join(WAIT_S)
        assert not reader.is_alive()
    assert sorted(read_by[0] + read_by[1]) == list(range(50))


def test_several_threads_hand_over_to_one_reader_and_nothing_is_lost() -> None:
    """As the tasks of an engine elsewhere do, where one reader waits for whichever has more."""
    stream, interval = Stream(), sys.getswitchinterval()

    def give(first: int) -> None:
        for number in range(first, first + 5000):
            stream.put(number)
            stream.hand_over()

    threads = [threading.Thread(target=give, args=[5000 * number]) for number in range(8)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
    finally:
        sys.setswitchinterval(interval)
    stream.close()
    assert sorted(stream) == list(range(40_000))


@pytest.mark.parametrize("late", [False, True])
def test_an_event_loop_reads_what_a_thread_would(engine: Engine, late: bool) -> None:
    counts = [counting(engine, 5) for _ in range(3)]

    async def read_all() -> list[list[int]]:
        return await asyncio.wait_for(
            asyncio.gather(*(read(stream, 9) for _, stream in counts)), WAIT_S
        )

    for task, _ in counts:
        engine.submit(task)
        if late:
            task.wait()
    assert asyncio.run(read_all()) == [[0, 1, 2, 3, 4]] * 3
    assert asyncio.run(read(counts[0][1], 9)) == []


def test_a_reader_may_stop_and_another_one_goes_on(engine: Engine, gates: list[Gate]) -> None:
    gates.append(gate := Gate(engine))
    task, stream = counting(engine, 5)
    engine.submit(task)
    gate.wait()
    for _ in range(2):
        gate.passes.release()
        gate.wait()
    assert asyncio.run(read(stream, 1)) == [0], "its loop is closed while the engine goes on"
    gate.let_all_through()
    assert list(stream) == [1, 2, 3, 4]
    task.wait()
    assert task.state == "done"


def test_results_before_a_failure_are_read_and_the_failure_is_told(engine: Engine) -> None:
    stream = Stream()

    def on_logits() -> bool:
        stream.put("a")
        raise RuntimeFailure("planted")

    task = streaming(appended(engine, ids_of(9)), on_logits, stream)
    engine.submit(task)
    assert list(stream) == ["a"]
    with pytest.raises(RuntimeFailure, match="planted"):
        task.wait()


@pytest.mark.slow
def test_a_history_can_be_read_while_the_engine_appends_to_it(
    make_engine: Callable[..., Engine],
) -> None:
    """A server tells what a prompt has cost while the reply grows: reading must not stop appending."""
    length, more = 100_000, 300
    engine = make_engine(context_length=length + more)
    growing, other = engine.new_sequence(), engine.new_sequence()
    for one in (growing, other):
        one.append([1] * length)
    ended = threading.Event()
    lengths: list[int] = []

    def read() -> None:
        while not ended.is_set():
            lengths.append(common_length(growing.history, other.history))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        while not lengths and reader.is_alive():
            ended.wait(0.001)
        for _ in range(more):
            growing.append([2])
            ended.wait(0.0001)
    finally:
        ended.set()
        reader.join()
    assert set(lengths) == {length}
