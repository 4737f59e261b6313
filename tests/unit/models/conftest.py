"""A real model of a few kilobytes, and real wheels made on the spot."""

import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

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
) -> Path:
    """Write a model with one layer of random weights and one token per byte."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(context_length)
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
        placed = ("post_attention_norm", "post_ffw_norm") if shape.norms_after else ()
        if shape.norms_on_both_sides:
            placed = ("attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm")
        for norm in placed or ("attn_norm", "ffn_norm"):
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
