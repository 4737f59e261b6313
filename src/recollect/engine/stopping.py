"""
Find stop strings in text that arrives in pieces.

Pure: no tokens, no runtime.
"""

from collections.abc import Sequence


class StopMatcher:
    """
    Pass text through up to the first stop string.

    Invariants:
        1. What was let through never contains a stop string, and never has to be taken back.
        2. What is held back is a proper prefix of a stop string.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.matched: str | None = None
        """The stop string that has come."""

    def push(self, piece: str) -> str:
        """Take more text and return what can be let through now; nothing once a stop string has come."""
        if self.matched is not None:
            return ""
        text = self._held + piece
        found = [(place + len(s), place, s) for s in self._stop if (place := text.find(s)) >= 0]
        if found:
            # The one complete first, and of those the longest: as if letters came one by one.
            _, place, self.matched = min(found)
            self._held = ""
            return text[:place]
        keep = self._possible_start(text)
        self._held = text[keep:]
        return text[:keep]

    def finish(self) -> str:
        """Return what was held back, now that no more text comes."""
        rest, self._held = self._held, ""
        return rest

    def _possible_start(self, text: str) -> int:
        """Return where the earliest suffix begins that could grow into a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1)
        for start in range(max(0, len(text) - longest + 1), len(text)):
            if any(stop.startswith(text[start:]) for stop in self._stop):
                return start
        return len(text)
