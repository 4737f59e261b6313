"""
How many replies are generated at once, and who waits for a turn.

Belongs to the event loop: every call is made on its thread. Knows no model.
"""

import asyncio
from collections import deque
from time import monotonic
from typing import Final

from recollect.server.errors import too_busy

_WEIGHT_OF_THE_LAST: Final = 0.2
"""How much the newest request's duration counts in the mean: a handful of requests is remembered."""


class Ticket:
    """A turn, until it is given back."""

    def __init__(self, admission: "Admission", weight: int) -> None:
        self._admission: Admission | None = admission
        self._weight = weight
        self._begun_s = monotonic()

    def release(self) -> None:
        """Give the turn to whoever waits; calling it again does nothing."""
        admission, self._admission = self._admission, None
        if admission is not None:
            admission._give_back(self._weight, monotonic() - self._begun_s)


class Admission:
    """
    Turns, first come, first served.

    Invariants:
        1. running <= concurrent, unless one request alone needs more turns than there are.
        2. Nobody waits while there is a turn for the first who does.
    """

    def __init__(self, *, concurrent: int, queue: int) -> None:
        self._concurrent = concurrent
        self._queue = queue
        self._waiting: deque[tuple[asyncio.Future[None], int]] = deque()
        self.running = 0
        """Turns that are taken."""
        self._mean_s = 1.0

    @property
    def waiting(self) -> int:
        """Return how many requests wait for a turn."""
        return len(self._waiting)

    async def enter(self, weight: int = 1) -> Ticket:
        """
        Wait for a turn.

        Args:
            weight: How many replies are generated in it.

        Raises:
            ApiError: Too many wait already; with the seconds after which it is worth another try.
        """
        if not self._waiting and self._has_room(weight):
            self.running += weight
            return Ticket(self, weight)
        if len(self._waiting) >= self._queue:
            raise too_busy(min(60.0, self._mean_s * (1 + len(self._waiting) / self._concurrent)))
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (turn, weight)
        self._waiting.append(entry)
        try:
            await turn
        except asyncio.CancelledError:
            if entry in self._waiting:
                self._waiting.remove(entry)
                self._call_next()  # the one behind may need less room
            elif not turn.cancelled():
                self._give_back(weight)  # the turn came in the same moment
            raise
        return Ticket(self, weight)

    def _has_room(self, weight: int) -> bool:
        return self.running == 0 or self.running + weight <= self._concurrent

    def _give_back(self, weight: int, took_s: float | None = None) -> None:
        self.running -= weight
        if took_s is not None:
            self._mean_s += _WEIGHT_OF_THE_LAST * (took_s - self._mean_s)
        self._call_next()

    def _call_next(self) -> None:
        while self._waiting and self._has_room(self._waiting[0][1]):
            turn, weight = self._waiting.popleft()
            if not turn.done():
                self.running += weight
                turn.set_result(None)
