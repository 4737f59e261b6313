"""
Find stop strings in text that arrives in pieces.

Pure: no tokens, no runtime.
"""

from collections.abc import Sequence
from typing import Final

_ROOT: Final = 0


class StopMatcher:
    """
    Pass text through up to the first stop string.

    An automaton reads each character once, so that a piece costs the same however many stop strings
    there are. Source: Aho and Corasick, Communications of the ACM 18(6), 1975.

    Invariants:
        1. What was let through never contains a stop string, and never has to be taken back.
        2. What is held back is a proper prefix of a stop string.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        # A state stands for a beginning of a stop string: the longest that the text so far ends with.
        self._next: list[dict[str, int]] = [{}]
        self._shorter = [_ROOT]
        """The state of the next shorter beginning that the same text ends with."""
        self._lengths = [0]
        """Of the beginning that a state stands for, in characters."""
        self._found: list[str | None] = [None]
        """The longest stop string that such a text ends with."""
        for text in stop:
            self._add(text)
        self._link()
        self._state = _ROOT
        self._held = ""
        self.matched: str | None = None
        """The stop string that has come."""

    def push(self, piece: str) -> str:
        """Take more text and return what can be let through now; nothing once a stop string has come."""
        if self.matched is not None:
            return ""
        text = self._held + piece
        for place, character in enumerate(piece, len(self._held) + 1):
            self._state = self._after(self._state, character)
            self.matched = self._found[self._state]
            if self.matched is not None:
                self._held = ""
                return text[: place - len(self.matched)]
        keep = len(text) - self._lengths[self._state]
        self._held = text[keep:]
        return text[:keep]

    def finish(self) -> str:
        """Return what was held back, now that no more text comes."""
        rest, self._held = self._held, ""
        return rest

    def _after(self, state: int, character: str) -> int:
        while character not in self._next[state]:
            if state == _ROOT:
                return _ROOT
            state = self._shorter[state]
        return self._next[state][character]

    def _add(self, text: str) -> None:
        state = _ROOT
        for length, character in enumerate(text, 1):
            if character not in self._next[state]:
                self._next[state][character] = len(self._next)
                self._next.append({})
                self._shorter.append(_ROOT)
                self._lengths.append(length)
                self._found.append(None)
            state = self._next[state][character]
        self._found[state] = text

    def _link(self) -> None:
        """Fill in what belongs to shorter beginnings, the shortest first."""
        states = list(self._next[_ROOT].values())
        for state in states:  # grows meanwhile
            for character, following in self._next[state].items():
                shorter = self._after(self._shorter[state], character)
                self._shorter[following] = shorter
                self._found[following] = self._found[following] or self._found[shorter]
                states.append(following)
