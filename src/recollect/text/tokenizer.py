"""
Text to token ids and back, and text as it arrives one token at a time.

Does not know templates, models or conversations: what a message looks like is decided above it.

The tokenizer of the reference model: one token per byte, and a few special tokens.

Pure: no files, no weights. Does not know the runtime whose logits it names.
"""

import hashlib
import re
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol, Self

import numpy as np

from recollect.errors import UnsupportedModelError
from recollect.text.other_tokenizers import added_texts, recognising_only, without_truncation
from recollect.text.vocabulary import (
    TEXT_MARKS,
    ControlTokens,
    UnknownCharacters,
    Vocabulary,
    control_tokens,
    decode_with_marks,
    encode_in_pieces,
    make_vocabulary,
)

if TYPE_CHECKING:
    import openvino
    import openvino_genai
    from numpy.typing import NDArray


_REPLACEMENT: Final = "\ufffd"
# An unfinished character lacks at least one of its at most four bytes, so no more than three
# replacement characters at the end of a text can still turn into something else.
_LONGEST_UNFINISHED: Final = 3
_ANCHOR: Final = "a"


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


class OpenVinoTokenizer:
    """The tokenizer that lies beside an OpenVINO model. Safe to use from several threads."""

    def __init__(
        self, folder: Path, eos_token_ids: frozenset[int], *, template: str | None = None
    ) -> None:
        """
        Read a tokenizer.

        Args:
            folder: Where its files are.
            eos_token_ids: The ids that end a reply.
            template: The source of the chat template; it tells which tokens mark turns.
        """
        self.eos_token_ids: Final = eos_token_ids
        self._added: dict[int, str | None] = {}  # what `added_text` has found out
        self._unknown = UnknownCharacters(self._are_unknown)
        try:
            self._files = _Files.read(folder)
            self._tokenizer = _load(self._files)
            self.control_tokens: Final[ControlTokens] = self._control_tokens(template)
        except (RuntimeError, OSError, ValueError) as cause:
            raise UnsupportedModelError(
                f"The tokenizer in {folder} cannot be read: export it again with "
                "`optimum-cli export openvino`, or remove the folder and load the model anew."
            ) from cause

    @cached_property
    def vocab_size(self) -> int:
        """Return one more than the largest id that stands for text."""
        return 1 + max(self._names)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Return the bytes of each id; takes a quarter of a second for 49,152 the first time."""
        each = [[token_id] for token_id in range(self.vocab_size)]
        shown, shown_as_text = (
            self._tokenizer.decode(each, skip_special_tokens=skip) for skip in (False, True)
        )
        for token_id, mark in self._hidden_marks.items():
            shown_as_text[token_id] = mark
        return make_vocabulary(self._tokenizer.get_vocab(), shown, shown_as_text)

    @cached_property
    def _names(self) -> dict[int, bytes]:
        """Return the name of each id in the tokenizer's own table."""
        return {token_id: name for name, token_id in self._tokenizer.get_vocab().items()}

    @cached_property
    def _hidden_marks(self) -> dict[int, str]:
        """Return the ids of text that the tokenizer leaves out, wrongly, with the other special tokens."""
        ids = {mark: self.token_id(mark) for mark in TEXT_MARKS}
        return {
            token_id: mark
            for mark, token_id in ids.items()
            if token_id is not None and not self._shown([token_id])
        }

    def _control_tokens(self, template: str | None) -> ControlTokens:
        texts = added_texts(self._files.xml, self._files.weights) or self._special_names()
        # In one call each: some vocabularies have thousands.
        each = zip(texts, self._each(texts) if texts else [], strict=True)
        known = {text: ids[0] for text, ids in each if len(ids) == 1}
        if not known:
            return ControlTokens({})
        as_text = self._tokenizer.decode(
            [[one] for one in known.values()], skip_special_tokens=True
        )
        special = {
            name: token_id
            for (name, token_id), shown in zip(known.items(), as_text, strict=True)
            if not shown
        }
        return control_tokens(special, known, template)

    def _special_names(self) -> list[str]:
        """Return the texts of special ids, for tokenizers that do not tell which texts they look for."""
        ids = [[token_id] for token_id in range(self.vocab_size)]
        shown, as_text = (
            self._tokenizer.decode(ids, skip_special_tokens=skip) for skip in (False, True)
        )
        return [name for name, text in zip(shown, as_text, strict=True) if name and not text]

    def encode(self, text: str) -> list[int]:
        """Return the ids of *text*, shape `(n,)`: nothing added, special tokens recognised."""
        ids = _encode(self._tokenizer, text)
        found = np.count_nonzero(self._is_control(ids))
        if found and found > self.control_tokens.count(text):
            ids = _encode(self._tokenizer, self._unknown.replaced(text))
        as_list: list[int] = ids.tolist()
        return as_list

    def encode_text(self, text: str) -> list[int]:
        """
        Return the ids of *text*, shape `(n,)`, the texts of control tokens as any other text.

        Those that Hugging Face's tokenizers give with `split_special_tokens=True`.
        """
        if next(self.control_tokens.begins(text), None) is None:
            return self.encode(text)
        ids = _encode(self._without_control_tokens, text)
        if self._is_control(ids).any():
            ids = _encode(self._without_control_tokens, self._unknown.replaced(text))
        if not self._is_control(ids).any():
            as_list: list[int] = ids.tolist()
            return as_list
        return encode_in_pieces(text, self.control_tokens, self.encode)

    def _is_control(self, ids: "NDArray[np.int64]") -> "NDArray[np.bool_]":
        return np.isin(ids, list(self.control_tokens.ids.values()))

    def _are_unknown(self, characters: Sequence[str]) -> Sequence[bool]:
        control = set(self.control_tokens.ids.values())
        return [not control.isdisjoint(ids) for ids in self._each(characters)]

    def _each(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, made in one call."""
        encoded = self._tokenizer.encode(list(texts), add_special_tokens=False)
        ids, is_text = encoded.input_ids.data, encoded.attention_mask.data != 0
        return [row[mask].tolist() for row, mask in zip(ids, is_text, strict=True)]

    @cached_property
    def _without_control_tokens(self) -> "openvino_genai.Tokenizer":
        """Return a second tokenizer that reads control tokens as text; made for the first such text."""
        added = added_texts(self._files.xml, self._files.weights)
        kept = [text for text in added if text not in self.control_tokens.ids]
        return _load(self._files.recognising_only(kept))

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of *ids*, shape `(n,)`; an id that stands for no text gives none."""
        if not skip_special_tokens:
            return self._shown(ids, skip_special_tokens=False)
        return decode_with_marks(ids, self._hidden_marks, self._shown)

    def _shown(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        if not ids:
            return ""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_id(self, text: str) -> int | None:
        """Return the one id that *text* encodes to, or None where it takes none or several."""
        ids = self.encode(text)
        return ids[0] if len(ids) == 1 else None

    def added_text(self, token_id: int) -> str | None:
        """
        Return the text that an id adds to any that ends with a whole character; None: not known.

        Known of ids whose name is their text, as in byte-level vocabularies: an id that ends inside
        a character has other bytes. Decoding takes 0.1 ms, so each id is asked about once.
        """
        if token_id not in self._added:
            anchor, name = self._anchor, self._names.get(token_id, b"")
            shown = b"" if anchor is None else self.decode([anchor, token_id]).encode()
            is_plain = bool(name) and shown == _ANCHOR.encode() + name
            self._added[token_id] = name.decode() if is_plain else None
        return self._added[token_id]

    @cached_property
    def _anchor(self) -> int | None:
        """Return the id of a letter that text is added to."""
        return self.token_id(_ANCHOR)


class Detokenizer:
    """
    Turns tokens into pieces of text as they come.

    Owned by whoever streams one reply. A character is held back until all of its bytes are there.

    Invariants:
        1. The pieces joined equal `decode` of all ids, if no later id changes the text before it
           (true of byte-level and sentencepiece vocabularies).
        2. A piece is never taken back.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
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
        unfinished = len(text) - len(text.rstrip(_REPLACEMENT))
        self.holds_back = unfinished > 0
        stable = text[: len(text) - min(unfinished, _LONGEST_UNFINISHED)]
        piece = self._new_part(stable)
        if piece and not unfinished:
            self._move_window()
        return piece

    def finish(self) -> str:
        """Return what was held back: the text of an unfinished character, or nothing."""
        piece = self._new_part(self._tokenizer.decode(self._ids))
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


def _has_surrogates(text: str) -> bool:
    return (
        any("\ud800" <= character <= "\udfff" for character in text)
        if not text.isascii()
        else False
    )


def _encode(tokenizer: "openvino_genai.Tokenizer", text: str) -> "NDArray[np.int64]":
    if not text:
        return np.empty(0, np.int64)
    # Half a surrogate pair is not a character: no tokenizer has a token for it.
    clean = text.encode("utf-8", "replace").decode() if _has_surrogates(text) else text
    encoded = tokenizer.encode(clean, add_special_tokens=False)
    ids: NDArray[np.int64] = encoded.input_ids.data.reshape(-1).copy()
    return ids


@dataclass(frozen=True, slots=True)
class _Files:
    """What a tokenizer is made of."""

    xml: str
    weights: bytes
    back_xml: str
    back_weights: bytes

    @classmethod
    def read(cls, folder: Path) -> Self:
        xml, weights = without_truncation(
            (folder / "openvino_tokenizer.xml").read_text("utf-8"),
            (folder / "openvino_tokenizer.bin").read_bytes(),
        )
        back_xml = (folder / "openvino_detokenizer.xml").read_text("utf-8")
        return cls(xml, weights, back_xml, (folder / "openvino_detokenizer.bin").read_bytes())

    def recognising_only(self, texts: Collection[str]) -> Self:
        xml, weights = recognising_only(self.xml, self.weights, texts)
        return replace(self, xml=xml, weights=weights)


def _load(files: _Files) -> "openvino_genai.Tokenizer":
    """
    Return the tokenizer of files: the one that was made of the same files before, if there is one.

    None is ever dropped. With the last one OpenVINO GenAI drops its CPU plugin, and with that goes
    the stack on which the thread that made it takes its signals: the next Ctrl-C there would end
    the process with a segmentation fault. See `recollect.runtime.openvino`, which keeps a core.
    """
    import openvino_genai  # noqa: PLC0415 - see above

    parts = (files.xml.encode(), files.weights, files.back_xml.encode(), files.back_weights)
    key = b"".join(hashlib.sha256(part).digest() for part in parts)
    with _LOADING:
        if key not in _LOADED:
            _LOADED[key] = openvino_genai.Tokenizer(
                files.xml,
                _tensor(files.weights),
                files.back_xml,
                _tensor(files.back_weights),
                # More would take the processor from a forward pass, and make nothing here faster.
                INFERENCE_NUM_THREADS=1,
            )
        return _LOADED[key]


_LOADED: Final[dict[bytes, "openvino_genai.Tokenizer"]] = {}
_LOADING: Final = threading.Lock()


def _tensor(data: bytes) -> "openvino.Tensor":
    import openvino  # noqa: PLC0415 - see above

    return openvino.Tensor(np.frombuffer(data, np.uint8))


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
