"""
A language model's forward pass in plain numpy: what a model's files say, computed a second way.

The pass shares no code with what makes or runs our graphs, so that a mistake there cannot hide here.
Each layer is read when it is needed and given up after it, so that memory holds one layer and not the
model. Rotary embeddings follow the formulas of the papers, in radians a position and float64. A setting
or a weight that the pass does not know ends in `NotCompared`. Reads no files: `gguf_reference` and
`openvino_reference` do.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from recollect.types import Profile

Array = npt.NDArray[np.float32]
Pairing = Literal["neighbours", "halves"]
"""
Which two places of a head are rotated as one pair.

`neighbours`: 2i and 2i + 1, as in the paper (RoFormer, Su et al. 2021) and in llama's GGUF files.
`halves`: i and i + size / 2, as in GPT-NeoX and in Hugging Face's weights.
"""

ROUNDING: Final = 2.0**-22
"""
The largest relative error that the second pass adds to each number before a layer: four times that of one
rounding in f32, because a layer has seven products, and each rounds in an order of its own.
"""
_NOISE_TOKENS: Final = 64
"""How many tokens go through twice: places enough for a largest difference, at a third more work."""
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

    def layer_shapes(self, width: int, inner: int) -> dict[str, tuple[int, ...]]:
        """Return the weights of a layer; *inner* is the width of its feed-forward part."""
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        norms = ["attn_norm", "ffn_norm"]
        norms += ["post_attention_norm", "post_ffw_norm"] if self.norms_after else []
        heads = ["attn_q_norm", "attn_k_norm"] if self.has_qk_norm else []
        return {
            "attn_q": (queries, width),
            "attn_k": (keys, width),
            "attn_v": (keys, width),
            "attn_output": (width, queries),
            "ffn_gate": (inner, width),
            "ffn_up": (inner, width),
            "ffn_down": (width, inner),
            **dict.fromkeys(norms, (width,)),
            **dict.fromkeys(heads, (self.head_size,)),
        }


class Settings:
    """What a model's files say of it, by name. Remembers which names were asked for."""

    def __init__(self, values: Any, of: str) -> None:
        """
        Take what a file holds.

        Args:
            values: A mapping from names to values; anything else is refused.
            of: What begins a name in messages, such as `llama.`.
        """
        if not isinstance(values, Mapping):
            raise NotCompared(f"{of or 'its configuration'} holds {values!r}, which names nothing")
        self._values, self._of, self._asked = values, of, set[str]()

    def get(self, name: str, default: Any = None) -> Any:
        """Return a value as it is."""
        self._asked.add(name)
        value = self._values.get(name)
        return default if value is None else value

    def has(self, name: str) -> bool:
        """Return whether the file has a value of that name, null included."""
        return name in self._values

    def table(self, name: str) -> Mapping[str, Any]:
        """Return settings within a setting; none where it is absent."""
        value = self.get(name, {})
        if not isinstance(value, Mapping):
            raise NotCompared(f"{self._of}{name} is {value!r}, where names and values are needed")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Return a number above 0; of a list that says the same for each layer, that."""
        value = self.get(name, default)
        if isinstance(value, list | tuple) and value and all(one == value[0] for one in value):
            value = value[0]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (is_number and 0 < value < math.inf):
            raise NotCompared(f"{self._of}{name} is {value!r}, where a number above 0 is needed")
        return float(value)

    def count(self, name: str, default: float | None = None, *, most: int = 1 << 20) -> int:
        """Return a whole number from 1 on."""
        value = self.number(name, default)
        if not (value <= most and value.is_integer()):
            raise NotCompared(f"{self._of}{name} is {value:g}, where 1 to {most:,} are known")
        return int(value)

    def optional(self, name: str) -> float | None:
        """Return a number above 0, or None where there is none or it is 0."""
        return self.number(name) if self.get(name) else None

    def require_default(self, name: str, *harmless: Any) -> None:
        """Check that a setting is absent, or has a value with which it changes nothing."""
        value = self.get(name)
        if value is not None and value not in harmless:
            raise NotCompared(f"the reference does not know {self._of}{name} = {value!r}")

    def require_all_asked(self, ignored: Collection[str] = ()) -> None:
        """Check that nothing else is said, but for names that change no number."""
        others = {name for name, value in self._values.items() if value is not None}
        for name in sorted(others.difference(self._asked, ignored)):
            raise NotCompared(f"the reference does not know {self._of}{name}")


@contextmanager
def refusing_nonsense() -> Iterator[None]:
    """Run what describes a model; where its numbers divide by 0 or do not fit, nothing is compared."""
    try:
        with np.errstate(over="raise", divide="raise", invalid="raise"):
            yield
    except (ArithmeticError, ValueError, TypeError) as cause:
        raise NotCompared(f"what its files say cannot be computed ({cause})") from cause


class Tensors(ABC):
    """The weights by the names that GGUF files give them, as f32; each is read when it is asked for."""

    def __init__(self) -> None:
        self._parts: dict[str, tuple[str, slice]] = {}

    @abstractmethod
    def names(self) -> Collection[str]:
        """Return the names of all tensors, biases included."""

    @abstractmethod
    def types(self) -> dict[str, int]:
        """Return how many numbers each type of tensor holds, the most first."""

    @abstractmethod
    def _shape(self, name: str) -> tuple[int, int]:
        """Return rows and columns; a tensor of one dimension may be either."""

    @abstractmethod
    def _read(self, name: str, rows: slice | list[int]) -> Array:
        """Return these rows, shape `(rows, columns)`, or `(rows,)` of a tensor of one dimension."""

    def __contains__(self, name: str) -> bool:
        return name in self._parts or name in self.names()

    def shape(self, name: str) -> tuple[int, int]:
        """Return how many rows and columns a matrix has."""
        _, rows, columns = self._found(name)
        return len(rows), columns

    def matrix(self, name: str, rows: slice = slice(None)) -> Array:
        """Return some rows of a tensor, shape `(rows, columns)`: it maps columns to rows."""
        whole, there, _ = self._found(name)
        chosen = there[rows]
        return self._read(whole, slice(chosen.start, chosen.stop))

    def _found(self, name: str) -> tuple[str, range, int]:
        """Return the tensor of the file that holds a matrix, the rows there, and the columns."""
        # Phi-3's files call gate and up together what other files call up: the whole has a part's name.
        whole, part = self._parts.get(name, (name, slice(None)))
        if whole not in self.names():
            raise NotCompared(f"its files have no tensor {name}")
        rows, columns = self._shape(whole)
        return whole, range(rows)[part], columns

    def gather(self, name: str, rows: Sequence[int]) -> Array:
        """Return these rows of a tensor, in this order."""
        return self._read(name, list(rows))

    def vector(self, name: str) -> Array:
        """Return a tensor of one dimension."""
        return self.matrix(name).reshape(-1)

    def require_known(self, model: Description, ignored: Collection[str] = ()) -> None:
        """
        Name the parts of fused matrices, and check that all weights are as a description has them.

        Args:
            model: What the family does.
            ignored: Names of tensors that no pass reads, because the description has their values.

        Raises:
            NotCompared: A tensor is missing, has another shape, or is one that the pass does not read.
        """
        is_too_long = any(2 * len(rope.frequencies) > model.head_size for rope in model.ropes)
        if is_too_long or model.heads % model.kv_heads:
            raise NotCompared("RoPE turns more than a head has, or heads share keys unevenly")
        width = self.shape("token_embd")[1]
        needed: dict[str, tuple[int, ...]] = {"output_norm": (width,)}
        for layer in range(model.layers):
            block = f"blk.{layer}."
            self._split(block, model)
            inner = self.shape(f"{block}ffn_up")[0]
            shapes = model.layer_shapes(width, inner)
            needed |= {block + part: shape for part, shape in shapes.items()}
        if "output" in self:
            needed["output"] = (self.shape("output")[0], width)
        matrices = [name for name, shape in needed.items() if len(shape) > 1]
        biases = {f"{name}.bias" for name in (*matrices, "output")} & set(self.names())
        needed |= {bias: (self.shape(bias.removesuffix(".bias"))[0],) for bias in biases}
        for name, shape in needed.items():
            found = self.shape(name)
            if math.prod(found) != math.prod(shape) or (len(shape) > 1 and found != shape):
                raise NotCompared(f"{name} has the shape {found} where {shape} is expected")
        fused = {whole for whole, _ in self._parts.values()}
        others = set(self.names()).difference(needed, fused, ignored, ["token_embd"])
        if others:
            raise NotCompared(f"the reference does not know the tensor {min(others)}")

    def _split(self, block: str, model: Description) -> None:
        """Find query, key and value, and gate and up, where each are one matrix, as in phi3."""
        if f"{block}attn_qkv" in self:
            rows = [model.head_size * count for count in (model.heads, *[model.kv_heads] * 2)]
            self._cut(block, "attn_qkv", ("attn_q", "attn_k", "attn_v"), rows)
        if f"{block}ffn_gate" not in self:
            fused = "ffn_gate_up" if f"{block}ffn_gate_up" in self else "ffn_up"
            half = self.shape(block + fused)[0] // 2
            self._cut(block, fused, ("ffn_gate", "ffn_up"), [half, half])

    def _cut(self, block: str, fused: str, names: Sequence[str], rows: Sequence[int]) -> None:
        if (found := self.shape(block + fused)[0]) != sum(rows) or f"{block}{fused}.bias" in self:
            raise NotCompared(f"{block}{fused} has a bias, or {found} rows and not {sum(rows)}")
        start = 0
        for name, count in zip(names, rows, strict=True):
            self._parts[block + name] = (block + fused, slice(start, start + count))
            start += count


def logits_at(
    model: Description,
    tensors: Tensors,
    token_ids: Sequence[int],
    places: Sequence[int],
    *,
    progress: Callable[[int, int], None] = lambda _done, _of: None,
) -> Array:
    """Return the logits after some of the tokens; as `logits_and_noise`."""
    return logits_and_noise(model, tensors, token_ids, places, progress=progress)[0]


def logits_and_noise(
    model: Description,
    tensors: Tensors,
    token_ids: Sequence[int],
    places: Sequence[int],
    *,
    progress: Callable[[int, int], None] = lambda _done, _of: None,
) -> tuple[Array, float]:
    """
    Return the logits after some of the tokens, and how far rounding moves them.

    The first 64 tokens go through a second time, with a random error of a few f32 roundings before each
    layer. The largest difference between the two passes is what this model makes of rounding.

    Args:
        model: What the family does.
        tensors: Its weights.
        token_ids: One sequence, shape `(tokens,)`, from position 0 on.
        places: Indices of tokens; the logits are those of the token after each.
        progress: Called after each layer with how many are done, and of how many.

    Returns:
        The logits, shape `(places, vocabulary)`, and a difference of logits.
    """
    tokens, again = len(token_ids), min(len(token_ids), _NOISE_TOKENS)
    random = np.random.default_rng(0)
    embedded = tensors.gather("token_embd", [*token_ids, *token_ids[:again]])
    hidden = embedded * np.float32(model.embedding_scale)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        for layer in range(model.layers):
            errors = random.uniform(-ROUNDING, ROUNDING, hidden[tokens:].shape)
            hidden[tokens:] *= (1 + errors).astype(np.float32)
            hidden = _layer(model, tensors, layer, hidden, (slice(tokens), slice(tokens, None)))
            progress(layer + 1, model.layers)
        twice = [row for row, place in enumerate(places) if place < again]
        chosen = [*places, *(tokens + places[row] for row in twice)]
        hidden = _norm(hidden[chosen], tensors.vector("output_norm"), model.epsilon)
        name = "output" if "output" in tensors else "token_embd"
        logits = np.empty((len(chosen), tensors.shape(name)[0]), np.float32)
        for start in range(0, logits.shape[1], _VOCABULARY_STEP):
            rows = slice(start, start + _VOCABULARY_STEP)
            logits[:, rows] = hidden @ tensors.matrix(name, rows).T
        if "output.bias" in tensors:
            logits += tensors.vector("output.bias")
        logits = _capped(logits, model.logits_cap)
        noise = np.abs(logits[twice] - logits[len(places) :]).max(initial=0.0)
    return logits[: len(places)], float(noise)


def log_softmax(logits: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return log probabilities over the last axis."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    log_probabilities: npt.NDArray[np.float64] = wide - np.log(
        np.exp(wide).sum(axis=-1, keepdims=True)
    )
    return log_probabilities


Outcome = Literal["PASS", "FAIL", "NOT COMPARED"]

LIMITS: Final[dict[Profile, float]] = {"exact": 1e-3, "fast": 2.0, "small": 2.5}
"""
The largest difference of any logit that passes, by profile, at logits with a standard deviation of 8.

