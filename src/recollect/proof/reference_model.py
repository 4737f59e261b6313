"""
A language model's forward pass in plain numpy: what a model's file says, computed a second way.

The pass shares no code with what makes or runs our graphs, so that a mistake there cannot hide here.
Each layer is read when it is needed and given up after it, so that memory holds one layer and not the
model. Rotary embeddings follow the formulas of the papers, in radians a position and float64. A GGUF
file is read with the `gguf` package alone, whose own functions dequantize each tensor.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize

from recollect.errors import UnsupportedModelError

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


Frequencies = npt.NDArray[np.float64]


def plain(turned: int, base: float) -> Frequencies:
    """
    Return the frequency of each pair, shape `(turned / 2,)`.

    Source: RoFormer (Su et al. 2021), equation 15.
    """
    pairs = np.arange(turned // 2, dtype=np.float64)
    frequencies: Frequencies = np.power(float(base), -2 * pairs / turned)
    return frequencies


def yarn(
    frequencies: Frequencies,
    *,
    base: float,
    factor: float,
    original: float,
    fast: float = 32.0,
    slow: float = 1.0,
) -> tuple[Frequencies, float]:
    """
    Return the frequencies of a context that is *factor* times as long, and what scales cosine and sine.

    Pairs that turn often within the original context stay, those that turn less than once are
    stretched, those between are mixed. Source: YaRN (Peng et al. 2023), section 3.2 and equation 22,
    with the borders rounded outward as the authors' code does.
    """
    turned = 2 * len(frequencies)

    def pair_with(turns: float) -> float:
        return turned / 2 * math.log(original / (turns * 2 * math.pi)) / math.log(base)

    first = max(math.floor(pair_with(fast)), 0)
    last = min(math.ceil(pair_with(slow)), turned - 1)
    stretched = np.clip((np.arange(len(frequencies)) - first) / max(last - first, 0.001), 0.0, 1.0)
    return frequencies * (1 - stretched) + frequencies / factor * stretched, yarn_scale(factor)


def yarn_scale(factor: float) -> float:
    """Return what cosine and sine are multiplied by. Source: YaRN, equation 22."""
    return 1 + 0.1 * math.log(factor) if factor > 1 else 1.0


def llama3(frequencies: Frequencies, scaling: dict[str, Any]) -> Frequencies:
    """
    Return the frequencies of Llama 3.1 and later: slow pairs are stretched, fast ones stay.

    Source: `apply_scaling` in the reference code that came with the model.
    """
    factor, original = float(scaling["factor"]), scaling["original_max_position_embeddings"]
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    turns = original * frequencies / (2 * math.pi)  # within the original context
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    scaled: Frequencies = (1 - kept) * frequencies / factor + kept * frequencies
    return scaled


def longrope_scale(factor: float, original: float) -> float:
    """Return what cosine and sine are multiplied by. Source: LongRoPE (Ding et al. 2024), Phi-3's code."""
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


_SUFFIX: Final = ".weight"
_STEP_NUMBERS: Final = 1 << 22
"""Numbers that are dequantized at once: 16 MB of f32, several times that while gguf works on them."""


