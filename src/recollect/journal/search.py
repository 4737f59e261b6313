"""
What somebody searches for: its words, which of them an index can find, and where a text has them.

A message is a hit if it has all words, in any order and whatever their case; a word is found inside of
others, so languages without spaces need nothing of their own. The index (`schema`) has all groups of three
characters of each message, and narrows down what is read; whether a message is a hit is decided here, on its
text. So an encrypted journal, which has no such index, finds the same.

`Query` is pure; `Search` has the SQL. Neither knows transactions.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Final, Self

from recollect.errors import InvalidParameterError
from recollect.journal import schema
from recollect.journal.changes import response_of
from recollect.journal.records import DEFAULT_TIP, Hit, require_limit
from recollect.journal.rows import NODE_COLUMNS, Row, is_sound, read_content
from recollect.journal.statements import Statements

MOST_CHARACTERS: Final = 1_000
"""Longest query: what people search for is shorter, and each word costs a pass over each message."""
MOST_WORDS: Final = 32
_MOST_TRIGRAMS: Final = 64
"""Most groups that the index is asked for: each is a list to walk, and a few leave hardly a wrong one."""
_WORD: Final = re.compile(r'"([^"]*)(?:"|$)|([^\s"]+)')
"""A phrase in quotation marks, of which the last may be missing, or what is between spaces."""
_CONTEXT: Final = 60
"""Characters that a snippet shows before and after the first word that is found."""
_FOLDED_BELOW: Final = 0x1E944
"""Above are no letters with case. Source: CaseFolding.txt of Unicode 16."""
_OLD_CYRILLIC: Final = re.compile("[\u1c80-\u1c88]")
"""Which casefold takes for today's letters, and the index does not."""
_MAX_ID: Final = 2**63 - 1
"""Largest id that SQLite gives."""


@dataclass(frozen=True, slots=True)
class Query:
    """
    Words that a message must have.

    Invariants:
        1. There is at least one word, and none is empty.
        2. Words are folded.
    """

    words: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """
        Return the query in what somebody typed: words, and phrases in double quotation marks.

        Raises:
            InvalidParameterError: It has no word, too many, or is too long.
        """
        if len(text) > MOST_CHARACTERS:
            raise InvalidParameterError(
                f"A search has {MOST_CHARACTERS:,} characters at most, and this one {len(text):,}: "
                "shorten it.",
                param="query",
            )
        found = [phrase.strip() or word for phrase, word in _WORD.findall(text)]
        words = tuple(dict.fromkeys(folded(word) for word in found if word))
        if not words:
            raise InvalidParameterError(
                "There is nothing to search for: give at least one word.", param="query"
            )
        if len(words) > MOST_WORDS:
            raise InvalidParameterError(
                f"A search has {MOST_WORDS} words at most, and this one {len(words)}: leave some out.",
                param="query",
            )
        return cls(words)

    def for_index(self) -> str | None:
        """
        Return an FTS5 expression that all hits match; None if the index cannot narrow this query down.

        A word of one or two characters has no group of three, and is only looked for in the texts.
        """
        groups = dict.fromkeys(group for word in self.words for group in _trigrams(word))
        quoted = [f'"{group.replace(chr(34), chr(34) * 2)}"' for group in groups]
        return " AND ".join(quoted[:_MOST_TRIGRAMS]) or None

    def snippet(self, text: str) -> str | None:
        """Return a text around the first word found, in one line; None if the text lacks a word."""
        inside = folded(text)
        places = [(inside.find(word), len(word)) for word in self.words]
        start, length = min(places)
        if start < 0:
            return None
        begin, end = max(0, start - _CONTEXT), start + min(length, _CONTEXT) + _CONTEXT
        shown = " ".join(text[begin:end].split())
        return f"{'…' * (begin > 0)}{shown}{'…' * (end < len(text))}"


