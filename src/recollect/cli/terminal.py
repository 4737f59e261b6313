"""
What a terminal needs to show a reply well: no control characters, whole words, no echo.

Does not know replies.
"""

import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager

from rich.cells import cell_len


def printable(text: str) -> str:
    """
    Return *text* without control characters other than newline and tab.

    What a model writes must not move the cursor, or set the title, of the terminal it is shown on.
    """
    return "".join(
        character
        for character in text
        if character in "\n\t" or unicodedata.category(character) != "Cc"
    )


class WordWrapper:
    """
    Text that arrives in pieces, with line breaks between words.

    A word is held back until it ends, as only then is it known whether it fits the line.

    Invariants:
        1. What comes out is what went in, but for breaks in place of the spaces they replace.
        2. No line is wider than `width`, except where one word and its indentation are.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self._column = 0
        self._spaces = ""
        self._word = ""

    @property
    def column(self) -> int:
        """Return how many columns of the line are written; what is held back does not count."""
        return self._column

    def push(self, text: str) -> str:
        """Return what can be written now."""
        return "".join(self._take(character) for character in text)

    def finish(self) -> str:
        """Return what was held back."""
        spaces, word = self._spaces, self._word
        self._spaces = self._word = ""
        end = self._column + cell_len(spaces.expandtabs()) + cell_len(word)
        if end > self._width and self._column > 0:
            self._column = cell_len(word)
            return "\n" + word
        self._column = end
        return spaces + word

    def _take(self, character: str) -> str:
        if character == "\n":
            out = self.finish() + "\n"
            self._column = 0
            return out
        if character.isspace():
            out = self.finish() if self._word else ""
            self._spaces += character
            return out
        if cell_len(character) > 1:  # scripts without spaces: a line may break before any of these
            out = self.finish() if self._word else ""
            self._word = character
            return out + self.finish()
        self._word += character
        return ""


@contextmanager
def no_echo() -> Iterator[None]:
    """Keep what is typed meanwhile off the screen, for the next prompt; on Windows, do nothing."""
    try:
        import termios  # noqa: PLC0415 - there is none on Windows
    except ImportError:
        yield
        return
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    quiet = list(before)
    quiet[3] &= ~termios.ECHO  # the fourth field holds the local modes
    termios.tcsetattr(sys.stdin, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)
