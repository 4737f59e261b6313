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
_MOST_IDS_OF_PARTS: Final = 9
"""That decode to so many signs, at three bytes each."""


def finished(text: str) -> str:
    """Return a decoded text without what may be the part of a character at its end."""
    return text[: len(text) - min(_signs(text), _LONGEST_UNFINISHED)]


def told_before(text: str, told: str) -> str:
    """
    Return what stands before the end of a decoded text that was told; nothing where that is not its end.

    A character in which the text was cut is not told.
    """
    if not told or not text.endswith(told):
        text = finished(text)
    return text.removesuffix(told) if text.endswith(told) else ""


def lacks_part(text: str, told: str) -> bool:
    """Return whether a decoded text ends with the part of a character that was not told of it."""
    return _signs(told) < _signs(text)


def whole_ids(ids: Sequence[int], told: str, tokenizer: IdsToText) -> Sequence[int]:
    """Return the ids of a text without those of a character's part that was not told of it."""
    text = tokenizer.decode(ids)
    if not lacks_part(text, told):
        return ids
    wanted = finished(text)
    shorter = (ids[:-count] for count in range(1, 1 + _MOST_IDS_OF_PARTS))
    return next((one for one in shorter if tokenizer.decode(one) == wanted), ids)


def _signs(text: str) -> int:
    return len(text) - len(text.rstrip(REPLACEMENT))


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
        self.begins_inside = self._is_at_seam = False
        """Whether what comes begins with the rest of a character."""
        self.ends_whole = True
        """
        Whether the text that is out is that of the ids: no character is unfinished, or, where one was at
        the beginning, that one is out.
        """

    def push(self, token_id: int) -> str:
        """Return the text that *token_id* completes, which may be empty."""
        self.ends_whole = True
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
        self.ends_whole = not self.holds_back or (self._is_at_seam and bool(piece))
        self._is_at_seam &= not piece
        if piece and not self.holds_back:
            self._move_window()
        return piece

    def follow(self, ids: Sequence[int], told: str) -> None:
        """
        Take the ids of a text that is out, before any other: what comes goes on with it.

        Args:
            ids: Of the text, and perhaps of others before it, shape `(n,)`. Where they end inside of
                a character, it comes out with the id that completes it.
            told: What is out. Where that has a sign for the part of a character at its end, as texts
                of clients may, it is not told again.
        """
        text = "".join([self.push(token_id) for token_id in ids])
        if self.holds_back:
            known = self._tokenizer.decode(self._ids)
            if lacks_part(text + known[len(self._shown or "") :], told):
                self.begins_inside = self._is_at_seam = True
            else:
                self._new_part(known)

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
