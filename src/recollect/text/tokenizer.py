"""
What the rest of recollect asks of a tokenizer, and what can be said of tokens without their files.

In the order of the file: the bytes of each token (`Vocabulary`); the control tokens, which say where
a turn begins and ends, found in texts (`ControlTokens`, `Shown`); the contract (`Tokenizer`); text as it
arrives one token at a time (`Detokenizer`), up to a stop string (`StopMatcher`); and the tokenizer of
the reference model, whose tokens are bytes (`ByteTokenizer`).

Nobody but a chat template may write a control token: what users, files and tools say is text,
whatever it looks like. Pure: knows no files, no templates and no conversations. The tokenizers that
models come with are in `file_tokenizers`.
"""

import itertools
import re
import threading
from array import array
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final, Protocol

REPLACEMENT: Final = "\ufffd"
"""What decoding gives for bytes that are no character."""
TEXT_MARKS: Final = (
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
"""
Marks that a model writes as a part of what it says, so that they are text wherever they are tokens.

The authors' tokenizers show them; one converted from GGUF counts them among the special tokens and
would leave them out.
"""

_BYTE_TOKEN: Final = re.compile(rb"<0x([0-9A-F]{2})>")
_SPACE_MARK: Final = "\u2581".encode()
"""Stands for a space in vocabularies made by SentencePiece."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The bytes of each id, and which ids are marks and no text."""

    token_bytes: tuple[bytes, ...]
    """By id, shape `(vocab_size,)`; empty where an id stands for nothing. Marks have their name."""
    special_token_ids: frozenset[int]
    """Ids that no text of a reply contains: beginnings and ends of turns, padding, and the like."""


def make_vocabulary(
    by_name: Mapping[bytes, int], shown: Sequence[str], shown_as_text: Sequence[str]
) -> Vocabulary:
    """
    Return the vocabulary of a tokenizer.

    Args:
        by_name: The id of each entry, by its name in the tokenizer's own table.
        shown: What each id decodes to by itself, shape `(vocab_size,)`.
        shown_as_text: The same without special tokens.
    """
    names = dict.fromkeys(range(len(shown)), b"") | {id_: name for name, id_ in by_name.items()}
    return Vocabulary(
        token_bytes=tuple(_plain_bytes(names[id_], shown[id_]) for id_ in range(len(shown))),
        special_token_ids=frozenset(
            id_ for id_, text in enumerate(shown) if text and not shown_as_text[id_]
        ),
    )


def decode_with_marks(
    ids: Sequence[int], marks: Mapping[int, str], decode: Callable[[Sequence[int]], str]
) -> str:
    """
    Return the text of ids with the marks in it that a tokenizer leaves out.

    Args:
        ids: Shape `(n,)`.
        marks: The text of each id that is left out.
        decode: Returns the text of ids that are no marks.
    """
    if marks.keys().isdisjoint(ids):
        return decode(ids)
    parts, start = [], 0
    for place, token_id in enumerate(ids):
        if token_id in marks:
            parts += [decode(ids[start:place]), marks[token_id]]
            start = place + 1
    return "".join([*parts, decode(ids[start:])])


def _plain_bytes(name: bytes, shown: str) -> bytes:
    """Return the bytes that an entry adds to a text; its name where that is them already."""
    if name == shown.encode():
        return name
    if byte := _BYTE_TOKEN.fullmatch(name):
        return bytes([int(byte[1], 16)])
    if _SPACE_MARK.decode() in shown:
        return name
    return name.replace(_SPACE_MARK, b" ")


class ControlTokens:
    """
    The control tokens of one vocabulary, by their text. Immutable.

    Those of a single character are left out: they could not be told from the letter.
    """

    def __init__(self, ids: Mapping[str, int]) -> None:
        self.ids: Final = {text: token_id for text, token_id in ids.items() if len(text) > 1}
        names = list(self.ids)
        # The longest first, as tokenizers prefer it where several begin at one place.
        self._lengths = sorted({len(name) for name in names}, reverse=True)
        # Vocabularies have up to some thousand of them, too many for one pattern: it tells where one
        # could begin, and the table whether one does.
        self._opening = re.compile(_starts(names))
        self._first = {name[0] for name in names}
        self._last = {name[-1] for name in names}
        self._heads = {name[:length] for name in names for length in range(1, len(name))}
        self._tails = {name[length:] for name in names for length in range(1, len(name))}
        self._longest = max(map(len, names), default=1)
        self._all = "\n".join(names)
        # By first characters, since looking for one character is by far the fastest.
        self._openings = {
            first: re.compile(_starts([name for name in names if name[0] == first]))
            for first in self._first
        }
        # Of texts with quotation marks around them: the end of a name at the beginning of one or the
        # beginning of a name at its end, roughly; and all that are no longer than a name.
        first, last, most = _any_of(self._first), _any_of(self._last), self._longest
        self._edges = re.compile(f'"[^"]{{0,{most}}}?{last}|{first}[^"]{{0,{most}}}"')
        self._short = re.compile(f'"([^"]{{1,{most}}})(?=")')
        self._has_quotes = any(mark in self._all for mark in '"\\')

    def find(self, text: str, start: int = 0) -> tuple[int, int] | None:
        """Return where the first one from *start* on lies, as `[begin, end)`; None: there is none."""
        for opening in self._opening.finditer(text, start):
            begin = opening.start()
            for length in self._lengths:
                if text[begin : begin + length] in self.ids:
                    return begin, begin + length
        return None

    def spans(self, text: str) -> Iterator[tuple[int, int]]:
        """Yield where each lies that a tokenizer finds in a text, as `[begin, end)`."""
        start = 0
        while (span := self.find(text, start)) is not None:
            yield span
            start = span[1]

    def count(self, text: str) -> int:
        """Return how many a tokenizer finds in a text."""
        return sum(1 for _ in self.spans(text))

    def begins(self, text: str) -> Iterator[int]:
        """Yield each place in a text where a control token begins, also inside another one."""
        if not self._may_have_one(text):
            return
        start = 0
        while (span := self.find(text, start)) is not None:
            yield span[0]
            start = span[0] + 1

    def may_be_in(self, texts: Sequence[str]) -> bool:
        """
        Return whether one could be in any of many texts, or be completed by what is around one.

        A quick look, which may say so where a close one does not.
        """
        if not self.ids:
            return False
        most, ends = self._longest, []
        for text in texts:
            one = text.strip()
            ends.append(one if len(one) <= 2 * most else f"{one[:most]} {one[-most:]}")
        return self._may_have_one("\n".join(texts)) or self.may_be_in_json(
            '"' + '""'.join(ends) + '"'
        )

    def may_be_in_json(self, text: str, *, except_for: Collection[str] = ()) -> bool:
        """
        Return the same of the texts in a JSON value.

        Args:
            text: The value as JSON, characters as they are.
            except_for: Texts that cannot complete any.
        """
        if not self.ids:
            return False
        if self._has_quotes or self._may_have_one(text):
            return True
        if any(one in text for one in (*self._first, *self._last)) and self._edges.search(text):
            return True
        short = {one.strip() for one in self._short.findall(text)}
        return any(one in self._all for one in short.difference(except_for) if one)

    def _may_have_one(self, text: str) -> bool:
        return any(
            first in text and opening.search(text) is not None
            for first, opening in self._openings.items()
        )

    def may_begin_before(self, text: str) -> bool:
        """Return whether a text could be the end, or the middle, of one that begins before it."""
        short = text[: self._longest]
        if not any(last in short for last in self._last):
            return self._is_inside(text)
        return self._is_inside(text) or any(
            short[:length] in self._tails for length in range(1, len(short) + 1)
        )

    def may_make(self, text: str) -> bool:
        """Return whether a control token could be read in a text, or where it meets another."""
        core = text.strip()
        return bool(core) and (
            any(True for _ in self.begins(core))
            or self.may_begin_before(core)
            or self.may_end_after(core)
        )

    def may_end_after(self, text: str) -> bool:
        """Return whether a text could be the beginning, or the middle, of one that ends after it."""
        short = text[-self._longest :] if self._longest else ""
        if not any(first in short for first in self._first):
            return self._is_inside(text)
        return self._is_inside(text) or any(
            short[-length:] in self._heads for length in range(1, len(short) + 1)
        )

    def _is_inside(self, text: str) -> bool:
        return 0 < len(text) < self._longest and text in self._all


def _starts(names: Collection[str]) -> str:
    """Return a pattern for the first two characters of names; it takes the first of them alone."""
    by_first: dict[str, set[str]] = {}
    for name in names:
        by_first.setdefault(name[0], set()).add(name[1])
    parts = (f"{re.escape(first)}(?={_any_of(second)})" for first, second in by_first.items())
    return "|".join(parts) or "(?!)"


def _any_of(characters: Collection[str]) -> str:
    return f"[{re.escape(''.join(sorted(characters)))}]" if characters else "(?!)"


@dataclass(frozen=True, slots=True)
class Shown:
    """A text in which a template, and nobody else, wrote control tokens."""

    text: str
    breaks: tuple[int, ...] = ()
    """Places in the text, ascending: a control token that lies across one was said, not written."""

    def name(self) -> bytes:
        """Return a name that no other text, or the same with other places, has."""
        text = self.text.encode("utf-8", "surrogatepass")
        if not self.breaks:
            return blake2b(text, digest_size=16).digest()
        places = blake2b(array("q", self.breaks).tobytes(), digest_size=32).digest()
        return blake2b(text, digest_size=16, key=places).digest()

    def part(self, start: int, end: int | None = None) -> "Shown":
        """Return what lies in `[start, end)`."""
        stop = len(self.text) if end is None else end
        if not self.breaks:
            return Shown(self.text[start:stop])
        first, last = bisect_right(self.breaks, start), bisect_right(self.breaks, stop - 1)
        breaks = tuple(place - start for place in self.breaks[first:last])
        return Shown(self.text[start:stop], breaks)

    def has_break(self, start: int, end: int) -> bool:
        """Return whether there is one inside `[start, end)`, its ends apart."""
        place = bisect_right(self.breaks, start)
        return place < len(self.breaks) and self.breaks[place] < end

    def written(self, control: ControlTokens) -> list[str]:
        """Return the control tokens that lie across no break, in order."""
        found, start = [], 0
        while (span := control.find(self.text, start)) is not None:
            if self.has_break(*span):
                start = span[0] + 1
            else:
                found.append(self.text[slice(*span)])
                start = span[1]
        return found

    def says(self, text: str, start: int, control: ControlTokens) -> bool:
        """Return whether a text is shown from *start* on, and none of its control tokens written."""
        begins = (start + place for place in control.begins(text))
        return self.text.startswith(text, start) and all(
            self.has_break(place, place + 2) for place in begins
        )

    def followed_by_said(self, text: str, control: ControlTokens) -> "Shown":
        """Return this and a text that somebody says after it."""
        start = len(self.text)
        begins = (start + place + 1 for place in control.begins(text))
        return Shown(self.text + text, (*self.breaks, start, *begins))


class UnknownCharacters:
    """
    Characters that a vocabulary cannot spell, found out as they come.

    Some vocabularies lack the bytes of rare characters, and their tokenizers put a control token
    there: with SmolLM2 the character U+0004 ends the conversation. Safe from several threads.

    Invariant: no more than `MOST_ASKED` characters are held between calls.
    """

    MOST_ASKED: Final = 1 << 16
    """About ten megabytes; more different characters than any conversation has."""
    _AT_ONCE: Final = 4096
    """Characters that are asked about in one call, to bound the memory that it takes."""

    def __init__(self, are_unknown: Callable[[Sequence[str]], Sequence[bool]]) -> None:
        """
        Hold what is found out.

        Args:
            are_unknown: Tells which of some characters give a control token.
        """
        self._are_unknown = are_unknown
        self._known: dict[str, bool] = {}
        self._lock = threading.Lock()

    def replaced(self, text: str) -> str:
        """Return a text with U+FFFD in the place of each character that cannot be spelled."""
        characters = {one for one in {*text, REPLACEMENT} if not "\ud800" <= one <= "\udfff"}
        with self._lock:
            new = [one for one in characters if one not in self._known]
            for start in range(0, len(new), self._AT_ONCE):
                some = new[start : start + self._AT_ONCE]
                self._known.update(zip(some, self._are_unknown(some), strict=True))
            unknown = {one for one in characters if self._known[one]}
            if len(self._known) > self.MOST_ASKED:
                self._known.clear()
        if unknown.isdisjoint(text):
            return text
        instead = "?" if REPLACEMENT in unknown else REPLACEMENT
        return "".join(instead if one in unknown else one for one in text)


def control_tokens(
    special: Mapping[str, int], added: Mapping[str, int], template: str | None
) -> ControlTokens:
    """
    Return which tokens of a vocabulary are control tokens.

    Args:
        special: Texts that the vocabulary calls special, and their ids.
        added: Texts that are one token wherever they are. Many fine-tuned models have marks of turns
            among these that nobody called special: those that the template writes are control tokens.
        template: The source of the chat template; None where there is none.
    """
    written = {text: token_id for text, token_id in added.items() if text in (template or "")}
    found = {**special, **written}
    return ControlTokens({text: id_ for text, id_ in found.items() if text not in TEXT_MARKS})


def encode_in_pieces(
    text: str, control: ControlTokens, encode: Callable[[str], list[int]]
) -> list[int]:
    """
    Return ids of a text without a control token, for a tokenizer that always recognises them.

    The text of each is cut after its first character, so no piece has one. What is read is the
    same; the ids around the cut may be others than a tokenizer would give that leaves them alone.
    """
    cuts = [0, *(place + 1 for place in control.begins(text)), len(text)]
    pieces = (text[start:end] for start, end in itertools.pairwise(cuts))
    return [token_id for piece in pieces for token_id in encode(piece)]


class Tokenizer(Protocol):
    """Encodes and decodes; safe to use from several threads."""

    @property
    def vocab_size(self) -> int:
        """Return one more than the largest id that stands for text."""

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Return the ids that end a reply."""

    @property
    def vocabulary(self) -> Vocabulary:
        """Return the bytes of each id."""

    @property
    def control_tokens(self) -> ControlTokens:
        """Return the tokens that `encode` recognises in a text and `encode_text` does not."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of *text*, shape `(n,)`: nothing added, special tokens recognised."""

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of *text*, shape `(n,)`, the texts of control tokens as any other text."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of *ids*, shape `(n,)`; an id that stands for no text gives none."""

    def token_id(self, text: str) -> int | None:
        """Return the one id that *text* encodes to, or None where it takes none or several."""

    def added_text(self, token_id: int) -> str | None:
        """
        Return the text that an id adds to any that ends with a whole character.

        None where that is not known, or depends on the ids around it.
        """


class IdsToText(Protocol):
    """What turns ids back into text."""

    def decode(self, ids: Sequence[int], /) -> str:
        """Return the text of *ids*, shape `(n,)`."""

    def added_text(self, token_id: int, /) -> str | None:
        """Return what an id adds to a text; see `Tokenizer.added_text`."""


def text_of(token_id: int, tokenizer: IdsToText) -> str:
    """Return the text of one id by itself; where what it adds is known, nothing is decoded."""
    added = tokenizer.added_text(token_id)
    return tokenizer.decode([token_id]) if added is None else added


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

    def finish(self, last: str = "") -> str:
        """Take the last text, and return it with what was held back, as far as it can be let through."""
        piece = self.push(last)
        rest, self._held = self._held, ""
        return piece + rest

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


END_OF_TURN: Final = "<|im_end|>"
SPECIAL_TOKENS: Final = ("<|im_start|>", END_OF_TURN, "<|endoftext|>")
_IDS: Final = {text: 256 + index for index, text in enumerate(SPECIAL_TOKENS)}
_VOCABULARY: Final = Vocabulary(
    token_bytes=(*(bytes([byte]) for byte in range(256)), *(t.encode() for t in SPECIAL_TOKENS)),
    special_token_ids=frozenset(_IDS.values()),
)
_SPLIT: Final = re.compile("(" + "|".join(re.escape(text) for text in SPECIAL_TOKENS) + ")")


class ByteTokenizer:
    """
    UTF-8 bytes as the ids `[0, 256)`, special tokens from 256 on.

    Stateless, so any thread may use it. Several tokens make one character as soon as the text is
    not ASCII, which is what makes it a fair stand-in for a real tokenizer.
    """

    eos_token_ids: Final = frozenset({_IDS[END_OF_TURN], _IDS["<|endoftext|>"]})
    control_tokens: Final = ControlTokens(_IDS)

    @property
    def vocab_size(self) -> int:
        """Return one more than the largest id."""
        return 256 + len(SPECIAL_TOKENS)

    @property
    def vocabulary(self) -> Vocabulary:
        """Return the bytes of each id."""
        return _VOCABULARY

    def encode(self, text: str) -> list[int]:
        """Return the ids of *text*, shape `(n,)`: nothing added, special tokens recognised."""
        ids: list[int] = []
        for part in _SPLIT.split(text):
            if part in _IDS:
                ids.append(_IDS[part])
            else:
                ids.extend(part.encode("utf-8", "replace"))
        return ids

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of *text*, shape `(n,)`, the texts of control tokens as any other text."""
        return list(text.encode("utf-8", "replace"))

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of *ids*; bytes that are not UTF-8 become U+FFFD, unknown ids nothing."""
        text = bytearray()
        for token_id in ids:
            if 0 <= token_id < 256:
                text.append(token_id)
            elif 256 <= token_id < self.vocab_size and not skip_special_tokens:
                text += SPECIAL_TOKENS[token_id - 256].encode()
        return text.decode("utf-8", "replace")

    def token_id(self, text: str) -> int | None:
        """Return the id of a special token, or None where *text* is not one."""
        return _IDS.get(text)

    def added_text(self, token_id: int) -> str | None:
        """Return the character that an id is by itself; None where it is a part of one, or a mark."""
        return chr(token_id) if 0 <= token_id < 128 else None


def encode_shown(tokenizer: Tokenizer, part: Shown) -> list[int]:
    """
    Return the ids of a part of what a template shows, control tokens only where the template wrote them.

    Between two of those the text is encoded in one piece, as it always is. So all but the pieces in
    which a control token was said have the ids that the whole text would have.
    """
    encode, find = tokenizer.encode, tokenizer.control_tokens.find
    text, ids = part.text, list[int]()
    done = piece = start = 0  # `[done, piece)` is encoded as always, once `[piece, …)` is not
    is_plain = False
    while part.breaks and (span := find(text, start)) is not None:
        begin, end = span
        if part.has_break(begin, end):
            is_plain, start = True, begin + 1
            continue
        if is_plain:
            ids += encode(text[done:piece]) + tokenizer.encode_text(text[piece:begin])
            done, is_plain = begin, False
        piece = start = end
    if is_plain:
        return ids + encode(text[done:piece]) + tokenizer.encode_text(text[piece:])
    return ids + encode(text[done:])
