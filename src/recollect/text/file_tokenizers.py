"""
The tokenizers that models come with, read from their files.

`OpenVinoTokenizer` reads the two graphs beside an OpenVINO model, and changes them before: without a
limit on the length of a text, and for what users say with fewer texts that are one token wherever
they are. `HfTokenizer` reads a tokenizer.json, as Hugging Face's fast tokenizers are saved. Does not
know models, templates or conversations.
"""

import hashlib
import json
import re
import struct
import threading
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self
from xml.etree import ElementTree

import numpy as np

from recollect import files
from recollect.errors import UnsupportedModelError
from recollect.text.tokenizer import (
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
    import tokenizers
    from numpy.typing import NDArray


_ANCHOR: Final = "a"
MOST_TOKENIZER_BYTES: Final = 256 * files.MIB
"""Of a tokenizer.json. The largest known, of 262,144 tokens, has 33 MB."""


class FileTokenizer(ABC):
    """What all of them do in the same way."""

    control_tokens: ControlTokens

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the ids of *text*, shape `(n,)`: nothing added, special tokens recognised."""

    @abstractmethod
    def _encode_without_control_tokens(self, text: str) -> list[int]:
        """Return the ids that a tokenizer gives which does not look for control tokens."""

    def encode_text(self, text: str) -> list[int]:
        """
        Return the ids of *text*, shape `(n,)`, the texts of control tokens as any other text.

        Those that Hugging Face's tokenizers give with `split_special_tokens=True`.
        """
        if next(self.control_tokens.begins(text), None) is None:
            return self.encode(text)
        ids = self._encode_without_control_tokens(text)
        if set(self.control_tokens.ids.values()).isdisjoint(ids):
            return ids
        return encode_in_pieces(text, self.control_tokens, self.encode)

    def token_id(self, text: str) -> int | None:
        """Return the one id that *text* encodes to, or None where it takes none or several."""
        ids = self.encode(text)
        return ids[0] if len(ids) == 1 else None


def characters(text: str) -> str:
    """Return a text with U+003F in the place of half surrogate pairs, for which no token can be."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


class OpenVinoTokenizer(FileTokenizer):
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
            self._tokenizer = _load_openvino(self._files)
            self.control_tokens = self._control_tokens(template)
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
        ids = _encode_openvino(self._tokenizer, text)
        found = np.count_nonzero(self._is_control(ids))
        if found and found > self.control_tokens.count(text):
            ids = _encode_openvino(self._tokenizer, self._unknown.replaced(text))
        as_list: list[int] = ids.tolist()
        return as_list

    def _encode_without_control_tokens(self, text: str) -> list[int]:
        ids = _encode_openvino(self._without_control_tokens, text)
        if self._is_control(ids).any():
            ids = _encode_openvino(self._without_control_tokens, self._unknown.replaced(text))
        as_list: list[int] = ids.tolist()
        return as_list

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
        return _load_openvino(self._files.recognising_only(kept))

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


def _encode_openvino(tokenizer: "openvino_genai.Tokenizer", text: str) -> "NDArray[np.int64]":
    if not text:
        return np.empty(0, np.int64)
    encoded = tokenizer.encode(characters(text), add_special_tokens=False)
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


def _load_openvino(files: _Files) -> "openvino_genai.Tokenizer":
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


_NO_LIMIT: Final = struct.pack("<i", 2**31 - 1)

_ADDED: Final = re.compile(
    r"(?P<before>(?:\(\?:\\s\*\))?)\((?!\?)(?P<texts>(?:\\.|[^][()\\{}.*+?^$])*)\)(?P<after>(?:\(\?:\\s\*\))?)\|?",
    re.DOTALL,
)
"""One group of the pattern by which added tokens are found. Source: `SpecialTokensSplit` of
openvino_tokenizers, which writes it, and OpenVINO GenAI's reader of GGUF."""
_TEXT: Final = re.compile(r"(?:\\.|[^|\\])+", re.DOTALL)
_NOTHING: Final = r"(?!)"


def without_truncation(xml: str, weights: bytes) -> tuple[str, bytes]:
    """
    Return the tokenizer with no limit on the length of its output.

    A tokenizer that came from a GGUF keeps the last `context_length` tokens of a text and drops
    the head without a word, whatever it is asked for. What does not fit must be seen and refused
    by those who know the context, so the limit goes: it is the constant that a `Minimum` compares
    the lengths with. Files without one come back as they were.

    Args:
        xml: The content of openvino_tokenizer.xml.
        weights: The content of openvino_tokenizer.bin.

    Raises:
        ValueError: The first is not XML.
    """
    root = _parsed(xml)
    layers = {layer.get("id"): layer for layer in root.iterfind("layers/layer")}
    minima = {number for number, layer in layers.items() if layer.get("type") == "Minimum"}
    feeds = {
        edge.get("from-layer")
        for edge in root.iterfind("edges/edge")
        if edge.get("to-layer") in minima
    }
    limits = [
        layer
        for number, layer in layers.items()
        if number in feeds and layer.get("type") == "Const"
    ]
    changed = False
    for layer in limits:
        data = layer.find("data")
        if data is not None and data.get("element_type") == "i32" and data.get("size") == "4":
            # Equal constants share their bytes, so the new value goes to the end, not in place.
            data.set("offset", str(len(weights)))
            weights += _NO_LIMIT
            changed = True
    return (ElementTree.tostring(root, encoding="unicode"), weights) if changed else (xml, weights)


def added_texts(xml: str, weights: bytes) -> list[str]:
    """
    Return the texts that a tokenizer takes for one token wherever they are, special or not.

    Empty where it has no such step, or one whose pattern is not of the known form.

    Args:
        xml: The content of openvino_tokenizer.xml.
        weights: The content of openvino_tokenizer.bin.

    Raises:
        ValueError: The first is not XML.
    """
    pattern = _split_pattern(_parsed(xml))
    groups = [] if pattern is None else _groups(_value(pattern, weights))
    return [_unquoted(text) for group in groups for text in group.quoted]


def recognising_only(xml: str, weights: bytes, texts: Collection[str]) -> tuple[str, bytes]:
    """
    Return the tokenizer with only these among the texts that are one token wherever they are.

    Args:
        xml: The content of openvino_tokenizer.xml.
        weights: The content of openvino_tokenizer.bin.
        texts: Of those that `added_texts` gives.

    Raises:
        ValueError: The first is not XML.
    """
    root = _parsed(xml)
    pattern = _split_pattern(root)
    if pattern is None:
        return xml, weights
    groups = []
    for group in _groups(_value(pattern, weights)):
        if kept := [text for text in group.quoted if _unquoted(text) in texts]:
            groups.append(f"{group.before}({'|'.join(kept)}){group.after}")
    value = ("|".join(groups) or _NOTHING).encode()
    data = pattern.find("data")
    assert data is not None, "it was read a moment ago"
    data.set("offset", str(len(weights)))  # others may share the bytes at the old place
    for name in ("size", "shape"):
        data.set(name, str(len(value)))
    for length in pattern.iterfind("output/port/dim"):
        length.text = str(len(value))
    return ElementTree.tostring(root, encoding="unicode"), weights + value


@dataclass(frozen=True, slots=True)
class _Group:
    """Texts that are found alike, quoted as in the pattern, and what is around them."""

    before: str
    quoted: list[str]
    after: str


def _parsed(xml: str) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(xml)  # noqa: S314 - expat itself bounds entities
    except ElementTree.ParseError as cause:
        raise ValueError(f"not XML: {cause}") from cause


def _split_pattern(root: ElementTree.Element) -> ElementTree.Element | None:
    """Return the constant with the pattern by which added tokens are found."""
    layers = {layer.get("id"): layer for layer in root.iterfind("layers/layer")}
    for edge in root.iterfind("edges/edge"):
        source, target = layers.get(edge.get("from-layer")), layers.get(edge.get("to-layer"))
        if source is None or target is None or target.get("type") != "SpecialTokensSplit":
            continue
        if source.get("type") == "Const" and source.find("data") is not None:
            return source
    return None


def _value(constant: ElementTree.Element, weights: bytes) -> str:
    data = constant.find("data")
    assert data is not None, "a constant has data"
    start, size = int(data.get("offset", "0")), int(data.get("size", "0"))
    return weights[start : start + size].decode("utf-8", "replace")


def _groups(pattern: str) -> list[_Group]:
    """Return the parts of a pattern; none where it is not of the known form."""
    groups, end = [], 0
    while end < len(pattern):
        found = _ADDED.match(pattern, end)
        if found is None:
            return []
        quoted = _TEXT.findall(found["texts"])
        groups.append(_Group(found["before"], quoted, found["after"]))
        end = found.end()
    return groups


def _unquoted(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text, flags=re.DOTALL)


TOKENIZER_NAME: Final = "tokenizer.json"
_MOST_VOCAB: Final = 1 << 22
"""Sixteen times the largest vocabulary there is: a table of all ids is made."""


class HfTokenizer(FileTokenizer):
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
        self._tokenizer = _with_text_marks(_load_hf(file))
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
        self.control_tokens = control_tokens(
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
        return _encode_hf(self._tokenizer, text)

    def _encode_without_control_tokens(self, text: str) -> list[int]:
        return _encode_hf(self._without_control_tokens, text)

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

    def added_text(self, token_id: int) -> str | None:  # noqa: ARG002 - the protocol's
        """Return None, not known: this tokenizer decodes fast enough for each token."""
        return None


def _with_text_marks(tokenizer: "tokenizers.Tokenizer") -> "tokenizers.Tokenizer":
    """Return a tokenizer that shows `TEXT_MARKS`, which some call special and would leave out."""
    added = tokenizer.get_added_tokens_decoder().values()
    if not any(one.special and one.content in TEXT_MARKS for one in added):
        return tokenizer
    settings = json.loads(tokenizer.to_str())
    for one in settings["added_tokens"]:
        one["special"] = one["special"] and one["content"] not in TEXT_MARKS
    return type(tokenizer).from_str(json.dumps(settings))


def _encode_hf(tokenizer: "tokenizers.Tokenizer", text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(characters(text), add_special_tokens=False).ids
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


def _load_hf(file: Path) -> "tokenizers.Tokenizer":
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
