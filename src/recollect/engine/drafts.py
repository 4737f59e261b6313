"""
Guesses of what a reply says next, from what was said before, and how many of them a pass should verify.

A reply that repeats something (an answer that is generated again, code that is given back with a change)
need not be decoded token by token. `SuffixIndex` finds where the last tokens of a text came before, and
what followed there. `PassTimes` knows what wider passes cost on this machine. `Drafts` puts both together
for each reply: it has as many guesses fed behind the last token as should save time, judging by how many
were right lately. The engine then has the logits after each guess, and the reply chooses its tokens from
these as it would have without guesses. A guess is kept where the reply chooses the same token; nothing else
depends on it. A smaller model can be asked as well (`engine.draft_model`). Knows token ids alone.
"""

from array import array
from bisect import bisect
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Iterable
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Final, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from recollect.engine.decoder import Task
from recollect.engine.sequence import Sequence
from recollect.runtime.base import Logits, Row, RuntimeInfo
from recollect.runtime.sequences import common_length

TokenArray = npt.NDArray[np.int64]

KEY: Final = 2
"""Tokens that have to come before a guess: two places with the same ones are compared further."""
LONGEST: Final = 32
"""Tokens before a place that are compared at most; what agrees so far is the same text."""
MOST_COMPARED: Final = 16
"""Places that are compared, the last ones first; looking further would cost what a token may cost."""
MOST_GUESSED: Final = 31
"""Guesses in a row. Beyond a pass over 32 tokens the cost of each no longer falls: benchmarks/drafts.py."""
BYTES_PER_TOKEN: Final = 200
"""Of an index: id, link and the entry by key. Source: tracemalloc, in the tests of this module."""
MOST_BYTES: Final = 64 << 20
"""Of the indexes of all namespaces together: 330,000 tokens."""
MOST_NAMESPACES: Final = 64
"""Those that were used last are known; what is kept of all of them is added up with each reply."""

_SHIFT: Final = 32
_MASK: Final = (1 << _SHIFT) - 1
_NOWHERE: Final = -1


@dataclass(frozen=True, slots=True)
class Guess:
    """What may follow a text."""

    token_ids: list[int]
    """In order; empty: nothing is known."""
    same: int = 0
    """How many tokens before it are the same where it comes from, at most `LONGEST`."""
    is_said: bool = False
    """Whether it comes from what replies said alone, and not from what the model was told."""


class Text:
    """A text in an index, or a part of one with some tokens before it; it only grows."""

    __slots__ = ("ids", "links", "number", "said")

    def __init__(self, number: int) -> None:
        self.number = number
        self.said = 0
        """The place from which on it is a reply."""
        self.ids = array("i")
        self.links = array("q")
        """By token: the place before that had the same key; `_NOWHERE`: there is none."""


