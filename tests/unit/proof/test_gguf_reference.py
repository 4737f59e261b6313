"""Claims about `proof/gguf_reference.py`: what a file says and nobody reads is not judged."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from recollect.proof.gguf_reference import open_gguf
from recollect.proof.reference_model import NotCompared, logits_at

WIDTH, INNER, HEADS, VOCABULARY = 32, 64, 2, 40
MATRICES = {
    "token_embd": (VOCABULARY, WIDTH),
    "output": (VOCABULARY, WIDTH),
    **dict.fromkeys([f"blk.0.attn_{part}" for part in ("q", "k", "v", "output")], (WIDTH, WIDTH)),
    "blk.0.ffn_gate": (INNER, WIDTH),
    "blk.0.ffn_up": (INNER, WIDTH),
    "blk.0.ffn_down": (WIDTH, INNER),
    **dict.fromkeys(["blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"], (WIDTH,)),
}
FIELDS = {
    "block_count": 1,
    "context_length": 64,
    "embedding_length": WIDTH,
    "feed_forward_length": INNER,
    "attention.head_count": HEADS,
    "attention.layer_norm_rms_epsilon": 1e-5,
}
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a writer of tiny files; fields and tensors of None are left out."""

    def make(
        *,
        architecture: str = "llama",
        fields: dict[str, object] | None = None,
        tensors: dict[str, np.ndarray | None] | None = None,
    ) -> Path:
        path, random = tmp_path / "tiny.gguf", np.random.default_rng(0)
        writer = gguf.GGUFWriter(path, architecture)
        kinds = {
            bool: gguf.GGUFValueType.BOOL,
            int: gguf.GGUFValueType.UINT32,
            float: gguf.GGUFValueType.FLOAT32,
            str: gguf.GGUFValueType.STRING,
        }
        for name, value in {**FIELDS, **(fields or {})}.items():
            if isinstance(value, list):
                writer.add_array(f"{architecture}.{name}", value)
            elif value is not None:
                writer.add_key_value(f"{architecture}.{name}", value, kinds[type(value)])
        ours = {name: random.normal(0, 0.2, shape) for name, shape in MATRICES.items()}
        given = {f"{name}.weight": values for name, values in ours.items()} | (tensors or {})
        for name, values in given.items():
            if values is not None:
                writer.add_tensor(name, np.asarray(values, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return make


def test_what_is_known_is_read(write: Write) -> None:
    description, tensors = open_gguf(write())
    assert (description.layers, description.heads, description.kv_heads) == (1, HEADS, HEADS)
    assert logits_at(description, tensors, [1, 2, 3], [2]).shape == (1, VOCABULARY)


@pytest.mark.parametrize(
    ("architecture", "fields", "what"),
    [
        ("mamba", {}, "architecture mamba"),
        ("llama", {"expert_count": 4}, "mixtures of experts"),
        ("llama", {"attention.causal": False}, "attention.causal"),
        ("llama", {"residual_scale": 0.5}, "llama.residual_scale"),
        ("llama", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("llama", {"attention.sliding_window": 8}, "attention.sliding_window"),
        ("llama", {"rope.scaling.yarn_log_multiplier": 0.1}, "yarn_log_multiplier"),
        ("llama", {"rope.scaling.type": "longrope"}, "RoPE scaled by 'longrope'"),
        ("llama", {"of_tomorrow": 1}, "llama.of_tomorrow"),
        ("llama", {"attention.value_length": 8}, "attention.value_length"),
        ("llama", {"block_count": None}, "block_count is None"),
        ("llama", {"block_count": "two"}, "block_count is 'two'"),
        ("llama", {"attention.head_count": 0}, "attention.head_count is 0"),
        ("llama", {"attention.head_count": [2, 4]}, "attention.head_count"),
        ("llama", {"attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon"),
        ("llama", {"attention.layer_norm_rms_epsilon": float("nan")}, "layer_norm_rms_epsilon"),
        ("llama", {"attention.head_count_kv": 1}, "attn_k has the shape"),
        ("llama", {"embedding_length": 64}, "attn_q has the shape"),
        ("llama", {"rope.freq_base": 1.0, "rope.scaling.type": "yarn"}, "cannot be computed"),
        ("qwen3", {}, "no tensor blk.0.attn_q_norm"),
        ("gemma2", {}, "no tensor blk.0.post_attention_norm"),
        ("phi3", {"attention.head_count_kv": 1}, "attn_k has the shape"),
    ],
)
def test_a_field_that_nobody_reads_or_that_has_no_sense_is_named(
    architecture: str, fields: dict[str, object], what: str, write: Write
) -> None:
    path = write(architecture=architecture, fields=fields)
    with pytest.raises(NotCompared, match=what):
        open_gguf(path)


def test_the_factor_of_old_files_is_read(write: Write) -> None:
    old = open_gguf(write(fields={"rope.scale_linear": 4.0}))[0].ropes[0].frequencies
    new = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    assert (old == open_gguf(write(fields=new))[0].ropes[0].frequencies).all()
    assert (old == open_gguf(write())[0].ropes[0].frequencies / 4).all()


@pytest.mark.parametrize(
    ("tensors", "what"),
    [
        ({"blk.0.ffn_norm.weight": None}, "no tensor blk.0.ffn_norm"),
        ({"output_norm.weight": None}, "no tensor output_norm"),
        ({"token_embd.weight": None}, "no tensor token_embd"),
        ({"blk.0.attn_q.weight": None}, "no tensor blk.0.attn_q"),
        ({"blk.0.ffn_gate.weight": None}, "ffn_gate has the shape|ffn_down has the shape"),
        ({"blk.0.attn_sinks.weight": np.ones(HEADS)}, "blk.0.attn_sinks"),
        ({"blk.0.attn_q_norm.weight": np.ones(16)}, "blk.0.attn_q_norm"),
        ({"blk.0.post_ffw_norm.weight": np.ones(WIDTH)}, "post_ffw_norm"),
        ({"blk.1.attn_norm.weight": np.ones(WIDTH)}, "blk.1.attn_norm"),
        ({"blk.0.ffn_up.bias": np.ones((3, 3))}, "ffn_up.bias"),
        ({"blk.0.attn_norm.bias": np.ones(WIDTH)}, "attn_norm.bias"),
        ({"output.weight": np.ones((VOCABULARY, 16))}, "output has the shape"),
    ],
)
def test_a_tensor_that_nobody_reads_or_that_is_missing_is_named(
    tensors: dict[str, np.ndarray | None], what: str, write: Write
) -> None:
    path = write(tensors=tensors)
    with pytest.raises(NotCompared, match=what):
        open_gguf(path)


def test_biases_are_read(write: Write) -> None:
    plain = logits_at(*open_gguf(write()), [1, 2, 3], [2])
    biased = write(
        tensors={"blk.0.ffn_down.bias": np.ones(WIDTH), "output.bias": np.ones(VOCABULARY)}
    )
    assert np.abs(logits_at(*open_gguf(biased), [1, 2, 3], [2]) - plain).max() > 0.1