The types of the tensors change nothing in it: each type that we read is stored so that its values are
the file's. `exact`: f32 products in another order. Twenty-eight layers, 1,536 wide, came out 1e-4 off;
ten times that leaves room for larger models, and the smallest fault that was ever seen in use (groups
without a scale, in one matrix of 196) moved a logit by 0.09. `fast`: KV in f16, and products of rounded
activations on processors with bf16 or VNNI, which alone move the largest of millions of logits by up to
1.0. `small`: KV in u8 besides. A fault that moves every logit by less is seen in `exact` only, which is
why `verify` runs in it unless told otherwise.
"""

USUAL_DEVIATION: Final = 8.0
"""
The standard deviation of logits that the limits are for. f32 rounds relative to the size of a number, so
the limits grow with logits that vary more: 8,000 came out 0.055 off. They do not shrink.
"""
ROUNDING_ALLOWANCE: Final = 8.0
"""
What `exact` allows at least, in units of the noise of `logits_and_noise`. Fifteen models came out 0.7 to
1.4 times that noise off, and one whose attention takes one token alone 4.2 times.
"""
MOST_ROUNDING: Final = 10.0
"""
What rounding may excuse at most, in units of the limit: 0.01 at the usual size, a ninth of the fault
above. A model that rounding moves further cannot be judged within that, and is not passed beyond it.
"""

PERPLEXITY_LIMIT: Final[dict[Profile, float]] = {"exact": 1e-3, "fast": 0.03, "small": 0.05}
"""
How far the ratio of perplexities may be from 1; wrong zero points gave 0.07 and 0.24. It grows as the
limit of logits does: a log probability moves by at most twice what the logits do.
"""
_MOST_EXPONENT: Final = 700.0
"""Of a perplexity: e to the power of more is infinite in f64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What is to be said of the logits of a model beside those that its file gives."""

    outcome: Outcome
    reason: str = ""
    """Why nothing was compared, or which limit was passed; empty where all is well."""
    largest: float = 0.0
    """Difference of a logit."""
    limit: float = 0.0
    noise: float = 0.0
    """How far rounding moves a logit by itself, as `logits_and_noise` has it."""
    deviation: float = 0.0
    """Standard deviation of the file's logits."""
    agreement: float = 0.0
    """Share of places at which both have the same likeliest token."""
    perplexity: float = 0.0
    """Of the text, as it runs here."""
    reference_perplexity: float = 0.0
    """Of the text, by the file's values."""


