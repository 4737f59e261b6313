"""llama.cpp's sequences as caches of blocks: right, and seen to be wrong where a fault is planted."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from random_model import WITH_WINDOW, Shape, write_random_model
from recollect.engine.engine import Engine
from recollect.engine.sequence import Sequence
from recollect.errors import ConfigError, RuntimeFailure, UnsupportedModelError
from recollect.kv.disk import DiskStore
from recollect.runtime import llama_library
from recollect.runtime import llamacpp as module
from recollect.runtime.base import Logits, PagedRuntime, Row, SequenceId
from recollect.runtime.llama_library import (
    VARIABLE,
    Device,
    Found,
    LlamaLibrary,
    found_libraries,
    library,
)
from recollect.runtime.llama_model import LlamaModel, LlamaOptions, LlamaVocabulary
from recollect.runtime.llama_state import Layout
from recollect.runtime.llamacpp import LlamaCppRuntime, load_llama
from recollect.runtime.sequences import SequenceAdapter

SHAPE = Shape(head_size=32)
EXACT = LlamaOptions(profile="exact", threads=1)
ELSEWHERE = 1e-3
"""Beyond rounding; a wrong slot is off by more than 1."""

Open = Callable[..., LlamaCppRuntime]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("llama") / "random.gguf", SHAPE)


@pytest.fixture
def open_runtime(path: Path) -> Iterator[Open]:
    made: list[PagedRuntime] = []

    def make(options: LlamaOptions = EXACT, blocks: int = 160) -> LlamaCppRuntime:
        runtime = load_llama(path, context_length=512, options=options)
        made.append(runtime)
        runtime.allocate(blocks)
        assert isinstance(runtime, LlamaCppRuntime)
        return runtime

    yield make
    for runtime in made:
        runtime.close()


def ids_of(length: int, seed: int = 0) -> list[int]:
    return [int(one) for one in np.random.default_rng(seed).integers(10, 250, length)]


def table(tokens: int, first: int = 0) -> list[int]:
    return list(range(first, first + -(-tokens // 32)))


def run(runtime: PagedRuntime, ids: list[int], blocks: list[int], past: int = 0) -> Logits:
    logits: Logits = runtime.forward([Row(ids[past:], past, blocks)]).logits[0]
    return logits


def lose_all_lanes(runtime: LlamaCppRuntime) -> None:
    for number in range(runtime.info.pace.most_rows):
        run(runtime, ids_of(5, 50 + number), [140 + number])


def differs(first: Logits, second: Logits) -> float:
    return float(np.abs(first - second).max())


@pytest.mark.parametrize("profile", ["exact", "fast", "small"])
def test_reuse_is_bitwise_for_the_same_passes(open_runtime: Open, profile: Any) -> None:
    runtime = open_runtime(LlamaOptions(profile=profile, threads=1))
    ids, more = ids_of(100), ids_of(20, 1)
    expected = run(runtime, ids, table(100, 20))
    expected = run(runtime, ids + more, table(120, 20), 100)
    run(runtime, ids, table(120))
    assert np.array_equal(run(runtime, ids + more, table(120), 100), expected)
    lose_all_lanes(runtime)
    assert np.array_equal(run(runtime, ids + more, table(120), 100), expected)
    assert np.array_equal(run(runtime, ids + more, table(120), 100), expected)  # rewound
    runtime.check()


def test_more_rows_than_lanes_are_computed_in_groups(open_runtime: Open) -> None:
    runtime = open_runtime()
    assert runtime.info.pace.most_rows == 4
    rows = [ids_of(10 + number, number) for number in range(11)]
    alone = [run(runtime, ids, [20 + number]) for number, ids in enumerate(rows)]
    together = runtime.forward([Row(ids, 0, [number]) for number, ids in enumerate(rows)]).logits
    for one, other in zip(alone, together, strict=True):
        assert differs(one, other) < ELSEWHERE
    runtime.check()


def test_a_lane_that_another_sequence_goes_on_from_is_not_taken(open_runtime: Open) -> None:
    runtime = open_runtime()
    ids, first, second = ids_of(64), SequenceId(), SequenceId()
    runtime.forward([Row(ids + ids_of(10, 1), 0, table(96), sequence=first)])
    lane = runtime.lane_lengths.index(74)
    runtime.forward([Row(ids_of(3, 2), 64, [0, 1, 9], sequence=second)])
    assert runtime.lane_lengths[lane] == 74
    runtime.forward([Row([7], 74, table(96), sequence=first)])
    assert runtime.lane_lengths[lane] == 75


def test_a_foreign_block_is_seen(open_runtime: Open) -> None:
    runtime = open_runtime()
    ids, other = ids_of(96), ids_of(96, 9)
    expected = run(runtime, ids, table(96))
    run(runtime, other, table(96, 10))
    assert differs(run(runtime, ids, [0, 1, 2], 95), expected) < ELSEWHERE
    run(runtime, ids[:64], table(64, 30))
    assert differs(run(runtime, ids, [30, 31, 3], 64), expected) < ELSEWHERE
    assert differs(run(runtime, ids, [30, 11, 3], 64), expected) > 1


def test_zeroed_bytes_are_seen_also_where_a_lane_has_the_right_ones(open_runtime: Open) -> None:
    runtime = open_runtime()
    ids = ids_of(96)
    expected = run(runtime, ids, table(96))
    content = bytearray(runtime.info.bytes_per_block)
    runtime.write_block(0, memoryview(content))
    assert differs(run(runtime, ids, table(96), 64), expected) > 1


def test_a_lane_matched_by_ids_alone_would_be_found(
    open_runtime: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KV of the same tokens that came from elsewhere is used, and not what a lane happens to have."""
    runtime = open_runtime(replace(EXACT, lanes=1))
    ids = ids_of(96)
    expected = run(runtime, ids, table(96))
    run(runtime, ids_of(64, 4), table(64, 10))
    content = bytearray(runtime.info.bytes_per_block)
    runtime.read_block(11, memoryview(content))

    def brings_in_other_kv() -> float:
        run(runtime, ids, table(96))
        runtime.write_block(1, memoryview(content))
        return differs(run(runtime, ids, table(96), 64), expected)

    assert brings_in_other_kv() > 1
    by_ids = lambda lane, wanted: min(len(lane), len(wanted))  # noqa: E731 - which are the same here
    monkeypatch.setattr(module, "common_length", by_ids)
    with pytest.raises(AssertionError):
        assert brings_in_other_kv() > 1