class SuffixIndex:
    """
    Where pairs of tokens came before, in texts that grow.

    A place is a token of a text, found by the `KEY` tokens before it; each leads to the one before with the
    same key. Adding a token takes constant time, and so does a look-up: see `MOST_COMPARED`.

    Invariants:
        1. Each key leads to the place that was added last, if its text is still there.
        2. Links lead to places that were added earlier.
    """

    def __init__(self) -> None:
        self._texts: OrderedDict[int, Text] = OrderedDict()
        self._last: dict[int, int] = {}
        self._next = 0
        self.tokens = 0
        """In all texts."""
        self.compared = 0
        """Tokens that look-ups have compared, for tests."""

    def begin(self, before: Tokens[int] = ()) -> Text:
        """Return a new text. The tokens *before* it are what it follows, and are in the index already."""
        text = Text(self._next)
        self._next += 1
        self._texts[text.number] = text
        text.ids.extend(before)
        text.links.extend([_NOWHERE] * len(before))
        self.tokens += len(before)
        return text

    def extend(self, text: Text, token_ids: Tokens[int]) -> None:
        """Add tokens to the end of a text; one that was dropped stays as it is."""
        if text.number not in self._texts:
            return
        ids, links, last = text.ids, text.links, self._last
        start = len(ids)
        ids.extend(token_ids)
        self.tokens += len(ids) - start
        links.extend([_NOWHERE] * min(KEY - start, len(token_ids)) if start < KEY else [])
        base = text.number << _SHIFT
        for place in range(max(start, KEY), len(ids)):
            key = ids[place - 2] << _SHIFT | ids[place - 1]
            links.append(last.get(key, _NOWHERE))
            last[key] = base | place

    def drop_oldest(self) -> bool:
        """Forget the text that was begun first; return whether there was one."""
        if not self._texts:
            return False
        _, text = self._texts.popitem(last=False)
        self.tokens -= len(text.ids)
        for place in range(KEY, len(text.ids)):
            key = text.ids[place - 2] << _SHIFT | text.ids[place - 1]
            if self._last.get(key, _NOWHERE) >> _SHIFT == text.number:
                del self._last[key]
        return True

    def follow(self, text: Text, most: int) -> Guess:
        """Return up to *most* tokens that followed where the end of a text came before."""
        same, is_said, places = self._longest(text.ids)
        guessed: list[int] = []
        while places and len(guessed) < most:
            if len(places) == 1:
                ids, place = places[0]
                guessed += ids[place : place + most - len(guessed)]
                break
            token = Counter(ids[place] for ids, place in places).most_common(1)[0][0]
            guessed.append(token)
            places = [
                (ids, place + 1)
                for ids, place in places
                if ids[place] == token and place + 1 < len(ids)
            ]
        return Guess(guessed, same, is_said)

    def _longest(self, ids: "array[int]") -> tuple[int, bool, list[tuple["array[int]", int]]]:
        """
        Return the most tokens before a place that are also the last of *ids*, and all such places.

        Between them, whether all of these are in replies.
        """
        if len(ids) < KEY:
            return 0, False, []
        found: list[tuple[array[int], int]] = []
        longest, length, is_said = 0, len(ids), True
        at = self._last.get(ids[-2] << _SHIFT | ids[-1], _NOWHERE)
        for _ in range(MOST_COMPARED):
            if at == _NOWHERE or (text := self._texts.get(at >> _SHIFT)) is None:
                break
            other, place = text.ids, at & _MASK
            same, most = KEY, min(LONGEST, place, length)
            while same < most and other[place - same - 1] == ids[length - same - 1]:
                same += 1
            self.compared += same
            if same > longest:
                longest, found, is_said = same, [], True
            if same == longest:
                found.append((other, place))
                is_said = is_said and place >= text.said
            at = text.links[place]
        return longest, is_said, found


_SAMPLES: Final = 5
"""Of how long passes of one width took; the shortest counts, since others use the machine too."""
_GUESSED_SLOPE: Final = 0.1
"""What each more token is taken to add to a pass of one, before that was measured."""
_FRESH_PASSES: Final = 512
"""Measured widths are forgotten after so many passes: texts become longer, and others leave the machine."""
_MOST_WIDTH: Final = 512
"""Of a pass that is timed: 16 replies with guesses."""


class PassTimes:
    """How long passes take in which replies go on and no prompt is read, by how many tokens they are fed."""

    def __init__(self) -> None:
        self._taken: dict[int, deque[float]] = {}
        self._noted: dict[int, int] = {}
        """By width the number of the pass that was noted last."""
        self._passes = 0
        self._known: list[tuple[int, float]] = []
        self.width = 1
        """Tokens of the last such pass."""

    def note(self, rows: Collection[Row], seconds: float) -> None:
        """Take note of a pass."""
        width = sum(len(row.token_ids) for row in rows)
        if width > _MOST_WIDTH or any(len(row.token_ids) - row.drafted > 1 for row in rows):
            return
        self._passes += 1
        self.width = width
        width = _rounded(width)
        if width in self._taken:
            self._taken[width].append(seconds)
        else:  # the first one of a shape may also prepare kernels for it: it is not counted
            self._taken[width] = deque(maxlen=_SAMPLES)
        self._noted[width] = self._passes
        # No pass takes longer than a wider one, other than by what else the machine did.
        self._known, least = [], inf
        for one in sorted(self._taken, reverse=True):
            if self._taken[one] and self._passes - self._noted[one] < _FRESH_PASSES:
                least = min(least, *self._taken[one])
                self._known.insert(0, (one, least))

    def of(self, width: int) -> float:
        """Return how long a pass over so many tokens takes, in a unit that is the same for all widths."""
        if not self._known:
            return 1 + _GUESSED_SLOPE * (width - 1)
        place = bisect(self._known, (width, inf))
        below, taken = self._known[max(0, place - 1)]
        slope = _GUESSED_SLOPE * taken / (1 + _GUESSED_SLOPE * (below - 1))
        if 0 < place < len(self._known):
            above, then = self._known[place]
            slope = max(0.0, (then - taken) / (above - below))
        return taken + slope * (width - below)


