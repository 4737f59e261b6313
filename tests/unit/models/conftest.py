"""A real model of a few kilobytes, and real wheels made on the spot."""

import json
import os
import shutil
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from recollect.models.prepare import prepare

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WIDTH, FEED_FORWARD, HEADS, LAYERS = 64, 128, 2, 1


def _byte_letters() -> list[str]:
    """Return the letter that byte-level vocabularies write for each byte."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    letters, next_free = [], 256
    for byte in range(256):
        letters.append(chr(byte) if byte in printable else chr(next_free))
        next_free += byte not in printable
    return letters


def write_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    tensor_type: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F16,
    context_length: int = 512,
    template: str | None = TEMPLATE,
    tensors: bool = True,
    tokenizer: str = "gpt2",
    splitter: str | None = "smollm",
    merges: Sequence[str] = (),
    seed: int = 0,
    temperature: float | None = None,
) -> Path:
    """Write a model with one layer of random weights and one token per byte."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(context_length)
    if temperature is not None:
        writer.add_sampling_temp(temperature)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    # the converter goes by this number: 1 is mostly F16, 7 mostly Q8_0
    writer.add_file_type(7 if tensor_type is gguf.GGMLQuantizationType.Q8_0 else 1)
    letters = _byte_letters()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    merged = letters[ord("h")] + letters[ord("e")]
    made = [merge.replace(" ", "") for merge in merges]
    tokens = [*specials, *letters, merged, *made, "</s>"]  # the last one an ordinary token
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model(tokenizer)
    if splitter is not None:
        writer.add_tokenizer_pre(splitter)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(specials) + [1] * (len(tokens) - len(specials)))
    writer.add_token_merges([f"{letters[ord('h')]} {letters[ord('e')]}", *merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    if template is not None:
        writer.add_chat_template(template)
    if tensors:
        _add_tensors(writer, len(tokens), tensor_type, seed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tensors(
    writer: gguf.GGUFWriter, vocab: int, kind: gguf.GGMLQuantizationType, seed: int
) -> None:
    random = np.random.default_rng(seed)
    matrices = {"token_embd": (vocab, WIDTH), "output": (vocab, WIDTH)}
    norms = ["output_norm"]
    for layer in range(LAYERS):
        name = f"blk.{layer}."
        matrices |= {name + f"attn_{part}": (WIDTH, WIDTH) for part in ("q", "k", "v", "output")}
        matrices |= {name + f"ffn_{part}": (FEED_FORWARD, WIDTH) for part in ("gate", "up")}
        matrices[name + "ffn_down"] = (WIDTH, FEED_FORWARD)
        norms += [name + "attn_norm", name + "ffn_norm"]
    for name, shape in matrices.items():
        weights = random.normal(0, 0.05, shape).astype(np.float32)
        data = gguf.quants.quantize(weights, kind)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
    for name in norms:
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))


# Where the blocks of a type hold their f16 scale. Other types have scales in other formats.
_SCALE_PLACES = {
    **dict.fromkeys(("Q8_0", "Q4_0", "Q5_0", "Q4_1", "Q5_1", "IQ4_NL", "IQ4_XS"), 0),
    **dict.fromkeys(("Q4_K", "Q5_K", "IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), 0),
    "Q2_K": 80,
    "Q3_K": 108,
    "Q6_K": 208,
    "TQ1_0": 52,
    "TQ2_0": 64,
}
# Minima follow the scale. They are as many times it as centres the values around 0.
_MINIMA = {"Q4_1": -7.5, "Q5_1": -15.5, "Q2_K": 1.5, "Q4_K": 7.5, "Q5_K": 15.5}


def random_blocks(
    kind: gguf.GGMLQuantizationType, count: int, random: np.random.Generator, deviation: float = 1.0
) -> np.ndarray:
    """
    Return random blocks of a type, shape `(count, bytes of a block)`, whose values vary that much.

    Any bytes are numbers of the type; only the scales are chosen. So no quantizer is needed, which
    the gguf package lacks for most types.
    """
    _, size = gguf.GGML_QUANT_SIZES[kind]
    if kind.name in ("F32", "F16", "BF16"):
        values = (random.standard_normal((count, 1)) * deviation).astype(np.float32)
        stored: np.ndarray = gguf.quants.quantize(values, kind)
        return stored.view(np.uint8).reshape(count, size)
    blocks = random.integers(0, 256, (count, size), dtype=np.uint8)
    if kind.name == "TQ2_0":  # of its four numbers one is never written
        bits = np.arange(0, 8, 2, dtype=np.uint8)
        numbers = np.minimum(blocks[:, :64, None] >> bits & 3, 2)
        blocks[:, :64] = (numbers << bits).sum(axis=-1)
    if kind.name == "MXFP4":  # an exponent
        blocks[:, 0] = 125 + round(np.log2(deviation)) - random.integers(0, 2, count)
    if kind.name == "NVFP4":  # three bits of exponent and more, three of fraction
        blocks[:, :4] = 8 * (5 + round(np.log2(deviation))) + random.integers(0, 8, (count, 4))
    if kind.name == "IQ1_M":  # the high halves of four bytes are the f16 scale
        halves = np.float16(deviation / 8).view(np.uint16) >> np.arange(0, 16, 4) & 15
        blocks[:, 49:56:2] = blocks[:, 49:56:2] & 15 | halves.astype(np.uint8) << 4
    if kind.name not in _SCALE_PLACES:
        return blocks
    place, varied = _SCALE_PLACES[kind.name] // 2, random.uniform(0.5, 1.5, count)
    halves = blocks.view(np.float16)

    def set_scales(scale: float) -> None:
        halves[:, place] = scale * varied
        if kind.name in _MINIMA:
            halves[:, place + 1] = halves[:, place] * _MINIMA[kind.name]

    set_scales(1.0)
    set_scales(deviation / float(gguf.quants.dequantize(blocks.reshape(1, -1), kind).std()))
    return blocks


@pytest.fixture(scope="session")
def make_blocks() -> Callable[..., np.ndarray]:
    """Return the maker of random blocks; see `random_blocks`."""
    return random_blocks


@dataclass(kw_only=True)
class Shape:
    """The decoder that `write_decoder` writes."""

    architecture: str = "llama"
    kind: str = "Q8_0"
    """The type of all matrices, but for those that `other_kinds` names."""
    other_kinds: dict[str, str] = field(default_factory=dict)
    """By the middle part of a tensor's name, such as `ffn_down`."""
    layers: int = 2
    width: int = 256
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 64
    feed_forward: int = 512
    vocabulary: int = 96
    tied: bool = False
    biases: Sequence[str] = ()
    head_norms: bool = False
    whole_norms: bool = False
    """Norms of query and key over all heads."""
    fused: bool = False
    """Query, key and value as one tensor, and gate and up as another."""
    norms_on_both_sides: bool = False
    norms_after: bool = False
    """Norms after attention and feed-forward part, in place of those before."""
    fields: dict[str, object] = field(default_factory=dict)
    rope_freqs: Sequence[float] = ()
    seed: int = 0


def _norms_of_a_layer(shape: Shape) -> list[str]:
    before, after = ["attn_norm", "ffn_norm"], ["post_attention_norm", "post_ffw_norm"]
    if shape.norms_on_both_sides:
        return before + after
    return after if shape.norms_after else before


def write_decoder(path: Path, shape: Shape) -> Path:
    """Write a random decoder without a tokenizer, of any architecture and tensor type."""
    writer = gguf.GGUFWriter(path, shape.architecture)
    base = {
        "context_length": 4096,
        "embedding_length": shape.width,
        "block_count": shape.layers,
        "feed_forward_length": shape.feed_forward,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
        "attention.key_length": shape.head_size,
        "attention.value_length": shape.head_size,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10_000.0,
    }
    for name, value in (base | shape.fields).items():
        kind, whole = gguf.GGUFValueType.get_type(value), gguf.GGUFValueType.UINT32
        kind = whole if type(value) is int else kind
        writer.add_key_value(f"{shape.architecture}.{name}", value, kind, whole)
    random = np.random.default_rng(shape.seed)
    all_heads, kv_width = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    matrices = {"token_embd": (shape.vocabulary, shape.width)}
    if not shape.tied:
        matrices["output"] = (shape.vocabulary, shape.width)
    norms = {"output_norm": shape.width}
    for layer in range(shape.layers):
        name = f"blk.{layer}."
        matrices |= {
            f"{name}attn_q": (all_heads, shape.width),
            f"{name}attn_k": (kv_width, shape.width),
            f"{name}attn_v": (kv_width, shape.width),
            f"{name}attn_output": (shape.width, all_heads),
            f"{name}ffn_gate": (shape.feed_forward, shape.width),
            f"{name}ffn_up": (shape.feed_forward, shape.width),
            f"{name}ffn_down": (shape.width, shape.feed_forward),
        }
        if shape.fused:
            for part in ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up"):
                del matrices[name + part]
            matrices[f"{name}attn_qkv"] = (all_heads + 2 * kv_width, shape.width)
            matrices[f"{name}ffn_up"] = (2 * shape.feed_forward, shape.width)
        for norm in _norms_of_a_layer(shape):
            norms[name + norm] = shape.width
        if shape.head_norms or shape.whole_norms:
            norms[f"{name}attn_q_norm"] = all_heads if shape.whole_norms else shape.head_size
            norms[f"{name}attn_k_norm"] = kv_width if shape.whole_norms else shape.head_size
    for name, (rows, width) in matrices.items():
        middle = name.rpartition(".")[2]
        kind = gguf.GGMLQuantizationType[shape.other_kinds.get(middle, shape.kind)]
        elements, _ = gguf.GGML_QUANT_SIZES[kind]
        # Such that attention is no mean and the logits vary by about 8, as those of real models do.
        deviation = 0.5 if name in ("token_embd", "output") else 2.0 / np.sqrt(width)
        blocks = random_blocks(kind, rows * width // elements, random, float(deviation))
        writer.add_tensor(f"{name}.weight", blocks.reshape(rows, -1), raw_dtype=kind)
        if middle in shape.biases:
            writer.add_tensor(f"{name}.bias", random.normal(0, 0.3, rows).astype(np.float32))
    for name, width in norms.items():
        weights = random.uniform(0.5, 1.5, width).astype(np.float32)
        writer.add_tensor(f"{name}.weight", weights)
    if len(shape.rope_freqs) > 0:
        writer.add_tensor("rope_freqs.weight", np.array(shape.rope_freqs, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def make_decoder(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a random decoder; see `Shape` for what it takes."""

    def make(name: str = "decoder.gguf", **settings: Any) -> Path:
        return write_decoder(tmp_path / name, Shape(**settings))

    return make


@pytest.fixture(scope="session")
def converted_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny model as recollect converts it, to be read only: converting takes a second."""
    home = tmp_path_factory.mktemp("converted")
    model = prepare(str(write_gguf(home / "tiny.gguf")), home=home)
    assert model.folder is not None
    return model.folder


@pytest.fixture
def make_gguf(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a tiny GGUF model; see `write_gguf`."""

    def make(name: str = "tiny.gguf", **settings: object) -> Path:
        return write_gguf(tmp_path / name, **settings)  # type: ignore[arg-type]

    return make


@pytest.fixture
def make_wheel(tmp_path: Path) -> Callable[[str, dict[str, bytes]], Path]:
    """Return a function that writes a wheel, version 1.0, with the given files into one folder."""
    folder = tmp_path / "wheels"
    folder.mkdir()

    def make(package: str, files: dict[str, bytes]) -> Path:
        name = package.replace("-", "_")
        info = f"{name}-1.0.dist-info"
        path = folder / f"{name}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
            for member, content in files.items():
                wheel.writestr(member, content)
            wheel.writestr(
                f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n"
            )
            wheel.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            wheel.writestr(f"{info}/RECORD", "")
        return path

    return make


@pytest.fixture
def only_local_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pip see the wheels of `make_wheel` and nothing else."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))


def _varint(number: int) -> bytes:
    parts = []
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*parts, number])


def _field(number: int, value: int | str | bytes) -> bytes:
    """Return a field of a protocol buffer."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _node(operator: str, inputs: list[str], output: str, attributes: bytes = b"") -> bytes:
    names = b"".join(_field(1, name) for name in inputs)
    return names + _field(2, output) + _field(3, output) + _field(4, operator) + attributes


def _value(name: str, kind: int, *dimensions: int | str) -> bytes:
    shape = b"".join(
        _field(1, _field(2 if isinstance(size, str) else 1, size)) for size in dimensions
    )
    return _field(1, name) + _field(2, _field(1, _field(1, kind) + _field(2, shape)))


ONNX_VOCAB, ONNX_HEAD = 300, 8


def onnx_bytes(location: str = "model.onnx.data", *, node: bytes = b"") -> bytes:
    """Return a graph whose logits are a row of a table, and whose KV is a row of another."""
    external = b"".join(
        _field(13, _field(1, key) + _field(2, text))
        for key, text in (
            ("location", location),
            ("offset", "0"),
            ("length", str(4 * ONNX_VOCAB * ONNX_VOCAB)),
        )
    )
    sizes = _field(1, ONNX_VOCAB) + _field(1, ONNX_VOCAB)
    table = sizes + _field(2, 1) + _field(8, "table") + external + _field(14, 1)
    rows = np.ones((ONNX_VOCAB, ONNX_HEAD), np.float32).tobytes()
    sizes = _field(1, ONNX_VOCAB) + _field(1, ONNX_HEAD)
    keys = sizes + _field(2, 1) + _field(8, "rows") + _field(9, rows)
    one = _field(1, 1) + _field(2, 7) + _field(8, "one") + _field(9, np.array([1]).tobytes())
    axis = _field(5, _field(1, "axis") + _field(3, 2) + _field(20, 2))
    parts = [
        _field(1, _node("Gather", ["table", "input_ids"], "logits")),
        _field(1, _node("Gather", ["rows", "input_ids"], "flat")),
        _field(1, _node("Unsqueeze", ["flat", "one"], "new")),
        _field(1, _node("Concat", ["past.0.key", "new"], "present.0.key", axis)),
        _field(1, _node("Concat", ["past.0.value", "new"], "present.0.value", axis)),
        _field(1, node) if node else b"",
        _field(2, "graph"),
        _field(5, table) + _field(5, keys) + _field(5, one),
        _field(11, _value("input_ids", 7, "batch", "length")),
        _field(11, _value("attention_mask", 7, "batch", "all")),
        _field(11, _value("past.0.key", 1, "batch", 1, "past", ONNX_HEAD)),
        _field(11, _value("past.0.value", 1, "batch", 1, "past", ONNX_HEAD)),
        _field(12, _value("logits", 1, "batch", "length", ONNX_VOCAB)),
        _field(12, _value("present.0.key", 1, "batch", 1, "all", ONNX_HEAD)),
        _field(12, _value("present.0.value", 1, "batch", 1, "all", ONNX_HEAD)),
    ]
    return _field(1, 8) + _field(7, b"".join(parts)) + _field(8, _field(2, 17))


def compiled_node(file_name: str) -> bytes:
    """Return an operator that stands for compiled code in another file."""
    embed = _field(5, _field(1, "embed_mode") + _field(3, 0) + _field(20, 2))
    content = _field(5, _field(1, "ep_cache_context") + _field(4, file_name) + _field(20, 3))
    return _node("EPContext", ["input_ids"], "compiled", embed + content)


@pytest.fixture(scope="session")
def make_onnx() -> Callable[..., bytes]:
    """Return `onnx_bytes`; with compiled=NAME, a graph that also names a compiled part."""

    def make(location: str = "model.onnx.data", *, compiled: str | None = None) -> bytes:
        node = b"" if compiled is None else compiled_node(compiled)
        return onnx_bytes(location, node=node)

    return make


ONNX_CONFIG: dict[str, Any] = {
    "model": {
        "type": "llama",
        "context_length": 512,
        "eos_token_id": [1, 2],
        "bos_token_id": 0,
        "pad_token_id": 2,
        "vocab_size": ONNX_VOCAB,
        "decoder": {
            "filename": "model.onnx",
            "hidden_size": ONNX_HEAD,
            "num_attention_heads": 1,
            "num_hidden_layers": 1,
            "num_key_value_heads": 1,
            "head_size": ONNX_HEAD,
            "session_options": {"log_id": "test", "provider_options": []},
            "inputs": {
                "input_ids": "input_ids",
                "attention_mask": "attention_mask",
                "past_key_names": "past.%d.key",
                "past_value_names": "past.%d.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
        },
    },
    "search": {"do_sample": True, "top_k": 20, "past_present_share_buffer": False},
}
_SPECIAL = ["<s>", "</s>", "<|im_end|>"]


@pytest.fixture(scope="session")
def onnx_original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(_SPECIAL)
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=_SPECIAL, initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator(["the harbour and the bay"], trainer)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=10)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "genai_config.json").write_text(json.dumps(ONNX_CONFIG))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (folder / "model.onnx").write_bytes(onnx_bytes())
    table = np.random.default_rng(0).standard_normal((ONNX_VOCAB, ONNX_VOCAB))
    (folder / "model.onnx.data").write_bytes(table.astype(np.float32).tobytes())
    return folder


@pytest.fixture
def onnx_model_folder(onnx_original: Path, tmp_path: Path) -> Path:
    """Return a folder that ONNX Runtime GenAI can run: one layer, one token per byte."""
    return Path(shutil.copytree(onnx_original, tmp_path / "model"))
