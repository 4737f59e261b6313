"""
Changes an OpenVINO tokenizer: no length limit, and fewer texts that are tokens wherever they are.

Pure: works on the text and the bytes of the two files. Does not know what loads them.
"""

import re
import struct
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final
from xml.etree import ElementTree

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
