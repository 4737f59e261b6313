"""
Models from GGUF files against transformers, on the values that the files hold.

Needs torch, transformers and ggml's own quantizers: `pip install torch transformers libggml-python`.
"""

import ctypes
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import openvino as ov
import pytest
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize

from recollect.models.gguf_decoder import read_decoder
from recollect.models.gguf_graph import Constants, GraphBuilder
from recollect.models.gguf_weights import Shards, write_as_f32
from recollect.proof.gguf_reference import open_gguf
from recollect.proof.reference_model import NotCompared, logits_at
from recollect.runtime.base import PagedRuntime, Row
from recollect.runtime.llama_model import LlamaOptions
from recollect.runtime.llamacpp import load_llama
from recollect.runtime.openvino import OpenVinoRuntime
from recollect.types import Profile

pytestmark = pytest.mark.slow
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CLOSE = 1e-3  # at logits that vary by 8
DEVIATION = 8.0
LENGTH = 150
VOCABULARY = 256


@pytest.fixture(scope="module")
def ggml() -> ctypes.CDLL:
    """Return ggml, which has the quantizers that files are made with."""
    found = importlib.util.find_spec("libggml")
    if found is None or found.origin is None:
        pytest.skip("needs ggml's quantizers: pip install libggml-python")
    file = sorted(Path(found.origin).parent.glob("lib*/*ggml-base.*"))[0]
    library = ctypes.CDLL(str(file))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    return library


