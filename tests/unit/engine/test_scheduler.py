"""Who is fed in the next pass, and how much: decisions over tasks, without any forward pass."""

from collections.abc import Callable
from typing import Any

import pytest

from recollect.engine import scheduler as scheduler_module
from recollect.engine.audit import check_scheduler
from recollect.engine.decoder import Task
from recollect.engine.engine import Engine
from recollect.engine.scheduler import Scheduler
from recollect.engine.sequence import FeedPlan
from recollect.runtime.base import Pace

PACE = Pace(prefill_chunk=32, shared_chunk=8)


@pytest.fixture
def scheduler() -> Scheduler:
    return Scheduler(4, PACE)


@pytest.fixture
def task_of(engine: Engine) -> Callable[..., Task]:
    """Return a maker of tasks on sequences that nobody computes."""

    def make(ids: list[int], *, namespace: str = "", idle: bool = False) -> Task:
        sequence = engine.new_sequence(namespace)
        sequence.append(ids)
        return Task(sequence, lambda: False, idle=idle)

    return make


def ids_of(length: int, seed: int = 0) -> list[int]:
    return [(7 * place + 13 * seed + place * place) % 50 for place in range(length)]


def admitted(scheduler: Scheduler, *tasks: Task, fits: Any = lambda _: True) -> list[Task]:
    for task in tasks:
        scheduler.add(task)
    scheduler.admit(fits)
    check_scheduler(scheduler)
    return scheduler.running


def fed(scheduler: Scheduler) -> dict[Task, FeedPlan]:
    chunks = scheduler.plan()
    scheduler.feed(chunks)
    check_scheduler(scheduler)
    return chunks


def test_nothing_to_do_is_an_empty_pass(scheduler: Scheduler) -> None:
    scheduler.admit(lambda _: True)
    assert fed(scheduler) == {}


def test_all_that_lack_one_token_are_fed_together(
    scheduler: Scheduler, task_of: Callable[..., Task]
) -> None:
    tasks = [task_of([number]) for number in range(5)]
    admitted(scheduler, *tasks)
    assert fed(scheduler) == {task: FeedPlan(0, 1) for task in tasks}


def test_alone_a_prompt_gets_a_large_chunk_and_beside_a_reply_a_small_one(
    scheduler: Scheduler, task_of: Callable[..., Task]
) -> None:
    long = task_of(ids_of(100))
    admitted(scheduler, long)
    assert fed(scheduler) == {long: FeedPlan(0, 32)}
    reply = task_of([3])
    admitted(scheduler, reply)
    assert fed(scheduler) == {long: FeedPlan(0, 8), reply: FeedPlan(0, 1)}


def test_a_block_larger_than_a_chunk_is_fed_all_the_same(task_of: Callable[..., Task]) -> None:
    scheduler = Scheduler(64, PACE)
    long = task_of(ids_of(100))
    admitted(scheduler, long)
    assert fed(scheduler) == {long: FeedPlan(0, 64)}


