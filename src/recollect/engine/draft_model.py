"""
A smaller model that says what a larger one may say next.

`DraftModel` owns the smaller model's engine, which has KV and a prefix cache of its own: the smaller model
reads no token twice either, not on the next turn, nor after an edit, a rewind or a fork. `Ahead` follows one
reply with it. `AskedModel` decides when it is asked, and how many of its guesses are worth a place in a pass.
Knows token ids alone; both models have one vocabulary. `engine.drafts` asks it, and guesses by itself too.
"""

import logging
from array import array
from bisect import bisect
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Tokens
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Final, Self

import numpy as np

from recollect.engine.budget import blocks_beside
from recollect.engine.drafts import Choose, PassTimes
from recollect.engine.engine import Engine
from recollect.engine.sampling import log_probabilities
from recollect.errors import MemoryLimitError, MisuseError, RecollectError, TokenIdError
from recollect.runtime.base import Logits, PagedRuntime
from recollect.types import common_prefix_length

_log = logging.getLogger(__name__)

READ_AT_ONCE: Final = 128
"""Most tokens of a prompt that are read between two tokens of a reply, as by `Pace.shared_chunk`."""
_SAMPLES: Final = 5
"""Of how long passes take; the shortest counts, since others use the machine too."""
MOST_ASKED: Final = 7
"""Guesses in a row: where a pass over four tokens costs little more, three bring the most (LOG.md)."""
_SURE: Final = (0.5, 0.8)
"""Guesses are judged by how likely the smaller model holds them: less, between, or at least so likely."""
_PRIORS: Final = (0.4, 0.7, 0.95)
"""How often these are right before any was judged. Source: LOG.md, qwen2.5-coder."""
_PRIOR_WEIGHT: Final = 2.0
_MEMORY: Final = 0.95
"""What remains of a count with each guess that is judged: about the last twenty of a kind count."""
_ASKED_AGAIN: Final = 32
"""Where guessing does not pay, one token in so many is guessed all the same, in case that has changed."""
_LENGTHS: Final = 16
"""Replies by whose lengths it is judged whether reading a long prompt should pay."""
_FIRST_LENGTH: Final = 64
"""Tokens that a reply is taken to have before one has ended."""
_FEW: Final = 2
"""Tokens of a pass that guesses: the last guess, and what the larger model has said behind it."""


@dataclass(frozen=True, slots=True)
class SmallModel:
    """A loaded model that is to guess."""

    name: str
    fingerprint: str
    """Of its files."""
    runtime: PagedRuntime


class DraftModel:
    """
    The smaller model.

    Used by the thread of the larger model's engine; its own engine's thread runs its passes, and the other
    waits for each.
    """

    def __init__(self, engine: Engine, vocab_size: int) -> None:
        """
        Own an engine.

        Args:
            engine: Of the smaller model, with the ends of sequence of the larger one.
            vocab_size: Of the larger model's logits.
        """
        self.engine: Final = engine
        self.vocab_size: Final = vocab_size
        self._passes: deque[float] = deque(maxlen=_SAMPLES)
        self._readings: deque[float] = deque(maxlen=_SAMPLES)
        """Seconds for each token, of passes over many."""
        self._lengths: deque[int] = deque([_FIRST_LENGTH], maxlen=_LENGTHS)
        self.failed = False
        """Whether it has failed; nothing is guessed from then on."""
        engine.start()

    @classmethod
    def beside(cls, engine: Engine, small: SmallModel) -> Self:
        """
        Return what guesses for an engine, with room for as many tokens, and own the runtime.

        Raises:
            ConfigError: There is not enough memory.
        """
        blocks = blocks_beside(engine.pool.num_blocks, engine.info, small.runtime.info)
        made = Engine(
            small.runtime,
            num_blocks=blocks,
            eos_token_ids=engine.eos_token_ids,
            fingerprint=small.fingerprint,
        )
        return cls(made, engine.info.vocab_size)

    @property
    def kv_bytes(self) -> int:
        """Return how much memory its KV takes at most."""
        return self.engine.info.kv_bytes(self.engine.pool.num_blocks)

    @property
    def pass_s(self) -> float:
        """Return how long one guess takes; 0: none was measured yet."""
        return min(self._passes, default=0.0)

    def reading_s(self, tokens: int) -> float:
        """Return how long it takes to read so many tokens; 0: that is not known yet."""
        # The first passes of a size also prepare kernels: what one alone took would keep all from being read.
        return tokens * min(self._readings) if len(self._readings) > 1 else 0.0

    def follow(self, history: "array[int]", namespace: str | None) -> "AskedModel":
        """Return what follows a reply whose history grows; it finds what was read in the namespace."""
        return AskedModel(Ahead(self, history, namespace))

    def remaining(self, tokens: int) -> float:
        """
        Return for how many tokens a reply is taken to go on that has so many.

        Until it is as long as the last ones were; one that is longer than half of that, for as long again.
        """
        return max(median(self._lengths) - tokens, tokens)

    def ended(self, tokens: int) -> None:
        """Take note of how long a reply was."""
        self._lengths.append(tokens)

    def took(self, tokens: int, seconds: float) -> None:
        """Take note of how long a pass, or some of them, took for so many tokens."""
        if 0 < tokens <= _FEW:
            self._passes.append(seconds)
        elif tokens >= READ_AT_ONCE // 2:
            self._readings.append(seconds / tokens)

    def fail(self, error: Exception) -> None:
        """Guess nothing from now on; replies go on without."""
        if not self.failed:
            self.failed = True
            _log.warning("The draft model has failed and guesses nothing from now on: %s", error)

    def check(self) -> None:
        """
        Verify the invariants of its engine.

        Raises:
            AssertionError: One does not hold.
        """
        self.engine.check()

    def close(self) -> None:
        """Give its memory back. May be called again."""
        self.engine.close()


