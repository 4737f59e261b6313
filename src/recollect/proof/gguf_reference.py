"""
A GGUF file as a description and tensors for `reference_model`.

Reads metadata and tensors with the `gguf` package alone: each tensor is dequantized by that
package's own function, as a whole number of rows. Shares nothing with our conversion.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize

from recollect.errors import UnsupportedModelError
from recollect.proof import rope_scaling
from recollect.proof.reference_model import Array, Description, NotCompared, Pairing, Rope

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
        nearby = Rope(rope_scaling.plain(head_size, base), "halves")
    return (
        tuple(nearby if local else everywhere for local in is_local),
        tuple(int(window) if local else None for local in is_local),
    )


def _rope(fields: _Fields, tensors: GgufTensors, head_size: int) -> Rope:
    turned = int(fields.number("rope.dimension_count", head_size))
    base = fields.number("rope.freq_base", 10_000.0)
    frequencies = rope_scaling.plain(turned, base)
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
            stretched, by_factor = rope_scaling.yarn(
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
