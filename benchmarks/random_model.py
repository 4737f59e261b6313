"""
Write GGUF files with random weights, for what does not depend on what a model says.

    python benchmarks/random_model.py big.gguf --layers 28 --width 1536 --heads 12 --kv-heads 2 \
        --feed-forward 8960 --vocabulary 151936 --kind F16
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import gguf
import numpy as np

from recollect.models.gguf import read_content

_DRAWN = (1 << 24) + 43
"""A prime, so that no two rows of a matrix are the same."""


@dataclass(kw_only=True)
class Shape:
    """A decoder; by default the smallest that attention means something in."""

    architecture: str = "llama"
    layers: int = 2
    width: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 16
    feed_forward: int = 128
    vocabulary: int = 300
    context: int = 512
    kind: str = "F32"
    """Type of the matrices: F32, F16 or Q8_0."""
    head_norms: bool = False
    """Norms of queries and keys, as in Qwen 3 and Gemma 3."""
    norms_on_both_sides: bool = False
    """Norms after attention and feed-forward part too, as in Gemma 3."""
    biases: bool = False
    """Of queries, keys and values, as in Qwen 2."""
    experts: int = 0
    """Experts in each layer, of which two compute a token; 0: there is one feed-forward part."""
    fields: Mapping[str, int | float] = field(default_factory=dict)
    """Other fields, by their names after the architecture's."""
    seed: int = 0


