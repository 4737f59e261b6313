"""What a task needs room for is what would have to be allocated, and nothing that is there already."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from recollect.engine.decoder import Task
from recollect.engine.engine import Engine
from recollect.engine.sequence import Sequence as TokenSequence
from recollect.runtime.base import Logits, PassResult, Row

WAIT_S = 60  # for what takes milliseconds: a test that would hang fails instead


def ids_of(length: int, seed: int = 0) -> list[int]:
    return [(7 * place + 13 * seed + place * place) % 50 for place in range(length)]


def prompt(engine: Engine, ids: Sequence[int], namespace: str = "") -> TokenSequence:
    sequence = engine.new_sequence(namespace)
    sequence.append(ids)
    return sequence


def talk(sequence: TokenSequence, tokens: int, *, on_first: Callable[[], Any] = int) -> Task:
    """Return a task that adds some tokens to a sequence, which holds its blocks to the end."""
    said: list[int] = []

    def on_logits() -> bool:
        if not said:
            on_first()
        said.append(len(said))
        sequence.append([len(said)])
        return len(said) < tokens

    return Task(sequence, on_logits, on_end=sequence.park)


def run_together(engine: Engine, tasks: Sequence[Task]) -> list[int]:
    """Submit tasks so that they may begin in one pass; return how many rows each pass had."""
    rows_of_passes: list[int] = []
    runtime: Any = engine.runtime
    forward = runtime.forward

    def counting(rows: Sequence[Row]) -> PassResult:
        rows_of_passes.append(len(rows))
        result: PassResult = forward(rows)
        return result

    runtime.forward = counting
    with engine.lock:
        for task in tasks:
            engine.submit(task)
    for task in tasks:
        assert task.join(WAIT_S)
        assert task.state == "done"
    engine.check()
    return rows_of_passes


def test_forks_run_together_where_only_what_they_add_needs_room(
    make_engine: Callable[..., Engine],
) -> None:
    """Their history is there already: each takes a few blocks, and not twenty more."""
    engine = make_engine(num_blocks=40)
    trunk = prompt(engine, ids_of(80))
    engine.compute([trunk])
    forks = [trunk.fork() for _ in range(4)]
    for number, fork in enumerate(forks):
        fork.append([number])
    assert run_together(engine, [talk(fork, 8) for fork in forks]) == [4] * 8
    assert engine.preemptions == 0


def test_prompts_join_one_that_runs_where_that_holds_their_beginning(
    make_engine: Callable[..., Engine],
) -> None:
    engine = make_engine(num_blocks=40)
    later = [talk(prompt(engine, [*ids_of(80), number]), 8) for number in range(3)]

    def bring_others() -> None:
        for task in later:
            engine.submit(task)

    first = talk(prompt(engine, ids_of(80)), 30, on_first=bring_others)
    rows = run_together(engine, [first])
    for task in later:
        assert task.join(WAIT_S)
    assert max(rows) == 4
    assert len(rows) == 30
    assert engine.preemptions == 0


def test_what_the_cache_alone_holds_counts_as_room_that_is_needed(
    make_engine: Callable[..., Engine],
) -> None:
    """Whoever takes blocks over from the cache leaves none there to evict for others."""
    engine = make_engine(num_blocks=21)
    for seed in range(2):
        warm = prompt(engine, ids_of(40, seed))
        engine.compute([warm])
        warm.release()
    talks = [talk(prompt(engine, ids_of(40, seed)), 4) for seed in range(2)]
    assert max(run_together(engine, talks)) == 1
    assert engine.preemptions == 0


def test_a_prompt_waits_for_room_that_one_which_runs_has_not_taken_yet(
    make_engine: Callable[..., Engine],
) -> None:
    engine = make_engine(num_blocks=16)
    talks = [talk(prompt(engine, ids_of(40, seed)), 4) for seed in range(2)]
    assert max(run_together(engine, talks)) == 1
    assert engine.preemptions == 0


def test_memory_that_one_namespace_has_filled_is_shared_with_the_next(
    make_engine: Callable[..., Engine], fresh_logits: Callable[..., Logits]
) -> None:
    engine = make_engine(num_blocks=44)
    passes: list[int] = []
    modest = prompt(engine, ids_of(30, 9), "b")
    late = talk(modest, 3, on_first=lambda: passes.append(engine.forward_passes))

    def bring_late() -> None:
        passes.append(engine.forward_passes)
        engine.submit(late)

    full = [prompt(engine, ids_of(40, seed), "a") for seed in range(4)]
    flood = [talk(full[0], 4, on_first=bring_late), *(talk(one, 4) for one in full[1:])]
    run_together(engine, flood)
    assert late.join(WAIT_S)
    assert passes[1] - passes[0] == 1
    assert engine.preemptions > 0
    for sequence in (*full, modest):
        engine.compute([sequence])
        assert sequence.logits is not None
        assert np.allclose(sequence.logits, fresh_logits(sequence.token_ids), atol=1e-4)
        sequence.release()
    engine.check()