class Ahead:
    """
    The smaller model beside one reply.

    Its sequence is the reply's history as far as that was read, with guesses behind it that may be wrong:
    they are dropped when the history has become longer. Whatever happens here ends guessing, for this reply
    or for all, and never the reply.

    Invariant: the first `_same` tokens of its sequence are those of the history.
    """

    def __init__(self, model: DraftModel, history: "array[int]", namespace: str | None) -> None:
        self.model: Final = model
        self._history = history
        self._namespace = namespace
        self._sequence = model.engine.new_sequence(namespace)
        self._same = 0
        self._is_beaten = False

    @property
    def can_follow(self) -> bool:
        """Return whether there is room for the history, and nothing has failed."""
        return not self._is_beaten and not self.model.failed

    @property
    def lacking(self) -> int:
        """Return how many tokens of the history it has yet to read."""
        return len(self._history) - self._same

    def begin(self) -> None:
        """Take over what was read before; looks at all of the history, once."""
        with self._guarded():
            ids = self._history.tolist()
            self._same = self.model.engine.warm_tokens(ids, self._namespace)
            if self._same:
                self._sequence.append(ids[: self._same])
                self._sequence.reuse()  # held from now on, so that it is not evicted and read again

    def read(self) -> None:
        """Read on, at most `READ_AT_ONCE` tokens."""
        with self._guarded():
            self._agree(self._same + READ_AT_ONCE)
            self._compute()

    def guesses(self, choose: Choose) -> Iterator[tuple[int, float]]:
        """
        Yield what may come next, and how likely the smaller model holds each; each takes it one pass.

        Ends before an end of sequence, and where it can follow no more.

        Args:
            choose: Returns what would be chosen by logits, behind the history and the guesses so far.
        """
        guessed: list[int] = []
        if not self.can_follow:
            return
        with self._guarded():
            self._agree(len(self._history))
            while True:
                logits = self._compute()
                try:
                    token = choose(self._widened(logits), guessed)
                except RecollectError:
                    return  # such as where a grammar wants what the smaller model has no token for
                if token in self.model.engine.eos_token_ids:
                    return
                yield token, float(np.exp(log_probabilities(logits, np.array([token]))[0]))
                guessed.append(token)
                self._sequence.append([token])

    def close(self) -> None:
        """Give the blocks back; what was read can be found, and no guess that was wrong."""
        with self._guarded():
            self._drop_guesses()
        self._sequence.release()

    def _agree(self, length: int) -> None:
        """Let the sequence be the first *length* tokens of the history, at most all of them."""
        self._drop_guesses()
        if more := self._history[self._same : length].tolist():
            self._sequence.append(more)
            self._same += len(more)

    def _drop_guesses(self) -> None:
        """Forget guesses that are not in the history."""
        told = self._history[self._same : len(self._sequence)]
        self._same += common_prefix_length(self._sequence.tokens(self._same), told)
        size = self.model.engine.block_size
        with self._sequence.memory.lock:
            # A rewind would leave the KV of what nobody said for others to find, in the place of what was.
            while (computed := self._sequence.computed) > self._same:
                start = max(self._same, (computed - 1) // size * size)
                if not self._sequence.take_back(start):
                    self._sequence.truncate(start)
        self._sequence.rewind_to(self._same)

    def _compute(self) -> Logits:
        before, begun = self._sequence.fed_tokens, perf_counter()
        self.model.engine.compute([self._sequence])
        self.model.took(self._sequence.fed_tokens - before, perf_counter() - begun)
        logits = self._sequence.logits
        assert logits is not None, "compute() leaves the logits known"
        return logits

    def _widened(self, logits: Logits) -> Logits:
        """Return logits as many as the larger model has: the smaller one holds the rest impossible."""
        size = self.model.vocab_size
        if len(logits) >= size:
            return logits[:size]
        return np.pad(logits, (0, size - len(logits)), constant_values=-np.inf)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except (MemoryLimitError, TokenIdError, MisuseError):
            self._is_beaten = True  # a history too long, a token that it lacks, the end of all
        except Exception as error:  # noqa: BLE001 - told in the log; a reply needs no guesses
            self._is_beaten = True
            self.model.fail(error)


class AskedModel:
    """
    When the smaller model is asked in one reply, and how many of its guesses are fed.

    How often guesses are right is learned by how likely the smaller model held them, and what passes take is
    measured. It reads a long prompt once that should pay; see `DraftModel.remaining`.
    """

    def __init__(self, ahead: Ahead) -> None:
        self._ahead = ahead
        self._guesses: list[tuple[int, int]] = []
        """Those of the last time, with their kinds; some may not have been fed."""
        self._right = [_PRIOR_WEIGHT * one for one in _PRIORS]
        self._judged = [_PRIOR_WEIGHT] * len(_PRIORS)
        self._has_begun = False
        self._tokens = 0
        self._refused = 0

    def grow(self, came: Tokens[int]) -> None:
        """Take note of what has come, which the history has already; guesses were right or not."""
        self._tokens += len(came)
        for (guessed, kind), token in zip(self._guesses, came, strict=False):
            self._judge(kind, right=guessed == token)
            if guessed != token:
                break
        self._guesses = []

    def guess(
        self,
        most: int,
        least: float,
        times: PassTimes,
        choose: Choose,
        goes_on: Callable[[], bool] = lambda: True,
    ) -> list[int]:
        """
        Return what to feed, at most so many guesses; none where that would not pay.

        Args:
            most: Guesses, at least one.
            least: Tokens per second that are to be had without.
            times: What wider passes take.
            choose: What the reply would choose.
            goes_on: Returns whether nobody waits, asked before each pass.
        """
        most = min(most, MOST_ASKED)
        if most < 1 or not self._tokens or not self._ahead.can_follow:
            return []  # nobody should wait for a first token because the second is guessed
        if not self._has_begun:
            self._has_begun = True
            self._ahead.begin()
        rate = max(self._rate(number, times) for number in range(1, most + 1))
        if rate <= least:
            self._refused += 1
            most = 1  # to learn whether that has changed
            if self._refused % _ASKED_AGAIN:
                return []
        if not self._has_read(1 / least - 1 / rate):
            return []
        return self._asked(most, times, choose, goes_on, has_to_pay=rate > least)

    def close(self) -> None:
        """Give the blocks back; what was read can be found."""
        self._ahead.model.ended(self._tokens)
        self._ahead.close()

    @property
    def _mean(self) -> float:
        """Return how often guesses of all kinds are right."""
        return sum(self._right) / sum(self._judged)

    def _rate(self, guesses: int, times: PassTimes) -> float:
        """Return how many tokens per second so many guesses are expected to bring."""
        mean = self._mean
        expected = sum(mean**number for number in range(1 + guesses))
        return expected / (times.of(1 + guesses) + guesses * self._ahead.model.pass_s)

    def _has_read(self, saved_s: float) -> bool:
        """
        Return whether the smaller model has read what it is asked about, having it read on where that pays.

        Args:
            saved_s: What guesses save with each token.
        """
        ahead = self._ahead
        if ahead.lacking > READ_AT_ONCE:
            remaining = ahead.model.remaining(self._tokens)
            if remaining * saved_s >= ahead.model.reading_s(ahead.lacking):
                ahead.read()
            return False  # what is left is for the next tokens
        return True

    def _asked(
        self,
        most: int,
        times: PassTimes,
        choose: Choose,
        goes_on: Callable[[], bool],
        *,
        has_to_pay: bool,
    ) -> list[int]:
        """Ask for guesses, one by one, as long as the next should pay; return those to be fed."""
        pass_s, fed = self._ahead.model.pass_s, list[int]()
        chance = expected = 1.0
        for token, likely in self._ahead.guesses(choose):
            kind = bisect(_SURE, likely)
            self._guesses.append((token, kind))
            chance *= self._right[kind] / self._judged[kind]
            count = len(fed)
            asked_s = (1 + count) * pass_s  # spent, whether it is fed or not
            before = expected / (times.of(1 + count) + asked_s)
            now = (expected + chance) / (times.of(2 + count) + asked_s)
            if has_to_pay and now <= before:
                break
            fed.append(token)
            expected += chance
            then = (expected + chance * self._mean) / (times.of(3 + count) + asked_s + pass_s)
            if len(fed) == most or then <= now or not goes_on():
                break
        if not self._guesses:  # a pass for nothing counts as one that was wrong
            self._judge(0, right=False)
        return fed

    def _judge(self, kind: int, *, right: bool) -> None:
        self._right[kind] = _MEMORY * self._right[kind] + right
        self._judged[kind] = _MEMORY * self._judged[kind] + 1
