"""
Graphs against a decoder written in numpy, which shares nothing with them but the gguf package.

How both compare with transformers is in tests/real/test_gguf.py.
"""

import math
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import openvino as ov
import pytest

from recollect.errors import UnsupportedModelError
from recollect.models.gguf_decoder import read_decoder
from recollect.models.gguf_graph import Constants, GraphBuilder
from recollect.models.gguf_weights import LAYOUTS, Shards
from recollect.runtime.base import Row
from recollect.runtime.openvino import OpenVinoRuntime

MakeDecoder = Callable[..., Path]

IDS = np.random.default_rng(5).integers(0, 96, 70).tolist()
CLOSE = 1e-3  # at logits that vary by 8; what is meant is 1e-4


def built(path: Path, *, fuses_gate: bool = False) -> OpenVinoRuntime:
    """Return a runtime of the file's model, exact, with room for 8 blocks."""
    shards = Shards(path)
    constants = Constants(path.with_suffix(".constants"))
    model = GraphBuilder(
        read_decoder(shards), shards, constants, lambda _count: None, fuses_gate=fuses_gate
    ).build()
    xml = path.with_suffix(".xml")
    ov.save_model(model, xml, compress_to_fp16=False)
    runtime = OpenVinoRuntime(xml, profile="exact", context_length=256)
    runtime.allocate(8)
    return runtime


