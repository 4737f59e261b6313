"""
The tokenizer of a folder with a tokenizer.json, as Hugging Face's fast tokenizers are saved.

Does not know templates or models.
"""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final

from recollect import files
from recollect.errors import UnsupportedModelError
from recollect.models.control_tokens import ControlTokens, control_tokens, encode_in_pieces
from recollect.models.hf_files import MOST_TOKENIZER_BYTES
from recollect.models.vocabulary import Vocabulary, make_vocabulary

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_NAME: Final = "tokenizer.json"
_MOST_VOCAB: Final = 1 << 22
"""Sixteen times the largest vocabulary there is: a table of all ids is made."""


class HfTokenizer:
    """
    A fast tokenizer. Safe to use from several threads.

    Raises:
        UnsupportedModelError: The file cannot be read, or the library is not installed.
    """

    def __init__(
        self, file: Path, eos_token_ids: frozenset[int], *, template: str | None = None
    ) -> None:
        """
        Read a tokenizer.

        Args:
            file: Its tokenizer.json.
            eos_token_ids: The ids that end a reply.
            template: The source of the chat template; it tells which tokens mark turns.
        """
        self.eos_token_ids: Final = eos_token_ids
        self._tokenizer = _load(file)
        # A length limit that was saved with it would cut texts without a word, and padding add to them.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        ids = self._tokenizer.get_vocab(True).values()
        if not ids or max(ids) >= _MOST_VOCAB:
            raise UnsupportedModelError(
                f"{file} cannot be used (it has {len(ids):,} tokens, and ids up to "
                f"{max(ids, default=0):,}): save the model's fast tokenizer there again."
            )
        self.vocab_size: Final = 1 + max(ids)
        added = self._tokenizer.get_added_tokens_decoder()
        self.control_tokens: Final[ControlTokens] = control_tokens(
            {token.content: token_id for token_id, token in added.items() if token.special},
            {token.content: token_id for token_id, token in added.items()},
            template,
        )

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Return the bytes of each id; takes a second, once."""
        by_name = self._tokenizer.get_vocab(True)
        ids = [[token_id] for token_id in range(self.vocab_size)]
        is_byte_level = _SPACE in "".join(by_name)
        return make_vocabulary(
            {_name_bytes(name, is_byte_level): token_id for name, token_id in by_name.items()},
            self._tokenizer.decode_batch(ids, skip_special_tokens=False),
            self._tokenizer.decode_batch(ids, skip_special_tokens=True),
        )

    def encode(self, text: str) -> list[int]:
        """Return the ids of *text*, shape `(n,)`: nothing added, special tokens recognised."""
        return _encode(self._tokenizer, text)

    def encode_text(self, text: str) -> list[int]:
        """
        Return the ids of *text*, shape `(n,)`, the texts of control tokens as any other text.

        Those that Hugging Face's tokenizers give with `split_special_tokens=True`.
        """
        if next(self.control_tokens.begins(text), None) is None:
            return self.encode(text)
        ids = _encode(self._without_control_tokens, text)
        if set(self.control_tokens.ids.values()).isdisjoint(ids):
            return ids
        return encode_in_pieces(text, self.control_tokens, self.encode)

    @cached_property
    def _without_control_tokens(self) -> "tokenizers.Tokenizer":
        """Return a second tokenizer that reads control tokens as text; made for the first such text."""
        import tokenizers  # noqa: PLC0415 - part of an extra

        settings = json.loads(self._tokenizer.to_str())
        for token in settings["added_tokens"]:
            token["special"] = token["content"] in self.control_tokens.ids
        second = tokenizers.Tokenizer.from_str(json.dumps(settings))
        second.encode_special_tokens = True
        return second

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of *ids*, shape `(n,)`; an id that stands for no text gives none."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_id(self, text: str) -> int | None:
        """Return the one id that *text* encodes to, or None where it takes none or several."""
        ids = self.encode(text)
        return ids[0] if len(ids) == 1 else None

    def added_text(self, token_id: int) -> str | None:  # noqa: ARG002 - the protocol's
        """Return None, not known: this tokenizer decodes fast enough for each token."""
        return None


def _encode(tokenizer: "tokenizers.Tokenizer", text: str) -> list[int]:
    # Half a surrogate pair is not a character: no tokenizer has a token for it.
    clean = text if text.isascii() else text.encode("utf-8", "replace").decode()
    ids: list[int] = tokenizer.encode(clean, add_special_tokens=False).ids
    return ids


def _byte_characters() -> dict[str, int]:
    """
    Return the byte that each character of a byte-level vocabulary stands for.

    Printable bytes stand for themselves, the others are moved up. Source: GPT-2's encoder.py.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + place): byte for place, byte in enumerate(moved)}


_BYTE_CHARACTERS: Final = _byte_characters()
_SPACE: Final = "\u0120"
"""Stands for a space where vocabularies are byte-level."""


def _name_bytes(name: str, is_byte_level: bool) -> bytes:
    if is_byte_level and all(character in _BYTE_CHARACTERS for character in name):
        return bytes(_BYTE_CHARACTERS[character] for character in name)
    return name.encode()


def _load(file: Path) -> "tokenizers.Tokenizer":
    try:
        import tokenizers  # noqa: PLC0415 - part of an extra
    except ModuleNotFoundError as cause:
        raise UnsupportedModelError(
            'ONNX GenAI folders need two more libraries: pip install "recollect-llm[genai]".'
        ) from cause
    try:
        data = files.read_bytes(
            files.inside(file.parent, file.name), most_bytes=MOST_TOKENIZER_BYTES
        )
        return tokenizers.Tokenizer.from_buffer(data)
    except BaseException as cause:  # the library raises nothing more exact, and panics besides
        if not isinstance(cause, Exception) and type(cause).__module__ != "pyo3_runtime":
            raise
        raise UnsupportedModelError(
            f"{file} cannot be read ({cause}): save the model's fast tokenizer there again."
        ) from cause