def _rounded(width: int) -> int:
    """Return the width under which a pass is noted, so that there are few."""
    step = 1 if width <= 16 else 4 if width <= 64 else 32
    return -(-width // step) * step


COUNTS: Final = (1, 2, 3, 5, 7, 11, 15, 23, 31)
"""How many guesses are fed: few different numbers, so that each is measured, and kernels are made for few."""
_COPIED: Final = 16
"""A reply that repeats so many tokens of a prompt copies it: it is sure of what it says, however computed."""
_FORCED: Final = 0
_PRIORS: Final = (0.95, 0.3, 0.4, 0.5, 0.7, 0.85)
"""How often guesses are right before any was judged: those that a grammar forces, and by how much is the
same before them, from `KEY` tokens on, each time twice as many."""
_PRIOR_WEIGHT: Final = 2.0
_MEMORY: Final = 0.9
"""What remains of a count with each guess that is judged: about the last ten of a kind count."""
_LEAST_GAIN: Final = 1.03
"""By how much guesses must pay: choosing from more logits takes time, too."""

Choose = Callable[[Logits, Tokens[int]], int]
"""Returns what a reply would choose by logits, behind its history and some guesses."""


class Guessable(Protocol):
    """A reply whose tokens can be guessed; see `engine.sampling.Generator`."""

    @property
    def sequence(self) -> Sequence:
        """Return its history."""

    def forced_tokens(self) -> Tokens[int]:
        """Return what is known to come next, if anything is."""

    def would_choose(self, logits: Logits, guessed: Tokens[int]) -> int:
        """Return what it would choose by other logits; see `Choose`."""


class Asked(Protocol):
    """A smaller model beside one reply; see `engine.draft_model`."""

    def grow(self, came: Tokens[int]) -> None:
        """Take note of what has come, which the history has already; its guesses were right or not."""

    def guess(
        self,
        most: int,
        least: float,
        times: PassTimes,
        choose: Choose,
        goes_on: Callable[[], bool],
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

    def close(self) -> None:
        """Give the memory back; what was read can be found."""


class Guesser(Protocol):
    """A smaller model; see `engine.draft_model`."""

    def follow(self, history: "array[int]", namespace: str | None) -> Asked:
        """Return what follows a reply whose history grows."""

    def check(self) -> None:
        """Verify the invariants."""

    def close(self) -> None:
        """Give the memory back. May be called again."""


class _Reply:
    """A reply that is followed: what was said so far, and how often guesses were right in it."""

    def __init__(
        self,
        namespace: "_Namespace",
        history: TokenArray,
        asked: Callable[["array[int]"], Asked] | None,
    ) -> None:
        self._namespace = namespace
        self._text, self._history = namespace.begin(history)
        self._asked = None if asked is None else asked(self._history)
        self._guess = Guess([])
        self._is_forced = False
        self._right = [_PRIOR_WEIGHT * one for one in _PRIORS]
        self._judged = [_PRIOR_WEIGHT] * len(_PRIORS)
        self.width = 1
        """Tokens of it that the next pass is fed."""

    def __len__(self) -> int:
        """Return how much of its history is known here, in tokens."""
        return len(self._history)

    def grow(self, came: Tokens[int]) -> None:
        """Take what has come; guesses in its place were right or not, up to the first that was not."""
        for number, (guessed, token) in enumerate(zip(self._guess.token_ids, came, strict=False)):
            kind = self._kind(number)
            self._right[kind] = _MEMORY * self._right[kind] + (guessed == token)
            self._judged[kind] = _MEMORY * self._judged[kind] + 1
            if guessed != token:
                break
        self._history.extend(came)
        self._namespace.index.extend(self._text, came)
        if self._asked is not None:
            self._asked.grow(came)

    def guess(
        self,
        forced: Tokens[int],
        most: int,
        most_alike: int,
        times: PassTimes,
        choose: Choose | None = None,
        is_alone: Callable[[], bool] = lambda: True,
    ) -> list[int]:
        """
        Return what the next pass should be fed behind the history; none where it would not pay.

        At most *most*, and *most_alike* of what is not being copied from a prompt. A smaller model is asked
        only while this reply *is_alone*: others would wait for it.
        """
        self._is_forced = bool(forced)
        self._guess = (
            Guess(list(forced)) if forced else self._namespace.index.follow(self._text, most)
        )
        if not forced and (self._guess.is_said or self._guess.same < _COPIED):
            most = min(most, most_alike)
        others = max(0, times.width - self.width)
        best, gain = 0, _LEAST_GAIN * (others + 1) / times.of(others + 1)
        chance = expected = 1.0
        for number in range(min(most, len(self._guess.token_ids))):
            kind = self._kind(number)
            chance *= self._right[kind] / self._judged[kind]
            expected += chance
            if number + 1 in COUNTS:
                now = (others + expected) / times.of(others + 2 + number)
                if now > gain:
                    best, gain = number + 1, now
        guesses = self._guess.token_ids[:best]
        if self._asked is not None and choose is not None and not forced and is_alone():
            guesses = self._asked.guess(most_alike, gain, times, choose, is_alone) or guesses
        self.width = 1 + len(guesses)
        return guesses

    def close(self) -> None:
        """Let the smaller model give its memory back."""
        if self._asked is not None:
            self._asked.close()

    def _kind(self, number: int) -> int:
        """Return which of `_PRIORS` that guess is of; the guesses before it are taken to be right."""
        if self._is_forced:
            return _FORCED
        return min((self._guess.same + number).bit_length() - 1, len(_PRIORS) - 1)


_MOST_HISTORIES: Final = 8
_MOST_LEARNED: Final = 64
"""Texts that wait for the next reply, of a conversation that was opened; the last ones stay."""
_HISTORY_BYTES: Final = array("i").itemsize
_FIXED_BYTES: Final = 4096
"""Of a namespace without a text."""


class _Namespace:
    """What was said under one name, each text once where it goes on from one of the last ones."""

    def __init__(self) -> None:
        self.index = SuffixIndex()
        self._histories: deque[array[int]] = deque(maxlen=_MOST_HISTORIES)
        self._learned: deque[int] = deque(maxlen=4 * _MOST_LEARNED)

    @property
    def bytes(self) -> int:
        """Return about how much memory it takes."""
        kept = sum(len(ids) for ids in self._histories)
        return _FIXED_BYTES + BYTES_PER_TOKEN * self.index.tokens + _HISTORY_BYTES * kept

    def begin(self, history: TokenArray) -> "tuple[Text, array[int]]":
        """Add a history, but for what it begins with as one of the last ones does; both may grow."""
        ids = history.astype(np.int32)
        same = [common_length(np.frombuffer(one, np.int32), ids) for one in self._histories]
        known = max(same, default=0)
        text = self.index.begin(ids[max(0, known - LONGEST) : known].tolist())
        self.index.extend(text, ids[known:].tolist())
        text.said = len(text.ids)
        self._histories.append(array("i", ids.tobytes()))
        return text, self._histories[-1]

    def learn(self, token_ids: Tokens[int]) -> None:
        """Add a text, unless the same was added lately."""
        ids = array("i", token_ids)
        name = hash(ids.tobytes())
        if name not in self._learned:
            self._learned.append(name)
            self.index.extend(self.index.begin(), ids)


class Drafts:
    """
    What is guessed for the replies of one engine, by namespace: nobody is told what another has said.

    Used by the engine's thread; `learn` may be called from any.
    """

    def __init__(self, info: RuntimeInfo) -> None:
        self._context_length, self._most = info.context_length, min(MOST_GUESSED, info.most_drafted)
        self._alike = info.alike
        self._namespaces: OrderedDict[str, _Namespace] = OrderedDict()
        self._replies: WeakKeyDictionary[Sequence, _Reply] = WeakKeyDictionary()
        self._learned: deque[tuple[str, Tokens[int]]] = deque(maxlen=_MOST_LEARNED)
        self.times: Final = PassTimes()
        self.guesser: Guesser | None = None
        """A smaller model that is asked too, owned from then on; None: there is none."""
        self.tasks: Callable[[], Iterable[Task]] = list
        """Returns what the engine has to do: a smaller model is asked where that is one reply."""

    @classmethod
    def over(cls, info: RuntimeInfo) -> "Drafts | None":
        """Return what guesses over a runtime; None where it cannot take a wrong guess back."""
        return cls(info) if info.most_drafted and info.reuse.inside_blocks else None

    @property
    def bytes(self) -> int:
        """Return about how much memory is taken, which is bounded by `MOST_BYTES`."""
        return sum(one.bytes for one in self._namespaces.values())

    def close(self) -> None:
        """Give the smaller model's memory back. May be called again."""
        if self.guesser is not None:
            self.guesser.close()

    def learn(self, namespace: str, texts: Iterable[Tokens[int]]) -> None:
        """Take texts that replies of a namespace may repeat, such as those of other branches."""
        self._learned.extend((namespace, ids) for ids in texts)

    def following(
        self, reply: Guessable, on_logits: Callable[[], bool], on_end: Callable[[], None]
    ) -> tuple[Callable[[], bool], Callable[[], None]]:
        """
        Return a task's callbacks that do what others do, and have the reply followed.

        Args:
            reply: What is generated.
            on_logits: Appends one token; returns whether the reply goes on.
            on_end: Called when the task is over.
        """
        sequence = reply.sequence

        def choosing() -> bool:
            goes_on = on_logits()
            if goes_on and sequence.logits is None:  # all that was guessed is judged
                self.follow(sequence, reply.forced_tokens(), reply.would_choose)
            return goes_on

        def ending() -> None:
            try:
                self.end(sequence)
            finally:
                on_end()

        return choosing, ending

    def end(self, sequence: Sequence) -> None:
        """Take what a reply has said last, and follow it no more; however its task ends."""
        if (reply := self._replies.pop(sequence, None)) is not None:
            reply.grow(sequence.tokens(len(reply)))
            reply.close()
            self._make_room()

    def follow(self, sequence: Sequence, forced: Tokens[int], choose: Choose | None = None) -> None:
        """
        Have the next pass verify guesses behind the history of a reply, as many as pay.

        Args:
            sequence: Its history, which may have grown since the last call.
            forced: What is known to come next, if anything is.
            choose: What it would choose by the logits of a smaller model; None: none is asked.
        """
        reply = self._replies.get(sequence)
        if reply is None:
            asked = None
            if self.guesser is not None:
                asked = partial(self.guesser.follow, namespace=sequence.namespace)
            reply = _Reply(self._begun(sequence.namespace), sequence.history, asked)
            self._replies[sequence] = reply
        else:
            reply.grow(sequence.tokens(len(reply)))
        if sequence.logits is None:
            most = min(self._most, self._context_length - len(sequence))
            sequence.draft = reply.guess(
                forced,
                most,
                min(most, self._most_alike),
                self.times,
                choose,
                partial(self._is_alone, sequence),
            )

    def _is_alone(self, sequence: Sequence) -> bool:
        """Return whether a reply goes on and nobody else waits for anything."""
        return not any(
            task.cancelled if task.sequence is sequence else not task.idle for task in self.tasks()
        )

    @property
    def _most_alike(self) -> int:
        """
        Return how many guesses a reply may have so that passes are alike.

        In these a model says again what it has said. Where there are too many replies, there are none.
        """
        replies = len(self._replies)
        return self._alike // replies - 1 if replies <= self._alike else self._most

    def _begun(self, name: str | None) -> _Namespace:
        """Return what was said in a namespace; nothing for a sequence that shares with nobody."""
        while self._learned:
            told, ids = self._learned.popleft()
            self._namespaces.setdefault(told, _Namespace()).learn(ids)
        self._make_room()
        if name is None:
            return _Namespace()
        namespace = self._namespaces.setdefault(name, _Namespace())
        self._namespaces.move_to_end(name)
        return namespace

    def _make_room(self) -> None:
        """Drop the oldest texts of the namespaces that were used the longest ago."""
        while len(self._namespaces) > MOST_NAMESPACES or self.bytes > MOST_BYTES:
            name, namespace = next(iter(self._namespaces.items()))
            if len(self._namespaces) > MOST_NAMESPACES or not namespace.index.drop_oldest():
                del self._namespaces[name]
