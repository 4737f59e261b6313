"""A real model of a few kilobytes, and real wheels made on the spot."""

import os
import zipfile
from collections.abc import Callable
from pathlib import Path

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
