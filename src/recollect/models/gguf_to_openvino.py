"""
A program that converts a GGUF file into an OpenVINO model and tokenizer.

`gguf_decoder.convert` runs it in a process of its own. It prints lines of two numbers: bytes that are done,
and bytes in all.

GenAI converts byte-level BPE tokenizers. It knows the rules for splitting text of two families, and applies
llama.cpp's default rule to all others, Llama 3 included; here each file gets its own rule. GenAI does not
know SentencePiece vocabularies (Llama 2, Mistral, TinyLlama). They become BPE merges here, as in Hugging
Face's converter: two pieces merge if their concatenation is a piece, and the pair whose whole has the best
score goes first.
"""

import errno
import os
import struct
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import openvino as ov
import openvino_genai as genai
import openvino_tokenizers  # noqa: F401 - its import tells OpenVINO what a tokenizer's nodes are
from gguf import GGUFValueType, TokenType
from openvino import opset13 as ops
from openvino_tokenizers.constants import UTF8ReplaceMode
from openvino_tokenizers.tokenizer_pipeline import (
    BPETokenizationStep,
    ByteFallbackStep,
    FuseStep,
    PaddingStep,
    RegexDecodingStep,
    RegexNormalizationStep,
    SpecialTokensSplit,
    TokenizerPipeline,
    UTF8ValidateStep,
    VocabDecoderStep,
)

from recollect.errors import UnsupportedModelError
from recollect.models.gguf import GgufContent, read_content
from recollect.models.gguf_decoder import NO_ROOM, REFUSED, read_decoder
from recollect.models.gguf_graph import Constants, GraphBuilder, has_avx2_kernel
from recollect.models.gguf_weights import Shards
from recollect.models.openvino_folder import MODEL_FILES, TOKENIZER_FILES

_SPACE: Final = "\u2581"
"""The character that stands for a space in SentencePiece vocabularies."""
_SPECIAL: Final = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
"""Kinds of tokens that are found in a text before it is split. Source: llama.cpp, `cache_special_tokens`."""
_CACHE: Final = 20_000
"""Words whose tokens the tokenizer caches; the same number as in the tokenizers that GenAI makes."""


def why_not(fields: Mapping[str, Any]) -> str | None:
    """Return what a SentencePiece vocabulary has that is not supported, as a noun phrase; None: nothing."""
    tokens, scores = (fields.get(f"tokenizer.ggml.{name}") for name in ("tokens", "scores"))
    kinds = fields.get("tokenizer.ggml.token_type")
    if (
        not tokens
        or scores is None
        or kinds is None
        or not len(tokens) == len(scores) == len(kinds)
    ):
        return "a token without a score or a type"
    if fields.get("tokenizer.ggml.precompiled_charsmap"):
        return "a table that normalizes text"
    return None


def write_sentencepiece(fields: Mapping[str, Any], folder: Path) -> None:
    """Write tokenizer and detokenizer of a SentencePiece vocabulary into *folder*."""
    tokens: Sequence[str] = fields["tokenizer.ggml.tokens"]
    kinds: Sequence[int] = fields["tokenizer.ggml.token_type"]
    special = {
        token: number
        for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in _SPECIAL
    }
    unknown = fields.get("tokenizer.ggml.unknown_token_id", 0)
    hidden = [
        number
        for number, kind in enumerate(kinds)
        if kind in (TokenType.CONTROL, TokenType.UNKNOWN)
    ]
    pipeline = TokenizerPipeline()
    steps = [SpecialTokensSplit.from_string_iter(special)]
    if fields.get("tokenizer.ggml.add_space_prefix", True):
        steps.append(RegexNormalizationStep.prepend_regex(_SPACE))
    steps += [
        RegexNormalizationStep.replace_spaces_metaspace(_SPACE),
        BPETokenizationStep(
            vocab=list(tokens),
            merges=merges_of(tokens, fields["tokenizer.ggml.scores"], kinds),
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
            cache_capacity=_CACHE,
            added_tokens=special,
        ),
        PaddingStep(_token_id=fields.get("tokenizer.ggml.padding_token_id", 0)),
        VocabDecoderStep(skip_tokens=hidden),
        RegexDecodingStep(_SPACE, " "),
        ByteFallbackStep(),
        FuseStep(),
    ]
    if fields.get("tokenizer.ggml.add_space_prefix", True):
        steps.append(RegexDecodingStep.strip_forward_space())
    # An incomplete character becomes U+FFFD, by which streaming knows that it has to wait for the rest.
    steps.append(UTF8ValidateStep(UTF8ReplaceMode.REPLACE))
    pipeline.add_steps(steps)
    tokenizer = pipeline.get_tokenizer_ov_subgraph()
    detokenizer = pipeline.get_detokenizer_ov_subgraph()
    # GenAI passes i64. The library's own conversion to i64 would fold the list of skipped tokens into a
    # constant, and decoding could not include special tokens any more.
    detokenizer.inputs[0].get_node().set_element_type(ov.Type.i64)
    detokenizer.validate_nodes_and_infer_types()
    for model, name in ((tokenizer, TOKENIZER_FILES[0]), (detokenizer, TOKENIZER_FILES[2])):
        # Without the version, GenAI treats the model as one whose special tokens cannot be decoded.
        model.set_rt_info(version("openvino-tokenizers"), "openvino_tokenizers_version")
        ov.save_model(model, folder / name, compress_to_fp16=False)


