"""
The decoder that a GGUF file describes, and the conversion of the file into a folder for OpenVINO.

Every field that changes what a model computes is either represented in `Decoder` or refused, so that no model
computes something else than its file means. This module reads no weights and builds no graph.

`convert` runs the program `gguf_to_openvino` in a process of its own, because a damaged file can crash a
library, and because the process gives its memory back. The folder is made in a scratch folder and gets its
name by one rename: nobody sees it incomplete, and two processes may convert the same model at once.
"""

import errno
import itertools
import math
import os
import signal
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from recollect.errors import UnsupportedModelError
from recollect.files import combine, scratch_folder
from recollect.models.fetch import run_program
from recollect.models.gguf import GgufHeader, read_header
from recollect.models.gguf_weights import READABLE_KINDS, Shards, parts_of, values_of
from recollect.models.openvino_folder import (
    CONVERTER,
    MODEL_FILES,
    TOKENIZER_FILES,
    Manifest,
    converted_bytes,
    find_converted,
    warn_of_writers,
)
from recollect.types import Progress

_EXPORT: Final = "export the original model with `optimum-cli export openvino`"


@dataclass(frozen=True, slots=True)
class _Family:
    """Properties of an architecture that follow from its name, not from fields or tensors."""

    interleaved: bool = False
    """Whether the two dimensions of a rotated pair are adjacent, which llama.cpp calls NORM and not NEOX."""
    unrotated_every: int = 0
    """The last of each so many layers has no rotary embedding; 0: all layers have it."""
    scales: bool = False
    """Whether the architecture has Granite's four multipliers, which are fields."""
    is_gemma: bool = False
    """Whether embeddings are multiplied by the root of their width, and the feed-forward part has GELU."""
    windowed_of: int = 0
    """Of each so many layers all but the last have a sliding window; 0: no layer has, 1: all have."""
    fused: bool = False
    """Whether query, key and value are one tensor, and gate and up another."""
    norms: tuple[str, ...] = ("attn_norm", "ffn_norm")
    """The norms that a layer must have. A file with others, or without one, holds another architecture."""


_HEAD_NORMS: Final = ("attn_q_norm", "attn_k_norm")
_OUTER_NORMS: Final = ("post_attention_norm", "post_ffw_norm")

FAMILIES: Final[Mapping[str, _Family]] = MappingProxyType(
    {
        "llama": _Family(interleaved=True),
        "qwen2": _Family(),
        "qwen3": _Family(norms=("attn_norm", *_HEAD_NORMS, "ffn_norm")),
        "granite": _Family(interleaved=True, scales=True),
        "smollm3": _Family(interleaved=True, unrotated_every=4),
        "olmo2": _Family(norms=(*_HEAD_NORMS, *_OUTER_NORMS)),
        "gemma3": _Family(
            is_gemma=True,
            windowed_of=6,
            norms=("attn_norm", *_HEAD_NORMS, "ffn_norm", *_OUTER_NORMS),
        ),
        "phi3": _Family(windowed_of=1, fused=True),
    }
)
"""
Architectures that can be built, by their names in files.

Source: llama.cpp, `llama_model_rope_type` for `interleaved`, and the builder of each architecture.
"""


@dataclass(frozen=True, slots=True)
class Rope:
    """The rotary embedding."""

    frequencies: np.ndarray
    """Radians per position, f64, shape `(rotated dimensions / 2,)`."""
    factor: float
    """Factor of cosine and sine: 1, except for YaRN."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """A decoder-only transformer with RMS norms, rotary embedding and a gated feed-forward part."""

    architecture: str
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    epsilon: float
    """The norms' epsilon."""
    rope: Rope
    interleaved: bool
    """Whether rotated pairs are adjacent, so that the rows of query and key are reordered into halves."""
    unrotated: frozenset[int] = frozenset()
    """Layers without rotary embedding."""
    attention_scale: float
    """Factor of the products of query and key."""
    embedding_scale: float = 1.0
    has_gelu: bool = False
    """Whether the feed-forward part has GELU, in its approximation with tanh, instead of SiLU."""
    fused: bool = False
    """Whether query, key and value are one tensor, and gate and up another."""
    window: int = 0
    """Tokens, including the newest, that a layer with a sliding window attends to; 0: no layer has one."""
    windowed: frozenset[int] = frozenset()
    """Layers with a sliding window."""
    local_rope: Rope | None = None
    """Rotary embedding of the layers with a sliding window; None: the same as in the other layers."""
    residual_scale: float = 1.0
    """Factor of attention and of the feed-forward part before the residual addition."""
    logit_divisor: float = 1.0
    """The logits are divided by it."""
    tensors: Collection[str] = field(repr=False)
    """The names of all tensors."""

    def has(self, name: str) -> bool:
        """Return whether the file holds a tensor of that name."""
        return name in self.tensors


