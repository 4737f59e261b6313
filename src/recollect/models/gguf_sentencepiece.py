"""
Makes the OpenVINO tokenizer of a GGUF file whose vocabulary is SentencePiece's, merged by score.

Llama 2, Mistral and TinyLlama have one. It becomes merges, as Hugging Face's converter makes them:
two pieces merge where the whole is a piece, and of several the one with the best score is first.
"""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import openvino as ov
from gguf import TokenType
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

from recollect.models.folder import TOKENIZER_FILES

_SPACE: Final = "\u2581"
"""Stands for a space in the vocabulary."""
_SPECIAL: Final = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
"""Tokens that are found in a text before it is merged. Source: llama.cpp, `cache_special_tokens`."""
_CACHE: Final = 20_000  # merged words that are remembered; as GenAI has it for its own


def why_not(fields: Mapping[str, Any]) -> str | None:
    """Return what keeps a SentencePiece vocabulary from being used; None: nothing does."""
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
    """Write the tokenizer and the detokenizer of a file's fields into *folder*."""
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
    # Half a character is shown as such, so that whoever streams knows to wait for the rest.
    steps.append(UTF8ValidateStep(UTF8ReplaceMode.REPLACE))
    pipeline.add_steps(steps)
    tokenizer = pipeline.get_tokenizer_ov_subgraph()
    detokenizer = pipeline.get_detokenizer_ov_subgraph()
    # GenAI gives 64 bits. The library's own way to change the type would fold the slice of hidden
    # tokens into a constant, and nobody could ask for them any more.
    detokenizer.inputs[0].get_node().set_element_type(ov.Type.i64)
    detokenizer.validate_nodes_and_infer_types()
    for model, name in ((tokenizer, TOKENIZER_FILES[0]), (detokenizer, TOKENIZER_FILES[2])):
        # Without it GenAI takes the model for one from before special tokens could be asked for.
        model.set_rt_info(version("openvino-tokenizers"), "openvino_tokenizers_version")
        ov.save_model(model, folder / name, compress_to_fp16=False)


def merges_of(
    tokens: Sequence[str], scores: Sequence[float], kinds: Sequence[int]
) -> list[tuple[str, str]]:
    """
    Return the pairs of pieces that make another piece, the best first.

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