def test_a_row_that_reads_what_was_never_written_is_refused(open_runtime: Open) -> None:
    runtime = open_runtime()
    run(runtime, ids_of(20), [0])
    with pytest.raises(RuntimeFailure, match="nothing was ever"):
        runtime.forward([Row([5], 21, [0])])
    runtime.check()


def test_a_pass_that_fails_leaves_what_was_there(
    open_runtime: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = open_runtime()
    ids = ids_of(80)
    expected = run(runtime, ids, table(80))
    run(runtime, ids[:70], table(80, 10))
    with monkeypatch.context() as patched:
        patched.setattr(runtime.model.lib, "llama_decode", lambda *_: 2)
        with pytest.raises(RuntimeFailure, match="running the model"):
            run(runtime, ids, table(80, 10), 70)
    runtime.check()
    assert differs(run(runtime, ids, table(80, 10), 70), expected) < ELSEWHERE


@pytest.mark.parametrize("profile", ["exact", "fast", "small"])
def test_a_state_is_made_of_blocks_byte_by_byte(open_runtime: Open, profile: Any) -> None:
    runtime = open_runtime(LlamaOptions(profile=profile, threads=1))
    run(runtime, ids_of(77), table(77))
    lane = runtime.lane_lengths.index(77)
    state = runtime.model.state(lane)
    layout = runtime.layout
    blocks = layout.cut(state, range(3), 77)
    assert np.array_equal(layout.join(blocks, range(3), lane, 77), state)
    assert not np.array_equal(layout.join(blocks, [2, 1, 0], lane, 77), state)
    with pytest.raises(ValueError, match="state"):
        layout.cut(state, range(3), 76)


def test_an_arrangement_that_is_not_known_is_replayed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Layout, "learn", classmethod(lambda *_, **__: None))
    runtime = load_llama(path, context_length=512, options=EXACT)
    assert isinstance(runtime, SequenceAdapter)
    assert not runtime.info.reuse.as_bytes
    runtime.allocate(40)
    ids = ids_of(70)
    expected = run(runtime, ids, table(70))
    run(runtime, ids[:40], table(70, 5))
    assert differs(run(runtime, ids, table(70, 5), 40), expected) < ELSEWHERE
    runtime.close()


