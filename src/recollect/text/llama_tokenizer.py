"""
The tokenizer in a GGUF file, as llama.cpp reads it.

`LlamaTokenizer` puts it behind the contract of `tokenizer`: bytes to text, which tokens are text and which
mark turns. The library itself is behind `TokenTable`. Knows no models and no conversations.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Final, Protocol

from recollect.text.file_tokenizers import FileTokenizer, characters
from recollect.text.tokenizer import TEXT_MARKS, UnknownCharacters, Vocabulary, control_tokens


class TokenTable(Protocol):
    """A vocabulary and the way in which it cuts texts; safe to use from several threads."""

    @property
    def count(self) -> int:
        """Return how many ids there are."""

    @property
    def drops_first_space(self) -> bool:
        """Return whether a text is cut as if a space came before it, which is not shown again."""

    def piece(self, token_id: int) -> bytes:
        """Return the bytes of an id; of a control token its name."""

    def is_control(self, token_id: int) -> bool:
        """Return whether an id is no text: a control token, or one that stands for what is unknown."""

    def is_added(self, token_id: int) -> bool:
        """Return whether an id's text is that token wherever it is."""

    def cut(self, text: bytes, *, with_control: bool) -> list[int]:
        """Return the ids of a text, nothing added, control tokens recognised or read as text."""


class LlamaTokenizer(FileTokenizer):
    """A GGUF file's own tokenizer. Safe to use from several threads."""

    def __init__(
        self, table: TokenTable, eos_token_ids: frozenset[int], *, template: str | None = None
    ) -> None:
        """
        Take a vocabulary.

        Args:
            table: The vocabulary.
            eos_token_ids: The ids that end a reply.
            template: The source of the chat template; it tells which tokens mark turns.
        """
        self.eos_token_ids: Final = eos_token_ids
        self._table = table
        self.vocab_size: Final = table.count
        self._unknown = UnknownCharacters(self._are_unknown)
        special = {
            self._name(token_id): token_id
            for token_id in range(table.count)
            if table.is_control(token_id)
        }
        added = {
            self._name(token_id): token_id
            for token_id in range(table.count)
            if table.is_added(token_id)
        }
        self._hidden: Final = frozenset(
            token_id for name, token_id in special.items() if name not in TEXT_MARKS
        )
        self.control_tokens = control_tokens(special, {**special, **added}, template)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Return the bytes of each id."""
        table = self._table
        return Vocabulary(
            token_bytes=tuple(table.piece(token_id) for token_id in range(table.count)),
            special_token_ids=self._hidden,
        )

    def encode(self, text: str) -> list[int]:
        """Return the ids of *text*, shape `(n,)`: nothing added, special tokens recognised."""
        return self._cut(text, with_control=True)

    def _encode_without_control_tokens(self, text: str) -> list[int]:
        return self._cut(text, with_control=False)

    def _cut(self, text: str, *, with_control: bool) -> list[int]:
        written = characters(text).encode()
        ids = self._table.cut(written, with_control=with_control)
        found = sum(token_id in self._control_ids for token_id in ids)
        most = self.control_tokens.count(text) if with_control else 0
        # Of what it cannot spell the library leaves bytes out, or puts a control token there.
        if found > most or len(written) > sum(len(self._table.piece(one)) for one in ids):
            written = characters(self._unknown.replaced(text)).encode()
            ids = self._table.cut(written, with_control=with_control)
        return ids

    def _are_unknown(self, texts: Sequence[str]) -> Sequence[bool]:
        cut = (self._table.cut(characters(one).encode(), with_control=False) for one in texts)
        return [not ids or not self._hidden.isdisjoint(ids) for ids in cut]

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        return frozenset(self.control_tokens.ids.values())

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of *ids*, shape `(n,)`; an id that stands for no text gives none."""
        shown = [
            self._table.piece(token_id)
            for token_id in ids
            if 0 <= token_id < self.vocab_size
            and not (skip_special_tokens and token_id in self._hidden)
        ]
        if shown and self._table.drops_first_space and ids[0] not in self._hidden:
            shown[0] = shown[0].removeprefix(b" ")
        return b"".join(shown).decode("utf-8", "replace")

    def added_text(self, token_id: int) -> str | None:
        """Return the text that an id adds to any; None where it ends inside a character."""
        if not 0 <= token_id < self.vocab_size or token_id in self._hidden:
            return None
        try:
            return self._table.piece(token_id).decode()
        except UnicodeDecodeError:
            return None

    def _name(self, token_id: int) -> str:
        return self._table.piece(token_id).decode("utf-8", "replace")
