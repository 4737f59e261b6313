"""
The tokenizer of the reference model: one token per byte, and a few special tokens.

Pure: no files, no weights. Does not know the runtime whose logits it names.
"""

import re
from collections.abc import Sequence
from typing import Final

from recollect.models.control_tokens import ControlTokens
from recollect.models.vocabulary import Vocabulary

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
