"""
A program: write a tiny model with Qwen2.5's tokenizer and chat template as a GGUF file.

Its weights are random, so what it would say is nonsense: the tests give it its replies. Two narrow
layers with room for 131,072 tokens read the 19,000 tokens of an agent's prompt in seconds.

    python make_model.py TOKENIZER_FOLDER FILE
"""

import json
import sys
from pathlib import Path
from typing import Final

import gguf
import numpy as np

CONTEXT_LENGTH: Final = 131_072
LAYERS: Final = 2
WIDTH: Final = 64  # one head, so that a token's KV takes 1 KiB in f32
FEED_FORWARD: Final = 128
KIND: Final = gguf.GGMLQuantizationType.F16


def write_model(tokenizer: Path, file: Path) -> None:
    """Write the model; *tokenizer* is a folder with Hugging Face's two files."""
    writer = gguf.GGUFWriter(file, "qwen2")
    writer.add_context_length(CONTEXT_LENGTH)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1_000_000.0)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    vocab_size = _add_vocabulary(writer, tokenizer)
    _add_tensors(writer, vocab_size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(writer: gguf.GGUFWriter, folder: Path) -> int:
    """Add the tokenizer and the template as llama.cpp's converter does; return the size."""
    read = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    ids: dict[str, int] = dict(read["model"]["vocab"])
    kinds = dict.fromkeys(ids, gguf.TokenType.NORMAL)
    for token in read["added_tokens"]:
        name = token["content"]
        ids[name] = token["id"]
        # The converter takes what looks like a mark for one, whatever the tokenizer calls it.
        is_mark = token["special"] or (name.startswith("<|") and name.endswith("|>"))
        kinds[name] = gguf.TokenType.CONTROL if is_mark else gguf.TokenType.USER_DEFINED
    names = sorted(ids, key=ids.__getitem__)
    assert [ids[name] for name in names] == list(range(len(names))), "ids have no gaps"
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(names)
    writer.add_token_types([kinds[name] for name in names])
    writer.add_token_merges(read["model"]["merges"])
    writer.add_eos_token_id(ids[config["eos_token"]])
    writer.add_pad_token_id(ids[config["pad_token"]])
    writer.add_bos_token_id(ids[config["pad_token"]])
    writer.add_add_bos_token(False)
    writer.add_chat_template(config["chat_template"])
    return len(names)


def _add_tensors(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    random = np.random.default_rng(0)
    matrices = {"token_embd": (vocab_size, WIDTH)}
    vectors = {"output_norm": 1.0}
    for layer in range(LAYERS):
        name = f"blk.{layer}."
        for part in ("q", "k", "v", "output"):
            matrices[f"{name}attn_{part}"] = (WIDTH, WIDTH)
        for part in ("gate", "up"):
            matrices[f"{name}ffn_{part}"] = (FEED_FORWARD, WIDTH)
        matrices[f"{name}ffn_down"] = (WIDTH, FEED_FORWARD)
        vectors |= {f"{name}attn_norm": 1.0, f"{name}ffn_norm": 1.0}
        for part in ("q", "k", "v"):
            bias = random.standard_normal(WIDTH).astype(np.float32)
            writer.add_tensor(f"{name}attn_{part}.bias", bias * np.float32(0.1))
    for name, shape in matrices.items():
        values = random.standard_normal(shape).astype(np.float32) / np.float32(shape[1] ** 0.5)
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, KIND), raw_dtype=KIND)
    for name, value in vectors.items():
        writer.add_tensor(f"{name}.weight", np.full(WIDTH, value, np.float32))


if __name__ == "__main__":
    write_model(Path(sys.argv[1]), Path(sys.argv[2]))