def read_decoder(shards: Shards) -> Decoder:
    """
    Return the decoder that a file describes.

    Raises:
        UnsupportedModelError: It cannot be built exactly; the message names the architecture, field, tensor
            or tensor type that is not supported.
    """
    fields = _Fields(shards)
    family = FAMILIES.get(fields.architecture)
    if family is None:
        raise UnsupportedModelError(
            f"{shards.path.name} is of the {fields.architecture} architecture, and recollect builds "
            f"only {', '.join(FAMILIES)} from GGUF: {_EXPORT}."
        )
    if not shards.tensors:
        raise UnsupportedModelError(
            f"{shards.path.name} holds a vocabulary and no weights: choose another file of the model."
        )
    _require_readable_kinds(shards)
    _require_no_other_meaning(fields, family)
    heads = fields.integer("attention.head_count")
    head_size = fields.integer("attention.key_length", fields.integer("embedding_length") // heads)
    layers = fields.integer("block_count")
    windowed, window = _windowed(family, fields, layers)
    decoder = Decoder(
        architecture=fields.architecture,
        layers=layers,
        heads=heads,
        kv_heads=fields.integer("attention.head_count_kv", heads),
        head_size=head_size,
        epsilon=fields.real("attention.layer_norm_rms_epsilon"),
        rope=_read_rope(fields, shards, head_size),
        interleaved=family.interleaved,
        unrotated=_unrotated(family, layers),
        attention_scale=_attention_scale(family, fields, layers, head_size),
        embedding_scale=_embedding_scale(family, fields),
        has_gelu=family.is_gemma,
        fused=family.fused,
        window=window,
        windowed=windowed,
        local_rope=_local_rope(family, fields, head_size),
        residual_scale=fields.real("residual_scale", 1.0),
        logit_divisor=fields.real("logit_scale", 1.0),
        tensors=shards.tensors.keys(),
    )
    _require_sound(decoder, fields, family.norms)
    return decoder


class _Fields:
    """The fields of a file whose names begin with its architecture; each method checks the type."""

    def __init__(self, shards: Shards) -> None:
        self._fields = shards.fields
        self.file = shards.path.name
        self.architecture = str(self._fields.get("general.architecture"))

    def get(self, name: str) -> Any:
        """
        Return a field's value, or None. Of a list with a value for each layer, the one value of all.

        Raises:
            UnsupportedModelError: The layers have different values.
        """
        value = self._fields.get(f"{self.architecture}.{name}")
        if isinstance(value, list | tuple):
            if len(set(value)) != 1:
                raise self.refusal(f"has layers of different {name.replace('_', ' ')}")
            return value[0]
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        value: int = self._number(name, default, int)
        return value

    def real(self, name: str, default: float | None = None) -> float:
        return float(self._number(name, default, (int, float)))

    def text(self, name: str, default: str) -> str:
        value = self.get(name)
        return value if isinstance(value, str) else default

    def refusal(self, what: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self.file} {what}, which recollect cannot build: {_EXPORT}."
        )

    def _number(self, name: str, default: Any, kinds: Any) -> Any:
        value = self.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value):
            raise UnsupportedModelError(
                f"{self.file} is damaged or not finished (its field {self.architecture}.{name} is "
                f"{value!r}): download it again."
            )
        return value


_GEMMA_27B_LAYERS: Final = 62
"""Layers of Gemma 3 27B, which alone scales attention by width / heads. Source: llama.cpp, gemma3."""


def _attention_scale(family: _Family, fields: _Fields, layers: int, head_size: int) -> float:
    if family.is_gemma and layers == _GEMMA_27B_LAYERS:
        head_size = fields.integer("embedding_length") // fields.integer("attention.head_count")
    return fields.real("attention.scale", 0.0) or 1 / math.sqrt(head_size)