def quantized(ggml: ctypes.CDLL, values: np.ndarray, kind: Kind) -> np.ndarray:
    """Return a matrix's bytes, shape `(rows, bytes of a row)`."""
    values = np.ascontiguousarray(values, np.float32)
    rows, width = values.shape
    block, size = GGML_QUANT_SIZES[kind]
    out = np.empty((rows, width // block * size), np.uint8)
    importance = np.ones(width, np.float32)  # the smallest types are refused without
    pointers = [array.ctypes.data for array in (values, out, importance)]
    written = ggml.ggml_quantize_chunk(kind.value, *pointers[:2], 0, rows, width, pointers[2])
    assert written == out.nbytes
    return out


@dataclass(kw_only=True)
class Case:
    """A model for transformers, and what of it a GGUF file says in its own words."""

    model: str = "Llama"
    config: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    architecture: str = "llama"
    kind: str = "Q8_0"
    down_kind: str = ""
    """Of the matrices that Q4_K_M keeps more bits of."""


CONFIG: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
BASE = {"rope_theta": 10_000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    **BASE,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, **BASE}
YARN_FIELDS = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 64,
}
LINEAR = {"rope_type": "linear", "factor": 4.0, **BASE}
LINEAR_FIELDS = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
GRANITE = {
    "attention_multiplier": 0.1,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.7,
    "logits_scaling": 1.5,
}
GRANITE_FIELDS = {
    "attention.scale": 0.1,
    "embedding_scale": 3.0,
    "residual_scale": 0.7,
    "logit_scale": 1.5,
}

CASES: dict[str, Case] = {
    "llama": Case(),
    "llama, tied": Case(config={"tie_word_embeddings": True}, kind="Q4_K"),
    "llama, heads of 32": Case(config={"head_dim": 32}),
    "llama, heads of 128": Case(config={"head_dim": 128, "num_key_value_heads": 4}),
    "llama, biases": Case(config={"attention_bias": True, "mlp_bias": True}),
    "llama 3.1": Case(config={"rope_parameters": LLAMA3}),
    "llama, linear": Case(config={"rope_parameters": LINEAR}, fields=LINEAR_FIELDS),
    "llama, YaRN": Case(config={"rope_parameters": YARN}, fields=YARN_FIELDS),
    "llama, F16": Case(kind="F16"),
    "mistral": Case(model="Mistral", config={"sliding_window": None}),
    "qwen2": Case(model="Qwen2", architecture="qwen2"),
    "qwen2, tied, Q4_K_M": Case(
        model="Qwen2",
        architecture="qwen2",
        config={"tie_word_embeddings": True},
        kind="Q4_K",
        down_kind="Q6_K",
    ),
    "qwen2, YaRN": Case(
        model="Qwen2", architecture="qwen2", config={"rope_parameters": YARN}, fields=YARN_FIELDS
    ),
    "qwen3": Case(model="Qwen3", architecture="qwen3", config={"head_dim": 128}),
    "qwen3, tied": Case(
        model="Qwen3", architecture="qwen3", config={"head_dim": 64, "tie_word_embeddings": True}
    ),
    "granite": Case(model="Granite", architecture="granite", config=GRANITE, fields=GRANITE_FIELDS),
    "smollm3": Case(
        model="SmolLM3",
        architecture="smollm3",
        config={"num_hidden_layers": 4, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "olmo2": Case(model="Olmo2", architecture="olmo2"),
    "gemma3": Case(
        model="Gemma3",
        architecture="gemma3",
        config={
            "num_hidden_layers": 6,
            "head_dim": 64,
            "query_pre_attn_scalar": 64,
            "sliding_window": 40,
            "tie_word_embeddings": True,
        },
        fields={"attention.sliding_window": 40},
    ),
    "phi3": Case(
        model="Phi3",
        architecture="phi3",
        config={"sliding_window": 40, "pad_token_id": 0},
        fields={"attention.sliding_window": 40},
    ),
}
KINDS = sorted(
    (kind.name for kind in {*gguf.quants._type_traits} | {Kind.F32, Kind.F16}),
)


class Written:
    """A random model, as a GGUF file and as transformers has it, with the same values."""

    def __init__(self, case: Case, path: Path, ggml: ctypes.CDLL) -> None:
        torch.manual_seed(7)
        text_alone = "Text" if case.model == "Gemma3" else ""  # the other one has pictures, too
        config_class = getattr(transformers, f"{case.model}{text_alone}Config")
        self.config = config_class(**CONFIG | case.config)
        model_class = getattr(transformers, f"{case.model}ForCausalLM")
        self.model = model_class._from_config(self.config, attn_implementation="eager")
        self.model = self.model.float().eval()
        self.path = path
        self.ids = np.random.default_rng(3).integers(0, VOCABULARY, LENGTH)
        self._redraw()
        self._write(case, ggml)

    def logits(self) -> np.ndarray:
        """Return transformers' logits after each token."""
        with torch.no_grad():
            found: np.ndarray = self.model(torch.tensor(self.ids[None])).logits[0].numpy()
        return found

    def _redraw(self) -> None:
        """Draw weights of such sizes that layers matter, and logits vary as those of real models."""
        random = np.random.default_rng(11)
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                shape = tuple(weight.shape)
                if len(shape) == 2:
                    new = random.standard_normal(shape) * 2 / np.sqrt(shape[1])
                elif name.endswith("bias"):
                    new = random.standard_normal(shape) * 0.3
                else:
                    new = random.uniform(0.5, 1.5, shape)
                weight.copy_(torch.from_numpy(new.astype(np.float32)))
            spread = float(self.logits().std())
            last = self.model.model.norm.weight
            last.copy_(last * DEVIATION / spread)

    def _write(self, case: Case, ggml: ctypes.CDLL) -> None:
        writer = gguf.GGUFWriter(self.path, case.architecture)
        config, name = self.config, case.architecture
        head_size = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        fields: dict[str, Any] = {
            "context_length": config.max_position_embeddings,
            "embedding_length": config.hidden_size,
            "block_count": config.num_hidden_layers,
            "feed_forward_length": config.intermediate_size,
            "attention.head_count": config.num_attention_heads,
            "attention.head_count_kv": config.num_key_value_heads,
            "attention.key_length": head_size,
            "attention.value_length": head_size,
            "rope.freq_base": float(rope_of(config)["rope_theta"]),
        }
        for key, value in (fields | case.fields).items():
            kind = gguf.GGUFValueType.get_type(value)
            is_whole = kind is gguf.GGUFValueType.INT32  # which llama.cpp does not take here
            kind = gguf.GGUFValueType.UINT32 if is_whole else kind
            writer.add_key_value(f"{name}.{key}", value, kind)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)
        writer.add_tokenizer_model("no_vocab")
        for tensor, (values, weight) in self._tensors(case).items():
            if values.ndim == 1:
                # Gemma's norms multiply by one more than their weights, which files have added.
                more = 1 if case.architecture == "gemma3" else 0
                writer.add_tensor(tensor, values + np.float32(more))
                continue
            is_down = "ffn_down" in tensor or "attn_v" in tensor or "token_embd" in tensor
            kind = Kind[case.down_kind if case.down_kind and is_down else case.kind]
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
            turned = interleaved(values, heads.get(tensor.split(".")[-2]), case.architecture)
            blocks = quantized(ggml, turned, kind)
            writer.add_tensor(tensor, blocks, raw_dtype=kind)
            # What transformers computes with: the file's values, of the rows as they were.
            exact = dequantize(quantized(ggml, values, kind), kind).reshape(values.shape)
            with torch.no_grad():
                weight.copy_(torch.from_numpy(exact))
        if rope_of(config).get("rope_type") == "llama3":
            writer.add_tensor("rope_freqs.weight", llama3_factors(config, head_size))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def _tensors(self, case: Case) -> dict[str, tuple[np.ndarray, Any]]:
        """Return every weight by the name that llama.cpp's converter gives it."""
        architecture = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}
        names = gguf.get_tensor_name_map(
            architecture[case.architecture], self.config.num_hidden_layers
        )
        found = {}
        for name, weight in self.model.named_parameters():
            translated = names.get_name(name, try_suffixes=(".weight", ".bias"))
            assert translated is not None, name
            values = weight.detach().numpy().copy()
            if values.ndim == 1 and translated.endswith(".bias"):
                heads = {
                    "attn_q": self.config.num_attention_heads,
                    "attn_k": self.config.num_key_value_heads,
                }.get(translated.split(".")[-2])
                values = interleaved(values[:, None], heads, case.architecture)[:, 0]
            found[translated] = (values, weight)
        return found


def rope_of(config: Any) -> dict[str, Any]:
    """Return what a config says of RoPE; where layers differ, of those that see everything."""
    found: dict[str, Any] = config.rope_parameters
    everywhere: dict[str, Any] = found.get("full_attention", found)
    return everywhere


def interleaved(values: np.ndarray, heads: int | None, architecture: str) -> np.ndarray:
    """Return rows as llama.cpp's converter puts them (`LlamaModel.permute`)."""
    if heads is None or architecture not in ("llama", "granite", "smollm3"):
        return values
    rows, width = values.shape
    halves = values.reshape(heads, 2, rows // heads // 2, width)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, width))


def llama3_factors(config: Any, head_size: int) -> np.ndarray:
    """Return what `rope_freqs` holds, as llama.cpp's converter computes it."""
    scaling, base = config.rope_parameters, config.rope_parameters["rope_theta"]
    low, high, factor = (
        scaling[name] for name in ("low_freq_factor", "high_freq_factor", "factor")
    )
    original = scaling["original_max_position_embeddings"]
    factors = []
    for exponent in np.arange(0, head_size, 2) / head_size:
        length = 2 * np.pi * base**exponent
        if length < original / high:
            factors.append(1.0)
        elif length > original / low:
            factors.append(factor)
        else:
            smooth = (original / length - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


REFERENCE_KNOWS = ("llama", "qwen2", "qwen3", "gemma3", "phi3")


def built(path: Path) -> OpenVinoRuntime:
    shards = Shards(path)
    constants = Constants(path.with_suffix(".constants"))
    model = GraphBuilder(read_decoder(shards), shards, constants, lambda _count: None).build()
    xml = path.with_suffix(".xml")
    ov.save_model(model, xml, compress_to_fp16=False)
    runtime = OpenVinoRuntime(xml, profile="exact", context_length=LENGTH + 1)
    runtime.allocate(16)
    return runtime


def differences(runtime: PagedRuntime, ids: list[int], expected: np.ndarray) -> Iterator[float]:
    """Yield how far logits are off: prefills, single tokens behind a prefill, and a batch."""
    table = list(range(5))
    for length in (5, 33, 64, 65, 100, LENGTH):
        logits = runtime.forward([Row(ids[:length], 0, table)]).logits[0]
        yield float(np.abs(logits - expected[length - 1]).max())
    runtime.forward([Row(ids[:100], 0, table)])
    for place in range(100, LENGTH):
        logits = runtime.forward([Row([ids[place]], place, table)]).logits[0]
        yield float(np.abs(logits - expected[place]).max())
    rows = [Row(ids[:70], 0, [5, 6, 7]), Row(ids[149:], 149, table), Row(ids[:9], 0, [8])]
    for logits, place in zip(runtime.forward(rows).logits, (69, 149, 8), strict=True):
        yield float(np.abs(logits - expected[place]).max())


def require_same(case: Case, path: Path, ggml: ctypes.CDLL) -> None:
    written = Written(case, path, ggml)
    expected = written.logits()
    assert DEVIATION / 2 < expected.std() < DEVIATION * 2
    runtime = built(path)
    assert max(differences(runtime, written.ids.tolist(), expected)) < CLOSE
    runtime.close()
    try:
        description, tensors = open_gguf(path)
    except NotCompared:
        assert case.architecture not in REFERENCE_KNOWS
        return
    places = [4, 32, 63, 64, 99, LENGTH - 1]
    found = logits_at(description, tensors, written.ids[:LENGTH].tolist(), places)
    assert np.abs(found - expected[places]).max() < CLOSE, "the reference of `verify`"


@pytest.mark.parametrize("name", CASES)
def test_every_architecture_and_rope_computes_what_transformers_does(
    name: str, tmp_path: Path, ggml: ctypes.CDLL
) -> None:
    require_same(CASES[name], tmp_path / "model.gguf", ggml)


COMPARED = {
    "llama, Q4_K": Case(kind="Q4_K"),
    "llama, Q5_0": Case(kind="Q5_0"),
    "llama, bf16 and Llama 3.1's RoPE": Case(kind="BF16", config={"rope_parameters": LLAMA3}),
    "qwen3, Q8_0": CASES["qwen3"],
}
"""The files of the table in docs/models.md, which this prints with `-s`."""
MOST_OFF: dict[Profile, float] = {"exact": CLOSE, "fast": DEVIATION / 2, "small": DEVIATION / 2}
"""Outside `exact` activations are rounded, too: to 16 bits where a processor has AMX, to 8 by llama.cpp."""


@pytest.mark.parametrize("name", COMPARED)
def test_both_runtimes_compute_what_transformers_does_in_every_profile(
    name: str, tmp_path: Path, ggml: ctypes.CDLL
) -> None:
    path, unpacked = tmp_path / "model.gguf", tmp_path / "f32.gguf"
    written = Written(COMPARED[name], path, ggml)
    expected, ids = written.logits(), written.ids.tolist()
    built(path).close()
    write_as_f32(Shards(path), unpacked)
    found: list[str] = []
    for profile, most in MOST_OFF.items():
        xml = path.with_suffix(".xml")
        openvino = OpenVinoRuntime(xml, profile=profile, context_length=LENGTH + 1)
        file = unpacked if profile == "exact" else path
        options = LlamaOptions(profile=profile, threads=1)
        llama = load_llama(file, context_length=LENGTH + 1, options=options)
        for runtime in (openvino, llama):
            runtime.allocate(16)
            off = max(differences(runtime, ids, expected))
            found.append(f"{off:.1g}" if off < 0.01 else f"{off:.2f}")
            runtime.close()
            assert off < most, (runtime.info.name, off)
    print(f"| {name} | {' | '.join(found[0::2] + found[1::2])} |")


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_type_computes_what_transformers_does(
    kind: str, tmp_path: Path, ggml: ctypes.CDLL
) -> None:
    require_same(Case(kind=kind), tmp_path / "model.gguf", ggml)