class NumpyDecoder:
    """The model of a file as f64 arrays: the dumb version."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.fields = {name: field.contents() for name, field in reader.fields.items()}
        self.architecture: str = self.fields["general.architecture"]
        self.weights = {
            tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
            for tensor in reader.tensors
        }
        self.heads: int = self.field("attention.head_count")
        self.kv_heads: int = self.field("attention.head_count_kv")
        self.size: int = self.field("attention.key_length")

    def field(self, name: str, default: Any = None) -> Any:
        return self.fields.get(f"{self.architecture}.{name}", default)

    def logits(self, ids: Sequence[int], frequencies: np.ndarray, factor: float = 1) -> np.ndarray:
        """Return the logits after each token."""
        hidden = self.weights["token_embd.weight"][ids] * self.field("embedding_scale", 1)
        is_gemma = self.architecture == "gemma3"
        if is_gemma:
            hidden = hidden * math.sqrt(hidden.shape[-1])
        scale = self.field("residual_scale", 1)
        places = np.arange(len(ids))[:, None]
        for layer in range(self.field("block_count")):
            is_local = is_gemma and (layer + 1) % 6 != 0
            self.window = (
                self.field("attention.sliding_window") if is_local or not is_gemma else None
            )
            turned = plain(self.size) if is_local else frequencies
            self.turn = np.exp(1j * places * turned)[:, None] * factor
            name = f"blk.{layer}."
            attended = self.attention(self.norm(hidden, name + "attn_norm"), name, layer)
            hidden = hidden + scale * self.norm(attended, name + "post_attention_norm")
            normed = self.norm(hidden, name + "ffn_norm")
            gate, up = self.gate_and_up(normed, name)
            if is_gemma:
                inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
                gated = gate / 2 * (1 + np.tanh(inner)) * up
            else:
                gated = gate / (1 + np.exp(-gate)) * up
            down = self.linear(gated, name + "ffn_down")
            hidden = hidden + scale * self.norm(down, name + "post_ffw_norm")
        hidden = self.norm(hidden, "output_norm")
        head = "output" if "output.weight" in self.weights else "token_embd"
        logits: np.ndarray = self.linear(hidden, head) / self.field("logit_scale", 1)
        return logits

    def gate_and_up(self, hidden: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
        if name + "ffn_gate.weight" in self.weights:
            return self.linear(hidden, name + "ffn_gate"), self.linear(hidden, name + "ffn_up")
        gate, up = np.split(self.linear(hidden, name + "ffn_up"), 2, axis=-1)
        return gate, up

    def attention(self, hidden: np.ndarray, name: str, layer: int) -> np.ndarray:
        rotates = self.architecture != "smollm3" or (layer + 1) % 4 != 0
        query = self.split(hidden, name + "attn_q", self.heads, rotates=rotates)
        key = self.split(hidden, name + "attn_k", self.kv_heads, rotates=rotates)
        value = self.split(hidden, name + "attn_v", self.kv_heads, rotates=False)
        shared = self.heads // self.kv_heads
        key, value = np.repeat(key, shared, axis=1), np.repeat(value, shared, axis=1)
        scale = self.field("attention.scale", 1 / math.sqrt(self.size))
        scores = np.einsum("qhd,khd->hqk", query, key) * scale
        seen = np.tri(len(hidden), dtype=bool)
        if self.window:
            seen &= ~np.tri(len(hidden), k=-self.window, dtype=bool)
        scores[:, ~seen] = -np.inf
        shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
        shares /= shares.sum(axis=-1, keepdims=True)
        mixed = np.einsum("hqk,khd->qhd", shares, value)
        return self.linear(mixed.reshape(len(hidden), -1), name + "attn_output")

    def split(self, hidden: np.ndarray, name: str, count: int, *, rotates: bool) -> np.ndarray:
        out, norm = self.projected(hidden, name), self.weights.get(name + "_norm.weight")
        is_whole = norm is not None and len(norm) == out.shape[-1]
        if is_whole:
            out = self.norm(out, name + "_norm")
        heads = out.reshape(len(hidden), count, self.size)
        if norm is not None and not is_whole:
            heads = self.norm(heads, name + "_norm")
        return self.rotated(heads) if rotates else heads

    def projected(self, hidden: np.ndarray, name: str) -> np.ndarray:
        fused = name[:-1] + "qkv"
        if fused + ".weight" not in self.weights:
            return self.linear(hidden, name)
        ends = np.cumsum([self.heads, self.kv_heads]) * self.size
        return np.split(self.linear(hidden, fused), ends, axis=-1)["qkv".index(name[-1])]

    def rotated(self, heads: np.ndarray) -> np.ndarray:
        """Multiply pairs of dimensions, as complex numbers, where the architecture has them."""
        pairs = self.turn.shape[-1]
        beside = self.architecture in ("llama", "granite", "smollm3")
        first = np.arange(pairs) * 2 if beside else np.arange(pairs)
        second = first + (1 if beside else pairs)
        turned = (heads[..., first] + 1j * heads[..., second]) * self.turn
        out = heads.copy()
        out[..., first], out[..., second] = turned.real, turned.imag
        return out

    def linear(self, hidden: np.ndarray, name: str) -> np.ndarray:
        out: np.ndarray = hidden @ self.weights[name + ".weight"].T
        out += self.weights.get(name + ".bias", 0)
        return out

    def norm(self, hidden: np.ndarray, name: str) -> np.ndarray:
        weight = self.weights.get(name + ".weight")
        if weight is None:
            return hidden
        epsilon = self.field("attention.layer_norm_rms_epsilon")
        normed: np.ndarray = (
            hidden / np.sqrt((hidden**2).mean(axis=-1, keepdims=True) + epsilon) * weight
        )
        return normed


def plain(rotated: int = 64, base: float = 10_000.0) -> np.ndarray:
    return base ** -(np.arange(0, rotated, 2) / rotated)


def require_same(path: Path, frequencies: np.ndarray | None = None, factor: float = 1.0) -> None:
    """Check a prefill, tokens one by one behind a prefill, and three sequences in one pass."""
    reference = NumpyDecoder(path)
    frequencies = plain(reference.size) if frequencies is None else frequencies
    expected = reference.logits(IDS, frequencies, factor)
    assert 3 < expected.std() < 20
    runtime = built(path)
    far = []
    whole = runtime.forward([Row(IDS, 0, [0, 1, 2])]).logits[0]
    far.append(np.abs(whole - expected[-1]).max())
    runtime.forward([Row(IDS[:60], 0, [0, 1, 2])])
    for place in range(60, 70):
        step = runtime.forward([Row([IDS[place]], place, [0, 1, 2])]).logits[0]
        far.append(np.abs(step - expected[place]).max())
    rows = [Row(IDS[:33], 0, [3, 4]), Row(IDS[:5], 0, [5]), Row(IDS[69:], 69, [0, 1, 2])]
    for logits, place in zip(runtime.forward(rows).logits, (32, 4, 69), strict=True):
        far.append(np.abs(logits - expected[place]).max())
    assert max(far) < CLOSE
    runtime.close()


ALL_BIASES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied": {"tied": True},
    "llama with biases": {"biases": ALL_BIASES},
    "heads of 32": {"head_size": 32, "heads": 16, "kv_heads": 16},
    "heads wider than the model": {"head_size": 128, "heads": 4, "kv_heads": 1},
    "qwen2": {"architecture": "qwen2", "biases": ("attn_q", "attn_k", "attn_v"), "tied": True},
    "qwen3": {"architecture": "qwen3", "head_norms": True, "head_size": 128},
    "granite": {
        "architecture": "granite",
        "fields": {
            "attention.scale": 0.1,
            "embedding_scale": 3.0,
            "residual_scale": 0.7,
            "logit_scale": 1.5,
        },
    },
    "smollm3": {"architecture": "smollm3", "layers": 4, "tied": True},
    "olmo2": {"architecture": "olmo2", "norms_after": True, "whole_norms": True},
    "phi3": {"architecture": "phi3", "fused": True, "fields": {"attention.sliding_window": 20}},
    "gemma3": {
        "architecture": "gemma3",
        "layers": 6,
        "tied": True,
        "head_norms": True,
        "norms_on_both_sides": True,
        "fields": {"attention.sliding_window": 20},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [name if name == "gemma3" else pytest.param(name, marks=pytest.mark.slow) for name in MODELS],
)
def test_every_architecture_computes_what_its_file_says(
    name: str, make_decoder: MakeDecoder
) -> None:
    require_same(make_decoder(**MODELS[name]))


@pytest.mark.slow
def test_a_part_of_a_head_can_be_rotated(make_decoder: MakeDecoder) -> None:
    path = make_decoder(architecture="qwen2", fields={"rope.dimension_count": 32})
    require_same(path, plain(32))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", pytest.param("qwen2", marks=pytest.mark.slow)])
def test_rope_is_scaled_as_the_file_says(architecture: str, make_decoder: MakeDecoder) -> None:
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    require_same(make_decoder(architecture=architecture, fields=linear), plain() / 4)
    factors = np.geomspace(1, 8, 32)
    path = make_decoder(architecture=architecture, rope_freqs=factors)
    require_same(path, plain() / factors.astype(np.float32))


def products_of(model: ov.Model) -> int:
    return sum(node.get_type_name() == "MatMul" for node in model.get_ops())


@pytest.mark.slow
def test_gate_and_up_can_be_one_product(make_decoder: MakeDecoder) -> None:
    path = make_decoder(kind="Q4_K", layers=2)
    expected = NumpyDecoder(path).logits(IDS, plain())
    for fuses, count in ((False, 2 * 5 + 1), (True, 2 * 4 + 1)):
        runtime = built(path, fuses_gate=fuses)
        assert products_of(ov.Core().read_model(path.with_suffix(".xml"))) == count
        assert (
            np.abs(runtime.forward([Row(IDS, 0, [0, 1, 2])]).logits[0] - expected[-1]).max() < CLOSE
        )
        runtime.close()


@pytest.mark.slow
def test_the_kernel_for_packed_weights_is_asked_of_openvino() -> None:
    """In a process of its own: a core that is dropped takes the thread's stack for signals along."""
    cpuinfo = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not cpuinfo.is_file():
        pytest.skip("needs to know the processor")
    program = "from recollect.models.gguf_graph import has_avx2_kernel as ask; print(ask())"
    done = subprocess.run(  # noqa: S603 - our own program
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str("avx512f" not in cpuinfo.read_text("utf-8"))


@pytest.mark.slow
def test_a_table_of_frequencies_is_f32_also_where_weights_are_f16(
    make_decoder: MakeDecoder,
) -> None:
    path = make_decoder(kind="F16")
    expected = NumpyDecoder(path).logits(IDS, plain())
    runtime = built(path)
    assert np.abs(runtime.forward([Row(IDS, 0, [0, 1, 2])]).logits[0] - expected[-1]).max() < CLOSE
    xml = path.with_suffix(".xml").read_text("utf-8")
    assert 'element_type="f32" shape="32"' in xml


KINDS = ("F32", "F16", "BF16", *(kind.name for kind in LAYOUTS))
EVERY_DAY = ("Q4_K",)
"""The type that most files have; `gguf_weights` is tested with all of them."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [kind if kind in EVERY_DAY else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS],
)
@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_tensor_type_computes_what_its_file_says(
    kind: str, tied: bool, make_decoder: MakeDecoder
) -> None:
    require_same(make_decoder(kind=kind, tied=tied))


@pytest.mark.slow
def test_types_can_be_mixed_as_in_q4_k_m(make_decoder: MakeDecoder) -> None:
    other_kinds = {"attn_v": "Q6_K", "ffn_down": "Q6_K", "output": "Q6_K", "ffn_up": "Q5_0"}
    require_same(make_decoder(kind="Q4_K", other_kinds=other_kinds))


@pytest.mark.slow
def test_groups_without_a_scale_keep_their_minimum(make_decoder: MakeDecoder) -> None:
    path = make_decoder(kind="Q4_K")
    tensor = Shards(path).tensors["blk.1.ffn_down.weight"]
    content = np.memmap(path, np.uint8, "r+")
    blocks = content[tensor.start : tensor.start + tensor.size_bytes].reshape(-1, 144)
    blocks[::3, 4:6] = 0  # two of eight scales, and not their minima
    content.flush()
    require_same(path)


def test_weights_in_memory_are_those_in_the_mapped_file(
    make_decoder: MakeDecoder, tmp_path: Path
) -> None:
    """Constants point into the file: building holds no second copy of the weights."""
    shards = Shards(make_decoder(kind="Q4_K"))
    constants = Constants(tmp_path / "constants")
    builder = GraphBuilder(read_decoder(shards), shards, constants, lambda _count: None)
    model = builder.build()
    stored = (tmp_path / "constants").stat().st_size
    sizes = [node.get_byte_size() for node in model.get_ops() if node.get_type_name() == "Constant"]
    total, elsewhere = sum(sizes), sum(size for size in sizes if size < 4096)
    small = total // 40  # norms, biases, RoPE, shapes
    assert elsewhere < small
    assert total - elsewhere <= stored <= total


def test_bytes_are_counted_once(make_decoder: MakeDecoder, tmp_path: Path) -> None:
    shards = Shards(make_decoder(kind="Q4_K"))
    counted: list[int] = []
    constants = Constants(tmp_path / "constants")
    GraphBuilder(read_decoder(shards), shards, constants, counted.append).build()
    matrices = [tensor for tensor in shards.tensors.values() if len(tensor.shape) == 2]
    assert sum(counted) == sum(tensor.size_bytes for tensor in matrices)


def test_matrices_that_do_not_fit_each_other_are_refused(
    make_decoder: MakeDecoder, tmp_path: Path
) -> None:
    shards = Shards(make_decoder(fields={"attention.key_length": 32, "attention.value_length": 32}))
    builder = GraphBuilder(
        read_decoder(shards), shards, Constants(tmp_path / "constants"), lambda _count: None
    )
    with pytest.raises(UnsupportedModelError, match=r"attn_q\.weight of 256 rows for 4 heads"):
        builder.build()
