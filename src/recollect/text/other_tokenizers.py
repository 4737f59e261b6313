"""
The tokenizer of a folder with a tokenizer.json, as Hugging Face's fast tokenizers are saved.

Does not know templates or models.

Reads the small files that Hugging Face's tools put beside weights, whatever the weights' format is.

Knows what is in them; not what a model needs of it.

Changes an OpenVINO tokenizer: no length limit, and fewer texts that are tokens wherever they are.

Pure: works on the text and the bytes of the two files. Does not know what loads them.
"""

import json
import logging
import re
import struct
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from xml.etree import ElementTree

from recollect import files
from recollect.errors import UnsupportedModelError
from recollect.text.vocabulary import (
    ControlTokens,
    Vocabulary,
    control_tokens,
    encode_in_pieces,
    make_vocabulary,
)

if TYPE_CHECKING:
    import tokenizers


_log = logging.getLogger(__name__)

MOST_TEXT_BYTES: Final = 16 * files.MIB
"""Of a settings file. The largest known, with a vocabulary's added tokens, has 1.2 MB."""
MOST_TOKENIZER_BYTES: Final = 256 * files.MIB
"""Of a tokenizer.json. The largest known, of 262,144 tokens, has 33 MB."""


def read_text(path: Path, *, most_bytes: int = MOST_TEXT_BYTES) -> str:
    """
    Return the content of a text file in a model's folder.

    Raises:
        UnsupportedModelError: It cannot be read, is too large, or lies outside the folder.
    """
    try:
        files.inside(path.parent, path.name)
        return files.read_text(path, most_bytes=most_bytes)
    except UnicodeDecodeError as cause:
        raise UnsupportedModelError(
            f"{path} cannot be read (it is not UTF-8 text): export the model again."
        ) from cause
    except OSError as cause:
        raise UnsupportedModelError(
            f"{path} cannot be read ({cause.strerror or cause}): export the model again."
        ) from cause


def read_json(path: Path, *, most_bytes: int = MOST_TEXT_BYTES) -> Mapping[str, Any]:
    """
    Return the object in a JSON file; empty where there is no file, or no object in it.

    Raises:
        UnsupportedModelError: It cannot be read, or is not JSON.
    """
    if not path.exists() and not path.is_symlink():
        return {}
    try:
        content: Any = json.loads(read_text(path, most_bytes=most_bytes))
    except (ValueError, RecursionError) as cause:  # ValueError: also a number of 5,000 digits
        raise UnsupportedModelError(f"{path} is not valid JSON: export the model again.") from cause
    return content if isinstance(content, dict) else {}


def warn_of_writers(folder: Path, names: Iterable[str]) -> None:
    """Say in one line who else may change the folder or one of its files, if anybody may."""
    for path in (folder, *(folder / name for name in names)):
        who = files.others_may_write(path) if path.exists() else None
        if who is not None:
            _log.warning(
                "%s can be changed by others (%s): they can change what the model says, or read "
                "into it; keep models in a folder of your own.",
                path,
                who,
            )
            return


def chat_template(folder: Path) -> str | None:
    """Return the chat template from whichever of three files holds it, or None."""
    file = folder / "chat_template.jinja"
    if file.exists() or file.is_symlink():
        return read_text(file)
    for name in ("tokenizer_config.json", "chat_template.json"):
        template = _default_template(read_json(folder / name).get("chat_template"))
        if template:
            return template
    return None


def special_token(tokenizer_config: Mapping[str, Any], name: str) -> str | None:
    """Return the text of `bos_token` or `eos_token` in a tokenizer_config.json, or None."""
    found = tokenizer_config.get(name)
    if isinstance(found, dict):
        found = found.get("content")
    return found if isinstance(found, str) else None


_MOST_IDS_TEXT: Final = 4096  # some hundred ids; models have up to ten ends
_MOST_DIGITS: Final = 10  # of an id
MOST_ID: Final = 2**31 - 1
"""Token ids are kept as int32."""


def as_ids(value: object) -> list[int]:
    """Return the ids in a number, a list, or the text of either, as runtime info has it."""
    if isinstance(value, str):
        parts = value[:_MOST_IDS_TEXT].replace(",", " ").split()
        value = [int(part) for part in parts if is_id(part)]
    items = value if isinstance(value, list) else [value]
    return [item for item in items if type(item) is int and 0 <= item <= MOST_ID]


def is_id(text: str) -> bool:
    """Return whether a text is a token id in digits."""
    return text.isdecimal() and len(text) <= _MOST_DIGITS and int(text) <= MOST_ID


def _default_template(found: object) -> str | None:
    """Return the template, or of several named ones the default."""
    if isinstance(found, list):
        found = next(
            (
                item.get("template")
                for item in found
                if isinstance(item, dict) and item.get("name") == "default"
            ),
            None,
        )
    return found if isinstance(found, str) else None


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