@pytest.mark.parametrize("chunk", [4, 5, 6, 7, 8, 11])
def test_a_chunk_ends_with_a_full_block(task_of: Callable[..., Task], chunk: int) -> None:
    scheduler = Scheduler(4, Pace(prefill_chunk=chunk))
    task = task_of(ids_of(50))
    admitted(scheduler, task)
    assert fed(scheduler) == {task: FeedPlan(0, chunk // 4 * 4)}


def test_what_is_left_of_the_chunk_goes_to_the_next_prompt(
    scheduler: Scheduler, task_of: Callable[..., Task]
) -> None:
    first, second, third = (task_of(ids_of(length, length)) for length in (10, 50, 50))
    admitted(scheduler, first, second, third)
    # 22 are left after the first; two of them are no block.
    assert fed(scheduler) == {first: FeedPlan(0, 10), second: FeedPlan(0, 20)}


def test_namespaces_take_turns_however_many_prompts_one_has(
    scheduler: Scheduler, task_of: Callable[..., Task]
) -> None:
    greedy = [task_of(ids_of(90, seed), namespace="a") for seed in range(4)]
    modest = task_of(ids_of(90, 9), namespace="b")
    admitted(scheduler, *greedy, modest)
    served = [next(iter(fed(scheduler))).namespace for _ in range(6)]
    assert served == ["a", "b", "a", "b", "a", "b"]


def test_places_go_to_the_namespace_that_has_the_fewest(
    scheduler: Scheduler, task_of: Callable[..., Task]
) -> None:
    greedy = [task_of([seed, 1], namespace="a") for seed in range(20)]
    modest = task_of([7, 7], namespace="b")
    running = admitted(scheduler, *greedy, modest)
    assert running.index(modest) == 1
    assert len(running) == PACE.most_rows
    assert len(scheduler.waiting) == 21 - PACE.most_rows


def test_in_a_namespace_the_first_to_come_is_the_first_to_run(
    scheduler: Scheduler, task_of: Callable[..., Task]
) -> None:
    tasks = [task_of([number, 1]) for number in range(20)]
    assert admitted(scheduler, *tasks) == tasks[: PACE.most_rows]


def test_a_prompt_waits_while_another_computes_the_same_tokens(
    scheduler: Scheduler, task_of: Callable[..., Task]
) -> None:
    first, same, longer, other = (
        task_of(ids) for ids in (ids_of(10), ids_of(10), ids_of(14), ids_of(10, 3))
    )
    admitted(scheduler, first, same, longer, other)
    assert fed(scheduler) == {first: FeedPlan(0, 10), other: FeedPlan(0, 10)}


def test_a_prompt_does_not_wait_for_another_namespace_or_for_a_private_one(
    scheduler: Scheduler, task_of: Callable[..., Task], engine: Engine
) -> None:
    private = engine.new_sequence(namespace=None)
    private.append(ids_of(10))
    tasks = [task_of(ids_of(10), namespace=name) for name in "ab"]
    tasks.append(Task(private, lambda: False))
    admitted(scheduler, *tasks)
    assert set(fed(scheduler)) == set(tasks)


def test_idle_work_runs_only_alone_and_gives_way(
    scheduler: Scheduler, task_of: Callable[..., Task]
) -> None:
    idle, second = task_of(ids_of(9), idle=True), task_of(ids_of(9, 1), idle=True)
    assert admitted(scheduler, idle, second) == [idle]
    work = task_of(ids_of(9, 2))
    assert admitted(scheduler, work) == [work]
    assert list(scheduler.waiting) == [idle, second]
    scheduler.end(work, "done")
    assert admitted(scheduler) == [idle]
    scheduler.end(idle, "done")
    assert admitted(scheduler) == [second]


def test_a_task_that_does_not_fit_waits_unless_it_is_alone(
    scheduler: Scheduler, task_of: Callable[..., Task]
) -> None:
    large, small = task_of(ids_of(50)), task_of([1])
    assert admitted(scheduler, large, small, fits=lambda task: task is small) == [large, small]
    later = task_of(ids_of(50, 1))
    assert admitted(scheduler, later, fits=lambda task: task is small) == [large, small]
    assert list(scheduler.waiting) == [later]


def test_the_one_that_is_preempted_is_the_next_to_run(
    scheduler: Scheduler, task_of: Callable[..., Task]
) -> None:
    first, second, third = (task_of([number, 1]) for number in range(3))
    admitted(scheduler, first, second)
    scheduler.preempt(second)
    scheduler.add(third)
    check_scheduler(scheduler)
    assert list(scheduler.waiting) == [second, third]
    assert scheduler.tasks() == [first, second, third]


def test_known_logits_are_fed_nothing(
    scheduler: Scheduler, task_of: Callable[..., Task], engine: Engine
) -> None:
    task = task_of([1, 2, 3])
    engine.compute([task.sequence])
    admitted(scheduler, task)
    assert fed(scheduler) == {}


def test_check_finds_a_task_that_is_there_twice(
    scheduler: Scheduler, task_of: Callable[..., Task]
) -> None:
    task = task_of([1])
    admitted(scheduler, task)
    scheduler.add(task)
    with pytest.raises(AssertionError, match="twice"):
        check_scheduler(scheduler)


def test_check_finds_idle_work_beside_other_work(
    scheduler: Scheduler, task_of: Callable[..., Task]
) -> None:
    scheduler.running += [task_of([1]), task_of([2], idle=True)]
    with pytest.raises(AssertionError, match="idle"):
        check_scheduler(scheduler)


def test_whoever_has_nothing_running_gets_the_place_of_the_newest_of_whoever_has_the_most(
    scheduler: Scheduler, task_of: Callable[..., Task]
) -> None:
    greedy = [task_of([seed, 1], namespace="a") for seed in range(PACE.most_rows + 4)]
    other = task_of([8, 8], namespace="b")
    admitted(scheduler, *greedy, other)
    parked = scheduler.running[-1]
    modest = task_of([7, 7], namespace="c")
    assert admitted(scheduler, modest)[-1] is modest
    assert parked.namespace == "a"
    assert scheduler.waiting[0] is parked
    assert {task.namespace for task in scheduler.running} == {"a", "b", "c"}
    assert (len(scheduler.running), scheduler.preemptions) == (PACE.most_rows, 1)


def test_nobody_makes_way_for_a_second_reply_or_where_each_has_one(
    scheduler: Scheduler, task_of: Callable[..., Task]
) -> None:
    many = [task_of([seed, 1], namespace=f"key {seed}") for seed in range(PACE.most_rows)]
    admitted(scheduler, *many)
    assert admitted(scheduler, task_of([7, 7], namespace="late")) == many
    scheduler.end(many[-1], "done")
    (late,) = scheduler.waiting
    second = task_of([8, 8], namespace="key 0")
    assert admitted(scheduler, second) == [*many[:-1], late]
    assert list(scheduler.waiting) == [second]
    assert scheduler.preemptions == 0


def test_who_lacks_memory_makes_those_with_the_most_wait_until_it_is_there(
    scheduler: Scheduler, task_of: Callable[..., Task]
) -> None:
    greedy = [task_of([seed, 1], namespace="a") for seed in range(5)]
    admitted(scheduler, *greedy)
    modest = task_of([7, 7], namespace="b")
    running = admitted(
        scheduler, modest, fits=lambda task: task is modest and len(scheduler.running) <= 2
    )
    assert running == [*greedy[:2], modest]
    assert list(scheduler.waiting) == greedy[2:]


def test_a_prompt_of_somebody_new_waits_for_none_of_somebody_who_sends_many(
    scheduler: Scheduler, task_of: Callable[..., Task]
) -> None:
    greedy = [task_of(ids_of(90, seed), namespace="a") for seed in range(8)]
    admitted(scheduler, *greedy)
    for _ in range(20):
        fed(scheduler)
    modest = task_of(ids_of(120, 9), namespace="b")
    admitted(scheduler, modest)
    assert [next(iter(fed(scheduler))) for _ in range(4)] == [modest] * 4


def test_who_was_quiet_overtakes_others_by_no_more_than_the_credit(
    scheduler: Scheduler, task_of: Callable[..., Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler_module, "MOST_CREDIT", 96)
    greedy = [task_of(ids_of(90, seed), namespace="a") for seed in range(4)]
    admitted(scheduler, *greedy)
    for _ in range(20):
        fed(scheduler)
    modest = [task_of(ids_of(90, 9 + seed), namespace="b") for seed in range(4)]
    admitted(scheduler, *modest)
    served = [next(iter(fed(scheduler))).namespace for _ in range(9)]
    assert served == ["b", "b", "b", "a", "b", "a", "b", "a", "b"]
