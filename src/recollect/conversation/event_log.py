"""
The last events of a namespace, and where in them each reader is.

Bounded in count and bytes, however slow a reader is: one that falls behind is told that events are lost.
Knows nothing of what happens; `feed` does.
"""

import json
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from time import time_ns
from typing import Any, Final

LOST: Final = "events.lost"
"""The kind that tells a reader to read the state anew: what happened meanwhile is not known any more."""
MOST_EVENTS: Final = 2_048
"""Of one namespace that are kept for readers that come back or are slow: minutes of a busy agent."""
MOST_BYTES: Final = 2 << 20
"""Of the same events as they are sent."""
TAKEN_BYTES: Final = 64 << 10
"""Most that a reader takes at once, but for a single larger event. What a client has not read yet is in
memory once for each client; asyncio has writers wait from as many bytes on."""


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened."""

    id: int
    """Larger than of any event before in its namespace, in this process or an earlier one."""
    kind: str
    """Such as `reply.completed`."""
    conversation: str | None
    """The label of the conversation; None: it is about none, or about one that is not saved."""
    data: Mapping[str, Any]
    """All of it as JSON has it, with `type` and `conversation`."""
    text: str
    """As a server-sent event."""


class EventLog:
    """
    The last events of one namespace.

    The feed's thread adds; any thread reads.

    Invariants:
        1. The ids are consecutive, and end before `next_id`.
        2. There are at most `MOST_EVENTS`, of at most `MOST_BYTES`, but for a single larger one.
    """

    def __init__(self, *, first_id: int | None = None) -> None:
        # Microseconds since 1970: fewer events come than these, so no id is given again after a restart.
        self.next_id = time_ns() // 1000 if first_id is None else first_id
        self.held_bytes = 0
        self._events: deque[Event] = deque()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Return how many events are kept."""
        return len(self._events)

    def add(self, kind: str, conversation: str | None, data: Mapping[str, Any]) -> Event:
        """Add an event, and forget the oldest where there are too many."""
        event = _event(self.next_id, kind, conversation, data)
        with self._lock:
            self._events.append(event)
            self.next_id += 1
            self.held_bytes += len(event.text)
            while len(self._events) > MOST_EVENTS or (
                self.held_bytes > MOST_BYTES and len(self._events) > 1
            ):
                self.held_bytes -= len(self._events.popleft().text)
        return event

    def forget(self) -> None:
        """Forget all events, so that every reader is told that some are lost."""
        with self._lock:
            self._events.clear()
            self.held_bytes = 0
            self.next_id += 1

    def after(self, event_id: int) -> list[Event] | None:
        """
        Return the events that follow one, of at most `TAKEN_BYTES` or a single larger one.

        None: some of them are forgotten, or it is of another log.
        """
        with self._lock:
            first = self.next_id - len(self._events)
            if not first - 1 <= event_id < self.next_id:
                return None
            found, left = list[Event](), TAKEN_BYTES
            for event in islice(self._events, event_id + 1 - first, None):
                left -= len(event.text)
                if left < 0 and found:
                    break
                found.append(event)
            return found

    def lost(self) -> Event:
        """Return the event that tells a reader to read the state anew and go on from here."""
        return _event(self.next_id - 1, LOST, None, {})


def _event(number: int, kind: str, conversation: str | None, data: Mapping[str, Any]) -> Event:
    whole = {"type": kind, **({} if conversation is None else {"conversation": conversation})}
    whole |= data
    text = json.dumps(whole, separators=(",", ":"))
    return Event(
        number, kind, conversation, whole, f"id: {number}\nevent: {kind}\ndata: {text}\n\n"
    )


class Watch:
    """
    One reader's place in the events of a namespace. Used by one thread at a time.

    Holds no events, however slow its reader is: one that falls behind is told so.
    """

    def __init__(
        self,
        log: EventLog,
        namespace: str,
        *,
        after: int | None,
        wake: Callable[["Watch"], object],
        leave: Callable[["Watch"], object],
    ) -> None:
        self.namespace: Final = namespace
        self.wake: Final = wake
        """Called on the feed's thread when there is something new, once for all that share it, with one of
        them; returns at once."""
        self.last_id = log.next_id - 1 if after is None else after
        """Of the last event that was taken."""
        self.is_closed = False
        self._leave = leave
        self._log = log

    def take(self) -> list[Event]:
        """
        Return what comes next, of at most `TAKEN_BYTES` or a single larger event; none: nothing is new.

        Where some of it is forgotten that is `events.lost` alone, and then what happens from now on.
        """
        events = self._log.after(self.last_id)
        if events is None:
            events = [self._log.lost()]
        if events:
            self.last_id = events[-1].id
        return events

    def rest(self) -> Iterator[Event]:
        """Yield all that is new, until it is closed."""
        while events := self.take():
            for event in events:
                if self.is_closed:
                    return
                yield event

    def close(self) -> None:
        """Watch no more; any thread may say so. Calling it again does nothing."""
        self.is_closed = True
        self._leave(self)