def merges_of(
    tokens: Sequence[str], scores: Sequence[float], kinds: Sequence[int]
) -> list[tuple[str, str]]:
    """
    Return the pairs of pieces whose concatenation is a piece, the best first.

    Source: transformers, `generate_merges`: by the score of the whole, then by the length of the parts.
    """
    known = {
        token: score
        for token, score, kind in zip(tokens, scores, kinds, strict=True)
        if kind in (TokenType.NORMAL, TokenType.USER_DEFINED)
    }
    found = [
        (-score, -cut, cut - len(token), token[:cut], token[cut:])
        for token, score in known.items()
        for cut in range(1, len(token))
        if token[:cut] in known and token[cut:] in known
    ]
    return [(left, right) for *_, left, right in sorted(found)]


_EXPORT: Final = "export the original model with `optimum-cli export openvino`"
_MAGIC_AND_VERSION: Final = b"GGUF" + struct.pack("<I", 3)  # fields of version 2 are the same
_SENTENCEPIECE: Final = "llama"
"""The name of SentencePiece tokenizers in files."""
_SPLITTER: Final = "tokenizer.ggml.pre"

_CONTRACTIONS: Final = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_AFTER_NUMBERS: Final = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA_3: Final = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_AFTER_NUMBERS}"
_GPT_2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_SPLITTERS: Final[Mapping[str, tuple[str, str | None]]] = MappingProxyType(
    {
        # The file's name of a rule: the name of a rule that GenAI knows, and the regular expression that
        # replaces that rule afterwards; None: it is the right one.
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
How text is split into words before BPE merges.

Source: llama.cpp, src/llama-vocab.cpp, `llm_tokenizer_bpe` and the names in `load`.
"""


def require_tokenizer(fields: Mapping[str, Any], name: str) -> None:
    """
    Check that a file's tokenizer can be converted exactly.

    Raises:
        UnsupportedModelError: It cannot, or it is damaged; the message names its kind or its rule.
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
        # OpenVINO's tokenizer accepts such merges, and then returns no token for any text.
        raise UnsupportedModelError(
            f"{name} has a tokenizer that merges {lacking!r}, which makes no token of its vocabulary: "
            "the file is damaged; download it again."
        )


def _lacking_product(fields: Mapping[str, Any]) -> str | None:
    """Return the first merge of which a half or the whole is not a token; None: there is none."""
    tokens = set(fields.get("tokenizer.ggml.tokens", ()))
    for merge in fields.get("tokenizer.ggml.merges", ()):
        # Halves never contain a space, which byte-level vocabularies represent by another character.
        first, space, second = merge.partition(" ")
        if not space or not {first, second, first + second} <= tokens:
            return str(merge)
    return None


def write_tokenizer(gguf: Path, folder: Path) -> None:
    """
    Write the tokenizer and the detokenizer of a file into *folder*.

    Raises:
        UnsupportedModelError: They cannot be converted.
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
    Return the bytes of a GGUF file with the fields of another and no tensors, which GenAI would convert, too.

    Fields that say that the model has several files are left out, because GenAI would look for the others.

    Args:
        gguf: The file.
        content: What was read of it.
        splitter: The rule for splitting text that is written in place of the file's.
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
    """Return a text as GGUF stores it: its length as uint64, then its bytes."""
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _replace_splitter(xml: Path, expression: str) -> None:
    """Replace the regular expression of the tokenizer's one node that splits text."""
    model = ov.Core().read_model(xml)
    (node,) = [node for node in model.get_ops() if node.get_type_name() == "RegexSplit"]
    pattern = ops.constant(np.frombuffer(expression.encode(), np.uint8))
    node.input(node.get_input_size() - 1).replace_source_output(pattern.output(0))
    written = xml.with_name("splitting.xml")
    ov.save_model(model, written, compress_to_fp16=False)
    written.replace(xml)
    written.with_suffix(".bin").replace(xml.with_suffix(".bin"))


_REPORT_EVERY_S: Final = 0.1
"""Least time between two printed lines: progress bars are drawn no more often."""


def main(gguf: Path, folder: Path) -> None:
    """Write the model in *gguf* and its tokenizer into *folder*."""
    write_tokenizer(gguf, folder)
    shards = Shards(gguf)
    report = _Reporter(shards.total_bytes)
    # Weights in a file instead of in memory. It is deleted with the scratch folder that both are in.
    constants = Constants(folder.parent / "constants.bin")
    builder = GraphBuilder(
        read_decoder(shards), shards, constants, report, fuses_gate=has_avx2_kernel()
    )
    model = builder.build()
    # Not compressed to f16, which would round rotary frequencies, norms and scales.
    xml = folder / MODEL_FILES[0]
    try:
        ov.save_model(model, xml, compress_to_fp16=False)
        ov.Core().read_model(xml)  # fails if not all weights were written
    except RuntimeError as cause:  # OpenVINO's error if it cannot write
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from cause


class _Reporter:
    """Counts the bytes that are done, and prints them at most every `_REPORT_EVERY_S`."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._next_s = 0.0

    def __call__(self, count: int) -> None:
        self._done += count
        now_s = time.monotonic()
        if now_s >= self._next_s:
            self._next_s = now_s + _REPORT_EVERY_S
            print(self._done, self._total, flush=True)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except UnsupportedModelError as error:
        print(error, file=sys.stderr)
        sys.exit(REFUSED)
    except OSError as error:
        print(error.errno, error.filename or sys.argv[2], file=sys.stderr)
        sys.exit(NO_ROOM)
