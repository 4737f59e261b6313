"""A prompt that was read is not read again for another reply, and what is kept for that is bounded."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from recollect.engine import prompt_ends
from recollect.engine.decoder import Task
from recollect.engine.engine import Engine
from recollect.engine.prompt_ends import PromptEnds
from recollect.engine.sequence import Sequence
from recollect.kv.blocks import CachedBlock
from recollect.runtime.base import Logits

PROMPT = [3, 1, 4, 1, 5, 9]


def asked(engine: Engine, ids: list[int], namespace: str | None = "") -> tuple[int, Sequence]:
    """Return how many tokens it took to have the logits after a prompt, and its sequence."""
    sequence, before = engine.new_sequence(namespace), engine.computed_tokens
    sequence.append(ids)
    engine.compute([sequence])
    engine.check()
    return engine.computed_tokens - before, sequence


def same(sequence: Sequence, expected: Logits) -> bool:
    return sequence.logits is not None and np.array_equal(sequence.logits, expected)


@pytest.mark.parametrize("length", [2, 4, 6, 8])  # blocks have four tokens
def test_another_reply_to_a_prompt_reads_nothing(
    engine: Engine, fresh_logits: Callable[..., Any], length: int
) -> None:
    prompt = [*PROMPT, 2, 6][:length]
    _, first = asked(engine, prompt)
    first.append([7])
    engine.compute([first])
    first.rewind_to(length)
    assert first.logits is None
    fed = engine.computed_tokens
    engine.compute([first])
    again, other = asked(engine, prompt)
    assert (engine.computed_tokens - fed, again) == (0, 0)
    for one in (first, other):
        assert same(one, fresh_logits(prompt))
        one.append([8])
        engine.compute([one])
        assert same(one, fresh_logits([*prompt, 8]))
        one.release()


def test_it_is_that_prompt_of_that_namespace_alone(engine: Engine) -> None:
    asked(engine, PROMPT, "ours")
    assert asked(engine, PROMPT, "theirs")[0] == len(PROMPT)
    assert asked(engine, PROMPT, None)[0] == len(PROMPT)
    assert asked(engine, PROMPT[:-1], "ours")[0] == 1, (
        "where it ends in the middle, nobody has asked"
    )
    assert asked(engine, [*PROMPT, 2], "ours")[0] == 1
    assert asked(engine, PROMPT, None)[0] == len(PROMPT), (
        "what is shared with nobody leaves nothing"
    )
    assert asked(engine, PROMPT, "ours")[0] == 0


def test_what_has_lost_its_kv_is_computed(engine: Engine, fresh_logits: Callable[..., Any]) -> None:
    asked(engine, PROMPT)[1].release()
    engine.forget()
    fed, sequence = asked(engine, PROMPT)
    assert fed == len(PROMPT)
    assert same(sequence, fresh_logits(PROMPT))


def test_ten_thousand_prompts_keep_the_logits_of_the_last_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prompt_ends, "MOST_END_BYTES", 1000)
    ends, root = PromptEnds(), CachedBlock(b"root", None, (), -1)
    logits = np.zeros(50, np.float32)  # 200 bytes
    for number in range(10_000):
        ends.keep(root, [number], logits)
        assert ends.of(root, [0]) is not None  # what is used stays
        assert ends.bytes <= 1000
    ends.check()
    kept = [number for number in range(10_000) if ends.of(root, [number]) is not None]
    assert kept == [0, 9996, 9997, 9998, 9999]
    logits[:] = 1
    assert not np.any(ends.of(root, [0])), "a copy: a pass may use its memory again"


def test_the_same_prompt_twice_counts_once() -> None:
    ends, root = PromptEnds(), CachedBlock(b"root", None, (), -1)
    for _ in range(2):
        ends.keep(root, [1], np.zeros(50, np.float32))
    assert ends.bytes == 200
    ends.keep(None, [1], np.zeros(50, np.float32))
    assert (ends.bytes, ends.of(None, [1])) == (200, None)


def test_a_task_that_is_parked_while_it_waits_ends_with_its_kv(
    make_engine: Callable[..., Engine],
) -> None:
    """It found the prompt and its logits while it waited; then others needed the room."""
    engine = make_engine()
    asked(engine, PROMPT)[1].release()
    waiting = engine.new_sequence()
    waiting.append(PROMPT)
    waiting.reuse()
    assert waiting.logits is not None
    waiting.park()
    engine.compute([waiting])
    assert (waiting.computed, waiting.logits is not None) == (len(PROMPT), True)
    engine.check()


def test_a_prompt_whose_end_is_known_and_whose_logits_are_not_ends(
    make_engine: Callable[..., Engine],
) -> None:
    """Where KV cannot be cut, and a turn is known to leave the prompt before its end."""
    engine = make_engine(whole_blocks_only=True, whole_tails=True)
    for keeps in (True, True, False):
        if not keeps:
            engine.memory.ends.clear()
        sequence = engine.new_sequence()
        sequence.append(PROMPT)
        sequence.branch_point = 5
        task = Task(sequence, lambda: False)
        engine.submit(task)
        ended = task.join(10)
        task.cancel()
        task.join()
        assert ended
        sequence.release()
    assert engine.forward_passes < 6


def test_what_is_forgotten_leaves_no_logits(engine: Engine) -> None:
    asked(engine, PROMPT)[1].release()
    assert engine.memory.ends.bytes > 0
    engine.forget()
    assert engine.memory.ends.bytes == 0
