"""
A GGUF file as a description and tensors for `reference_model`.

The file is read with the `gguf` package alone, whose own functions dequantize each tensor.
"""

import math
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor
from gguf.quants import dequantize

from recollect.errors import UnsupportedModelError
from recollect.files import combine, sha256_file
from recollect.models.gguf_weights import parts_of
from recollect.proof.reference_model import (
    Array,
    Description,
    NotCompared,
    Pairing,
    Rope,
    Settings,
    Tensors,
    plain,
    refusing_nonsense,
    yarn,
)

_SUFFIX: Final = ".weight"
_STEP_NUMBERS: Final = 1 << 22
"""Numbers that are dequantized at once: 16 MB of f32, several times that while gguf works on them."""


class GgufTensors(Tensors):
    """The tensors of a file, mapped; each is dequantized anew whenever it is asked for."""

    def __init__(self, readers: Sequence[GGUFReader]) -> None:
        super().__init__()
        self._tensors: dict[str, ReaderTensor] = {
            tensor.name.removesuffix(_SUFFIX): tensor
            for reader in readers
            for tensor in reader.tensors
        }

    def names(self) -> Collection[str]:
        """Return the names of all tensors, biases included."""
        return self._tensors.keys()

    def types(self) -> dict[str, int]:
        """Return how many numbers each type of tensor holds, the most first."""
        counts: Counter[str] = Counter()
        for tensor in self._tensors.values():
            counts[tensor.tensor_type.name] += int(tensor.n_elements)
        return dict(counts.most_common())

    def _shape(self, name: str) -> tuple[int, int]:
        tensor = self._tensors[name]
        columns = int(tensor.shape[0])
        return int(tensor.n_elements) // columns, columns

    def _read(self, name: str, rows: slice | list[int]) -> Array:
        tensor, columns = self._tensors[name], self._shape(name)[1]
        kind = tensor.tensor_type
        if tensor.data.ndim == 1:
            return _dequantized(tensor.data, kind)
        raw = tensor.data[rows]
        wide = np.empty((len(raw), columns), np.float32)
        step = max(1, _STEP_NUMBERS // columns)
        for start in range(0, len(raw), step):
            part = np.ascontiguousarray(raw[start : start + step])
            # As one long row, because gguf goes through short ones in a Python loop.
            wide[start : start + step] = _dequantized(part.reshape(1, -1), kind).reshape(
                -1, columns
            )
        return wide


def _dequantized(raw: npt.NDArray[Any], kind: GGMLQuantizationType) -> Array:
    try:
        return np.asarray(dequantize(raw, kind), np.float32)
    except NotImplementedError as cause:
        raise NotCompared(f"the gguf package does not read tensors of type {kind.name}") from cause


def open_gguf(path: Path, *, sha256: str | None = None) -> tuple[Description, Tensors]:
    """
    Return how the model in a file computes, and its tensors.

    Args:
        path: The file, or the first of several.
        sha256: What the file has to be, as `Manifest.source_sha256`; None: it may be any.

    Raises:
        NotCompared: It is another file, or the reference does not know something of it.
        UnsupportedModelError: The file cannot be read.
    """
    parts = parts_of(path)
    if sha256 is not None:
        digests = [sha256_file(part) for part in parts]
        if sha256 != (digests[0] if len(digests) == 1 else combine(digests)):
            raise NotCompared(
                f"{path} is no longer the file that the model was made of: put the original there; "
                "for a model with a name, `recollect models --prune NAME` and then "
                "`recollect pull NAME --check` do so"
            )
    readers = [_reader(part) for part in parts]
    tensors, first = GgufTensors(readers), readers[0]
    name = first.fields.get("general.architecture")
    architecture = "" if name is None else str(name.contents())
    values = {
        key.removeprefix(f"{architecture}."): first.fields[key].contents()
        for key in first.fields
        if key.startswith(f"{architecture}.")
    }
    with refusing_nonsense():
        fields = Settings(values, f"{architecture}.")
        description = describe(architecture, fields, tensors)
        fields.require_all_asked(_NO_NUMBERS)
    tensors.require_known(description, _IN_DESCRIPTION)
    return description, tensors


def _reader(path: Path) -> GGUFReader:
    try:
        return GGUFReader(path)
    except (OSError, ValueError, IndexError, KeyError) as cause:
        raise UnsupportedModelError(f"{path} cannot be read as GGUF ({cause}).") from cause


_GATED: Final = ("llama", "qwen2", "qwen3", "phi3", "gemma2", "gemma3")
_NO_NUMBERS: Final = (
    "vocab_size", "feed_forward_length", "context_length", "expert_used_count",
    "rope.scaling.finetuned", "tensor_data_layout",
)  # fmt: skip
"""Fields that the shapes of tensors repeat, or that no pass depends on."""
_IN_DESCRIPTION: Final = ("rope_freqs", "rope_factors_short", "rope_factors_long")


def describe(architecture: str, fields: Settings, tensors: Tensors) -> Description:
    """
    Return what an architecture does.

    Raises:
        NotCompared: It is none of those that the reference knows.
    """
    if architecture not in _GATED:
        raise NotCompared(f"the reference does not know the architecture {architecture}")
    if fields.get("expert_count"):
        raise NotCompared("the reference does not know mixtures of experts")
    fields.require_default("attention.causal", True)
    layers, heads = fields.count("block_count", most=10_000), fields.count("attention.head_count")
    width = fields.count("embedding_length")
    head_size = fields.count("attention.key_length", width // heads)
    fields.require_default("attention.value_length", head_size)
    ropes, windows = _ropes(architecture, fields, tensors, layers, head_size)
    gemma = architecture.startswith("gemma")
    caps = architecture == "gemma2"
    # The files do not say it. Source: `query_pre_attn_scalar` of the 27B models' configurations,
    # which alone differ from the head size; llama.cpp tells them by their number of layers too.
    is_27b = (architecture, layers) in (("gemma2", 46), ("gemma3", 62))
    scale = 1 / math.sqrt(width / heads if is_27b else head_size)
    return Description(
        architecture=architecture,
        layers=layers,
        heads=heads,
        kv_heads=fields.count("attention.head_count_kv", heads),
        head_size=head_size,
        epsilon=fields.number("attention.layer_norm_rms_epsilon"),
        ropes=ropes,
        windows=windows,
        activation="gelu" if gemma else "silu",
        attention_scale=fields.number("attention.scale", scale),
        attention_cap=fields.optional("attn_logit_softcapping") if caps else None,
        logits_cap=fields.optional("final_logit_softcapping") if caps else None,
        embedding_scale=math.sqrt(width) if gemma else 1.0,
        norms_after=gemma,
        has_qk_norm=architecture in ("qwen3", "gemma3"),
    )


def _ropes(
    architecture: str, fields: Settings, tensors: Tensors, layers: int, head_size: int
) -> tuple[tuple[Rope, ...], tuple[int | None, ...]]:
    """Return how each layer turns positions, and how far it sees."""
    everywhere = _rope(architecture, fields, tensors, head_size)
    # Every n-th layer sees everything. Source: `layer_types` of Gemma's configurations.
    every = {"gemma2": 2, "gemma3": 6, "phi3": 1}.get(architecture)
    if every is None or not fields.get("attention.sliding_window"):
        return (everywhere,) * layers, (None,) * layers
    window = fields.count("attention.sliding_window", most=1 << 31)
    every = fields.count("attention.sliding_window_pattern", every)
    is_local = [every == 1 or (layer + 1) % every != 0 for layer in range(layers)]
    nearby = everywhere
    if architecture == "gemma3":
        # Source: `rope_local_base_freq` of Gemma 3's configurations; never scaled.
        nearby = Rope(plain(head_size, fields.number("rope.freq_base_swa", 10_000.0)), "halves")
    return (
        tuple(nearby if local else everywhere for local in is_local),
        tuple(window if local else None for local in is_local),
    )


def _rope(architecture: str, fields: Settings, tensors: Tensors, head_size: int) -> Rope:
    turned = fields.count("rope.dimension_count", head_size, most=head_size)
    base = fields.number("rope.freq_base", 10_000.0)
    frequencies = plain(turned, base)
    pairing: Pairing = "neighbours" if architecture == "llama" else "halves"
    scale = fields.number("rope.scaling.attn_factor", 1.0)
    factor = fields.number("rope.scaling.factor", fields.number("rope.scale_linear", 1.0))
    # A factor without a kind is linear. Source: llama.cpp, `llama_model::load_hparams`.
    kind = fields.get("rope.scaling.type", "linear")
    context = fields.count("context_length", most=1 << 31)
    original = fields.number("rope.scaling.original_context_length", context)
    fast, slow = (
        fields.number(f"rope.scaling.yarn_beta_{name}", default)
        for name, default in (("fast", 32.0), ("slow", 1.0))
    )
    scale *= fields.number("rope.scaling.yarn_attn_factor", 1.0)
    if "rope_freqs" in tensors:
        frequencies = frequencies / tensors.vector("rope_freqs")
    if "rope_factors_short" in tensors:  # LongRoPE, within the context that it was trained on
        return Rope(frequencies / tensors.vector("rope_factors_short"), pairing, scale)
    match kind:
        case "none":
            return Rope(frequencies, pairing)
        case "linear":
            return Rope(frequencies / factor, pairing)
        case "yarn":
            stretched, by_factor = yarn(
                frequencies, base=base, factor=factor, original=original, fast=fast, slow=slow
            )
            return Rope(stretched, pairing, scale * by_factor)
        case _:
            raise NotCompared(f"the reference does not know RoPE scaled by {kind!r}")