def folded(text: str) -> str:
    """Return a text of the same length in which letters of either case are the same."""
    if text.isascii():
        return text.lower()
    plain = text.casefold()
    # As long as before: each letter has become one. This is several times as fast as to translate.
    if len(plain) == len(text) and not _OLD_CYRILLIC.search(text):
        return plain
    return text.translate(_folding())


@cache
def _folding() -> dict[int, int]:
    """Return the letters that are not folded already, with what they become: one letter each."""
    pairs = ((code, chr(code).casefold()) for code in range(_FOLDED_BELOW))
    return {
        code: ord(letter)
        for code, letter in pairs
        if len(letter) == 1 and ord(letter) != code and not _OLD_CYRILLIC.match(chr(code))
    }


def _trigrams(word: str) -> Iterator[str]:
    """Yield the groups of three characters of a folded word about which the index and `folded` agree."""
    for start in range(len(word) - 2):
        group = word[start : start + 3]
        if all(_is_alike(ord(character)) for character in group):
            yield group


def _is_alike(code: int) -> bool:
    """
    Return whether FTS5 takes a folded character for the same as `folded` does.

    It knows the letters of Unicode 6.1: Latin, Greek and Cyrillic, but for U+03F3 and phonetic letters, some
    of whose capitals are younger.
    The others are scripts without case: Hebrew to Burmese, Japanese and Chinese, Korean.
    """
    is_letter = 0 < code < 0x528 and not 0x250 <= code < 0x2B0 and code != 0x3F3
    return is_letter or any(
        first <= code < end for first, end in ((0x590, 0x10A0), (0x3000, 0xA4D0), (0xAC00, 0xD7A4))
    )


