"""
How many replies are generated at once, and who waits for a turn.

Belongs to the event loop: every call is made on its thread. Knows no model.
"""

import asyncio
from collections import Counter, deque
from dataclasses import dataclass
from itertools import count
from time import monotonic
from typing import Final

from recollect.server.errors import too_busy

_WEIGHT_OF_THE_LAST: Final = 0.2
"""How much the newest request's duration counts in the mean: a handful of requests is remembered."""

_FIRST_GUESS_S: Final = 1.0
"""How long a request is taken to last before one of its key has ended."""


class Ticket:
    """A turn, until it is given back."""

    def __init__(self, admission: "Admission", key: str, weight: int) -> None:
        self._admission: Admission | None = admission
        self._key = key
        self._weight = weight
        self._begun_s = monotonic()

    def release(self) -> None:
        """Give the turn to whoever waits; calling it again does nothing."""
        admission, self._admission = self._admission, None
        if admission is not None:
            admission._give_back(self._key, self._weight, monotonic() - self._begun_s)


@dataclass(eq=False, slots=True)
class _Waiting:
    """A request in line."""

    key: str
    weight: int
    number: int
    """In the order of arrival."""
    turn: asyncio.Future[None]


class Admission:
    """
    Turns, shared among keys: first come, first served within one, and the key with the fewest first.

    A key with nothing running does not wait for others' replies to end: it gets a turn beside
    them, and the engine parks the newest reply of the key with the most.

    Invariants:
        1. running <= concurrent, but for the first request of each key.
        2. At most `concurrent` keys have turns.
        3. Nobody waits while there is a turn for the first who does.
        4. At most `queue` wait. Of a full line, the key with the most gives up its newest place to one
           that has fewer even then.
    """

    def __init__(self, *, concurrent: int, queue: int) -> None:
        self._concurrent = concurrent
        self._queue = queue
        self._lines: dict[str, deque[_Waiting]] = {}
        self._numbers = count()
        self._turns: Counter[str] = Counter()
        # By key, so that nobody is told how long the replies of others are.
        self._mean_s: dict[str, float] = {}

    @property
    def running(self) -> int:
        """Return how many turns are taken."""
        return self._turns.total()

    @property
    def waiting(self) -> int:
        """Return how many requests wait for a turn."""
        return sum(map(len, self._lines.values()))

    async def enter(self, weight: int = 1, *, key: str = "") -> Ticket:
        """
        Wait for a turn.

        Args:
            weight: How many replies are generated in it.
            key: Whose they are.

        Raises:
            ApiError: Too many wait already; with the seconds after which it is worth another try.
        """
        waiting = _Waiting(
            key, weight, next(self._numbers), asyncio.get_running_loop().create_future()
        )
        if key not in self._lines and self._may_begin(waiting):
            self._begin(waiting)
        else:
            self._stand_in_line(waiting)
        try:
            await waiting.turn
        except asyncio.CancelledError:
            if waiting in self._lines.get(key, ()):
                self._leave(waiting)
                self._call_next()  # the one behind may need less room
            elif not waiting.turn.cancelled() and waiting.turn.exception() is None:
                self._give_back(key, weight)  # the turn came in the same moment
            raise
        return Ticket(self, key, weight)

    def check(self) -> None:
        """
        Verify the invariants, but for the first, which does not show in what there is.

        Raises:
            AssertionError: One does not hold.
        """
        assert all(turns > 0 for turns in self._turns.values()), "a turn was given back twice"
        assert len(self._turns) <= self._concurrent, "too many keys have turns"
        assert all(self._lines.values()), "an empty line is kept"
        heads = [line[0] for line in self._lines.values()]
        assert not heads or not self._may_begin(min(heads, key=self._place)), "a turn is left"
        assert self.waiting <= self._queue, "too many wait"

    def _may_begin(self, waiting: _Waiting) -> bool:
        """Return whether there is a turn for the first request in line of a key."""
        if not self._turns[waiting.key]:
            return len(self._turns) < self._concurrent
        return self.running + waiting.weight <= self._concurrent and not any(
            self._place(line[0]) < self._place(waiting) for line in self._lines.values()
        )

    def _place(self, waiting: _Waiting) -> tuple[int, int]:
        return self._turns[waiting.key], waiting.number

    def _stand_in_line(self, waiting: _Waiting) -> None:
        if self.waiting >= self._queue:
            fullest = max(self._lines.values(), key=len, default=deque[_Waiting]())
            if len(fullest) <= len(self._lines.get(waiting.key, ())) + 1:
                raise too_busy(self._retry_after_s(waiting.key))
            refused = fullest[-1]
            self._leave(refused)
            refused.turn.set_exception(too_busy(self._retry_after_s(refused.key)))
        self._lines.setdefault(waiting.key, deque()).append(waiting)

    def _retry_after_s(self, key: str) -> float:
        mean_s = self._mean_s.get(key, _FIRST_GUESS_S)
        return min(60.0, mean_s * (1 + self.waiting / self._concurrent))

    def _leave(self, waiting: _Waiting) -> None:
        line = self._lines[waiting.key]
        line.remove(waiting)
        if not line:
            del self._lines[waiting.key]

    def _begin(self, waiting: _Waiting) -> None:
        self._turns[waiting.key] += waiting.weight
        waiting.turn.set_result(None)

    def _give_back(self, key: str, weight: int, took_s: float | None = None) -> None:
        self._turns[key] -= weight
        if not self._turns[key]:
            del self._turns[key]
        if took_s is not None:
            known = self._mean_s.get(key, _FIRST_GUESS_S)
            self._mean_s[key] = known + _WEIGHT_OF_THE_LAST * (took_s - known)
        self._call_next()

    def _call_next(self) -> None:
        while self._lines:
            first = min((line[0] for line in self._lines.values()), key=self._place)
            if not self._may_begin(first):
                return
            self._leave(first)
            if not first.turn.done():
                self._begin(first)
