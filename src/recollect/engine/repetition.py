"""
When a reply does nothing but repeat itself: a rule over its tokens and their texts.

Knows of a reply only the tokens and texts that it is given.
"""

from collections import Counter, defaultdict, deque
from typing import Final

SAME_LENGTH: Final = 48
"""
Tokens of a sequence that counts as the same. Rows of a table, lines of code and list items that differ in
one place have shorter stretches between those places; a refrain is longer, but has verses around it.
"""
SAME_WORDS: Final = 28
"""
Tokens with letters that such a sequence has: prose. Of records, in JSON or SQL, of logs and of matrices long
stretches are the same and mostly marks and digits; they are only ended where nothing in them changes.
"""
SAME_TIMES: Final = 4
"""How often a sequence must have come, without overlap, before its tokens count as repeated."""
REPETITION_WINDOW: Final = 512
"""Last tokens that are looked at: a hundred zeros, or a paragraph three times, are less."""
MOST_REPEATED: Final = REPETITION_WINDOW * 4 // 5
CYCLE_WINDOW: Final = 700
"""Last tokens that are the same as one period before, where they are no prose: a drawn board is less."""
PROSE_CYCLE_WINDOW: Final = 288
"""Last tokens that are the same as one period before, where all of them are prose: a sentence of ten tokens
thirty times is ended, and two dozen times, as somebody may ask for it, not."""
PROSE_CYCLE_TIMES: Final = 6
"""How many periods these have to be: a page with the same filler text in each of six boxes has fewer."""
REMEMBERED_TOKENS: Final = 4096
"""Tokens whose sequences are remembered: what one reply can hold is bounded by them."""

SHORTEST_ITEM: Final = 5
"""Tokens with letters that a list's item has if its number is left out when repetition is looked for."""

_HASH_BASE: Final = 1_000_003
_HASH_MODULUS: Final = (1 << 61) - 1
_LEAVING: Final = pow(_HASH_BASE, SAME_LENGTH, _HASH_MODULUS)


class _WithoutNumbers:
    """
    Leaves out of a reply the numbers of a list's items: "86" of "86. Colosseum", "**86)" and "86: ...".

    A number counts as an item's where nothing but marks stands before it in its line, a full stop,
    bracket or colon follows, and the item before had some length: lines that do nothing but count stay.
    """

    def __init__(self) -> None:
        self._is_line_start = True
        self._held: list[int] = []
        """The digits of what may be the number of an item."""
        self._since = 0
        """Tokens with letters since the last such number."""

    def push(self, token_id: int, text: str) -> list[tuple[int, bool]]:
        """Return the tokens that are known to count, and whether they have letters."""
        if self._is_line_start and text.strip(" ").isdecimal():
            self._held.append(token_id)
            return []
        held, self._held = self._held, []
        if held and text.lstrip()[:1] in (".", ")", ":"):
            held = held if self._since < SHORTEST_ITEM else []
            self._since = 0
        has_letters = any(map(str.isalpha, text))
        self._since += has_letters
        _, line_break, after = text.rpartition("\n")
        is_blank = not any(character.isalnum() for character in after)
        self._is_line_start = is_blank and (bool(line_break) or (self._is_line_start and not held))
        return [*((digit, False) for digit in held), (token_id, has_letters)]


