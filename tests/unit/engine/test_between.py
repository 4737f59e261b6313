"""How much the engine's thread does between two passes: counted, as times differ with what else runs."""

import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Final

import pytest

from recollect.engine.engine import Engine
from recollect.engine.reply import ReplyGeneration
from recollect.engine.sampling import Generator
from recollect.runtime.base import PassResult, ReferenceRuntime, Row
from recollect.text.tokenizer import ByteTokenizer
from recollect.types import SamplingParams

MOST_CALLS: Final = 55
"""Of functions of ours, between two passes, for each of 4 sequences that decode greedily."""


class Counting(ReferenceRuntime):
    """A reference runtime that knows which functions are called on its thread outside of its passes."""

    def __init__(self) -> None:
        tokenizer = ByteTokenizer()
        super().__init__(vocab_size=tokenizer.vocab_size, context_length=256)
        self.between: list[tuple[int, int]] = []
        """Of each pass: the sequences in it, and the calls before the next."""
        self._calls = 0

    def forward(self, rows: Sequence[Row]) -> PassResult:
        if self.between:
            self.between[-1] = self.between[-1][0], self._calls
        result = super().forward(rows)
        self.between.append((len(rows), 0))
        self._calls = 0
        return result

    def note(self, _frame: FrameType, event: str, _argument: object) -> None:
        """Be the profile function of a thread."""
        if threading.current_thread().name != "recollect":
            sys.setprofile(None)
        else:
            self._calls += event == "call"


@pytest.fixture
def runtime() -> Iterator[Counting]:
    before, found = threading.getprofile(), Counting()
    threading.setprofile(found.note)
    yield found
    threading.setprofile(before)


def test_a_token_of_four_greedy_replies_takes_few_calls(runtime: Counting) -> None:
    engine = Engine(runtime, num_blocks=64)
    params = SamplingParams(max_tokens=100, ignore_eos=True)
    replies = []
    for number in range(4):
        generator = Generator(engine, params)
        generator.append_tokens([number + 1, 2, 3])
        replies.append(ReplyGeneration(engine, generator, ByteTokenizer()))
    with engine.lock:  # so that they begin in one pass
        for reply in replies:
            reply.start()
    for reply in replies:
        for _ in reply:
            pass
    engine.close()
    steps = sorted(calls for rows, calls in runtime.between if rows == 4 and calls)
    usual = steps[len(steps) // 2]
    assert 0 < usual <= 4 * MOST_CALLS, usual
