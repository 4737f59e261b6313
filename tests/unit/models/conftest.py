"""A real model of a few kilobytes, and real wheels made on the spot."""

import json
import os
import shutil
import zipfile
from collections.abc import Callable
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
    tokens = [*specials, *letters, merged, "</s>"]  # the last one an ordinary token
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(specials) + [1] * (len(letters) + 2))
    writer.add_token_merges([f"{letters[ord('h')]} {letters[ord('e')]}"])
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