def _embedding_scale(family: _Family, fields: _Fields) -> float:
    if family.is_gemma:
        return math.sqrt(fields.integer("embedding_length"))
    return fields.real("embedding_scale", 1.0)


def _windowed(family: _Family, fields: _Fields, layers: int) -> tuple[frozenset[int], int]:
    """Return the layers with a sliding window, and its length in tokens."""
    window = fields.integer("attention.sliding_window", 0)
    if not 0 < window < fields.integer("context_length"):
        return frozenset(), 0
    if not family.windowed_of:
        raise fields.refusal("has a sliding window")
    every = fields.integer("attention.sliding_window_pattern", family.windowed_of)
    if every < 1:
        raise fields.refusal(f"has windows in the pattern {every}")
    return frozenset(n for n in range(layers) if every == 1 or (n + 1) % every != 0), window


def _local_rope(family: _Family, fields: _Fields, head_size: int) -> Rope | None:
    if not family.is_gemma:
        return None
    base = fields.real("rope.freq_base_swa", 10_000.0)
    return Rope(base ** -(np.arange(0, head_size, 2) / head_size), 1.0)


def _unrotated(family: _Family, layers: int) -> frozenset[int]:
    every = family.unrotated_every
    return frozenset(range(every - 1, layers, every)) if every else frozenset()


_MEANINGS: Final[Mapping[str, tuple[Callable[[Any], bool], str]]] = MappingProxyType(
    {
        # Name of a field: whether a value of it changes nothing, and the clause of the refusal otherwise.
        "expert_count": (lambda value: value == 0, "is a mixture of experts"),
        "attention.causal": (lambda value: value is True, "is no causal model"),
        "attention.clamp_kqv": (lambda value: value == 0, "clamps query, key and value"),
        "attention.max_alibi_bias": (lambda value: value == 0, "has ALiBi in place of RoPE"),
        "attn_logit_softcapping": (lambda value: value == 0, "caps the logits of attention"),
        "final_logit_softcapping": (lambda value: value == 0, "caps its logits"),
        "use_parallel_residual": (lambda value: value is False, "has parallel residuals"),
        "rope.scaling.yarn_ext_factor": (lambda value: value == 1, "extrapolates YaRN its own way"),
        "rope.scaling.yarn_log_multiplier": (lambda value: value == 0, "scales YaRN its own way"),
    }
)
_GRANITE_SCALES: Final = ("attention.scale", "embedding_scale", "residual_scale", "logit_scale")


def _require_no_other_meaning(fields: _Fields, family: _Family) -> None:
    for name, (is_harmless, what) in _MEANINGS.items():
        value = fields.get(name)
        if value is not None and not is_harmless(value):
            raise fields.refusal(what)
    for name in () if family.scales else _GRANITE_SCALES:
        if fields.get(name) is not None:
            raise fields.refusal(f"has the field {fields.architecture}.{name}")


def _require_readable_kinds(shards: Shards) -> None:
    strange = {t.kind.name for t in shards.tensors.values() if t.kind not in READABLE_KINDS}
    if strange:
        raise UnsupportedModelError(
            f"{shards.path.name} holds {', '.join(sorted(strange))} tensors, which recollect does "
            "not read: choose another quantization of the model, such as Q4_K_M or Q8_0."
        )


_IGNORED: Final = ("rope_freqs.weight", ".attn_rot_embd.weight", ".rope_freqs.weight")
"""Ends of names of tensors that are not weights: RoPE's factors, and frequencies that old files repeat."""
_SEPARATE: Final = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_FUSED: Final = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")