class Search:
    """Searches in one transaction on the journal, and valid as long as that."""

    def __init__(self, sql: Statements) -> None:
        self._sql = sql
        self._connection = sql.connection
        self._sealing = sql.sealing

    def find(
        self, query: Query, namespace: str, before: int | None, most_rows: int
    ) -> tuple[list[tuple[Row, str]], int | None]:
        """
        Return the messages of a namespace with all words of a query, the newest first.

        Args:
            query: The words.
            namespace: Whose messages are searched.
            before: Only messages with smaller ids; None: all.
            most_rows: How many messages to read. The index narrows down which, where there is one.

        Returns:
            The rows of the messages in `NODE_COLUMNS`, with a snippet of each; and the id before which the
            search goes on, None where it is at its end.

        Raises:
            StoreCorruptError: A row is not what was written.
        """
        rows = self._candidates(query, _MAX_ID if before is None else before, most_rows)
        found = []
        for whose, *columns_of_row in rows:
            row = tuple(columns_of_row)
            if whose != namespace:
                continue
            snippet = query.snippet(read_content(row, self._sealing))
            if snippet is None:
                continue
            if not is_sound(row):  # what is read and is no hit is not checked, which takes longer
                raise self._sealing.not_as_written(f"node {row[0]}")
            found.append((row, snippet))
        return found, rows[-1][1] if len(rows) == most_rows else None

    def _candidates(self, query: Query, before: int, most_rows: int) -> list[Row]:
        """Return messages that may be hits, the newest first: namespaces, and rows of `NODE_COLUMNS`."""
        columns = ", ".join(f"n.{name}" for name in NODE_COLUMNS.split(", "))

        def read(source: str, which: str, *values: object) -> list[Row]:
            return self._rows(
                f"SELECT c.namespace, {columns} FROM {source} "  # noqa: S608 - names of ours
                f"CROSS JOIN conversations c ON c.id = n.conversation_id WHERE {which} DESC LIMIT ?",
                *values,
                most_rows,
            )

        narrowed = None if self._sealing.is_on else query.for_index()
        if narrowed is None or not (schema.can_index() and schema.has_index(self._connection)):
            return read("nodes n", "n.id < ? ORDER BY n.id", before)
        # CROSS JOIN: the index is walked first, as it narrows most. It can walk backwards.
        by_words = read(
            f"{schema.INDEX} s CROSS JOIN nodes n ON n.id = s.rowid",
            f"s.{schema.INDEX} MATCH ? AND s.rowid < ? ORDER BY s.rowid",
            narrowed,
            before,
        )
        with_nul = read("nodes n", f"{schema.HAS_NUL} AND n.id < ? ORDER BY n.id", before)
        rows = {row[1]: row for row in (*by_words, *with_nul)}
        return [rows[node_id] for node_id in sorted(rows, reverse=True)][:most_rows]

    def hits(self, found: Sequence[tuple[Row, str]]) -> list[Hit]:
        """
        Return what a list of hits says of rows of `NODE_COLUMNS` with their snippets.

        Raises:
            StoreCorruptError: A row of a conversation is not what was written.
        """
        by_conversation: dict[int, list[int]] = {}
        for (node_id, _, conversation_id, *_), _ in found:
            by_conversation.setdefault(conversation_id, []).append(node_id)
        infos = {one: self._sql.info(one) for one in by_conversation}
        places = {one: self._places(one, ids) for one, ids in by_conversation.items()}
        hits = []
        for (node_id, _, conversation_id, _, role, _, created_at, *_), snippet in found:
            branch, number = places[conversation_id][node_id]
            hits.append(
                Hit(
                    conversation=infos[conversation_id].name,
                    branch=branch,
                    role=role,
                    snippet=snippet,
                    created_at=datetime.fromisoformat(created_at),
                    conversation_id=conversation_id,
                    node_id=node_id,
                    label=infos[conversation_id].label,
                    number=number,
                    node_label=response_of(self._sql, conversation_id, node_id),
                )
            )
        return hits

    def _places(
        self, conversation_id: int, ids: Sequence[int]
    ) -> dict[int, tuple[str | None, int]]:
        """Return for nodes of a conversation a branch that each is in, and its number; reads no text."""
        parents: dict[int, int | None] = dict(
            self._rows(
                "SELECT id, parent_id FROM nodes WHERE conversation_id = ? ORDER BY id",
                conversation_id,
            )
        )
        branches = dict[int, str]()
        tips = self._sql.tips(conversation_id)
        # Checkpoints of a server's clients have a colon in their names; they come last.
        for name in sorted(tips, key=lambda name: (name != DEFAULT_TIP, ":" in name, name)):
            node_id = tips[name]
            while node_id is not None and node_id >= min(ids) and node_id not in branches:
                branches[node_id] = name
                node_id = parents.get(node_id)
        wanted = set(ids)
        return {
            node_id: (branches.get(node_id), number)
            for number, node_id in enumerate(parents, 1)
            if node_id in wanted
        }

    def numbered_node(self, conversation_id: int, number: int) -> int | None:
        """Return the id of a conversation's message by its number, as `Hit.number`; None: there is none."""
        rows = self._rows(
            "SELECT id FROM nodes WHERE conversation_id = ? ORDER BY id LIMIT 1 OFFSET ?",
            conversation_id,
            number - 1,
        )
        return int(rows[0][0]) if rows else None

    def _rows(self, sql: str, *values: object) -> list[Row]:
        return self._connection.execute(sql, values).fetchall()


_ROWS_AT_ONCE: Final = 500
"""Messages that a search reads before it lets others use the file, which takes some milliseconds."""


def find_hits(
    reading: Callable[[], AbstractContextManager[Statements]],
    query: Query,
    namespace: str,
    limit: int,
    after: int | None,
) -> list[Hit]:
    """
    Return the hits of a query, in several transactions; see `Journal.search`.

    Args:
        reading: Begins a transaction that reads.
        query, namespace, limit, after: As there.
    """
    found: list[Hit] = []
    before, limit = after, require_limit(limit)
    # Of a common word, most that are read are hits.
    rows_at_once = min(2 * limit, _ROWS_AT_ONCE)
    while len(found) < limit:
        with reading() as sql:
            search = Search(sql)
            rows, before = search.find(query, namespace, before, rows_at_once)
            found += search.hits(rows[: limit - len(found)])
        rows_at_once = _ROWS_AT_ONCE
        if before is None:
            break
    return found