def judge(
    profile: Profile, ours: Array, theirs: Array, *, noise: float, following: Mapping[int, int]
) -> Judgement:
    """
    Return what is to be said of logits.

    Args:
        profile: What the model computes in.
        ours: As it runs, shape `(places, vocabulary)`.
        theirs: By its file.
        noise: Of `logits_and_noise`.
        following: By row of the logits, the token that follows in the text.

    Raises:
        NotCompared: The file gives no finite numbers, or rounding moves this model so far that
            they may be the same.
    """
    if not np.isfinite(theirs).all():
        raise NotCompared("by its file, its logits are no finite numbers")
    if ours.shape != theirs.shape:
        reason = f"it has {ours.shape[1]:,} logits for a token, and its file {theirs.shape[1]:,}"
        return Judgement(outcome="FAIL", reason=reason)
    with np.errstate(invalid="ignore"):
        largest = float(np.abs(ours - theirs).max())
        rows, tokens = list(following), list(following.values())
        mean, mean_by_file = (
            float(log_softmax(logits[rows])[range(len(rows)), tokens].mean())
            for logits in (ours, theirs)
        )
    deviation = float(theirs.std(dtype=np.float64))
    usual = LIMITS[profile] * max(1.0, deviation / USUAL_DEVIATION)
    excused = ROUNDING_ALLOWANCE * noise if profile == "exact" else 0.0
    limit = max(usual, min(excused, MOST_ROUNDING * usual))
    if limit < largest <= excused:
        raise NotCompared(f"rounding alone moves its logits by {noise:.2g}, too far to judge them")
    perplexity, by_file = (math.exp(min(-one, _MOST_EXPONENT)) for one in (mean, mean_by_file))
    reasons = []
    if not largest <= limit:  # so that NaN is a difference too
        reasons.append(f"a logit is {largest:.2g} off, and {limit:.2g} is allowed")
    if not abs(mean - mean_by_file) <= PERPLEXITY_LIMIT[profile] * limit / LIMITS[profile]:
        reasons.append(f"perplexity is {perplexity:.4g}, and {by_file:.4g} by the file")
    return Judgement(
        outcome="FAIL" if reasons else "PASS",
        reason="; ".join(reasons),
        largest=largest,
        limit=limit,
        noise=noise,
        deviation=deviation,
        agreement=float(np.mean(ours.argmax(axis=1) == theirs.argmax(axis=1))),
        perplexity=perplexity,
        reference_perplexity=by_file,
    )


def _layer(
    model: Description, tensors: Tensors, layer: int, hidden: Array, sequences: Sequence[slice]
) -> Array:
    """Return what a layer makes of several sequences, which lie one after the other."""

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
    mixed = [
        _attention(
            model, layer, _rotated(query[:, one], rope), _rotated(key[:, one], rope), value[:, one]
        )
        for one in sequences
    ]
    added = linear(np.concatenate(mixed), "attn_output")
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


def llama3(
    frequencies: Frequencies, *, factor: float, original: float, low: float, high: float
) -> Frequencies:
    """
    Return the frequencies of Llama 3.1 and later: slow pairs are stretched, fast ones stay.

    Source: `apply_scaling` in the reference code that came with the model.
    """
    turns = original * frequencies / (2 * math.pi)  # within the original context
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    scaled: Frequencies = (1 - kept) * frequencies / factor + kept * frequencies
    return scaled


def longrope_scale(factor: float, original: float) -> float:
    """Return what cosine and sine are multiplied by. Source: LongRoPE (Ding et al. 2024), Phi-3's code."""
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