WITH_WINDOW = Shape(
    architecture="gemma3",
    layers=6,
    head_norms=True,
    norms_on_both_sides=True,
    fields={"attention.sliding_window": 64},
)
"""Five of its six layers attend to the last 64 tokens alone."""
WITH_EXPERTS = Shape(architecture="qwen3moe", head_norms=True, experts=4)
"""OpenVINO does not run it, and llama.cpp does."""
WITH_CONVOLUTIONS = Shape(
    architecture="lfm2", layers=4, head_norms=True, fields={"shortconv.l_cache": 3}
)
"""A hybrid: every other layer has a short convolution, which is a recurrent state, in place of attention."""
WITHOUT_ATTENTION = Shape(
    architecture="mamba",
    fields={
        "ssm.conv_kernel": 4,
        "ssm.inner_size": 128,
        "ssm.state_size": 16,
        "ssm.time_step_rank": 4,
    },
)
"""A Mamba: all that it has of a sequence is a recurrent state."""
SHAPES = {
    "plain": Shape(),
    "window": WITH_WINDOW,
    "experts": WITH_EXPERTS,
    "recurrent": WITHOUT_ATTENTION,
    "hybrid": WITH_CONVOLUTIONS,
}
"""One of each kind whose state llama.cpp keeps in a way of its own."""

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for one in messages %}{{ one.role }}: {{ one.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def write_bytes_as_vocabulary(path: Path) -> Path:
    """Write a file that has no weights, a token for each byte, one that ends a turn, and a chat template."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    # The letters that stand for bytes in GPT-2's vocabulary.
    letters = [chr(byte if byte in own else next(others)) for byte in range(256)]
    writer.add_token_list([*letters, "<|end|>"])
    writer.add_token_types([1] * 256 + [3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(256)
    writer.add_chat_template(TEMPLATE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def write_random_model(path: Path, shape: Shape, *, vocabulary_of: Path | None = None) -> Path:
    """
    Write a random decoder whose logits vary as those of real models do.

    It has the vocabulary and the chat template of another file, or else none. Written tensor by tensor: a
    large model takes no more memory than its largest matrix.
    """
    writer = gguf.GGUFWriter(path, shape.architecture)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    is_hybrid = shape.architecture == "lfm2"  # every other layer has a convolution and no attention
    kv_heads = [shape.kv_heads * (layer % 2) for layer in range(shape.layers)]
    writer.add_head_count_kv(kv_heads if is_hybrid else shape.kv_heads)
    writer.add_key_length(shape.head_size)
    writer.add_value_length(shape.head_size)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.head_size)
    writer.add_rope_freq_base(10_000.0)
    if vocabulary_of is None:
        writer.add_vocab_size(shape.vocabulary)
        writer.add_tokenizer_model("no_vocab")
    else:
        shape = replace(shape, vocabulary=_copy_vocabulary(vocabulary_of, writer))
        writer.add_vocab_size(shape.vocabulary)
    if shape.experts:
        writer.add_expert_count(shape.experts)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(shape.feed_forward)
    for name, value in shape.fields.items():
        key = f"{shape.architecture}.{name}"
        if isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_float32(key, value)
    tensors = _tensors(shape)
    kinds = {name: _kind(shape, size) for name, size in tensors.items()}
    for name, size in tensors.items():
        bytes_of = gguf.quant_shape_to_byte_shape(size, kinds[name])
        nbytes = int(np.prod(bytes_of))
        writer.add_tensor_info(name, bytes_of, np.dtype(np.uint8), nbytes, raw_dtype=kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = np.random.default_rng(shape.seed)
    for name, size in tensors.items():
        writer.write_tensor_data(_data(name, size, kinds[name], random))
    writer.close()
    return path


def _copy_vocabulary(path: Path, writer: gguf.GGUFWriter) -> int:
    """Copy a file's fields about text; return how many tokens there are."""
    fields = read_content(path).fields
    for name, value in fields.items():
        if not name.startswith("tokenizer."):
            continue
        if isinstance(value, list | tuple):
            writer.add_array(name, list(value))
        else:
            kind = gguf.GGUFValueType.get_type(value)
            is_whole = kind is gguf.GGUFValueType.INT32
            writer.add_key_value(name, value, gguf.GGUFValueType.UINT32 if is_whole else kind)
    return len(fields["tokenizer.ggml.tokens"])


def _kind(shape: Shape, size: tuple[int, ...]) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[shape.kind if len(size) > 1 else "F32"]


def _data(
    name: str, size: tuple[int, ...], kind: gguf.GGMLQuantizationType, random: np.random.Generator
) -> np.ndarray:
    if len(size) == 1:
        low, high = (-0.5, 0.5) if name.endswith("bias") else (0.5, 1.5)
        return random.uniform(low, high, size).astype(np.float32)
    if name.endswith("ssm_a"):  # minus what a state forgets at each step
        return -random.uniform(0.1, 2.0, size).astype(np.float32)
    deviation = 0.5 if name.startswith(("token_embd", "output")) else 2.0 / np.sqrt(size[-1])
    # Drawing takes a minute for a billion numbers, so large matrices repeat some.
    drawn = random.standard_normal(min(int(np.prod(size)), _DRAWN), np.float32)
    values = np.resize(drawn * np.float32(deviation), size)
    if kind is gguf.GGMLQuantizationType.F32:
        return values
    if kind is gguf.GGMLQuantizationType.F16:
        return values.astype(np.float16)
    quantized: np.ndarray = gguf.quants.quantize(values, kind)
    return quantized


def _tensors(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Return the tensors' shapes by name, outermost dimension first."""
    all_heads, kv_width = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    width, inner = shape.width, shape.feed_forward
    tensors: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (shape.vocabulary, width),
        "output.weight": (shape.vocabulary, width),
        "output_norm.weight": (width,),
    }
    if shape.architecture == "mamba":
        return tensors | _mamba(shape)
    if shape.architecture == "lfm2":
        tensors["token_embd_norm.weight"] = tensors.pop("output_norm.weight")
    for layer in range(shape.layers):
        parts: dict[str, tuple[int, ...]] = {
            "attn_norm": (width,),
            "ffn_norm": (width,),
            "attn_q": (all_heads, width),
            "attn_k": (kv_width, width),
            "attn_v": (kv_width, width),
            "attn_output": (width, all_heads),
        }
        experts = shape.experts
        if experts:
            parts |= {
                "ffn_gate_inp": (experts, width),
                "ffn_gate_exps": (experts, inner, width),
                "ffn_up_exps": (experts, inner, width),
                "ffn_down_exps": (experts, width, inner),
            }
        else:
            parts |= {
                "ffn_gate": (inner, width),
                "ffn_up": (inner, width),
                "ffn_down": (width, inner),
            }
        if shape.architecture == "lfm2" and layer % 2 == 0:
            parts = {name: size for name, size in parts.items() if not name.startswith("attn_")}
            kernel = int(shape.fields["shortconv.l_cache"])
            parts |= {
                "attn_norm": (width,),
                "shortconv.conv": (width, kernel),
                "shortconv.in_proj": (3 * width, width),
                "shortconv.out_proj": (width, width),
            }
        elif shape.head_norms:
            parts |= {"attn_q_norm": (shape.head_size,), "attn_k_norm": (shape.head_size,)}
        if shape.biases:
            tensors |= {
                f"blk.{layer}.attn_q.bias": (all_heads,),
                f"blk.{layer}.attn_k.bias": (kv_width,),
                f"blk.{layer}.attn_v.bias": (kv_width,),
            }
        if shape.norms_on_both_sides:
            parts |= {"post_attention_norm": (width,), "post_ffw_norm": (width,)}
        tensors |= {f"blk.{layer}.{name}.weight": size for name, size in parts.items()}
    return tensors


def _mamba(shape: Shape) -> dict[str, tuple[int, ...]]:
    width = shape.width
    sizes = ("inner_size", "state_size", "time_step_rank", "conv_kernel")
    inner, state, rank, kernel = (int(shape.fields[f"ssm.{name}"]) for name in sizes)
    tensors: dict[str, tuple[int, ...]] = {}
    for layer in range(shape.layers):
        parts: dict[str, tuple[int, ...]] = {
            "attn_norm.weight": (width,),
            "ssm_in.weight": (2 * inner, width),
            "ssm_conv1d.weight": (inner, kernel),
            "ssm_conv1d.bias": (inner,),
            "ssm_x.weight": (rank + 2 * state, inner),
            "ssm_dt.weight": (inner, rank),
            "ssm_dt.bias": (inner,),
            "ssm_a": (inner, state),
            "ssm_d": (inner,),
            "ssm_out.weight": (width, inner),
        }
        tensors |= {f"blk.{layer}.{name}": size for name, size in parts.items()}
    return tensors


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    for name, value in vars(Shape()).items():
        if isinstance(value, int | str) and not isinstance(value, bool):
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = vars(parser.parse_args())
    write_random_model(options.pop("path"), Shape(**options))
