"""
Makes the OpenVINO tokenizer of a GGUF file, which splits text as the file says.

GenAI makes it out of the file's fields where these hold merges of bytes. It knows how two families
split text before merging and takes llama.cpp's default for all others, Llama 3 among them: those are
given their own rule here. SentencePiece's vocabularies are unknown to it, and made beside this.
"""

import struct
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import openvino as ov
import openvino_genai as genai
import openvino_tokenizers  # noqa: F401 - its import tells OpenVINO what a tokenizer's nodes are
from gguf import GGUFValueType
from openvino import opset13 as ops

from recollect.errors import UnsupportedModelError
from recollect.models.folder import TOKENIZER_FILES
from recollect.models.gguf_file import GgufContent, read_content
from recollect.models.gguf_sentencepiece import why_not, write_sentencepiece

_EXPORT: Final = "export the original model with `optimum-cli export openvino`"
_MAGIC_AND_VERSION: Final = b"GGUF" + struct.pack("<I", 3)  # fields of version 2 are the same
_SENTENCEPIECE: Final = "llama"
"""What files call it, after the model that had it first."""
_SPLITTER: Final = "tokenizer.ggml.pre"

_CONTRACTIONS: Final = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_AFTER_NUMBERS: Final = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA_3: Final = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_AFTER_NUMBERS}"
_GPT_2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_SPLITTERS: Final[Mapping[str, tuple[str, str | None]]] = MappingProxyType(
    {
        # The file's name of a rule: GenAI's name of one, and the expression to put in its place.
        **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), ("qwen2", None)),
        **dict.fromkeys(
            ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), ("smollm", None)
        ),
        **dict.fromkeys(
            ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "dbrx", "smaug-bpe"),
            ("qwen2", _LLAMA_3),
        ),
        **dict.fromkeys(("gpt-2", "phi-2", "olmo", "jais", "mpt"), ("qwen2", _GPT_2)),
        "default": ("default", None),
    }
)
"""
How text is split before it is merged.

Source: llama.cpp, src/llama-vocab.cpp, `llm_tokenizer_bpe` and the names in `load`.
"""


def require_tokenizer(fields: Mapping[str, Any], name: str) -> None:
    """
    Check that a file's tokenizer can be made as it is meant.

    Raises:
        UnsupportedModelError: It cannot; the message names its kind or its rule.
    """
    kind, splitter = fields.get("tokenizer.ggml.model"), fields.get(_SPLITTER, "default")
    if kind not in ("gpt2", _SENTENCEPIECE):
        raise UnsupportedModelError(
            f"{name} has a tokenizer of the kind {kind!r}, and recollect makes only 'gpt2' (merges of "
            f"bytes) and 'llama' (SentencePiece) from GGUF: {_EXPORT}."
        )
    what = why_not(fields) if kind == _SENTENCEPIECE else None
    if what is not None:
        raise UnsupportedModelError(
            f"{name} has a tokenizer with {what}, which recollect cannot make from GGUF: {_EXPORT}."
        )
    if kind == "gpt2" and splitter not in _SPLITTERS:
        raise UnsupportedModelError(
            f"{name} has a tokenizer that splits text in the way {splitter!r}, which recollect does "
            f"not know: {_EXPORT}."
        )
    lacking = _lacking_product(fields) if kind == "gpt2" else None
    if lacking is not None:
        # OpenVINO's tokenizer takes such a vocabulary, and then gives no token for any text.
        raise UnsupportedModelError(
            f"{name} has a tokenizer that merges {lacking!r}, which makes no token of its vocabulary: "
            "the file is damaged; download it again."
        )


def _lacking_product(fields: Mapping[str, Any]) -> str | None:
    """Return the first merge whose product, or one of whose halves, is no token; None: there is none."""
    tokens = set(fields.get("tokenizer.ggml.tokens", ()))
    for merge in fields.get("tokenizer.ggml.merges", ()):
        # Halves never hold a space: byte-level vocabularies write it as another letter.
        first, space, second = merge.partition(" ")
        if not space or not {first, second, first + second} <= tokens:
            return str(merge)
    return None


def write_tokenizer(gguf: Path, folder: Path) -> None:
    """
    Write the tokenizer and the detokenizer of a file into *folder*.

    Raises:
        UnsupportedModelError: They cannot be made.
        OSError: The disk is full or cannot be written to.
    """
    content = read_content(gguf)
    require_tokenizer(content.fields, gguf.name)
    if content.fields["tokenizer.ggml.model"] == _SENTENCEPIECE:
        write_sentencepiece(content.fields, folder)
        return
    known, expression = _SPLITTERS[content.fields.get(_SPLITTER, "default")]
    without_tensors = folder / "tokenizer.gguf"
    without_tensors.write_bytes(_fields_alone(gguf, content, known))
    try:
        genai.Tokenizer(without_tensors, enable_save_ov_model=True)
    except RuntimeError as cause:
        lines = str(cause).strip().splitlines() or ["it gave no reason"]
        raise UnsupportedModelError(
            f"The tokenizer in {gguf.name} cannot be converted ({lines[-1].strip().rstrip('.')}): "
            f"{_EXPORT}."
        ) from cause
    finally:
        without_tensors.unlink()
    if expression is not None:
        _replace_splitter(folder / TOKENIZER_FILES[0], expression)


def _fields_alone(gguf: Path, content: GgufContent, splitter: str) -> bytes:
    """
    Return a GGUF file with the fields of another and no tensors, which GenAI would convert, too.

    Fields that say that the model has several files are left out: it would look for them.
    """
    places = {
        name: place
        for name, place in content.field_places.items()
        if not name.startswith("split.") and name != _SPLITTER
    }
    with gguf.open("rb") as file:
        header = file.read(max(place.stop for place in places.values()))
    fields = [header[place] for place in places.values()]
    kind = struct.pack("<I", GGUFValueType.STRING)
    fields.append(_text(_SPLITTER) + kind + _text(splitter))
    return _MAGIC_AND_VERSION + struct.pack("<QQ", 0, len(fields)) + b"".join(fields)


def _text(text: str) -> bytes:
    """Return a text as GGUF stores it: its length, then its bytes."""
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _replace_splitter(xml: Path, expression: str) -> None:
    """Give the one node that splits text another regular expression."""
    model = ov.Core().read_model(xml)
    (node,) = [node for node in model.get_ops() if node.get_type_name() == "RegexSplit"]
    pattern = ops.constant(np.frombuffer(expression.encode(), np.uint8))
    node.input(node.get_input_size() - 1).replace_source_output(pattern.output(0))
    written = xml.with_name("splitting.xml")
    ov.save_model(model, written, compress_to_fp16=False)
    written.replace(xml)
    written.with_suffix(".bin").replace(xml.with_suffix(".bin"))
