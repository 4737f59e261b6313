"""
An OpenVINO folder as a description and tensors for `reference_model`.

How the model computes comes from `config.json`, the weights from the constants of the graph, read
as XML and bytes without OpenVINO. Only matrices and norms are taken from the graph, by the names of
the modules that the export keeps; everything else in it is what is to be checked.
"""

import json
import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt

from recollect.errors import UnsupportedModelError
from recollect.proof import reference_model
from recollect.proof.reference_model import (
    Array,
    Description,
    NotCompared,
    Rope,
    Settings,
    Tensors,
    refusing_nonsense,
)

Numbers = npt.NDArray[Any]
_Rows = slice | Sequence[int] | None

_TYPES: Final = {
    "f64": "<f8", "f32": "<f4", "f16": "<f2", "bf16": "<u2", "i64": "<i8", "i32": "<i4",
    "i16": "<i2", "i8": "<i1", "u8": "<u1",
}  # fmt: skip
_NIBBLES: Final = ("u4", "i4")
_ARITHMETIC: Final = {"Subtract": np.subtract, "Multiply": np.multiply, "Add": np.add}
_THROUGH: Final = {"Convert", "Reshape", "Unsqueeze", *_ARITHMETIC}
"""What lies between a constant and its use where weights are packed."""
_STEP_NUMBERS: Final = 1 << 24
"""Numbers that are widened to f32 at once: 64 MB, and several times that on the way."""

