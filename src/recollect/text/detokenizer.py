"""
Text from ids as they come: whole characters, and what a reply goes on with.

On its own because its rules are about what is out already, which a tokenizer knows nothing of.
"""

from collections.abc import Sequence
from typing import Final

from recollect.text.tokenizer import REPLACEMENT, IdsToText

# An unfinished character lacks at least one of its at most four bytes, so no more than three
# replacement characters at the end of a text can still turn into something else.
_LONGEST_UNFINISHED: Final = 3
_LONGEST_COMPARED: Final = 16
"""Characters at the end of two texts that tell whether one of them goes further."""


def finished(text: str) -> str:
    """Return a decoded text without what may be the part of a character at its end."""
    unfinished = len(text) - len(text.rstrip(REPLACEMENT))
    return text[: len(text) - min(unfinished, _LONGEST_UNFINISHED)]


def told_before(text: str, told: str) -> str:
    """
    Return what stands before the end of a decoded text that was told; nothing where that is not its end.

    A character in which the text was cut is not told.
    """
    if not told or not text.endswith(told):
        text = finished(text)
    return text.removesuffix(told) if text.endswith(told) else ""


class Detokenizer:
    """
    Turns tokens into pieces of text as they come.

    Owned by whoever streams one reply. A character is held back until all of its bytes are there.

    Invariants:
        1. The pieces joined, with what `finish` returns, equal `decode` of all ids, if no later id
           changes the text before it (true of byte-level and sentencepiece vocabularies).
        2. A piece is never taken back.
    """

    def __init__(self, tokenizer: IdsToText) -> None:
        self._tokenizer = tokenizer
        # The ids from which the next piece is decoded. The first `_settled` of them are context
        # (some vocabularies drop a space at the very start of a text); their text is out already.
        self._ids: list[int] = []
        self._settled = 0
        self._shown: str | None = ""
        """The text of `_ids` that is out; None: all of it, and nobody has asked yet what that is."""
        self.holds_back = False
        """Whether a part of the text so far waits for the end of a character."""

    def push(self, token_id: int) -> str:
        """Return the text that *token_id* completes, which may be empty."""
        if self._ids and len(self._ids) == self._settled:
            added = self._tokenizer.added_text(token_id)
            if added is not None:
                self._ids, self._settled, self._shown = [token_id], 1, None
                return added
        self._ids.append(token_id)
        text = self._tokenizer.decode(self._ids)
        stable = finished(text)
        self.holds_back = len(stable) < len(text)
        piece = self._new_part(stable)
        if piece and not self.holds_back:
            self._move_window()
        return piece

    def follow(self, ids: Sequence[int], text: str) -> None:
        """
        Take the ids of a text that is out, before any other: what comes goes on with it.

        Args:
            ids: Of the text, and perhaps of others before it, shape `(n,)`. Where they end inside of
                a character, it comes out with the id that completes it.
            text: What is out. If that is more than whole characters, with a sign for the last one's
                part, the sign is not told again.
        """
        whole = "".join([self.push(token_id) for token_id in ids])
        if self.holds_back and not text.endswith(whole[-_LONGEST_COMPARED:][-len(text) :]):
            self.finish()

    def finish(self, *, is_cut: bool = False) -> str:
        """
        Return what was held back: signs for the part of a character, or nothing.

        Args:
            is_cut: Whether more may come later, behind the same ids: then nothing is told of the
                part, because the character comes with the rest.
        """
        piece = "" if is_cut else self._new_part(self._tokenizer.decode(self._ids))
        self._ids, self._settled, self._shown = [], 0, ""
        self.holds_back = False
        return piece

    def _new_part(self, text: str) -> str:
        if self._shown is None:
            self._shown = self._tokenizer.decode(self._ids[: self._settled])
        if len(text) <= len(self._shown):
            return ""
        piece = text[len(self._shown) :]
        self._shown = text
        return piece

    def _move_window(self) -> None:
        """Forget all ids before the last piece, so that a long reply costs no more per token."""
        self._ids = self._ids[self._settled :]
        self._settled, self._shown = len(self._ids), None
