"""Loading puts the parts together, within the memory that was asked for."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

import recollect
from recollect import config
from recollect.conversation.model import Model
from recollect.engine.budget import CONTEXTS_IN_POOL, pool_size
from recollect.engine.drafts import PassTimes
from recollect.errors import ConfigError, InvalidParameterError, ModelError
from recollect.kv.disk import DiskStore
from recollect.runtime.base import Lanes, RuntimeInfo
from recollect.types import SamplingParams

INFO = RuntimeInfo("x", block_size=32, bytes_per_block=1000, vocab_size=10, context_length=100)


def test_lists_come_in_pages_and_a_search_says_where_each_message_is(
    make_model: Callable[..., Model], open_store: Callable[..., DiskStore]
) -> None:
    model = make_model(store=open_store())
    for name in ("one", "two", "three"):
        session = model.session(name=name, params=SamplingParams(max_tokens=4))
        session.respond(f"An Oak of {name} by the sea")
        session.checkpoint(name)
    first = model.sessions(limit=2)
    assert [each.name for each in first] == ["three", "two"]
    assert [each.name for each in model.sessions(limit=2, after=first[-1].id)] == ["one"]
    assert [each.name for each in model.checkpoints(limit=2)] == ["one", "three"]
    assert [each.name for each in model.checkpoints(limit=2, after="three")] == ["two"]
    hits = model.search('oak "the sea"', limit=2)
    assert [(hit.conversation, hit.branch) for hit in hits] == [("three", "main"), ("two", "main")]
    assert "Oak of three" in hits[0].snippet
    (last,) = model.search('oak "the sea"', limit=2, after=hits[-1].node_id)
    assert last.conversation == "one"
    assert model.search('oak "sea the"') == []
    search = partial(model.search, "oak")
    lists: list[Callable[..., object]] = [model.sessions, model.checkpoints, search]
    for listed in lists:
        with pytest.raises(InvalidParameterError, match="give 1 or more"):
            listed(limit=0)


@pytest.mark.parametrize(("memory", "expected"), [(1000, 1), (1999, 1), (2000, 2), (10**6, 1000)])
def test_a_pool_is_what_the_memory_holds(memory: int, expected: int) -> None:
    assert pool_size(INFO, memory) == expected


@pytest.mark.parametrize("memory", [0, 999, -1])
def test_memory_for_no_block_is_refused(memory: int) -> None:
    with pytest.raises(ConfigError, match="1,000"):
        pool_size(INFO, memory)


@pytest.mark.parametrize("memory", [config.machine_memory_bytes() + 1, 10**20, 10**30])
def test_more_memory_than_the_machine_has_is_refused(memory: int) -> None:
    with pytest.raises(ConfigError, match="memory that this machine has: give less"):
        pool_size(INFO, memory)


LANES = Lanes(most=4, fixed_bytes=100, token_bytes=10, step=8)


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        (1000 + 100 + 32 * 10, 1),
        (2000 + 100 + 64 * 10, 2),  # no row is longer than the blocks, and so is no lane
        (2000 + 100 + 64 * 10 - 1, 1),
        (4000 + 1140, 4),  # one lane for a context of 100 tokens, which are 104 there
        (7000 + 2 * 1140 - 1, 6),  # a second lane with the 200th token
        (7000 + 2 * 1140, 7),
        (100_000, (100_000 - 4 * 1140) // 1000),
    ],
)
def test_lanes_count_as_memory_too(memory: int, expected: int) -> None:
    info = replace(INFO, lanes=LANES)
    assert pool_size(info, memory) == expected
    assert info.kv_bytes(expected) <= memory < info.kv_bytes(expected + 1)


@pytest.mark.parametrize(
    ("memory", "expected"), [(1250, 1), (1499, 1), (2500, 2), (2499, 1), (125_000, 100)]
)
def test_the_kv_of_a_draft_model_counts_as_memory_too(memory: int, expected: int) -> None:
    """For as many tokens, whatever its blocks are: four times as large ones are a quarter as many."""
    beside = replace(INFO, bytes_per_block=250)
    assert pool_size(INFO, memory, beside=beside) == expected
    larger = replace(beside, block_size=4 * INFO.block_size, bytes_per_block=1000)
    assert pool_size(INFO, 8 * 1000 + 2 * 1000, beside=larger) == 8
    with pytest.raises(ConfigError, match="give at least 1,250"):
        pool_size(INFO, 1249, beside=beside)


def test_memory_for_blocks_without_a_lane_is_refused() -> None:
    info = replace(INFO, lanes=LANES)
    with pytest.raises(ConfigError, match=r"1,419 bytes hold no KV block and .*: give at .* 1,420"):
        pool_size(info, 1419)


@pytest.mark.slow
def test_memory_that_the_system_does_not_give_is_said(tmp_path: Path) -> None:
    """As in a container that may use less than the machine has."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30));"
    program = f"import recollect; recollect.load('reference', kv_memory={4 << 30}, kv_disk=0)"
    if sys.platform != "linux" or config.machine_memory_bytes() < 4 << 30:
        pytest.skip("it has no such limit, or less memory than is asked for")
    done = subprocess.run(  # noqa: S603 - our own program
        [sys.executable, "-c", limit + program],
        env={**os.environ, "RECOLLECT_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.splitlines()[-1].startswith(
        "recollect.errors.ConfigError: There is no memory for"
    )


def test_without_a_budget_the_pool_holds_some_full_contexts() -> None:
    assert pool_size(INFO, None) == CONTEXTS_IN_POOL * 4


def test_the_reference_model_needs_no_weights(tmp_path: Path) -> None:
    with recollect.load("reference", home=tmp_path, kv_disk=0) as model:
        assert model.name == "reference"
        assert model.context_length == model.engine.info.context_length
        chat = model.session("S")
        assert chat.respond("Hello").usage.generated_tokens > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_two_loads_of_one_model_have_one_fingerprint_and_give_the_same_reply(
    tmp_path: Path,
) -> None:
    with (
        recollect.load("reference", home=tmp_path) as first,
        recollect.load("reference", home=tmp_path) as second,
    ):
        assert first.fingerprint == second.fingerprint
        assert first.session().respond("Hi").text == second.session().respond("Hi").text


def test_an_unknown_profile_is_refused() -> None:
    with pytest.raises(ConfigError):
        recollect.load("reference", profile="huge")  # type: ignore[arg-type]


def test_an_unknown_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        recollect.load("no-such-model", home=tmp_path)


def test_a_small_kv_memory_is_kept_to(tmp_path: Path) -> None:
    with recollect.load("reference", home=tmp_path, kv_memory=10_000) as model:
        assert model.engine.pool.num_blocks * model.engine.info.bytes_per_block <= 10_000


def test_after_a_restart_a_conversation_is_warm(tmp_path: Path) -> None:
    with recollect.load("reference", home=tmp_path) as model:
        chat = model.session("You are terse.", name="notes")
        first = chat.respond("Hello there, my name is Alex.").usage
    with recollect.load("reference", home=tmp_path) as model:
        usage = model.resume("notes").respond("What is my name?").usage
    known = first.prompt_tokens + first.generated_tokens - 1
    assert usage.restored_tokens >= known
    assert usage.reused_tokens == usage.restored_tokens
    assert usage.reason == "new"


def test_without_a_disk_it_is_read_again_and_says_so(tmp_path: Path) -> None:
    with recollect.load("reference", home=tmp_path, kv_disk=0) as model:
        model.session("You are terse.", name="notes").respond("Hello there.")
    with recollect.load("reference", home=tmp_path, kv_disk=0) as model:
        usage = model.resume("notes").respond("What is my name?").usage
    assert (usage.reused_tokens, usage.restored_tokens) == (0, 0)
    assert usage.reason == "evicted"


def test_a_budget_that_holds_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="or 0 to do without"):
        recollect.load("reference", home=tmp_path, kv_disk=1000)