def _require_sound(decoder: Decoder, fields: _Fields, norms: Sequence[str]) -> None:
    """Check that every needed tensor is there, that no other is, and that the sizes are possible."""
    sizes = (decoder.layers, decoder.heads, decoder.kv_heads, decoder.head_size)
    is_odd = decoder.heads % decoder.kv_heads or decoder.head_size % 2 if min(sizes) > 0 else True
    if is_odd or decoder.layers > len(decoder.tensors):
        raise fields.refusal(f"says that it has layers, heads, KV heads and head size of {sizes}")
    matrices = _FUSED if decoder.fused else _SEPARATE
    needed = {"token_embd.weight", "output_norm.weight"}
    allowed = {"output.weight", "output.bias"}
    for layer in range(decoder.layers):
        name = f"blk.{layer}."
        needed |= {f"{name}{kind}.weight" for kind in (*matrices, *norms)}
        allowed |= {f"{name}{matrix}.bias" for matrix in matrices}
    missing = sorted(needed.difference(decoder.tensors))
    if missing:
        raise UnsupportedModelError(
            f"{fields.file} lacks the tensor {missing[0]}: it is damaged or no whole model; "
            "download it again, with all of its parts."
        )
    strange = sorted(
        name
        for name in decoder.tensors
        if name not in needed | allowed and not name.endswith(_IGNORED)
    )
    if strange:
        raise fields.refusal(f"holds the tensor {strange[0]}")
    if fields.integer("attention.value_length", decoder.head_size) != decoder.head_size:
        raise fields.refusal("has values of another size than keys")
    if decoder.interleaved and 2 * len(decoder.rope.frequencies) != decoder.head_size:
        raise fields.refusal("rotates a part of each head")


def _read_rope(fields: _Fields, shards: Shards, head_size: int) -> Rope:
    """
    Return the rotary embedding of the layers without a sliding window.

    Source: llama.cpp, `llama_model::load_hparams` for the fields and `ggml_rope_yarn_corr_dims` for
    YaRN, which agrees with transformers' `_compute_yarn_parameters`.
    """
    rotated = fields.integer("rope.dimension_count", head_size)
    if not 0 < rotated <= head_size or rotated % 2:
        raise fields.refusal(f"rotates {rotated} of {head_size} dimensions of a head")
    base = fields.real("rope.freq_base", 10_000.0)
    plain = base ** -(np.arange(0, rotated, 2) / rotated)
    if "rope_freqs.weight" in shards.tensors:  # Llama 3.1: each frequency is divided by its factor
        factors = values_of(shards.blocks("rope_freqs.weight"), shards.kind("rope_freqs.weight"))
        if factors.shape != plain.shape or not (factors > 0).all():
            raise fields.refusal("has RoPE factors of another size than its heads")
        plain = plain / factors
    factor = fields.real("rope.scaling.factor", fields.real("rope.scale_linear", 1.0)) or 1.0
    # In files that are older than the field for the kind, a factor means linear scaling.
    kind = fields.text("rope.scaling.type", "linear")
    if kind == "none":
        return Rope(plain, 1.0)
    if kind == "linear":
        return Rope(plain / factor, 1.0)
    if kind == "yarn":
        return _yarn(fields, plain, base, factor)
    raise fields.refusal(f"scales RoPE in the way {kind!r}")


def _yarn(fields: _Fields, plain: np.ndarray, base: float, factor: float) -> Rope:
    rotated = 2 * len(plain)
    original = fields.integer(
        "rope.scaling.original_context_length", fields.integer("context_length")
    )

    def dimension(turns: float) -> float:
        """Return the dimension that rotates *turns* times over the original context."""
        return rotated * math.log(original / (turns * math.tau)) / (2 * math.log(base))

    low = max(0, math.floor(dimension(fields.real("rope.scaling.yarn_beta_fast", 32.0))))
    high = min(rotated - 1, math.ceil(dimension(fields.real("rope.scaling.yarn_beta_slow", 1.0))))
    ramp = np.clip((np.arange(len(plain)) - low) / max(0.001, high - low), 0, 1)
    scale = fields.real("rope.scaling.attn_factor", 1.0)
    scale *= fields.real("rope.scaling.yarn_attn_factor", 1.0)
    return Rope(plain * (1 - ramp) + plain / factor * ramp, scale * (0.1 * math.log(factor) + 1))


def require_buildable(path: Path) -> None:
    """
    Check that the model in a file can be built exactly.

    Raises:
        UnsupportedModelError: It cannot, or the file is damaged.
    """
    read_decoder(Shards(path))


