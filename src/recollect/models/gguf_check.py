"""
What in a GGUF file's header no model needs: kinds of files that hold none, and numbers beyond sense.

A header is a stranger's claim, and readers in C++ believe it. Pure: the fields in, a sentence out.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from recollect.errors import UnsupportedModelError

MOST_HEADER_BYTES: Final = 128 << 20
"""Of a file before its weights. The largest known, of 262,144 tokens, has 16 MB."""
MOST_ITEMS: Final = 1 << 22
"""Of an array in it. Vocabularies have up to 262,144 tokens, and half a million merges."""

_MOST_ALIGNMENT: Final = 1 << 20  # bytes; all files have 32, and pages of the largest kind 2 MiB
_MOST_ELEMENTS: Final = 1 << 40  # of a tensor: a thousand times the largest matrix there is

# Ten to a thousand times what the largest models have.
_MOST: Final = {
    "context_length": 2**31 - 1,
    "block_count": 10_000,
    "embedding_length": 1 << 20,
    "feed_forward_length": 1 << 24,
    "attention.head_count": 1 << 16,
    "attention.head_count_kv": 1 << 16,
    "attention.key_length": 1 << 16,
    "attention.value_length": 1 << 16,
    "rope.dimension_count": 1 << 16,
    "vocab_size": 1 << 24,
    "expert_count": 1 << 16,
    "expert_used_count": 1 << 16,
}
_MAY_BE_0: Final = ("attention.head_count_kv", "expert_count", "expert_used_count")
_ABOVE_0: Final = (
    "rope.freq_base",
    "attention.layer_norm_rms_epsilon",
    "attention.layer_norm_epsilon",
)
_OTHER_KINDS: Final = {
    "adapter": "an adapter, which changes another model",
    "mmproj": "the part of a model that sees",
    "imatrix": "measurements for making models smaller",
}


def require_model(fields: Mapping[str, Any], tensor_count: int, name: str) -> None:
    """
    Check that a file holds a whole model, and say what it holds instead.

    Raises:
        UnsupportedModelError: It is a part of one, or something else.
    """
    kind = fields.get("general.type")
    if isinstance(kind, str) and kind in _OTHER_KINDS:
        raise UnsupportedModelError(
            f"{name} holds {_OTHER_KINDS[kind]}, and no language model: choose another file of the "
            "model."
        )
    if not tensor_count and "tokenizer.ggml.tokens" in fields:
        raise UnsupportedModelError(
            f"{name} holds a vocabulary alone, without weights: choose a file of the model that is "
            "some hundred megabytes or more."
        )


def fault_of_fields(fields: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the numbers and the vocabulary, to stand in a sentence; or None."""
    alignment = fields.get("general.alignment", 32)
    if type(alignment) is not int or not _is_power_of_two(alignment):
        return f"its alignment is {alignment!r}"
    architecture = fields.get("general.architecture")
    for key, most in _MOST.items():
        value = fields.get(f"{architecture}.{key}")
        least = 0 if key in _MAY_BE_0 else 1
        for number in value if isinstance(value, tuple) else () if value is None else (value,):
            if type(number) is not int or not least <= number <= most:
                return f"its {key} is {number!r}"
    for key, value in fields.items():
        if not key.startswith(f"{architecture}."):
            continue
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                return f"its {key} is {number}"
    for key in _ABOVE_0:
        value = fields.get(f"{architecture}.{key}")
        if value is not None and not (isinstance(value, float | int) and value > 0):
            return f"its {key} is {value!r}"
    return _fault_of_vocabulary(fields)


def _fault_of_vocabulary(fields: Mapping[str, Any]) -> str | None:
    tokens = fields.get("tokenizer.ggml.tokens")
    if tokens is None:
        return None
    if not _is_texts(tokens) or not tokens:
        return "its tokens are no texts"
    for name in ("token_type", "scores"):
        values = fields.get(f"tokenizer.ggml.{name}")
        if values is not None and (not isinstance(values, tuple) or len(values) != len(tokens)):
            return f"its {name} are not one for each of {len(tokens):,} tokens"
    merges = fields.get("tokenizer.ggml.merges")
    return "its merges are no texts" if merges is not None and not _is_texts(merges) else None


def fault_of_tensor(shape: Sequence[int], block: int, offset: int, alignment: int) -> str | None:
    """
    Return what is wrong with one tensor's description; or None.

    Args:
        shape: As the file has it, innermost dimension first.
        block: Elements that are packed together in its type.
        offset: Of its data, from the start of all data.
        alignment: Of the file.
    """
    if any(size < 1 for size in shape) or math.prod(shape) > _MOST_ELEMENTS:
        return f"it holds a tensor of shape {tuple(shape)}"
    if (shape[0] if shape else 1) % block:
        return f"it holds a tensor of shape {tuple(shape)} in blocks of {block}"
    if offset % alignment:
        return f"a tensor lies at {offset:,}, which is no multiple of {alignment}"
    return None


def _is_power_of_two(number: int) -> bool:
    return 0 < number <= _MOST_ALIGNMENT and number & (number - 1) == 0


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