@pytest.mark.slow
def test_another_process_is_warmed_by_this_one(tmp_path: Path) -> None:
    """And the other way round: both have the store open at once."""
    script = (
        "import sys, recollect\n"
        "from pathlib import Path\n"
        "with recollect.load('reference', home=Path(sys.argv[1])) as model:\n"
        "    usage = model.session('You are terse.').respond(sys.argv[2]).usage\n"
        "    print(usage.restored_tokens, usage.computed_tokens)\n"
    )
    question = "Which rivers flow through more than three countries?"

    def other() -> list[int]:
        command = [sys.executable, "-c", script, str(tmp_path), question]
        done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
        return [int(word) for word in done.stdout.split()]

    with recollect.load("reference", home=tmp_path) as model:
        restored, computed = other()
        assert restored == 0
        usage = model.session("You are terse.").respond(question).usage
        assert usage.restored_tokens == computed - 1
        assert other() == [computed - 1, 1]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_disk_that_is_really_full_costs_one_warning_and_nothing_else(tmp_path: Path) -> None:
    """No file may grow beyond 300 kB: what LMDB then gets is what a full disk gives it."""
    script = (
        "import resource, signal, sys, recollect\n"
        "from pathlib import Path\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "with recollect.load('reference', home=Path(sys.argv[1]), kv_disk=64 << 20) as model:\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n"
        "    chat = model.session('You are terse. ' * 80)\n"
        "    for number in range(6):\n"
        "        print(chat.respond(f'{number}: ' + 'on and on, ' * 60).usage.generated_tokens)\n"
        "        model.engine.tier.flush()\n"
        "    model.engine.check()\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    assert len(done.stdout.splitlines()) == 6
    assert done.stderr.count("\n") == 1
    assert "KV is not kept on disk for now" in done.stderr
    assert "make room" in done.stderr


@pytest.mark.slow
def test_without_kv_on_disk_nothing_is_written_and_on_a_full_disk_what_is_there_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    question = "Which rivers flow through more than three countries?"
    with recollect.load("reference", home=tmp_path, kv_disk=0) as model:
        model.session("You are terse.").respond(question)
        assert model.engine.tier is None
    assert list(tmp_path.rglob("*.mdb")) == []
    monkeypatch.setattr("recollect.config.default_kv_disk_bytes", lambda _: 0)
    with recollect.load("reference", home=tmp_path) as model:
        assert model.engine.tier is None, "there is nothing to be read"
    assert list(tmp_path.rglob("*.mdb")) == []
    with recollect.load("reference", home=tmp_path, kv_disk=64 << 20) as model:
        model.session("You are terse.").respond(question)
    with recollect.load("reference", home=tmp_path) as model:
        assert model.session("You are terse.").respond(question).usage.restored_tokens > 0


def test_a_reply_that_is_generated_again_after_a_restart_is_guessed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the journal: the index of what was said is in memory alone."""
    monkeypatch.setattr(PassTimes, "of", lambda _self, width: 1 + width / 50)  # so that guesses pay
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    with recollect.load("reference", home=tmp_path, kv_disk=0) as model:
        first = model.session(params=params, name="kept").respond("Hello")
    assert first.usage.accepted_tokens < 20
    with recollect.load("reference", home=tmp_path, kv_disk=0) as model:
        again = model.resume("kept", params=params).regenerate()
    assert again.text == first.text
    assert again.usage.accepted_tokens > 20