_PUBLISH_ATTEMPTS: Final = 5
_KILLED: Final = -9  # minus SIGKILL, a name that Windows lacks
_PROGRAM: Final = "recollect.models.gguf_to_openvino"
REFUSED: Final = 3
"""Exit status of `gguf_to_openvino` if it cannot convert the file. The last line on stderr is the error."""
NO_ROOM: Final = 4
"""Exit status of `gguf_to_openvino` if it cannot write. The last line on stderr has errno and path."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """A GGUF file to be converted."""

    name: str
    """Name of the model, for the manifest and for progress."""
    gguf: Path
    """The file, or the first of several parts."""
    sha256: str
    """Hex sha256 of the file; of several parts, that of their sha256s."""


def convert(job: Conversion, folder: Path, *, home: Path, progress: Progress) -> Manifest:
    """
    Convert a GGUF file into *folder*, replacing what is there, and return the folder's manifest.

    Args:
        job: The file and its name.
        folder: The converted folder, which is one of the data folder's.
        home: The data folder, in which the scratch folder is made.
        progress: Called with the bytes of the file that are done.

    Raises:
        UnsupportedModelError: The file is damaged, or its model cannot be built exactly.
        OSError: The disk is full or cannot be written to.
    """
    header = read_header(job.gguf)
    require_buildable(job.gguf)
    warn_of_writers(job.gguf.parent, [part.name for part in parts_of(job.gguf)])
    what = f"converting {job.name}"
    progress(what, 0, None)
    with scratch_folder(home) as scratch:
        made = scratch / "model"
        made.mkdir()
        _run_converter(job, made, lambda done, total: progress(what, done, total))
        manifest = _describe(job, header, made)
        manifest.write(made)
        manifest = _publish(made, folder, scratch, manifest)
    progress(what, 1, 1)
    return manifest


def _run_converter(job: Conversion, folder: Path, on_bytes: Callable[[int, int], None]) -> None:
    """
    Run the program that converts, which writes its files into *folder*.

    Raises:
        UnsupportedModelError: It refused the file, or crashed.
        OSError: It could not write.
    """
    command = [sys.executable, "-P", "-m", _PROGRAM, str(job.gguf), str(folder)]

    def on_line(line: str) -> None:
        done, _, total = line.strip().partition(" ")
        if done.isdecimal() and total.isdecimal():  # libraries may print other lines
            on_bytes(int(done), int(total))

    status, complaints = run_program(command, on_line)
    lines = complaints.strip().splitlines()
    said = lines[-1].strip() if lines else ""
    missing = [name for name in (*MODEL_FILES, *TOKENIZER_FILES) if not (folder / name).is_file()]
    if status == 0 and not missing:
        return
    if status == REFUSED and said:
        raise UnsupportedModelError(said)
    if status == NO_ROOM and said:
        number, _, path = said.partition(" ")
        code = int(number) if number.isdecimal() else errno.EIO
        raise OSError(code, os.strerror(code), path)
    if status == _KILLED:
        reason = "it was killed, as happens when memory runs out"
    elif status < 0:
        reason = f"it crashed with {signal.Signals(-status).name}"
    else:
        reason = said.rstrip(".") or f"it wrote no {missing[:1]}"
    raise UnsupportedModelError(
        f"{job.gguf.name} could not be converted ({reason}): download the file again, or "
        "export the original model with `optimum-cli export openvino`."
    )


def _describe(job: Conversion, header: GgufHeader, folder: Path) -> Manifest:
    versions = {package: version(package) for package in ("openvino", CONVERTER)}
    return Manifest(
        name=job.name,
        source_sha256=job.sha256,
        architecture=header.architecture,
        context_length=header.context_length,
        chat_template=header.chat_template,
        eos_token_ids=sorted(header.eos_token_ids),
        bos_token=header.bos_token,
        eos_token=header.eos_token,
        window=header.window,
        sampling=dict(header.sampling),
        fingerprint=combine(
            ["gguf weights 1", job.sha256, versions[CONVERTER], header.chat_template or ""]
        ),
        library_versions=versions,
        file_bytes=converted_bytes(folder),
    )


def _publish(made: Path, folder: Path, scratch: Path, manifest: Manifest) -> Manifest:
    """Rename *made* to *folder*; if another process has just done that, use its folder instead."""
    folder.parent.mkdir(mode=0o700, exist_ok=True)  # in the home that the scratch folder is in
    for attempt in itertools.count(1):
        existing = find_converted(folder, manifest.source_sha256)
        if existing is not None:
            return existing
        try:
            if folder.exists():  # it cannot be used, and is deleted with the scratch folder
                folder.rename(scratch / f"replaced{attempt}")
            made.rename(folder)
        except OSError:
            # Another process may have renamed its own folder meanwhile: look again. Other errors recur.
            if attempt == _PUBLISH_ATTEMPTS:
                raise
        else:
            break
    return manifest