class Repetition:
    """
    Takes the tokens of one reply, and says when it does nothing but repeat itself.

    Small models fall into loops that no stop token ends. The rule: a reply has run away when four fifths
    of its last 512 tokens belong to sequences of 48 tokens, at least 28 with letters, that have each
    come at least four times within the last 4,096; or when its last 700 tokens are an exact cycle, whatever
    they are; or, where they are prose, its last 288, if these are at least six periods. A loop that counts,
    or changes a word now and then, is found where it is prose and 48 tokens in a row stay the same. Numbers
    of a list's items are left out, so that a list whose items are all the same is a cycle.

    A token costs a few dictionary look-ups, whatever came before. Sequences are told apart by their
    rolling hash (Karp and Rabin, IBM Journal of Research and Development 31(2), 1987).

    Invariants:
        1. `_counted[name]` is how often a sequence ended, without overlap, among the remembered tokens.
        2. `_repeated` is the number of true values in `_window`.
        3. `_end` has where each remembered sequence ended last, and nothing else.
    """

    def __init__(self) -> None:
        self._numbers = _WithoutNumbers()
        self._tokens: deque[tuple[int, bool]] = deque(maxlen=SAME_LENGTH)
        self._words = 0
        """How many of them have letters."""
        self._name = 0
        """The hash of the last `SAME_LENGTH` tokens."""
        self._length = 0
        self._counted: defaultdict[int, int] = defaultdict(int)
        self._last_end: dict[int, int] = {}
        """Where the last counted one of each sequence ended."""
        self._end: dict[int, int] = {}
        self._remembered: deque[tuple[int, bool]] = deque()
        """The sequence that ends at each remembered token, and whether it was counted."""
        self._period = 0
        """How long ago the sequence that ends here ended before; 0: it did not."""
        self._in_cycle = 0
        """How many tokens the period has been the same."""
        self._in_prose_cycle = 0
        """The same for those after which the last `SAME_LENGTH` tokens were prose."""
        self._window: deque[bool] = deque(maxlen=REPETITION_WINDOW)
        self._repeated = 0

    def push(self, token_id: int, text: str) -> bool:
        """
        Take the next token; return whether the reply has run away.

        Args:
            token_id: Its id.
            text: What it adds to the reply's text.
        """
        is_over = False
        for token, has_letters in self._numbers.push(token_id, text):
            is_over = self._push(token, has_letters=has_letters)
        return is_over

    def _push(self, token_id: int, *, has_letters: bool) -> bool:
        self._length += 1
        is_full = len(self._tokens) == SAME_LENGTH
        oldest, had_letters = self._tokens[0] if is_full else (-1, False)
        self._words += has_letters - had_letters
        self._tokens.append((token_id, has_letters))
        leaving = (oldest + 1) * _LEAVING
        self._name = (self._name * _HASH_BASE + token_id + 1 - leaving) % _HASH_MODULUS
        is_repeated = False
        if self._length >= SAME_LENGTH:
            is_prose = self._words >= SAME_WORDS
            self._measure_cycle(self._name, is_prose=is_prose)
            is_repeated = self._count(self._name) >= SAME_TIMES and is_prose
        if len(self._window) == REPETITION_WINDOW:
            self._repeated -= self._window[0]
        self._window.append(False)
        if is_repeated:
            self._mark()
        is_full = len(self._window) == REPETITION_WINDOW
        enough = max(PROSE_CYCLE_WINDOW, PROSE_CYCLE_TIMES * self._period)
        is_prose_cycle = self._in_prose_cycle + SAME_LENGTH >= enough
        is_cycle = self._in_cycle + SAME_LENGTH >= CYCLE_WINDOW or is_prose_cycle
        return is_cycle or (is_full and self._repeated > MOST_REPEATED)

    def check(self) -> None:
        """Verify the invariants."""
        counted = Counter(name for name, is_counted in self._remembered if is_counted)
        assert counted == dict(self._counted), "1: the counts are those of what is remembered"
        assert self._last_end.keys() == counted.keys(), "1: nothing else is remembered"
        assert len(self._remembered) <= REMEMBERED_TOKENS, "what is remembered is bounded"
        assert self._repeated == sum(self._window), "2"
        assert self._end.keys() == {name for name, _ in self._remembered}, "3"

    def _measure_cycle(self, name: int, *, is_prose: bool) -> None:
        period = self._length - self._end.get(name, self._length)
        self._in_cycle = self._in_cycle + 1 if period and period == self._period else 0
        self._in_prose_cycle = min(self._in_prose_cycle + 1, self._in_cycle) if is_prose else 0
        self._period = period
        self._end[name] = self._length

    def _count(self, name: int) -> int:
        """Count a sequence that ends here, and forget the oldest; return how often it has come."""
        is_apart = self._length - self._last_end.get(name, -SAME_LENGTH) >= SAME_LENGTH
        if is_apart:
            self._counted[name] += 1
            self._last_end[name] = self._length
        self._remembered.append((name, is_apart))
        if len(self._remembered) > REMEMBERED_TOKENS:
            oldest, was_counted = self._remembered.popleft()
            if self._end[oldest] == self._length - REMEMBERED_TOKENS:
                del self._end[oldest]
            if was_counted:
                self._counted[oldest] -= 1
                if not self._counted[oldest]:
                    del self._counted[oldest], self._last_end[oldest]
        return self._counted[name]

    def _mark(self) -> None:
        """Let the last `SAME_LENGTH` tokens count as repeated."""
        for place in range(len(self._window) - 1, max(len(self._window) - SAME_LENGTH, 0) - 1, -1):
            if self._window[place]:
                break  # the ones before were marked with it
            self._window[place] = True
            self._repeated += 1
