"""
An OpenVINO folder as a description and tensors for `reference_model`.

How the model computes comes from `config.json`, the weights from the constants of the graph, read
as XML and bytes without OpenVINO. Only matrices and norms are taken from the graph, by the names of
the modules that the export keeps; everything else in it is what is to be checked.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt

from recollect.errors import UnsupportedModelError
from recollect.proof import reference_model
from recollect.proof.reference_model import Array, Description, NotCompared, Rope

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


class OpenVinoTensors:
    """The matrices, norms and biases of a graph; each is widened whenever it is asked for."""

    def __init__(
        self, graph: _Graph, layers: int, *, norms_after: bool, embeddings: _Graph | None = None
    ) -> None:
        """
        Find everything by the names of modules.

        Args:
            graph: Of the language model.
            layers: How many it has.
            norms_after: As in `Description`.
            embeddings: Where they are apart, as in exports of multimodal models.
        """
        self._graph = graph
        self._embeddings = embeddings
        self._places: dict[str, str] = {}
        self._parts: dict[str, tuple[str, slice]] = {}
        by_module = _by_module(graph)
        norms = _NORMS_AFTER if norms_after else _NORMS
        for layer in range(layers):
            for name, module in {**_LINEAR, **norms}.items():
                self._note(by_module, f"blk.{layer}.{name}", f"model.layers.{layer}.{module}")
        self._note(by_module, "output_norm", "model.norm")
        self._note(by_module, "output", "lm_head")
        self._note(by_module, "token_embd", "model.embed_tokens")
        if embeddings is not None:
            self._places["token_embd"] = _table(embeddings)
        for required in ("token_embd", "output_norm"):
            if required not in self._places:
                raise NotCompared(f"the graph does not name {required}")

    def __contains__(self, name: str) -> bool:
        return name in self._places or name in self._parts

    def split(self, whole: str, parts: Sequence[tuple[str, int]]) -> None:
        """Give names to the rows of a matrix in which several lie below each other."""
        start = 0
        for name, rows in parts:
            self._parts[name] = (whole, slice(start, start + rows))
            start += rows

    def matrix(self, name: str, rows: slice = slice(None)) -> Array:
        """Return some rows of a matrix as f32."""
        if name in self._parts:
            whole, part = self._parts[name]
            return self.matrix(whole)[part][rows]
        wanted = range(*rows.indices(self.rows(name)))
        parts = [
            self._value(name, slice(start, min(start + step, wanted.stop)))
            for step in [max(1, _STEP_NUMBERS // max(1, self._columns(name)))]
            for start in range(wanted.start, wanted.stop, step)
        ]
        return np.concatenate(parts).reshape(len(wanted), -1).astype(np.float32, copy=False)

    def gather(self, name: str, rows: Sequence[int]) -> Array:
        """Return these rows of a matrix, in this order."""
        return self._value(name, list(rows)).reshape(len(rows), -1)

    def vector(self, name: str) -> Array:
        """Return a norm or a bias as f32."""
        return self._value(name).reshape(-1)

    def rows(self, name: str) -> int:
        """Return how many rows a matrix has."""
        return self._of(name).rows(self._places[name])

    def types(self) -> dict[str, int]:
        """Return how many numbers of constants each type holds, the most first."""
        counts: dict[str, int] = {}
        for number, node in self._graph.nodes.items():
            if node.kind == "Const" and math.prod(self._graph.shape(number)) > 1024:
                kind = node.data["element_type"]
                counts[kind] = counts.get(kind, 0) + math.prod(self._graph.shape(number))
        return dict(sorted(counts.items(), key=lambda one: -one[1]))

    def _value(self, name: str, rows: _Rows = None) -> Numbers:
        return self._of(name).value(self._places[name], rows)

    def _of(self, name: str) -> _Graph:
        """Return the graph that a weight is in."""
        apart = name == "token_embd" and self._embeddings is not None
        return self._embeddings if apart and self._embeddings is not None else self._graph

    def _columns(self, name: str) -> int:
        return len(self.gather(name, [0])[0])

    def _note(self, by_module: dict[str, list[str]], name: str, module: str) -> None:
        """Find the weight and the bias of a module."""
        for number in by_module.get(module, []):
            kind, sources = self._graph.nodes[number].kind, self._graph.inputs[number]
            weights = [source for source in sources if self._graph.is_weight(source)]
            if kind in ("MatMul", "Gather") and weights:
                self._places.setdefault(name, weights[0])
            if kind == "MatMul":
                self._note_bias(name, number)
            is_norm = kind == "Multiply" and name.endswith("norm") and weights
            if is_norm and self._graph.value(weights[0]).size > 1:
                self._places[name] = weights[0]

    def _note_bias(self, name: str, product: str) -> None:
        for user in self._graph.users[product]:
            if self._graph.nodes[user].kind == "Add":
                for source in self._graph.inputs[user]:
                    if source != product and self._graph.is_weight(source):
                        self._places[f"{name}.bias"] = source


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


def open_openvino(
    folder: Path, *, long_context: bool = False
) -> tuple[Description, OpenVinoTensors]:
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
    except (OSError, ValueError) as cause:
        raise NotCompared(f"its config.json cannot be read ({cause})") from cause
    config = {**config, **config.get("text_config", {})}
    description = describe(config, long_context=long_context)
    whole, text_half = folder / "openvino_model.xml", folder / "openvino_language_model.xml"
    is_half = not whole.exists()
    tensors = OpenVinoTensors(
        _Graph(text_half if is_half else whole),
        description.layers,
        norms_after=description.norms_after,
        embeddings=_Graph(folder / "openvino_text_embeddings_model.xml") if is_half else None,
    )
    size = description.head_size
    for layer in range(description.layers):
        block = f"blk.{layer}."
        if f"{block}attn_qkv" in tensors:
            rows = [size * count for count in (description.heads, *[description.kv_heads] * 2)]
            names = [f"{block}attn_{part}" for part in "qkv"]
            tensors.split(f"{block}attn_qkv", list(zip(names, rows, strict=True)))
        if f"{block}ffn_gate_up" in tensors:
            half = tensors.rows(f"{block}ffn_gate_up") // 2
            tensors.split(
                f"{block}ffn_gate_up", [(f"{block}ffn_gate", half), (f"{block}ffn_up", half)]
            )
    return description, tensors


_KNOWN: Final = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text")


def describe(config: dict[str, Any], *, long_context: bool = False) -> Description:
    """
    Return what a model computes, by its `config.json`.

    Raises:
        NotCompared: It is of no family that the reference knows.
    """
    kind = config.get("model_type", "")
    if kind not in _KNOWN:
        raise NotCompared(f"the reference does not know the architecture {kind}")
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    local = _local_layers(config, layers)
    window = config.get("sliding_window")
    everywhere = _rope(config, size, "full_attention", long_context=long_context)
    nearby = _rope(config, size, "sliding_attention", long_context=long_context)
    gemma = kind.startswith("gemma")
    return Description(
        architecture=kind,
        layers=layers,
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_size=size,
        epsilon=config["rms_norm_eps"],
        ropes=tuple(nearby if is_local else everywhere for is_local in local),
        windows=tuple(window if is_local else None for is_local in local),
        activation="gelu" if gemma else "silu",
        attention_scale=config["query_pre_attn_scalar"] ** -0.5 if gemma else 0.0,
        attention_cap=config.get("attn_logit_softcapping") if kind == "gemma2" else None,
        logits_cap=config.get("final_logit_softcapping") if gemma else None,
        embedding_scale=math.sqrt(config["hidden_size"]) if gemma else 1.0,
        norms_after=gemma,
        has_qk_norm=kind in ("qwen3", "gemma3_text"),
    )


def _local_layers(config: dict[str, Any], layers: int) -> list[bool]:
    """Return which layers see a window only."""
    if not config.get("sliding_window") or config.get("use_sliding_window") is False:
        return [False] * layers
    if "layer_types" in config:
        return [kind == "sliding_attention" for kind in config["layer_types"]]
    every = {"gemma2": 2, "gemma3_text": config.get("sliding_window_pattern", 6)}
    step = every.get(config["model_type"])
    if step is None:
        return [config["model_type"] in ("mistral", "phi3")] * layers
    return [(layer + 1) % step != 0 for layer in range(layers)]


def _rope(config: dict[str, Any], size: int, layer_type: str, *, long_context: bool) -> Rope:
    # transformers 5 has `rope_parameters`, by type of layer where they differ; before, they are apart.
    parameters = config.get("rope_parameters") or {}
    parameters = parameters.get(layer_type, parameters)
    scaling = dict(config.get("rope_scaling") or {}) | parameters
    base = float(scaling.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    is_nearby = layer_type == "sliding_attention" and "rope_local_base_freq" in config
    if is_nearby:
        base, scaling = float(config["rope_local_base_freq"]), {}
    share = scaling.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    frequencies = reference_model.plain(int(size * share), base)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    original = float(
        scaling.get("original_max_position_embeddings")
        or config.get("original_max_position_embeddings")
        or config["max_position_embeddings"]
    )
    match kind:
        case "default":
            return Rope(frequencies, "halves")
        case "linear":
            return Rope(frequencies / scaling["factor"], "halves")
        case "llama3":
            return Rope(reference_model.llama3(frequencies, scaling), "halves")
        case "yarn":
            stretched, scale = reference_model.yarn(
                frequencies,
                base=base,
                factor=scaling["factor"],
                original=original,
                fast=scaling.get("beta_fast") or 32.0,
                slow=scaling.get("beta_slow") or 1.0,
            )
            return Rope(stretched, "halves", scaling.get("attention_factor") or scale)
        case "longrope" | "su":
            factors = scaling["long_factor" if long_context else "short_factor"]
            factor = scaling.get("factor") or config["max_position_embeddings"] / original
            scale = scaling.get("attention_factor") or reference_model.longrope_scale(
                factor, original
            )
            return Rope(frequencies / np.array(factors), "halves", scale)
    raise NotCompared(f"the reference does not know RoPE scaled by {kind!r}")
