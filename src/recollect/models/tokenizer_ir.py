"""
Takes the length limit out of an OpenVINO tokenizer.

Pure: works on the text and the bytes of the two files. Does not know what loads them.
"""

import struct
from typing import Final
from xml.etree import ElementTree

_NO_LIMIT: Final = struct.pack("<i", 2**31 - 1)


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
    try:
        root = ElementTree.fromstring(xml)  # noqa: S314 - expat itself bounds entities
    except ElementTree.ParseError as cause:
        raise ValueError(f"not XML: {cause}") from cause
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
