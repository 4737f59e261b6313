"""
A language model's forward pass in plain numpy: what a model's file says, computed a second way.

Pure: knows neither files nor runtimes, and shares no code with what makes or runs our graphs, so
that a mistake there cannot hide here. Every layer is read when it is needed and given up after it,
so that memory holds one layer and not the model.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Pairing = Literal["neighbours", "halves"]
"""
Which two places of a head are rotated as one pair.

`neighbours`: 2i and 2i + 1, as in the paper (RoFormer, Su et al. 2021) and in llama's GGUF files.
`halves`: i and i + size / 2, as in GPT-NeoX and in Hugging Face's weights.
"""

_VOCABULARY_STEP: Final = 8192
"""Rows of the output matrix that are f32 at once: 64 MB at 2,048 wide, and large enough for BLAS."""


class NotCompared(Exception):  # noqa: N818 - a result and not an error: `verify` prints it
    """The reference does not know how a model computes; the message says what it does not know."""


@dataclass(frozen=True, slots=True)
class Rope:
    """How a layer turns queries and keys by their positions."""

    frequencies: npt.NDArray[np.float64]
    """Radians a position turns each pair by, shape `(pairs,)`."""
    pairing: Pairing
    scale: float = 1.0
    """On cosine and sine; YaRN and LongRoPE have one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What a family of models does differently from the next, as numbers and switches."""

    architecture: str
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    epsilon: float
    """Of the norms, beside the mean square."""
    ropes: tuple[Rope, ...]
    """One for each layer."""
    windows: tuple[int | None, ...]
    """For each layer, how many positions a token sees, itself included; None: all before it."""
    activation: Literal["silu", "gelu"] = "silu"
    """`gelu` in its approximation by tanh."""
    attention_scale: float = 0.0
    """What products of queries and keys are multiplied by; 0: 1 / sqrt(head size)."""
    attention_cap: float | None = None
    """Scores are cap * tanh(score / cap). Source: Gemma 2 technical report, section 2."""
    logits_cap: float | None = None
    embedding_scale: float = 1.0
    norms_after: bool = False
    """Whether what a layer adds is normed before it is added."""
    has_qk_norm: bool = False


class Tensors(Protocol):
    """The weights by the names that GGUF files give them, as f32."""

    def __contains__(self, name: str, /) -> bool:
        """Return whether there is a tensor of that name."""

    def matrix(self, name: str, rows: slice = ...) -> Array:
        """Return some rows of a tensor, shape `(rows, columns)`: it maps columns to rows."""

    def gather(self, name: str, rows: Sequence[int]) -> Array:
        """Return these rows, in this order."""

    def vector(self, name: str) -> Array:
        """Return a tensor of one dimension."""

    def rows(self, name: str) -> int:
        """Return how many rows a matrix has."""


def logits_at(
    model: Description,
    tensors: Tensors,
    token_ids: Sequence[int],
    places: Sequence[int],
    *,
    progress: Callable[[int, int], None] = lambda _done, _of: None,
) -> Array:
    """
    Return the logits after some of the tokens, shape `(places, vocabulary)`.

    Args:
        model: What the family does.
        tensors: Its weights.
        token_ids: One sequence, shape `(tokens,)`, from position 0 on.
        places: Indices of tokens; the logits are those of the token after each.
        progress: Called after each layer with how many are done, and of how many.
    """
    hidden = tensors.gather("token_embd", token_ids) * np.float32(model.embedding_scale)
    for layer in range(model.layers):
        hidden = _layer(model, tensors, layer, hidden)
        progress(layer + 1, model.layers)
    hidden = _norm(hidden[list(places)], tensors.vector("output_norm"), model.epsilon)
    name = "output" if "output" in tensors else "token_embd"
    logits = np.empty((len(places), tensors.rows(name)), np.float32)
    for start in range(0, logits.shape[1], _VOCABULARY_STEP):
        rows = slice(start, start + _VOCABULARY_STEP)
        logits[:, rows] = hidden @ tensors.matrix(name, rows).T
    if "output.bias" in tensors:
        logits += tensors.vector("output.bias")
    return _capped(logits, model.logits_cap)


def log_softmax(logits: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return log probabilities over the last axis."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    log_probabilities: npt.NDArray[np.float64] = wide - np.log(
        np.exp(wide).sum(axis=-1, keepdims=True)
    )
    return log_probabilities


def _layer(model: Description, tensors: Tensors, layer: int, hidden: Array) -> Array:
    def name(part: str) -> str:
        return f"blk.{layer}.{part}"

    def linear(values: Array, part: str) -> Array:
        product: Array = values @ tensors.matrix(name(part)).T
        bias = f"{name(part)}.bias"
        return product + tensors.vector(bias) if bias in tensors else product

    def normed(values: Array, part: str) -> Array:
        return _norm(values, tensors.vector(name(part)), model.epsilon)

    before = normed(hidden, "attn_norm")
    query, key, value = (
        _heads(linear(before, part), count, model.head_size)
        for part, count in (
            ("attn_q", model.heads),
            ("attn_k", model.kv_heads),
            ("attn_v", model.kv_heads),
        )
    )
    if model.has_qk_norm:
        query, key = normed(query, "attn_q_norm"), normed(key, "attn_k_norm")
    rope = model.ropes[layer]
    mixed = _attention(model, layer, _rotated(query, rope), _rotated(key, rope), value)
    added = linear(mixed, "attn_output")
    hidden = hidden + (normed(added, "post_attention_norm") if model.norms_after else added)
    before = normed(hidden, "ffn_norm")
    gate = linear(before, "ffn_gate")
    added = linear(_activated(gate, model.activation) * linear(before, "ffn_up"), "ffn_down")
    return hidden + (normed(added, "post_ffw_norm") if model.norms_after else added)


def _attention(model: Description, layer: int, query: Array, key: Array, value: Array) -> Array:
    """Return what each position takes from those that it sees, shape `(tokens, heads * size)`."""
    tokens = query.shape[1]
    scale = model.attention_scale or 1 / math.sqrt(model.head_size)
    distance = np.arange(tokens)[:, None] - np.arange(tokens)[None, :]
    window = model.windows[layer]
    unseen = (distance < 0) | (distance >= (window or tokens))
    mixed = np.empty((tokens, model.heads, value.shape[2]), np.float32)
    for head in range(model.heads):
        shared = head * model.kv_heads // model.heads
        scores = _capped((query[head] @ key[shared].T) * np.float32(scale), model.attention_cap)
        scores[unseen] = -np.inf
        scores = np.exp(scores - scores.max(axis=1, keepdims=True))
        mixed[:, head] = (scores / scores.sum(axis=1, keepdims=True)) @ value[shared]
    return mixed.reshape(tokens, -1)


def _rotated(heads: Array, rope: Rope) -> Array:
    """Turn each pair of places by position times frequency; places beyond the pairs stay."""
    pairs = len(rope.frequencies)
    angles = np.arange(heads.shape[1])[:, None] * rope.frequencies
    cosine = (np.cos(angles) * rope.scale).astype(np.float32)
    sine = (np.sin(angles) * rope.scale).astype(np.float32)
    if rope.pairing == "neighbours":
        first, second = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
    else:
        first, second = slice(0, pairs), slice(pairs, 2 * pairs)
    turned = heads.copy()
    turned[..., first] = heads[..., first] * cosine - heads[..., second] * sine
    turned[..., second] = heads[..., second] * cosine + heads[..., first] * sine
    return turned


def _heads(values: Array, count: int, size: int) -> Array:
    """Return values by head, shape `(heads, tokens, size)`."""
    return values.reshape(len(values), count, size).transpose(1, 0, 2)


def _norm(values: Array, weight: Array, epsilon: float) -> Array:
    """Return the root-mean-square norm over the last axis."""
    mean = np.mean(np.square(values, dtype=np.float64), axis=-1, keepdims=True)
    normed: Array = (values / np.sqrt(mean + epsilon)).astype(np.float32) * weight
    return normed


def _activated(values: Array, kind: Literal["silu", "gelu"]) -> Array:
    if kind == "silu":
        # exp overflows to infinity for what is very negative, and the quotient is then 0 as it is.
        with np.errstate(over="ignore"):
            smooth: Array = values / (1 + np.exp(-values))
        return smooth
    cubic = np.float32(math.sqrt(2 / math.pi)) * (values + np.float32(0.044715) * values**3)
    halved: Array = np.float32(0.5) * values * (1 + np.tanh(cubic))
    return halved


def _capped(values: Array, cap: float | None) -> Array:
    if cap is None:
        return values
    capped: Array = np.float32(cap) * np.tanh(values / np.float32(cap))
    return capped
