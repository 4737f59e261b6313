"""
What is being typed, handed on when the user pauses.

Knows neither the input line nor sessions: it is given texts, and what to call with them.
"""

from collections.abc import Callable
from threading import Timer
from typing import Final

PAUSE_S: Final = 0.5
"""How long nothing is typed before what stands there is read: shorter than most thinking, longer
than the time between two keys."""
FEWEST_WORDS: Final = 4
"""Of fewer the reply reads the tokens in a moment, and they are likely to change."""


class TypedText:
    """
    Hands on a text that has not changed for a while, from a thread of its own.

    Used from the thread that reads the keys.
    """

    def __init__(self, hand_on: Callable[[str], None], *, pause_s: float = PAUSE_S) -> None:
        self._hand_on = hand_on
        self._pause_s = pause_s
        self._timer: Timer | None = None

    def begin(self) -> None:
        """Hand on that nothing is typed yet."""
        self._after(0.0, "")

    def changed(self, text: str) -> None:
        """Note what stands there now."""
        self._cancel()
        if len(text.split()) >= FEWEST_WORDS:
            self._after(self._pause_s, text)

    def stop(self) -> None:
        """Hand nothing more on; returns when nothing is being handed on any more."""
        timer = self._timer
        self._cancel()
        if timer is not None:
            timer.join()

    def _after(self, seconds: float, text: str) -> None:
        self._timer = Timer(seconds, self._hand_on, [text])
        self._timer.daemon = True
        self._timer.start()

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