def test_states_with_bytes_that_nobody_explains_are_not_learned(open_runtime: Open) -> None:
    runtime = open_runtime()
    run(runtime, ids_of(3), [0])
    lane = runtime.lane_lengths.index(3)
    state = runtime.model.state(lane)
    learn: dict[str, Any] = {"sequence": lane, "streams": 4, "cells": 3, "block_size": 32}
    assert Layout.learn(state, **learn) is not None
    assert Layout.learn(np.concatenate([state, np.zeros(4, np.uint8)]), **learn) is None
    assert Layout.learn(state[:-1], **learn) is None


@pytest.mark.slow
def test_the_window_is_left_behind_and_come_back_to(tmp_path: Path) -> None:
    file = write_random_model(tmp_path / "window.gguf", WITH_WINDOW)
    runtime = load_llama(file, context_length=512, options=EXACT)
    assert isinstance(runtime, LlamaCppRuntime)
    runtime.allocate(160)
    ids, more = ids_of(400), ids_of(9, 3)
    run(runtime, ids, table(409))
    for past in (30, 70, 200, 333):
        expected = run(runtime, ids[:past] + more, table(409, 20))
        blocks = [*table(past)[:-1], 100, 101]
        runtime.copy_blocks([(table(past)[-1], 100)])
        lose_all_lanes(runtime)
        assert differs(run(runtime, ids[:past] + more, blocks, past), expected) < ELSEWHERE, past
    runtime.close()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (LlamaOptions(kv_type="f12"), "choose one of f32"),
        (LlamaOptions(profile="exact", kv_type="q8_0"), "with KV of q8_0 .*: take another"),
        (LlamaOptions(gpu_layers=3), "There is no graphics card"),
        (LlamaOptions(device="CUDA0"), "has no device 'CUDA0' here: it has CPU; give one"),
        (LlamaOptions(device="GPU"), "has no device 'GPU' here"),
    ],
)
def test_options_that_cannot_be_are_one_sentence(
    path: Path, options: LlamaOptions, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        load_llama(path, context_length=512, options=options)


@pytest.mark.parametrize(("added", "drops"), [(None, True), (True, True), (False, False)])
def test_a_sentencepiece_vocabulary_adds_a_space_unless_its_file_says_no(
    tmp_path: Path, *, added: bool | None, drops: bool
) -> None:
    words, file = tmp_path / "words.gguf", tmp_path / "spoken.gguf"
    writer = gguf.GGUFWriter(words, "llama")
    bytes_of = [f"<0x{number:02X}>" for number in range(256)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *bytes_of, "a", "\u2581a"])
    writer.add_token_scores([0.0] * 259 + [-1.0, -2.0])
    writer.add_token_types([2, 3, 3, *[6] * 256, 1, 1])
    if added is not None:
        writer.add_add_space_prefix(added)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    table = LlamaVocabulary(write_random_model(file, SHAPE, vocabulary_of=words))
    assert table.drops_first_space is drops
    (token_id,) = table.cut(b"a", with_control=False)
    assert table.piece(token_id) == (b" a" if drops else b"a")


def test_a_file_that_is_none_is_one_sentence(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(UnsupportedModelError, match=r"cannot load broken\.gguf"):
        load_llama(broken, context_length=512, options=EXACT)


def test_a_library_that_is_named_and_missing_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "libllama.so"))
    with pytest.raises(UnsupportedModelError, match="where no file is"):
        found_libraries()


def test_another_release_of_the_package_is_refused() -> None:
    refusal = llama_library.refusal_of(Found(Path("x"), "xllamacpp-2026.9.11063", ""))
    assert refusal == "it is 2026.9.11063, and 2026.10.11549 was tested"
    for version, ok in (("0.3.36", True), ("0.3.9", False), ("0.4.0", False)):
        found = Found(Path("x"), f"llama-cpp-python-{version}", "")
        assert (llama_library.refusal_of(found) is None) is ok


def test_a_machine_with_another_release_alone_is_told_which_one_it_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = Found(Path("x"), "xllamacpp-2026.9.11063", "xllamacpp 2026.9.11063")
    monkeypatch.setattr(llama_library, "found_libraries", lambda: [other])
    library.cache_clear()
    with pytest.raises(
        UnsupportedModelError,
        match=r"can be used \(xllamacpp .*11063: it is .*11063, and .*11549 was tested\): install it",
    ):
        library()
    library.cache_clear()