# Names that GGUF has, and the modules of Hugging Face's models. `{}` is the number of the layer.
_LINEAR: Final = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_gate_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_NORMS: Final = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
_NORMS_AFTER: Final = {
    **_NORMS,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@dataclass(frozen=True, slots=True)
class _Node:
    """An operation of the graph."""

    kind: str
    name: str
    data: dict[str, str]


class _Graph:
    """The operations and edges of a graph, and the bytes of its constants."""

    def __init__(self, xml: Path) -> None:
        try:
            root = ElementTree.parse(xml).getroot()  # noqa: S314 - expat limits entities by itself
        except (OSError, ElementTree.ParseError) as cause:
            raise UnsupportedModelError(f"{xml} cannot be read ({cause}).") from cause
        self._bytes = np.memmap(xml.with_suffix(".bin"), np.uint8, "r")
        self.nodes: dict[str, _Node] = {}
        for layer in root.iterfind("./layers/layer"):
            data = layer.find("data")
            self.nodes[layer.attrib["id"]] = _Node(
                layer.attrib["type"],
                layer.attrib["name"],
                {} if data is None else dict(data.attrib),
            )
        self.inputs: dict[str, list[str]] = {number: [] for number in self.nodes}
        self.users: dict[str, list[str]] = {number: [] for number in self.nodes}
        edges = [edge.attrib for edge in root.iterfind("./edges/edge")]
        for edge in sorted(edges, key=lambda one: int(one["to-port"])):
            self.inputs[edge["to-layer"]].append(edge["from-layer"])
            self.users[edge["from-layer"]].append(edge["to-layer"])

    def shape(self, number: str) -> tuple[int, ...]:
        """Return the shape of a constant."""
        text = self.nodes[number].data.get("shape", "")
        return tuple(int(size) for size in text.split(",") if size.strip())

    def is_weight(self, number: str) -> bool:
        """Return whether a node's value comes from constants alone."""
        node = self.nodes[number]
        if node.kind == "Const":
            return True
        return node.kind in _THROUGH and all(map(self.is_weight, self.inputs[number]))

    def size(self, number: str) -> int:
        """Return how many numbers a weight has at least."""
        node = self.nodes[number]
        if node.kind == "Const":
            return math.prod(self.shape(number))
        return max(self.size(source) for source in self.inputs[number][:1])

    def rows(self, number: str) -> int:
        """Return the length of the first axis of a weight."""
        node = self.nodes[number]
        if node.kind == "Const":
            return (self.shape(number) or (1,))[0]
        return max(self.rows(source) for source in self.inputs[number][:1])

    def value(self, number: str, rows: _Rows = None) -> Numbers:
        """Return a weight as f32, or only some of its rows."""
        node, sources = self.nodes[number], self.inputs[number]
        if node.kind == "Const":
            return self._constant(number, rows)
        first = self.value(sources[0], rows)
        if node.kind in ("Convert", "Unsqueeze"):
            return first
        if node.kind == "Reshape":
            target = self._constant(sources[1], None).astype(int).tolist()
            return first.reshape(len(first) if len(target) > 1 else -1, *target[1:])
        is_by_row = self.rows(sources[1]) == self.rows(sources[0])
        second = self.value(sources[1], rows if is_by_row else None)
        result: Numbers = _ARITHMETIC[node.kind](first, second)
        return result

    def _constant(self, number: str, rows: _Rows) -> Numbers:
        node, shape = self.nodes[number], self.shape(number)
        kind, start = node.data["element_type"], int(node.data["offset"])
        raw = self._bytes[start : start + int(node.data["size"])]
        if kind in _NIBBLES:
            whole = np.stack([raw & 15, raw >> 4], axis=-1).reshape(-1)  # the first in the low half
            numbers: Numbers = whole[: math.prod(shape)].astype(np.int8)
            if kind == "i4":
                numbers = np.where(numbers > 7, numbers - 16, numbers)
        elif kind in _TYPES:
            numbers = raw.view(_TYPES[kind])
        else:
            raise NotCompared(f"the reference does not know constants of type {kind}")
        numbers = numbers.reshape(shape)
        if rows is not None and numbers.ndim:
            numbers = numbers[rows] if isinstance(rows, slice) else numbers[list(rows)]
        if kind == "bf16":
            return (numbers.astype(np.uint32) << 16).view(np.float32)
        return numbers.astype(np.float32)


class OpenVinoTensors(Tensors):
    """The matrices, norms and biases of a graph, found by the names of modules."""

    def __init__(
        self, graph: _Graph, layers: int, *, norms_after: bool, embeddings: _Graph | None = None
    ) -> None:
        """
        Find everything.

        Args:
            graph: Of the language model.
            layers: How many it has.
            norms_after: As in `Description`.
            embeddings: Where they are apart, as in exports of multimodal models.
        """
        super().__init__()
        self._graph = graph
        self._embeddings = embeddings
        self._places: dict[str, str] = {}
        modules = {"model.norm": "output_norm", "lm_head": "output"}
        modules["model.embed_tokens"] = "token_embd"
        norms = _NORMS_AFTER if norms_after else _NORMS
        for layer in range(layers):
            for name, module in {**_LINEAR, **norms}.items():
                modules[f"model.layers.{layer}.{module}"] = f"blk.{layer}.{name}"
        for module, numbers in _by_module(graph).items():
            # Frequencies are computed from the configuration: those in the graph are to be checked.
            is_rope = module.rpartition(".")[2].startswith("rotary_emb")
            for number in () if is_rope else numbers:
                if not graph.is_weight(number):  # unpacking a weight is no operation on it
                    # What has no name of its own keeps the module's, which no description expects.
                    self._note(modules.get(module, module), number, is_known=module in modules)
        if embeddings is not None:
            self._places["token_embd"] = _table(embeddings)

    def names(self) -> Collection[str]:
        """Return the names of all weights, biases included; of unknown ones those of their modules."""
        return self._places.keys()

    def types(self) -> dict[str, int]:
        """Return how many numbers of constants each type holds, the most first."""
        counts: Counter[str] = Counter()
        for number, node in self._graph.nodes.items():
            if node.kind == "Const" and (size := math.prod(self._graph.shape(number))) > 1024:
                counts[node.data["element_type"]] += size
        return dict(counts.most_common())

    def _shape(self, name: str) -> tuple[int, int]:
        return self._of(name).rows(self._places[name]), self._value(name, [0]).size

    def _read(self, name: str, rows: slice | list[int]) -> Array:
        count, columns = self._shape(name)
        wanted = list(range(count)[rows]) if isinstance(rows, slice) else rows
        step = max(1, _STEP_NUMBERS // max(1, columns))
        wide = np.empty((len(wanted), columns), np.float32)
        for start in range(0, len(wanted), step):
            part = wanted[start : start + step]
            is_run = isinstance(rows, slice)
            chosen: _Rows = slice(part[0], part[-1] + 1) if is_run else part
            wide[start : start + step] = self._value(name, chosen).reshape(len(part), columns)
        return wide

    def _value(self, name: str, rows: _Rows) -> Numbers:
        return self._of(name).value(self._places[name], rows)

    def _of(self, name: str) -> _Graph:
        """Return the graph that a weight is in."""
        apart = self._embeddings if name == "token_embd" else None
        return self._graph if apart is None else apart

    def _note(self, name: str, number: str, *, is_known: bool) -> None:
        """Note the weight of an operation, and its bias, under the name of its module."""
        graph = self._graph
        kind = graph.nodes[number].kind
        # One number alone is an epsilon or a scale of the family, not a weight.
        weights = [
            source
            for source in graph.inputs[number]
            if graph.is_weight(source) and graph.size(source) > 1
        ]
        if not weights:
            return
        if kind in ("MatMul", "Gather"):
            self._places.setdefault(name, weights[0])
        elif kind == "Multiply":  # a norm's
            self._places[name] = weights[0]
        elif kind == "Add" and is_known:
            self._places[f"{name}.bias"] = weights[0]


def _table(graph: _Graph) -> str:
    """Return the weight that a graph looks token ids up in."""
    for number, node in graph.nodes.items():
        if node.kind == "Gather":
            for source in graph.inputs[number]:
                if graph.is_weight(source) and graph.rows(source) > 1:
                    return source
    raise NotCompared("the graph of the embeddings has no table")


def _by_module(graph: _Graph) -> dict[str, list[str]]:
    """Return the nodes of each module, by its name in Hugging Face's model."""
    found: dict[str, list[str]] = {}
    for number, node in graph.nodes.items():
        module, slash, _ = node.name.partition("/")
        if slash and module.startswith("__module."):
            # Multimodal exports have the text half one level deeper.
            name = module.removeprefix("__module.").replace("model.language_model.", "model.")
            found.setdefault(name, []).append(number)
    return found


def open_openvino(folder: Path, *, long_context: bool = False) -> tuple[Description, Tensors]:
    """
    Return how the model in a folder computes, and its tensors.

    Args:
        folder: As an export has written it, with a `config.json`.
        long_context: Whether LongRoPE's factors for long contexts are used.

    Raises:
        NotCompared: The reference does not know this architecture, or something of it.
        UnsupportedModelError: The files cannot be read.
    """
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as cause:
        raise NotCompared(f"its config.json cannot be read ({cause})") from cause
    nested = config.get("text_config") if isinstance(config, dict) else None
    settings = Settings({**config, **nested} if isinstance(nested, dict) else config, "")
    with refusing_nonsense():
        description = describe(settings, long_context=long_context)
    whole, text_half = folder / "openvino_model.xml", folder / "openvino_language_model.xml"
    is_half = not whole.exists()
    tensors = OpenVinoTensors(
        _Graph(text_half if is_half else whole),
        description.layers,
        norms_after=description.norms_after,
        embeddings=_Graph(folder / "openvino_text_embeddings_model.xml") if is_half else None,
    )
    tensors.require_known(description)
    return description, tensors


_KNOWN: Final = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text")
_MUST_SAY: Final = {
    "mistral": ("sliding_window",),
    "gemma2": ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping"),
    "gemma3_text": ("sliding_window", "rope_theta", "rope_local_base_freq"),
}
"""Settings, null included, whose default in transformers is not what their absence means elsewhere."""


_ACTIVATIONS: Final[dict[str, Literal["silu", "gelu"]]] = {
    "silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu", "gelu_new": "gelu",
}  # fmt: skip
"""Source: `ACT2FN` of transformers; plain `gelu` is another function."""


def describe(config: Settings, *, long_context: bool = False) -> Description:
    """
    Return what a model computes, by its `config.json`.

    Raises:
        NotCompared: It is of no family that the reference knows, or a setting is missing whose
            default differs between families.
    """
    kind = config.get("model_type", "")
    if kind not in _KNOWN:
        raise NotCompared(f"the reference does not know the architecture {kind}")
    gemma = kind.startswith("gemma")
    for name in _MUST_SAY.get(kind, ()):
        if not config.has(name) and not (name.startswith("rope") and config.has("rope_parameters")):
            raise NotCompared(f"its config.json does not say {name}")
    for name in ("num_experts", "num_local_experts", "use_bidirectional_attention"):
        config.require_default(name, 0, False)
    layers, heads = (
        config.count(name, most=10_000) for name in ("num_hidden_layers", "num_attention_heads")
    )
    width = config.count("hidden_size")
    size = config.count("head_dim", max(1, width // heads))
    local = _local_layers(kind, config, layers)
    window = config.count("sliding_window", most=1 << 31) if any(local) else None
    everywhere = _rope(config, size, "full_attention", long_context=long_context)
    nearby = _rope(config, size, "sliding_attention", long_context=long_context)
    usual = "gelu_pytorch_tanh" if gemma else "silu"
    named = config.get("hidden_activation", config.get("hidden_act", usual))
    if not isinstance(named, str) or named not in _ACTIVATIONS:
        raise NotCompared(f"the reference does not know the activation {named!r}")
    if kind != "gemma2":
        config.require_default("attn_logit_softcapping", 0)
    return Description(
        architecture=kind,
        layers=layers,
        heads=heads,
        kv_heads=config.count("num_key_value_heads", heads),
        head_size=size,
        epsilon=config.number("rms_norm_eps"),
        ropes=tuple(nearby if is_local else everywhere for is_local in local),
        windows=tuple(window if is_local else None for is_local in local),
        activation=_ACTIVATIONS[named],
        attention_scale=config.number("query_pre_attn_scalar") ** -0.5 if gemma else 0.0,
        attention_cap=config.optional("attn_logit_softcapping") if kind == "gemma2" else None,
        logits_cap=config.optional("final_logit_softcapping") if gemma else None,
        embedding_scale=math.sqrt(width) if gemma else 1.0,
        norms_after=gemma,
        has_qk_norm=kind in ("qwen3", "gemma3_text"),
    )


def _local_layers(kind: str, config: Settings, layers: int) -> list[bool]:
    """Return which layers see a window only."""
    is_chosen = config.get("use_sliding_window", kind not in ("qwen2", "qwen3", "llama"))
    if not config.get("sliding_window") or not is_chosen:
        return [False] * layers
    types = config.get("layer_types")
    if types is not None:
        known = ("sliding_attention", "full_attention")
        if not isinstance(types, list) or len(types) != layers or not set(types) <= set(known):
            raise NotCompared(f"the reference does not know the layer_types {types!r}")
        return [one == "sliding_attention" for one in types]
    if kind in ("qwen2", "qwen3"):
        first = config.get("max_window_layers", 28)  # as transformers has it where it is not said
        return [layer >= first for layer in range(layers)]
    every = {"gemma2": 2, "gemma3_text": config.count("sliding_window_pattern", 6)}.get(kind, 1)
    return [every == 1 or (layer + 1) % every != 0 for layer in range(layers)]


def _rope(config: Settings, size: int, layer_type: str, *, long_context: bool) -> Rope:
    # transformers 5 has `rope_parameters`, by type of layer where they differ; before, they are apart.
    parameters = config.table("rope_parameters")
    parameters = parameters.get(layer_type, parameters)
    scaling = Settings({**config.table("rope_scaling"), **parameters}, "rope_scaling.")
    base = scaling.number("rope_theta", config.number("rope_theta", 10_000.0))
    if layer_type == "sliding_attention" and config.get("rope_local_base_freq"):
        base, scaling = config.number("rope_local_base_freq"), Settings({}, "")
    share = scaling.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0))
    frequencies = reference_model.plain(int(size * share), base)
    scale = 1.0
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    longest = "max_position_embeddings"
    first = f"original_{longest}"
    original = scaling.number(first, config.get(first) or config.number(longest, 2048))
    match kind:
        case "default":
            pass
        case "linear":
            frequencies = frequencies / scaling.number("factor")
        case "llama3":
            frequencies = reference_model.llama3(
                frequencies,
                factor=scaling.number("factor"),
                original=original,
                low=scaling.number("low_freq_factor"),
                high=scaling.number("high_freq_factor"),
            )
        case "yarn":
            frequencies, scale = reference_model.yarn(
                frequencies,
                base=base,
                factor=scaling.number("factor"),
                original=original,
                fast=scaling.number("beta_fast", 32.0),
                slow=scaling.number("beta_slow", 1.0),
            )
            scale = scaling.number("attention_factor", scale)
        case "longrope" | "su":
            short, long = scaling.get("short_factor"), scaling.get("long_factor")
            factors = np.array(long if long_context else short, np.float64)
            if factors.shape != frequencies.shape or not (factors > 0).all():
                raise NotCompared(f"LongRoPE has not {len(frequencies)} factors above 0")
            frequencies = frequencies / factors
            factor = scaling.number("factor", config.number(longest) / original)
            scale = reference_model.longrope_scale(factor, original)
            scale = scaling.number("attention_factor", scale)
        case _:
            raise NotCompared(f"the reference does not know RoPE scaled by {kind!r}")
    scaling.require_all_asked()
    return Rope(frequencies, "halves", scale)
