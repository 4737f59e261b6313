"""
What each token id stands for, as bytes.

Pure: a tokenizer says what it knows; here is what grammars and log probabilities need of it.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

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
