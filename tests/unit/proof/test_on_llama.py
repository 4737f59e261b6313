"""All that is above a runtime, on llama.cpp: a mixture of experts, and a hybrid whose state cannot be cut."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest

import recollect
from forking import measure_forks
from random_model import (
    WITH_CONVOLUTIONS,
    WITH_EXPERTS,
    write_bytes_as_vocabulary,
    write_random_model,
)
from recollect import og
from recollect.conversation.loading import bring_in, collect, why_not
from recollect.errors import RuntimeFailure
from recollect.journal.home import encrypt
from recollect.journal.portable import PortableFile, write
from recollect.proof.bench import BenchConfig, run_iterations
from recollect.proof.scenarios import Scenario, play, run_rewind_test
from recollect.proof.verify import compare_with_file, verify
from recollect.types import Profile, SamplingParams

pytestmark = (
    pytest.mark.slow
)  # llama.cpp's threads do not sleep, so beside other tests they take long
SHAPES = {"experts": WITH_EXPERTS, "hybrid": WITH_CONVOLUTIONS}
SHORT = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
Load = Callable[..., recollect.Model]


@pytest.fixture(scope="module", params=sorted(SHAPES))
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    letters = write_bytes_as_vocabulary(folder / "letters.gguf")
    shape = replace(SHAPES[request.param], context=4096, width=128, head_size=32)
    return write_random_model(folder / f"{request.param}.gguf", shape, vocabulary_of=letters)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have llama.cpp compute on one: several wait for each other while other tests have their cores."""
    monkeypatch.setattr(psutil, "cpu_count", lambda **_: 1)


@pytest.fixture
def load(file: Path, tmp_path: Path) -> Load:
    return partial(
        recollect.load,
        str(file),
        runtime="llama",
        profile="exact",
        kv_disk=256 << 20,
        home=tmp_path / "home",
    )


@pytest.fixture
def model(load: Load) -> Iterator[recollect.Model]:
    with load() as model:
        yield model


@pytest.mark.parametrize("profile", ["exact", "fast", "small"])
def test_a_conversation_reuses_itself_in_every_profile(load: Load, profile: Profile) -> None:
    types = {"exact": "f32", "fast": "f16", "small": "q8_0"}
    with load(profile=profile) as model:
        assert model.engine.info.kv_format.startswith(f"{types[profile]},")
        session = model.session("be brief", name="kept", params=SHORT)
        first = session.respond("one" * 60)
        second = session.respond("two")
        assert second.usage.reused_tokens >= first.usage.prompt_tokens
        model.engine.check()


def test_verify_passes(model: recollect.Model) -> None:
    report = verify(model, operations=8, seed=5, boundary_s=2)
    assert report.passed
    assert compare_with_file(model).outcome == "NOT COMPARED"


def test_verify_finds_a_hole(load: Load, plant_hole: Callable[[], None]) -> None:
    with load() as model:
        if not model.engine.info.reuse.inside_blocks:
            pytest.skip("the hole is one of a single token, which a recurrent state cannot have")
        plant_hole()
        with suppress(RuntimeFailure):  # what was never written is refused before it is compared
            assert not verify(model, operations=14, seed=7, boundary_s=2).passed


def test_bench_and_scenarios_run(model: recollect.Model) -> None:
    sizes = BenchConfig(
        input_tokens=300, output_tokens=8, input2_tokens=20, output2_tokens=8, iterations=2
    )
    for iteration in run_iterations(model, sizes, "some text"):
        assert iteration.without.second.reused_tokens == 0
        assert iteration.reuse.second.reused_tokens == 300 + 8 - 1
    turns = play(model, Scenario("short", ("One?", "Two?"), {})).turns
    assert [turn.changed_by_reuse for turn in turns] == [(), ()]


def test_branches_share_their_trunk_and_forks_compute_nothing(load: Load) -> None:
    ids = [10 + number % 200 for number in range(2100)]
    with load(kv_memory=256 << 20) as model:
        result = measure_forks(model, ids)
        assert result.forward_passes == 0
        assert result.fork_blocks == 2048 // model.engine.block_size + 100
        assert (
            result.fork_s.minimum < 1e-3
        )  # the median where nothing else runs: benchmarks/fork.py
        model.engine.check()


def test_eight_branches_are_tried_beside_each_other_on_four_lanes(load: Load) -> None:
    with load() as model:
        assert model.engine.info.pace.most_rows == 4
        session = model.session("be brief", params=SHORT)
        session.respond("one" * 150)
        prompts = [f"ask {number}" for number in range(8)]
        alone = [session.fork().respond(prompt).text for prompt in prompts]
        model.engine.forget()
        explored = session.explore(prompts, keep=0, params=SHORT).read()
        assert [one.text for one in explored.branches] == alone
        first = explored.usage.prompt_tokens // 8
        # What leads to them is read once, and each branch reads what is its own.
        size = model.engine.info.reuse.unit
        assert explored.usage.computed_tokens <= first + 8 * (size + 20)
        model.engine.check()


def test_a_rewind_is_an_exact_one(model: recollect.Model) -> None:
    result = run_rewind_test(model)
    assert (result.rewind_differs_at, result.fresh_differs_at) == (None, None)
    assert result.rewind_computed_tokens == 0


def test_og_appends_generates_and_rewinds(
    file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RECOLLECT_HOME", str(tmp_path / "home"))
    model = og.Model(str(file), profile="exact", runtime="llama")
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=400)
    generator = og.Generator(model, params)
    generator.append_tokens([10 + number % 200 for number in range(300)])
    taken = []
    for _ in range(2):
        generator.rewind_to(300)
        for _ in range(5):
            generator.generate_next_token()
        taken.append(np.asarray(generator.get_sequence(0))[300:].tolist())
    assert len(taken[0]) == 5
    assert taken[0] == taken[1]
    model.close()


def test_an_encrypted_home_and_a_checkpoint_go_on_after_a_restart(
    load: Load, tmp_path: Path
) -> None:
    cipher = encrypt(tmp_path / "home", passphrase="a long passphrase")
    with load(cipher=cipher) as model:
        session = model.session("be brief", name="kept", params=SHORT)
        session.respond("one" * 100)
        session.checkpoint("here")
        expected = session.fork().respond("two")
        session.respond("three")
    with load(cipher=cipher) as model:
        session = model.resume("kept", checkpoint="here", params=SHORT)
        again = session.respond("two")
        assert again.text == expected.text
        unit = model.engine.info.reuse.unit
        assert again.usage.reused_tokens >= expected.usage.prompt_tokens // unit * unit - 64
        assert again.usage.reused_tokens >= 256


def test_a_file_carries_a_conversation_to_another_machine(load: Load, tmp_path: Path) -> None:
    path = tmp_path / "kept.safetensors"
    with load() as model:
        session = model.session("be brief", name="kept", params=SHORT)
        session.respond("one" * 100)
        write(path, model.journal.load("kept"), collect(model, model.resume("kept")))
        expected = session.respond("two")
    portable = PortableFile(path)
    with load(home=tmp_path / "there", profile="fast") as model:
        assert why_not(model, portable) is not None
    with load(home=tmp_path / "there") as model:
        assert why_not(model, portable) is None
        assert bring_in(model, portable) >= 256
        session = model.session("be brief", params=SHORT)
        first = session.respond("one" * 100)
        assert first.usage.reused_tokens >= 256
        assert session.respond("two").text == expected.text