class GgufTensors:
    """The tensors of a file, mapped; each is dequantized anew whenever it is asked for."""

    def __init__(self, readers: Sequence[GGUFReader]) -> None:
        self._tensors: dict[str, ReaderTensor] = {}
        for reader in readers:
            for tensor in reader.tensors:
                self._tensors[tensor.name.removesuffix(_SUFFIX)] = tensor
        self._parts: dict[str, tuple[str, slice]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors or name in self._parts

    def split(self, whole: str, parts: Sequence[tuple[str, int]]) -> None:
        """Give names to the rows of a tensor in which several matrices lie below each other."""
        start = 0
        for name, rows in parts:
            self._parts[name] = (whole, slice(start, start + rows))
            start += rows
        if start != self.rows(whole):
            raise NotCompared(f"{whole} has {self.rows(whole)} rows where {start} were expected")

    def matrix(self, name: str, rows: slice = slice(None)) -> Array:
        """Return some rows of a tensor as f32."""
        if name in self._parts:
            whole, part = self._parts[name]
            return self._wide(whole, self._raw(whole)[part][rows])
        return self._wide(name, self._raw(name)[rows])

    def gather(self, name: str, rows: Sequence[int]) -> Array:
        """Return these rows of a tensor, in this order."""
        return self._wide(name, self._raw(name)[list(rows)])

    def vector(self, name: str) -> Array:
        """Return a tensor of one dimension."""
        return self.matrix(name).reshape(-1)

    def rows(self, name: str) -> int:
        """Return how many rows a matrix has."""
        return len(self._raw(name))

    def types(self) -> dict[str, int]:
        """Return how many numbers each type of tensor holds, the most first."""
        counts: dict[str, int] = {}
        for tensor in self._tensors.values():
            kind = tensor.tensor_type.name
            counts[kind] = counts.get(kind, 0) + int(tensor.n_elements)
        return dict(sorted(counts.items(), key=lambda one: -one[1]))

    def _raw(self, name: str) -> npt.NDArray[Any]:
        """Return the bytes of a tensor by row, as the file has them."""
        raw: npt.NDArray[Any] = self._tensors[name].data
        return raw

    def _wide(self, name: str, raw: npt.NDArray[Any]) -> Array:
        kind = self._tensors[name].tensor_type
        columns = int(self._tensors[name].shape[0])
        if raw.ndim == 1:
            return np.asarray(dequantize(raw, kind), np.float32)
        wide = np.empty((len(raw), columns), np.float32)
        step = max(1, _STEP_NUMBERS // columns)
        for start in range(0, len(raw), step):
            part = np.ascontiguousarray(raw[start : start + step])
            # As one long row, because gguf goes through short ones in a Python loop.
            wide[start : start + step] = dequantize(part.reshape(1, -1), kind).reshape(-1, columns)
        return wide


class _Fields:
    """The metadata of an architecture."""

    def __init__(self, reader: GGUFReader) -> None:
        self._fields = reader.fields
        self.architecture = str(self._fields["general.architecture"].contents())

    def get(self, name: str, default: Any = None) -> Any:
        entry = self._fields.get(f"{self.architecture}.{name}")
        return default if entry is None else entry.contents()

    def number(self, name: str, default: float | None = None) -> float:
        value = self.get(name, default)
        if not isinstance(value, int | float):
            raise NotCompared(f"{self.architecture}.{name} is {value!r}, which is no number")
        return value


def open_gguf(path: Path) -> tuple[Description, GgufTensors]:
    """
    Return how the model in a file computes, and its tensors.

    Raises:
        NotCompared: The reference does not know this architecture, or something of it.
        UnsupportedModelError: The file cannot be read.
    """
    first = _reader(path)
    others = []
    if "split.count" in first.fields:
        count = int(first.fields["split.count"].contents())
        # How llama.cpp's gguf-split names them. Source: its `llama_split_path`.
        stem = path.name.removesuffix(f"-00001-of-{count:05}.gguf")
        others = [
            _reader(path.with_name(f"{stem}-{number:05}-of-{count:05}.gguf"))
            for number in range(2, count + 1)
        ]
    tensors = GgufTensors([first, *others])
    return describe(_Fields(first), tensors), tensors


def _reader(path: Path) -> GGUFReader:
    try:
        return GGUFReader(path)
    except (OSError, ValueError, IndexError, KeyError) as cause:
        raise UnsupportedModelError(f"{path} cannot be read as GGUF ({cause}).") from cause


_GATED: Final = ("llama", "qwen2", "qwen3", "phi3", "gemma2", "gemma3")


def describe(fields: _Fields, tensors: GgufTensors) -> Description:
    """
    Return what an architecture does.

    Raises:
        NotCompared: It is none of those that the reference knows.
    """
    name = fields.architecture
    if name not in _GATED:
        raise NotCompared(f"the reference does not know the architecture {name}")
    if fields.get("expert_count"):
        raise NotCompared("the reference does not know mixtures of experts")
    layers, heads = int(fields.number("block_count")), int(fields.number("attention.head_count"))
    width = int(fields.number("embedding_length"))
    head_size = int(fields.number("attention.key_length", width // heads))
    kv_heads = int(fields.number("attention.head_count_kv", heads))
    _split_fused(tensors, layers, head_size, heads, kv_heads)
    ropes, windows = _ropes(fields, tensors, layers, head_size)
    gemma = name.startswith("gemma")
    return Description(
        architecture=name,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        epsilon=float(fields.number("attention.layer_norm_rms_epsilon")),
        ropes=ropes,
        windows=windows,
        activation="gelu" if gemma else "silu",
        attention_scale=_attention_scale(fields, width, heads, head_size),
        attention_cap=fields.get("attn_logit_softcapping") if name == "gemma2" else None,
        logits_cap=fields.get("final_logit_softcapping") if name == "gemma2" else None,
        embedding_scale=math.sqrt(width) if gemma else 1.0,
        norms_after=gemma,
        has_qk_norm=name in ("qwen3", "gemma3"),
    )


def _split_fused(
    tensors: GgufTensors, layers: int, head_size: int, heads: int, kv_heads: int
) -> None:
    """Find query, key and value, and gate and up, where a file has them as one matrix, as phi3's do."""
    for layer in range(layers):
        block = f"blk.{layer}."
        if f"{block}attn_qkv" in tensors:
            rows = (heads * head_size, kv_heads * head_size, kv_heads * head_size)
            names = (f"{block}attn_q", f"{block}attn_k", f"{block}attn_v")
            tensors.split(f"{block}attn_qkv", list(zip(names, rows, strict=True)))
        if f"{block}ffn_gate" not in tensors and f"{block}ffn_up" in tensors:
            half = tensors.rows(f"{block}ffn_up") // 2
            tensors.split(f"{block}ffn_up", [(f"{block}ffn_gate", half), (f"{block}ffn_up", half)])


def _attention_scale(fields: _Fields, width: int, heads: int, head_size: int) -> float:
    # The files do not say it. Source: `query_pre_attn_scalar` of the 27B models' configurations,
    # which alone differ from the head size; llama.cpp tells them by their number of layers too.
    is_27b = (fields.architecture, fields.number("block_count")) in (("gemma2", 46), ("gemma3", 62))
    return 1 / math.sqrt(width / heads if is_27b else head_size)


def _ropes(
    fields: _Fields, tensors: GgufTensors, layers: int, head_size: int
) -> tuple[tuple[Rope, ...], tuple[int | None, ...]]:
    """Return how each layer turns positions, and how far it sees."""
    everywhere = _rope(fields, tensors, head_size)
    window = fields.get("attention.sliding_window")
    # Every n-th layer sees everything. Source: `layer_types` of Gemma's configurations.
    every = {"gemma2": 2, "gemma3": 6}.get(fields.architecture)
    if window is None or (every is None and fields.architecture != "phi3"):
        return (everywhere,) * layers, (None,) * layers
    if every is None:
        return (everywhere,) * layers, (int(window),) * layers
    is_local = [(layer + 1) % every != 0 for layer in range(layers)]
    nearby = everywhere
    if fields.architecture == "gemma3":
        # Source: `rope_local_base_freq` of Gemma 3's configurations; never scaled.
        base = fields.number("rope.freq_base_swa", 10_000.0)
        nearby = Rope(plain(head_size, base), "halves")
    return (
        tuple(nearby if local else everywhere for local in is_local),
        tuple(int(window) if local else None for local in is_local),
    )


def _rope(fields: _Fields, tensors: GgufTensors, head_size: int) -> Rope:
    turned = int(fields.number("rope.dimension_count", head_size))
    base = fields.number("rope.freq_base", 10_000.0)
    frequencies = plain(turned, base)
    pairing: Pairing = "neighbours" if fields.architecture == "llama" else "halves"
    scale = fields.number("rope.scaling.attn_factor", 1.0)
    if "rope_freqs" in tensors:
        frequencies = frequencies / tensors.vector("rope_freqs")
    if "rope_factors_short" in tensors:  # LongRoPE, within the context that it was trained on
        return Rope(frequencies / tensors.vector("rope_factors_short"), pairing, scale)
    kind = fields.get("rope.scaling.type", "none")
    factor = fields.number("rope.scaling.factor", 1.0)
    match kind:
        case "none":
            return Rope(frequencies, pairing)
        case "linear":
            return Rope(frequencies / factor, pairing)
        case "yarn":
            stretched, by_factor = yarn(
                frequencies,
                base=base,
                factor=factor,
                original=fields.number(
                    "rope.scaling.original_context_length", fields.number("context_length")
                ),
                fast=fields.number("rope.scaling.yarn_beta_fast", 32.0),
                slow=fields.number("rope.scaling.yarn_beta_slow", 1.0),
            )
            return Rope(stretched, pairing, scale * by_factor)
        case _:
            raise NotCompared(f"the reference does not know RoPE scaled by {kind!r}")
