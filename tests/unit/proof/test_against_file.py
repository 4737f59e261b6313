"""Claims about the first part of `proof/verify.py`: what is right passes, one wrong number does not."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import gguf
import numpy as np
import pytest

import recollect
from recollect.files import sha256_file
from recollect.proof.gguf_reference import open_gguf
from recollect.proof.reference_model import LIMITS, logits_and_noise
from recollect.proof.verify import FileReport, compare_with_file, verify

WIDTH, FEED_FORWARD, HEADS, LAYERS, VOCABULARY = 64, 128, 4, 2, 320
KIND = gguf.GGMLQuantizationType.Q4_1
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def letters() -> list[str]:
    """Return the letter that byte-level vocabularies write for each byte."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (chr(256 + number) for number in range(256))
    return [chr(byte) if byte in printable else next(others) for byte in range(256)]


def matrices(vocabulary: int) -> dict[str, tuple[int, int]]:
    shapes = {"token_embd": (vocabulary, WIDTH), "output": (vocabulary, WIDTH)}
    for layer in range(LAYERS):
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            shapes[f"blk.{layer}.{part}"] = (WIDTH, WIDTH)
        for part in ("ffn_gate", "ffn_up"):
            shapes[f"blk.{layer}.{part}"] = (FEED_FORWARD, WIDTH)
        shapes[f"blk.{layer}.ffn_down"] = (WIDTH, FEED_FORWARD)
    return shapes


