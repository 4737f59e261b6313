"""Claims about `proof/against_file.py`: what is right passes, and one wrong number in a file does not."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

import recollect
from recollect.models.prepare import Compared
from recollect.proof.gguf_reference import open_gguf
from recollect.proof.reference_model import NotCompared
from recollect.proof.verify import LIMITS, compare_with_file

WIDTH, FEED_FORWARD, HEADS, LAYERS, VOCABULARY = 64, 128, 4, 2, 320
KIND = gguf.GGMLQuantizationType.Q4_1
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def letters() -> list[str]:
    """Return the letter that byte-level vocabularies write for each byte."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (chr(256 + number) for number in range(256))
    return [chr(byte) if byte in printable else next(others) for byte in range(256)]


def matrices() -> dict[str, tuple[int, int]]:
    shapes = {"token_embd": (VOCABULARY, WIDTH), "output": (VOCABULARY, WIDTH)}
    for layer in range(LAYERS):
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            shapes[f"blk.{layer}.{part}"] = (WIDTH, WIDTH)
        for part in ("ffn_gate", "ffn_up"):
            shapes[f"blk.{layer}.{part}"] = (FEED_FORWARD, WIDTH)
        shapes[f"blk.{layer}.ffn_down"] = (WIDTH, FEED_FORWARD)
    return shapes


def write_model(path: Path, *, architecture: str = "llama", experts: int | None = None) -> Path:
    """Write a random model whose logits vary by about 8, as those of real models do."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    if experts is not None:
        writer.add_expert_count(experts)
    tokens = [*SPECIALS, *letters(), "he"]
    tokens += [f"unused{number}" for number in range(VOCABULARY - len(tokens))]
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIALS) + [1] * (VOCABULARY - len(SPECIALS)))
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    for name, shape in matrices().items():
        spread = 1.0 if name in ("token_embd", "output") else 1.4 / shape[1] ** 0.5
        values = random.normal(0, spread, shape).astype(np.float32)
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, KIND), raw_dtype=KIND)
    norms = [f"blk.{layer}.{part}" for layer in range(LAYERS) for part in ("attn_norm", "ffn_norm")]
    for name in ("output_norm", *norms):
        values = random.uniform(0.75, 1.25, WIDTH).astype(np.float32)
        writer.add_tensor(f"{name}.weight", values)
    factors = np.ones(WIDTH // HEADS // 2, np.float32)
    writer.add_tensor("rope_freqs.weight", factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class File:
    """A model's file, open for changing single numbers in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes = bytearray(path.read_bytes())
        self._places = {
            tensor.name: (int(tensor.data_offset), int(tensor.n_bytes), tensor.data.shape)
            for tensor in gguf.GGUFReader(path).tensors
        }

    def raw(self, name: str) -> np.ndarray:
        """Return the bytes of a tensor, to be changed in place; rows by row where it is a matrix."""
        start, size, shape = self._places[f"{name}.weight"]
        flat = np.frombuffer(memoryview(self._bytes)[start : start + size], np.uint8)
        return flat.reshape(shape[0], -1) if len(shape) > 1 else flat

    def save(self, path: Path) -> Path:
        path.write_bytes(self._bytes)
        return path


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def model(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[recollect.Model]:
    home = tmp_path_factory.mktemp("home")
    with recollect.load(original, profile="exact", home=home, kv_disk=0) as loaded:
        yield loaded


def test_a_model_passes_against_its_own_file(model: recollect.Model) -> None:
    report = compare_with_file(model)
    assert (report.outcome, report.reason) == ("PASS", "")
    assert report.tokens >= 48
    assert report.largest < LIMITS["exact"] / 5, "so that what is right is not near the limit"
    assert report.agreement == 1.0
    assert report.perplexity == pytest.approx(report.reference_perplexity, rel=1e-4)
    assert report.tensor_types is not None
    assert next(iter(report.tensor_types)) == "Q4_1"


def one_wrong_zero_point(file: File) -> None:
    """The minimum of one group of 32 numbers, which is the second half of a block's head."""
    head = file.raw("blk.1.ffn_down")[5, 2:4].view(np.float16)
    head[0] = head[0] * np.float16(1.2)


def one_rope_frequency(file: File) -> None:
    file.raw("rope_freqs").view(np.float32)[1] = 1.05


def two_heads_swapped(file: File) -> None:
    size = WIDTH // HEADS
    rows = file.raw("blk.0.attn_q")
    first, second = rows[:size].copy(), rows[size : 2 * size].copy()
    rows[:size], rows[size : 2 * size] = second, first


def a_norm_left_out(file: File) -> None:
    file.raw("blk.0.ffn_norm").view(np.float32)[:] = 1.0


def a_tensor_of_another_layer(file: File) -> None:
    file.raw("blk.1.attn_v")[:] = file.raw("blk.0.attn_v")


def one_number(file: File) -> None:
    """One of 4,096 numbers of one matrix, by 5 of 15 steps."""
    file.raw("blk.0.attn_output")[7, 4] ^= 0x05


PLANTED = (
    one_wrong_zero_point,
    one_rope_frequency,
    two_heads_swapped,
    a_norm_left_out,
    a_tensor_of_another_layer,
    one_number,
)


@pytest.mark.parametrize("plant", PLANTED)
def test_what_differs_from_the_file_fails(
    plant: Callable[[File], None],
    model: recollect.Model,
    original: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The file is changed and not the model, which is the same to whoever compares them."""
    changed = File(original)
    plant(changed)
    path = changed.save(tmp_path / "changed.gguf")
    monkeypatch.setattr(model, "local", replace(model.local, source=path))
    report = compare_with_file(model)
    assert report.outcome == "FAIL"
    assert "is allowed" in report.reason


def test_without_its_file_nothing_is_passed(
    model: recollect.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "local", replace(model.local, source=None))
    report = compare_with_file(model)
    assert report.outcome == "NOT COMPARED"
    assert "recollect pull" in report.reason


def test_the_reference_model_has_no_file(tmp_path: Path) -> None:
    with recollect.load("reference", profile="exact", home=tmp_path, kv_disk=0) as loaded:
        assert compare_with_file(loaded).outcome == "NOT COMPARED"


@pytest.mark.parametrize(
    ("options", "what"),
    [({"architecture": "mamba"}, "architecture mamba"), ({"experts": 4}, "mixtures of experts")],
)
def test_what_the_reference_does_not_know_it_does_not_judge(
    options: dict[str, object], what: str, tmp_path: Path
) -> None:
    path = write_model(tmp_path / "strange.gguf", **options)  # type: ignore[arg-type]  # of a test
    with pytest.raises(NotCompared, match=what):
        open_gguf(path)


def test_an_outcome_is_noted_by_fingerprint(tmp_path: Path) -> None:
    Compared(outcome="PASS", profile="exact", largest=1e-4).write(tmp_path, "ab/cd")
    noted = Compared.read(tmp_path, "ab/cd")
    assert noted is not None
    assert (noted.outcome, noted.profile, noted.largest) == ("PASS", "exact", 1e-4)
    assert noted.at.startswith("20")
    assert Compared.read(tmp_path, "other") is None
    next((tmp_path / "compared").iterdir()).write_text("[1]")
    assert Compared.read(tmp_path, "ab/cd") is None
