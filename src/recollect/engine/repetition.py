"""
When a reply does nothing but repeat itself.

Small models fall into loops that no stop token ends. The rule: a reply has run away when four fifths of
its last 512 tokens belong to sequences of 48 tokens that have each come at least four times within the
last 4,096. An exact cycle is the plain case; a loop that counts, or changes a word now and then, is found
too, where 48 tokens in a row stay the same. Knows token ids only.
On its own because the rule and its numbers are what a reader looks for.
"""

from collections import defaultdict, deque
from typing import Final

LENGTH: Final = 48
"""
Tokens of a sequence that counts as the same. Rows of a table, lines of code and list items that differ in
one place have shorter stretches between those places; a refrain is longer, but has verses around it.
"""
TIMES: Final = 4
"""How often a sequence must have come, without overlap, before its tokens count as repeated."""
WINDOW: Final = 512
"""Last tokens that are looked at: a hundred zeros, or a paragraph three times, are less."""
MOST_REPEATED: Final = WINDOW * 4 // 5
REMEMBERED: Final = 4096
"""Tokens whose sequences are remembered: what one reply can hold is bounded by them."""

_BASE: Final = 1_000_003
_MODULUS: Final = (1 << 61) - 1
_LEAVING: Final = pow(_BASE, LENGTH, _MODULUS)


class Repetition:
    """
    Take the tokens of one reply, and say when it has run away.

    A token costs a few dictionary look-ups, whatever came before. Sequences are told apart by their
    rolling hash (Karp and Rabin, IBM Journal of Research and Development 31(2), 1987).

    Invariants:
        1. `_counted[name]` is how often a sequence ended, without overlap, among the remembered tokens.
        2. `_repeated` is the number of true values in `_window`.
    """

    def __init__(self) -> None:
        self._tokens: deque[int] = deque(maxlen=LENGTH)
        self._name = 0
        """The hash of the last `LENGTH` tokens."""
        self._length = 0
        self._counted: defaultdict[int, int] = defaultdict(int)
        self._last_end: dict[int, int] = {}
        """Where the last counted one of each sequence ended."""
        self._remembered: deque[int] = deque()
        """The sequence that ends at each remembered token; -1 where it was not counted."""
        self._window: deque[bool] = deque(maxlen=WINDOW)
        self._repeated = 0

    def push(self, token_id: int) -> bool:
        """Take the next token; return whether the reply has run away."""
        self._length += 1
        leaving = self._tokens[0] + 1 if len(self._tokens) == LENGTH else 0
        self._tokens.append(token_id)
        self._name = (self._name * _BASE + token_id + 1 - leaving * _LEAVING) % _MODULUS
        is_repeated = False
        if self._length >= LENGTH:
            is_repeated = self._count(self._name) >= TIMES
        if len(self._window) == WINDOW:
            self._repeated -= self._window[0]
        self._window.append(False)
        if is_repeated:
            self._mark()
        return len(self._window) == WINDOW and self._repeated > MOST_REPEATED

    def _count(self, name: int) -> int:
        """Count a sequence that ends here, and forget the oldest; return how often it has come."""
        is_apart = self._length - self._last_end.get(name, -LENGTH) >= LENGTH
        if is_apart:
            self._counted[name] += 1
            self._last_end[name] = self._length
        self._remembered.append(name if is_apart else -1)
        if len(self._remembered) > REMEMBERED:
            oldest = self._remembered.popleft()
            if oldest != -1:
                self._counted[oldest] -= 1
                if not self._counted[oldest]:
                    del self._counted[oldest], self._last_end[oldest]
        return self._counted[name]

    def _mark(self) -> None:
        """Let the last `LENGTH` tokens count as repeated."""
        for place in range(len(self._window) - 1, max(len(self._window) - LENGTH, 0) - 1, -1):
            if self._window[place]:
                break  # the ones before were marked with it
            self._window[place] = True
            self._repeated += 1