def test_a_build_with_other_structures_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a field was added: every default behind it is another's."""
    changed = {**llama_library.CONTEXT_DEFAULTS, "n_batch": 1024}
    monkeypatch.setattr(llama_library, "CONTEXT_DEFAULTS", changed)
    with pytest.raises(UnsupportedModelError, match=r"not known here \(its default n_batch"):
        LlamaLibrary(library().found)


def test_what_is_no_library_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "libllama.so"
    other.write_bytes(b"no library")
    with pytest.raises(UnsupportedModelError, match=r"cannot be used as llama\.cpp's library"):
        LlamaLibrary(Found(other, "x", "x"))


def test_without_memory_for_all_lanes_there_are_fewer(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opens = LlamaModel.open

    def open_few(self: Any, cells: int, lanes: int) -> None:
        if lanes > 2:
            raise RuntimeFailure("no memory")
        opens(self, cells, lanes)

    monkeypatch.setattr(LlamaModel, "open", open_few)
    runtime = load_llama(path, context_length=512, options=EXACT)
    runtime.allocate(160)
    assert runtime.info.pace.most_rows == 2
    assert "memory for 2 of 4 sequences" in caplog.text
    assert len(runtime.forward([Row([5 + n], 0, [n]) for n in range(5)]).logits) == 5
    runtime.close()


@pytest.mark.parametrize("blocks", [3, 16, 40, 160])
def test_lanes_take_what_is_counted_for_them(
    path: Path, blocks: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As the library itself says how large its KV is."""
    caplog.set_level("DEBUG", llama_library.__name__)
    runtime = load_llama(path, context_length=512, options=EXACT)
    caplog.clear()
    runtime.allocate(blocks)
    sizes = [re.search(r"CPU KV buffer size =\s+([\d.]+) MiB", one) for one in caplog.messages]
    (held,) = [float(found[1]) * 2**20 for found in sizes if found]
    info = runtime.info
    counted = info.kv_bytes(blocks) - blocks * info.bytes_per_block
    assert held <= counted <= 1.2 * held + 100
    with monkeypatch.context() as patched:
        patched.setattr(LlamaModel, "decode", lambda *_: pytest.fail("was too long"))
        with pytest.raises(RuntimeFailure):
            run(runtime, ids_of(blocks * 32 + 1), list(range(blocks)))
    assert len(run(runtime, ids_of(min(512, blocks * 32)), list(range(blocks))))
    runtime.close()


@pytest.mark.few(1)
@pytest.mark.skipif(sys.platform != "linux", reason="libgomp waits, and on Linux alone")
@pytest.mark.parametrize(
    ("loadavg", "own", "spins"),
    [
        ("0.00 0.00 0.00 1000/2000 77", {}, "1000"),
        ("1000.00 0.00 0.00 1/2000 77", {}, "300000"),
        (None, {}, "300000"),
        ("0.00 0.00 0.00 1000/2000 77", {"GOMP_SPINCOUNT": "77"}, "77"),
        ("0.00 0.00 0.00 1000/2000 77", {"OMP_WAIT_POLICY": "passive"}, "0"),
    ],
    ids=["busy", "busy a minute ago", "not told", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"],
)
def test_libgomp_itself_says_how_long_threads_spin(
    loadavg: str | None, own: dict[str, str], spins: str, tmp_path: Path
) -> None:
    """And the environment, which processes that are started later have too, is as it was."""
    told = tmp_path / "loadavg"
    if loadavg is not None:
        told.write_text(loadavg)
    code = (
        "import os, pathlib\n"
        "from recollect.runtime import llama_library as found, llama_threads\n"
        f"llama_threads.LOADAVG = pathlib.Path({str(told)!r})\n"
        "before = dict(os.environ)\n"
        "found.library()\n"
        "assert os.environ == before, os.environ\n"
    )
    env = {name: value for name, value in os.environ.items() if "OMP_" not in name}
    done = subprocess.run(  # noqa: S603 - our own program
        [sys.executable, "-c", code],
        env={**env, **own, "OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr) == [spins]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="libgomp waits, and on Linux alone")
def test_threads_that_wait_leave_the_cores_to_others(path: Path) -> None:
    """Spinning as libgomp does by itself, two threads took 60 times the processor time of one."""
    busy = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
        for _ in range(2 * (os.cpu_count() or 1))
    ]
    took: dict[int, list[float]] = {1: [], 2: []}
    try:
        made = {
            count: load_llama(path, context_length=512, options=replace(EXACT, threads=count))
            for count in took
        }
        for runtime in made.values():
            runtime.allocate(16)
        for _ in range(5):
            for count, runtime in made.items():
                before = time.process_time()
                run(runtime, ids_of(64), table(64))
                for token in range(64, 80):
                    run(runtime, ids_of(80)[: token + 1], table(80), token)
                took[count].append(time.process_time() - before)
        for runtime in made.values():
            runtime.close()
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert min(took[2]) < 10 * min(took[1]) + 0.01


def card(free_bytes: int) -> Device:
    return Device("CUDA0", "a card", "GPU", free_bytes, 80 << 30)


@pytest.mark.parametrize(("free", "layers"), [(8 << 30, 3), (1 << 29, 0)])
def test_as_many_layers_go_to_a_card_as_fit(
    path: Path, monkeypatch: pytest.MonkeyPatch, free: int, layers: int
) -> None:
    monkeypatch.setattr(LlamaLibrary, "devices", lambda _: [card(free)])
    model = LlamaModel(library(), path, LlamaOptions(threads=1))
    assert model.layers_on_card == layers
    assert model.device == ("CUDA" if layers else "CPU")
    model.close()


@pytest.mark.parametrize(
    ("asked", "handles"),
    [
        (None, []),  # all there are, in the library's own order
        ("CPU", None),
        ("gpu", [11, 12, 13]),
        ("cuda", [11, 12]),
        ("CUDA1", [12]),
        ("Vulkan0", [13]),
    ],
)
def test_the_device_that_was_asked_for_computes(
    path: Path, monkeypatch: pytest.MonkeyPatch, asked: str | None, handles: list[int] | None
) -> None:
    names = {"CUDA0": 11, "CUDA1": 12, "Vulkan0": 13}
    cards = [Device(name, name, "GPU", 8 << 30, 8 << 30, one) for name, one in names.items()]
    cpu = Device("CPU", "a processor", "CPU", 8 << 30, 8 << 30, 10)
    monkeypatch.setattr(LlamaLibrary, "devices", lambda _: [cpu, *cards])
    loads, given = LlamaLibrary.load_model, []

    def load(self: LlamaLibrary, file: Path, params: Any) -> int | None:
        chosen = []
        if params.devices:
            array = ctypes.cast(params.devices, ctypes.POINTER(ctypes.c_void_p))
            chosen = list(iter(iter(array).__next__, None))
        given.append(chosen if params.n_gpu_layers else None)
        params.devices, params.n_gpu_layers = None, 0
        return loads(self, file, params)

    monkeypatch.setattr(LlamaLibrary, "load_model", load)
    model = LlamaModel(library(), path, LlamaOptions(device=asked, threads=1))
    assert given[-1] == handles
    assert model.device == ("CPU" if handles is None else "Vulkan" if handles == [13] else "CUDA")
    model.close()


@pytest.mark.slow
def test_a_device_that_is_lost_is_one_sentence_and_loses_nothing(
    open_runtime: Open, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every call fails from then on, as those of CUDA do; what was written before is on the disk."""
    ids = ids_of(100)
    store = partial(DiskStore, tmp_path / "kv", budget_bytes=64 << 20)

    def begun(runtime: LlamaCppRuntime) -> tuple[Engine, Sequence]:
        engine = Engine(runtime, num_blocks=160, fingerprint="random", store=store())
        sequence = engine.new_sequence()
        sequence.append(ids)
        engine.compute([sequence])
        return engine, sequence

    runtime = open_runtime()
    engine, sequence = begun(runtime)
    assert engine.tier is not None
    engine.tier.flush()
    with monkeypatch.context() as lost:
        runtime.model.layers_on_card = 1
        lost.setattr(LlamaLibrary, "devices", lambda _: [card(0)])
        lost.setattr(runtime.model.lib, "llama_decode", lambda *_: -3)
        lost.setattr(runtime.model.lib, "llama_state_seq_get_data", lambda *_: 0)
        for _ in range(2):
            sequence.append([7])
            with pytest.raises(RuntimeFailure, match=r"If CUDA was lost, load .* --device CPU"):
                engine.compute([sequence])
        assert sequence.token_ids == [*ids, 7, 7]  # the caller has all that was said
        sequence.release()
        engine.check()
        engine.close()
    engine, sequence = begun(open_runtime())
    assert engine.computed_tokens == 1
    engine.close()


def test_half_a_model_on_a_card_is_said_and_another_format(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reserve = 512 << 20
    half = int((reserve + path.stat().st_size * 0.5) / 0.85)
    monkeypatch.setattr(LlamaLibrary, "devices", lambda _: [card(half)])
    model = LlamaModel(library(), path, LlamaOptions(threads=1))
    assert model.layers_on_card == 1
    assert "memory for 1 of 3 layers" in caplog.text
    formats = {model.information(512, None).kv_format}
    assert model.put_less_on_cards()
    assert model.layers_on_card == 0
    formats.add(model.information(512, None).kv_format)
    assert len(formats) == 2
    assert not model.put_less_on_cards()
    model.close()


def test_a_file_that_was_unpacked_for_loading_alone_is_not_loaded_again(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in profile `exact`, on a card that has memory for the weights and none for KV."""
    unpacked = tmp_path / "f32.gguf"
    shutil.copyfile(path, unpacked)
    monkeypatch.setattr(LlamaLibrary, "devices", lambda _: [card(8 << 30)])
    runtime = load_llama(unpacked, context_length=512, options=EXACT)
    unpacked.unlink()
    monkeypatch.setattr(LlamaLibrary, "new_context", lambda *_: None)
    with pytest.raises(
        RuntimeFailure,
        match=rf"take 530,516 bytes on the .*, of which {8 << 30:,} .*fewer layers on the card",
    ):
        runtime.allocate(160)
    runtime.close()


def test_a_machine_without_the_library_is_told_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(llama_library, "found_libraries", list)
    library.cache_clear()
    with pytest.raises(
        UnsupportedModelError,
        match=r'not on this machine: install .*recollect-llm\[llama\]".*CMAKE_ARGS',
    ):
        library()
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(UnsupportedModelError, match=r"pip install llama-cpp-python`, or set"):
        library()
    library.cache_clear()


def test_an_architecture_that_the_library_does_not_know_is_named(tmp_path: Path) -> None:
    unknown = write_random_model(tmp_path / "new.gguf", replace(SHAPE, architecture="brandnew"))
    with pytest.raises(
        UnsupportedModelError,
        match=r"cannot load new\.gguf \(.*unknown model architecture: 'brandnew'",
    ):
        load_llama(unknown, context_length=512, options=EXACT)


def test_layers_that_were_asked_for_and_do_not_fit_are_refused_with_both_sizes(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaLibrary, "devices", lambda _: [card(1000)])
    loads = LlamaLibrary.load_model

    def load(self: LlamaLibrary, file: Path, params: Any) -> int | None:
        return None if params.n_gpu_layers else loads(self, file, params)

    monkeypatch.setattr(LlamaLibrary, "load_model", load)
    size = f"{path.stat().st_size:,}"
    with pytest.raises(UnsupportedModelError, match=f"1,000 bytes are free.*{size}.*gpu-layers"):
        LlamaModel(library(), path, LlamaOptions(gpu_layers=2))
    chosen = LlamaModel(library(), path, LlamaOptions())  # nobody asked: then fewer
    assert chosen.layers_on_card == 0
    chosen.close()


def test_a_copy_is_in_the_lane_of_its_source_until_somebody_wants_it(
    open_runtime: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each turn copies the block in which the one before ended; taking it out takes the whole lane."""
    runtime, taken = open_runtime(), []
    state = LlamaModel.state

    def counted(self: LlamaModel, lane: int) -> Any:
        taken.append(lane)
        return state(self, lane)

    monkeypatch.setattr(LlamaModel, "state", counted)
    ids, one, other = ids_of(80), ids_of(10, 1), ids_of(20, 2)
    run(runtime, ids, table(80))
    runtime.copy_blocks([(2, 20)])
    run(runtime, ids + one, [0, 1, 20], 80)
    runtime.copy_blocks([(2, 21)])
    runtime.check()
    assert not taken
    # The lane goes back to where the copies part, and the first one's end is kept.
    got = run(runtime, ids + other, [0, 1, 21, 22], 80)
    assert differs(got, run(runtime, ids + other, table(100, 40))) < ELSEWHERE
    runtime.check()
    lose_all_lanes(runtime)
    got = run(runtime, [*ids, *one, 7], [0, 1, 20], 90)
    assert differs(got, run(runtime, [*ids, *one, 7], table(91, 50))) < ELSEWHERE
    got = run(runtime, [*ids, 8], [0, 1, 2], 80)
    assert differs(got, run(runtime, [*ids, 8], table(81, 60))) < ELSEWHERE
    runtime.check()