def write_model(
    path: Path,
    *,
    architecture: str = "llama",
    context: int = 512,
    vocabulary: int = VOCABULARY,
    fields: Mapping[str, float | bool] = MappingProxyType({}),
    tensors: Mapping[str, np.ndarray] = MappingProxyType({}),
    without: Collection[str] = (),
    sizes: Mapping[str, float] = MappingProxyType({}),
) -> Path:
    """
    Write a random model whose logits vary by about 8, as those of real models do.

    Args:
        path: The file to write.
        architecture: What it says that it is.
        context: Tokens.
        vocabulary: Tokens, too.
        fields: More of the architecture's.
        tensors: More of them, as f32.
        without: Names of tensors that are left out.
        sizes: What the numbers of a matrix are multiplied by.
    """
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(context)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    for name, value in fields.items():
        add = writer.add_bool if isinstance(value, bool) else writer.add_uint32
        (writer.add_float32 if isinstance(value, float) else add)(f"{architecture}.{name}", value)
    tokens = [*SPECIALS, *letters(), "he"]
    tokens += [f"unused{number}" for number in range(vocabulary - len(tokens))]
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIALS) + [1] * (vocabulary - len(SPECIALS)))
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    for name, shape in matrices(vocabulary).items():
        spread = 1.0 if name in ("token_embd", "output") else 1.4 / shape[1] ** 0.5
        values = random.normal(0, spread, shape).astype(np.float32) * np.float32(sizes.get(name, 1))
        if name not in without:
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, KIND), raw_dtype=KIND)
    norms = [f"blk.{layer}.{part}" for layer in range(LAYERS) for part in ("attn_norm", "ffn_norm")]
    for name in ("output_norm", *norms):
        values = random.uniform(0.75, 1.25, WIDTH).astype(np.float32)
        values *= np.float32(sizes.get(name, 1))
        if name not in without:
            writer.add_tensor(f"{name}.weight", values)
    factors = np.ones(WIDTH // HEADS // 2, np.float32)
    writer.add_tensor("rope_freqs.weight", factors)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
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


@pytest.mark.slow
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


def against(
    model: recollect.Model,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    boundaries: tuple[int, ...] = (),
) -> FileReport:
    """Compare a model with a file as if it had been made of it."""
    local = replace(
        model.local, source=path, source_sha256=sha256_file(path), boundaries=boundaries
    )
    monkeypatch.setattr(model, "local", local)
    return compare_with_file(model)


@pytest.mark.few(1)
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
    report = against(model, changed.save(tmp_path / "changed.gguf"), monkeypatch)
    assert report.outcome == "FAIL"
    assert "is allowed" in report.reason
    assert report.largest > 2 * report.limit, "so that the limit could be twice as far"


@pytest.mark.slow
def test_a_source_that_changed_is_not_compared_with(
    original: Path, model: recollect.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model would fail, which is right, and the file is what is wrong."""
    changed = File(original)
    one_number(changed)
    path = changed.save(tmp_path / "changed.gguf")
    monkeypatch.setattr(model, "local", replace(model.local, source=path))
    report = compare_with_file(model)
    assert report.outcome == "NOT COMPARED"
    assert "no longer the file" in report.reason


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[recollect.Model]:
    """Return a model with logits of thousands."""
    home = tmp_path_factory.mktemp("loud")
    path = write_model(home / "loud.gguf", sizes={"output_norm": 1000.0})
    with recollect.load(path, profile="exact", home=home, kv_disk=0) as loaded:
        yield loaded


@pytest.mark.slow
def test_limits_follow_the_size_of_logits(
    loud: recollect.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is planted in a model with logits of thousands still fails."""
    path = loud.local.source
    assert path is not None
    report = compare_with_file(loud)
    for plant in PLANTED:
        changed = File(path)
        plant(changed)
        found = against(loud, changed.save(tmp_path / "changed.gguf"), monkeypatch)
        assert found.outcome == "FAIL", plant
    assert report.outcome == "PASS", report.reason
    assert report.deviation > 1000
    assert report.largest > LIMITS["exact"], "or this says nothing"
    assert report.limit == pytest.approx(LIMITS["exact"] * report.deviation / 8, rel=1e-3)
    assert math.isfinite(report.perplexity)


@pytest.mark.slow
def test_the_limit_of_reuse_follows_the_size_of_logits(
    loud: recollect.Model, plant_hole: Callable[[], None]
) -> None:
    right = verify(loud, operations=30)
    plant_hole()
    wrong = verify(loud, operations=30)
    assert right.passed
    assert right.largest.logits > LIMITS["exact"], "or this says nothing"
    assert not wrong.passed


@pytest.mark.slow
def test_a_model_that_rounding_moves_far_is_allowed_more(tmp_path: Path) -> None:
    """Attention that takes one token alone amplifies the last bit of its scores."""
    path = write_model(tmp_path / "hard.gguf", sizes={"blk.0.attn_q": 600.0})
    with recollect.load(path, profile="exact", home=tmp_path, kv_disk=0) as hard:
        report = compare_with_file(hard)
    assert report.outcome == "PASS", report.reason
    assert LIMITS["exact"] < report.limit <= 11 * LIMITS["exact"]


def test_noise_is_measured_and_not_a_constant(original: Path) -> None:
    description, tensors = open_gguf(original)
    ids, places = list(range(3, 70)), [5, 30, 60]
    logits, noise = logits_and_noise(description, tensors, ids, places)
    assert 1e-6 < noise < LIMITS["exact"] / 4
    again, same = logits_and_noise(description, tensors, ids, places)
    assert (logits == again).all()
    assert noise == same, "a proof says the same twice"


@pytest.mark.slow
def test_a_model_that_lost_rows_of_its_vocabulary_fails(
    model: recollect.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the logits that both have: those that it lacks are never the likeliest."""
    path = write_model(tmp_path / "more.gguf", vocabulary=VOCABULARY + 20)
    report = against(model, path, monkeypatch)
    assert report.outcome == "FAIL"
    assert "320 logits for a token, and its file 340" in report.reason


@pytest.mark.slow
@pytest.mark.parametrize("context", [1, 2, 48])
def test_a_context_below_48_tokens_is_not_compared(context: int, tmp_path: Path) -> None:
    path = write_model(tmp_path / "short.gguf", context=context)
    with recollect.load(path, profile="exact", home=tmp_path, kv_disk=0) as short:
        report = compare_with_file(short)
    assert report.outcome == "NOT COMPARED"
    assert "too short" in report.reason


@pytest.mark.slow
def test_a_narrow_window_is_looked_beyond(
    model: recollect.Model, original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compare_with_file(model).tokens == 192
    report = against(model, original, monkeypatch, boundaries=(300,))
    assert report.outcome == "PASS"
    assert report.tokens == 316
    wide = against(model, original, monkeypatch, boundaries=(4096,))
    assert wide.tokens == 192


def test_without_its_file_nothing_is_passed(
    model: recollect.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "local", replace(model.local, source=None))
    report = compare_with_file(model)
    assert report.outcome == "NOT COMPARED"
    assert "--check" in report.reason, "a plain pull does not fetch it again"


def test_the_reference_model_has_no_file(tmp_path: Path) -> None:
    with recollect.load("reference", profile="exact", home=tmp_path, kv_disk=0) as loaded:
        assert compare_with_file(loaded).outcome == "NOT COMPARED"
