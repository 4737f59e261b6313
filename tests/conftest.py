"""
Fixtures that every part's tests share, and the Hypothesis profiles.

Test modules do not import each other; what they share comes from here.
"""

import faulthandler
import gc
import os
import re
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import platformdirs
import pytest
from hypothesis import HealthCheck, settings

from recollect import config
from recollect.conversation.model import Model
from recollect.engine import sampling
from recollect.engine import sequence as sequence_module
from recollect.engine.engine import Engine
from recollect.engine.reply import IdleWork
from recollect.errors import RuntimeFailure
from recollect.files import cached_sha256
from recollect.kv.disk import DiskStore, NewBlock
from recollect.kv.record import Identity, Pin, Sealer, StoredReply, chained_key, namespace_key
from recollect.models.catalog import CATALOG, reference_model
from recollect.models.fetch import sources_folder
from recollect.models.onnx_folder import Precision, convert_to_onnx, is_onnx_folder
from recollect.models.prepare import original_of
from recollect.runtime.base import (
    Logits,
    Pace,
    PassResult,
    ReferenceRuntime,
    Reuse,
    Row,
    RuntimeInfo,
)
from recollect.runtime.sequences import Feed
from recollect.text.file_tokenizers import HfTokenizer
from recollect.text.tokenizer import END_OF_TURN, ByteTokenizer
from recollect.types import SamplingParams

_SAME = "CI" in os.environ
"""Whether Hypothesis tries the same examples every time: a red build then is about the change."""
_profile = partial(
    settings.register_profile,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
_profile("plain", max_examples=10, stateful_step_count=30, derandomize=_SAME)
_profile("many", max_examples=200, derandomize=_SAME)
_profile("nightly", max_examples=3000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or "many")


# What other programs keep on this machine is no part of a test; `stores` has tests of its own.
for _variable in ("OLLAMA_MODELS", "LLAMA_CACHE", "HF_HUB_CACHE"):
    os.environ[_variable] = "/nonexistent"
# Tests share the cores with each other, whatever the load is when the first loads llama.cpp.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

HERE = Path(__file__).parent
SLOW_FOLDERS = {"clients", "crash", "e2e", "exports", "homes", "real"}
"""Their tests start processes, kill them, take large models or whole homes; all of them are slow."""

CLIENTS = {"anthropics", "openais"}
"""Fixtures whose libraries take seconds to load, in each worker; what asks for them is slow."""


def is_plain(config: pytest.Config) -> bool:
    """Return whether tests are chosen as pyproject.toml says."""
    # Options that are given there keep the space before their value.
    return bool(config.getoption("markexpr").strip() == "not model and not slow")


def pytest_configure(config: pytest.Config) -> None:
    """Have Hypothesis try few examples in a plain run, and many where tests are asked for."""
    if is_plain(config) and "HYPOTHESIS_PROFILE" not in os.environ:
        settings.load_profile("plain")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave slow folders unread in a plain run: the clients that they import take seconds to load."""
    ignored = is_plain(config) and collection_path in [HERE / name for name in SLOW_FOLDERS]
    return True if ignored else None


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their markers
def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """
    Mark what is slow by its folder, fixtures or parameters, and say which tests one worker runs.

    What a file's tests load is then loaded once, and models that are made on first use are made by
    one worker alone.
    """
    for item in items:
        if item.path.relative_to(HERE).parts[0] in SLOW_FOLDERS:
            item.add_marker("slow")
        if CLIENTS & set(getattr(item, "fixturenames", ())):
            item.add_marker("slow")
        if item.get_closest_marker("model"):
            made = {"onnx_folder", "exports_folder"} & set(getattr(item, "fixturenames", ()))
            item.add_marker(pytest.mark.xdist_group("made" if made else str(item.path)))
    functions = defaultdict[str, list[pytest.Function]](list)
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("few"):
            functions[item.nodeid.partition("[")[0]].append(item)
    for tests in functions.values():
        for test in left_out(tests):
            test.add_marker("slow")


def left_out(tests: Sequence[pytest.Function]) -> Iterator[pytest.Function]:
    """
    Yield those of one function's tests that a plain run leaves out, as its marker `few(count)` says.

    It takes *count*, evenly, from the diagonal of the parameters: with (a, b, c) and (1, 2) that is
    a-1, b-2 and c-1, where each value is once.
    """
    tests = [test for test in tests if test.get_closest_marker("slow") is None]
    places = {test: tuple(test.callspec.indices.values()) for test in tests}
    values = [sorted(set(column)) for column in zip(*places.values(), strict=True)]
    longest = max(map(len, values), default=0)
    diagonal = [tuple(column[k % len(column)] for column in values) for k in range(longest)]
    diagonal = [place for place in diagonal if place in places.values()] or sorted(places.values())
    for test in tests:
        (most,) = test.get_closest_marker("few").args  # type: ignore[union-attr]  # its tests have it
        if places[test] not in {diagonal[k * len(diagonal) // most] for k in range(most)}:
            yield test


def pytest_collection_finish() -> None:
    """
    Keep modules and test items out of the garbage collector's way, and let it start less often.

    They stay until the end; every `gc.collect()` of a test would walk through all of them again. What
    tests allocate hardly ever goes in a circle, and those that look for it call `gc.collect()`.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


MOST_MEMORY_BYTES = 16 << 30
"""Of the tests' process: two thirds of what there is where all tests run."""


def pytest_sessionstart(session: pytest.Session) -> None:
    """End tests that take memory without end, and show where: the system would kill them without a word."""
    status = Path("/proc/self/status")
    if "CI" not in os.environ or not status.exists():
        return
    output = os.dup(1)  # before tests capture it

    def watch() -> None:
        while True:
            time.sleep(1)
            told = re.search(r"RssAnon:\s*(\d+) kB", status.read_text())
            if told is not None and int(told[1]) << 10 > MOST_MEMORY_BYTES:
                os.write(
                    output, b"\nThe tests took too much memory; this is what each thread did.\n"
                )
                faulthandler.dump_traceback(output)
                os._exit(137)

    threading.Thread(target=watch, name="memory", daemon=True).start()


@dataclass
class Faults:
    """What the next calls of a `FaultyRuntime` do; None: nothing wrong."""

    forward_in: int | None = None
    """Forward passes until one fails, after it has written garbage; 0 is the next."""
    copy: bool = False
    """Whether the next copy fails before it has copied anything."""
    write_in: int | None = None
    """Blocks that are restored until one fails; 0 is the next."""
    error: type[BaseException] = RuntimeFailure


class FaultyRuntime(ReferenceRuntime):
    """Fails on demand, and leaves the worst that the contract allows behind."""

    def write_block(self, block: int, content: memoryview) -> None:
        faults = self._faults
        if faults.write_in == 0:
            faults.write_in = None
            raise faults.error("injected while restoring")
        if faults.write_in is not None:
            faults.write_in -= 1
        super().write_block(block, content)

    def __init__(
        self,
        faults: Faults,
        *,
        vocab_size: int,
        context_length: int,
        block_size: int,
        whole_blocks_only: bool,
        whole_tails: bool = False,
        pace: Pace = Pace(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(
            vocab_size=vocab_size,
            context_length=context_length,
            block_size=block_size,
            whole_blocks_only=whole_blocks_only,
            whole_tails=whole_tails,
            pace=pace,
        )
        self._faults = faults

    def forward(self, rows: Sequence[Row]) -> PassResult:
        faults = self._faults
        if faults.forward_in == 0:
            faults.forward_in = None
            vocab_size = self.info.vocab_size
            super().forward(
                [
                    replace(row, token_ids=[(token + 1) % vocab_size for token in row.token_ids])
                    for row in rows
                ]
            )
            raise faults.error("injected while writing")
        if faults.forward_in is not None:
            faults.forward_in -= 1
        return super().forward(rows)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        if self._faults.copy:
            self._faults.copy = False
            raise self._faults.error("injected while copying")
        super().copy_blocks(pairs)


class ListedSequences:
    """
    A `SequenceRuntime` without weights: a sequence holds the ids that were appended to it.

    The logits are a hash of all of them. `computed` counts tokens as a library would.
    """

    def __init__(
        self,
        *,
        copies: bool,
        can_cut: bool = True,
        sequences: int = 4,
        vocab_size: int = 50,
        context_length: int = 128,
        block_size: int = 4,
    ) -> None:
        self.info = RuntimeInfo(
            name="listed-1",
            block_size=block_size,
            bytes_per_block=block_size,
            vocab_size=vocab_size,
            context_length=context_length,
            reuse=Reuse(copies=copies),
        )
        self.held: dict[int, list[int]] = {}
        self.computed = 0
        self.fails = False
        self._can_cut = can_cut
        self._sequences = sequences

    def allocate(self, tokens: int) -> int:
        assert tokens > 0
        self.held = {number: [] for number in range(self._sequences)}
        return self._sequences

    def extend(self, feeds: Sequence[Feed]) -> Logits:
        assert len({feed.sequence for feed in feeds}) == len(feeds), "a sequence is fed twice"
        logits = []
        for feed in feeds:
            held = self.held[feed.sequence]
            assert len(held) == feed.past, "the adapter takes it for something else"
            held += feed.token_ids.tolist()
            self.computed += len(feed.token_ids)
            if feed.wants_logits:
                logits.append(self.logits_of(held))
        if self.fails:
            self.fails = False
            raise RuntimeFailure("injected")
        return np.array(logits, np.float32).reshape(-1, self.info.vocab_size)

    def logits_of(self, ids: Sequence[int]) -> Logits:
        return np.random.default_rng(list(ids)).standard_normal(self.info.vocab_size, np.float32)

    def truncate(self, sequence: int, length: int) -> bool:
        if length and not self._can_cut:
            return False
        del self.held[sequence][length:]
        return True

    def copy(self, source: int, target: int, length: int) -> None:
        assert self.info.reuse.copies
        assert self.held[target] == []
        assert 0 < length <= len(self.held[source])
        self.held[target] = self.held[source][:length]

    def close(self) -> None:
        self.held.clear()


@pytest.fixture(scope="session")
def make_sequences() -> Callable[..., ListedSequences]:
    """Return a maker of runtimes that own their KV."""
    return ListedSequences


@pytest.fixture
def faults() -> Faults:
    """Return the switch of every runtime that `make_engine` and `make_model` make in this test."""
    return Faults()


@pytest.fixture
def pace() -> Pace:
    """Return how large the passes of `make_engine` and `make_model` are; tests parametrize it."""
    return Pace()


@pytest.fixture
def make_engine(faults: Faults, pace: Pace) -> Iterator[Callable[..., Engine]]:
    """Return a maker of small engines on the reference runtime."""
    made: list[Engine] = []

    def make(
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        vocab_size: int = 50,
        context_length: int = 128,
        whole_blocks_only: bool = False,
        whole_tails: bool = False,
        eos_token_ids: Sequence[int] = (),
        fingerprint: str = "",
        store: DiskStore | None = None,
    ) -> Engine:
        runtime = FaultyRuntime(
            faults,
            vocab_size=vocab_size,
            context_length=context_length,
            block_size=block_size,
            whole_blocks_only=whole_blocks_only,
            whole_tails=whole_tails,
            pace=pace,
        )
        engine = Engine(
            runtime,
            num_blocks=num_blocks,
            eos_token_ids=eos_token_ids,
            fingerprint=fingerprint,
            store=store,
        )
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.close()


@pytest.fixture
def open_store(tmp_path: Path) -> Callable[..., DiskStore]:
    """Return an opener of one folder's store; whoever opens it closes it, as an engine does."""

    def open_it(*, budget_bytes: int = 64 << 20, sealer: Sealer | None = None) -> DiskStore:
        return DiskStore(tmp_path / "kv", budget_bytes=budget_bytes, sealer=sealer)

    return open_it


@pytest.fixture
def write_earlier_store() -> Callable[..., list[NewBlock]]:
    """
    Return what writes an encrypted store of format 2, whose names of blocks are no secret.

    Apart from those and the number of the format, this version writes the same bytes. A block holds
    its tokens and zeros, is later used than those of chains before its own, and follows the root of
    `weights`. Returns the blocks.
    """

    def write(
        folder: Path,
        sealer: Sealer,
        chains: Sequence[Sequence[tuple[int, ...]]],
        *,
        payload_bytes: int = 8,
        kept: Sequence[Pin] = (),
        said: Mapping[bytes, StoredReply] | None = None,
    ) -> list[NewBlock]:
        times, blocks = count(1.0), list[NewBlock]()
        clock = partial(next, times)
        store = DiskStore(folder, budget_bytes=64 << 20, sealer=sealer, clock=clock)
        root = namespace_key("weights", "", sealer.name_secret)
        for chain in chains:
            parent = root
            for ids in chain:
                key = chained_key(parent, ids)
                payload = bytes(ids).ljust(payload_bytes, b"\0")
                blocks.append(NewBlock(key, parent, parent == root, ids, payload))
                parent = key
        store.write(Identity("weights", "runtime", "f32"), blocks)
        for pin in kept:
            store.add_pin(pin)
        for place, reply in (said or {}).items():
            name = blake2b(root + place, digest_size=32, person=b"recollect reply").digest()
            store.remember({name: reply})
        with store.env.writing() as txn:
            txn.put(b"format", (2).to_bytes(8, "little"), db=store.env.tables["info"])
        store.close()
        return blocks

    return write


@pytest.fixture
def read_only_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a switch after which LMDB's files can be opened for reading alone, whoever asks."""
    opened = lmdb.open

    def refused(path: str, **options: Any) -> lmdb.Environment:
        if not options["readonly"]:
            raise lmdb.ReadonlyError("mdb_env_open: Read-only file system")
        return opened(path, **options)

    return lambda: monkeypatch.setattr(lmdb, "open", refused)


@pytest.fixture
def engine(make_engine: Callable[..., Engine]) -> Engine:
    """Return an engine of 64 blocks of 4 slots, 50 token ids, 128 tokens of context."""
    return make_engine()


@pytest.fixture
def fresh_logits() -> Callable[..., Logits]:
    """Return the oracle: one prefill of some ids on a runtime of their own, without any engine."""

    def fresh(
        ids: Sequence[int],
        *,
        vocab_size: int = 50,
        block_size: int = 4,
        whole_blocks_only: bool = False,
    ) -> Logits:
        runtime = ReferenceRuntime(
            vocab_size=vocab_size, block_size=block_size, whole_blocks_only=whole_blocks_only
        )
        num_blocks = -(-len(ids) // block_size)
        runtime.allocate(num_blocks)
        logits: Logits = runtime.forward([Row(list(ids), 0, range(num_blocks))]).logits[0]
        return logits

    return fresh


@pytest.fixture
def tokenizer() -> ByteTokenizer:
    """Return the tokenizer of the reference model."""
    return ByteTokenizer()


@pytest.fixture
def make_model(faults: Faults, pace: Pace, tmp_path: Path) -> Iterator[Callable[..., Model]]:
    """Return a maker of reference models with any template, context and KV memory."""
    made: list[Model] = []

    def make(
        *,
        template: str | None = None,
        context_length: int = 2048,
        num_blocks: int = 512,
        block_size: int = 8,
        whole_blocks_only: bool = False,
        whole_tails: bool = False,
        store: DiskStore | None = None,
        sampling: Mapping[str, float] | None = None,
        vocab_size: int = ByteTokenizer().vocab_size,
    ) -> Model:
        local = replace(reference_model(), context_length=context_length, sampling=sampling or {})
        if template is not None:
            local = replace(local, chat_template=template)
        runtime = FaultyRuntime(
            faults,
            vocab_size=vocab_size,
            context_length=context_length,
            block_size=block_size,
            whole_blocks_only=whole_blocks_only,
            whole_tails=whole_tails,
            pace=pace,
        )
        kv_memory = num_blocks * runtime.info.bytes_per_block
        home = tmp_path / "home"
        model = Model(local, runtime, profile="exact", home=home, kv_memory=kv_memory, store=store)
        made.append(model)
        return model

    yield make
    for model in made:
        model.engine.check()
        model.close()


@dataclass
class SqlWork:
    """What SQLite did for connections that were opened while it was counted."""

    steps: int = 0
    """Instructions of its virtual machine: some for each row that it looks at."""
    statements: list[str] = field(default_factory=list)

    def clear(self) -> None:
        self.steps = 0
        self.statements.clear()


@pytest.fixture
def sql_work(monkeypatch: pytest.MonkeyPatch) -> SqlWork:
    """Return the count of what SQLite does from here on, for files that are opened from here on."""
    work, connect = SqlWork(), sqlite3.connect

    def step() -> int:
        work.steps += 1
        return 0

    def counted(*arguments: Any, **options: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = connect(*arguments, **options)
        connection.set_progress_handler(step, 1)
        connection.set_trace_callback(work.statements.append)
        return connection

    monkeypatch.setattr(sqlite3, "connect", counted)
    return work


class SmallDisk:
    """A disk of its own that can be filled and made read-only, also for root, whom modes do not bind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fill(self) -> None:
        with (self.path / "filler").open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))

    def make_room(self) -> None:
        (self.path / "filler").unlink()

    def make_read_only(self, *, again: bool = False) -> None:
        """Refuse to write, or with *again* take it once more."""
        how = "remount,rw" if again else "remount,ro"
        subprocess.run(["mount", "-o", how, str(self.path)], check=True)  # noqa: S603, S607 - a test


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """Return a disk of 4 MB, mounted at the home of the test's models and servers."""
    path = tmp_path / "home"
    path.mkdir(mode=0o700)
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m,mode=700", "tmpfs", str(path)]
    try:
        mounted = subprocess.run(mount, check=False, capture_output=True).returncode == 0  # noqa: S603
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("no file system can be mounted here, which takes root")
    yield SmallDisk(path)
    subprocess.run(["umount", "--lazy", str(path)], check=True)  # noqa: S603, S607 - as above


@pytest.fixture
def model(make_model: Callable[..., Model]) -> Model:
    """Return the reference model, with blocks of 8 slots."""
    return make_model()


@pytest.fixture
def plant_hole(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """
    Return a switch after which every prompt that is appended to KV leaves out its first token.

    The fault of the best-known implementation, whose own rewind test passes with it.
    """
    plan_feed = sequence_module.plan_feed

    def with_hole(length: int, computed: int, reuse: Reuse) -> sequence_module.FeedPlan:
        plan = plan_feed(length, computed, reuse)
        if plan.start > 0 and plan.end - plan.start > 1:
            plan = replace(plan, start=plan.start + 1)
        return plan

    return lambda: monkeypatch.setattr(sequence_module, "plan_feed", with_hole)


_TAKE_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
    "os.execvp(sys.argv[1], sys.argv[1:])"
)


@pytest.fixture
def terminal() -> Iterator[Callable[..., Any]]:
    """
    Return what starts a program on a pseudo-terminal, as `pexpect.spawn` does.

    That forks, and what runs in the child before the program does may find a lock that another
    thread held. Models are loaded here, with threads that we know nothing of; so the child is made
    as `subprocess` makes one, and takes the terminal for its own once nothing of ours is in it.
    """
    import pexpect
    import ptyprocess

    class Terminal(pexpect.spawn):  # type: ignore[misc]  # it has no types
        def _spawnpty(self, args: Sequence[bytes], **options: Any) -> ptyprocess.PtyProcess:
            ours, theirs = os.openpty()
            launcher = subprocess.Popen(  # noqa: S603 - what tests start
                [sys.executable, "-I", "-S", "-c", _TAKE_TERMINAL, *args],
                stdin=theirs,
                stdout=theirs,
                stderr=theirs,
                env=options["env"],
                start_new_session=True,
            )
            launcher.returncode = 0  # whoever waits for it is pexpect
            os.close(theirs)
            process = ptyprocess.PtyProcess(launcher.pid, ours)
            if options.get("dimensions"):
                process.setwinsize(*options["dimensions"])
            return process

    started: list[Terminal] = []

    def start(program: str, *arguments: str, **options: Any) -> Terminal:
        child = Terminal(
            program,
            list(arguments),
            encoding="utf-8",
            codec_errors="replace",
            timeout=60,
            **options,
        )
        started.append(child)
        return child

    yield start
    for child in started:
        child.close(force=True)


def _onnx_folder(precision: Precision) -> Path:
    """Return the default model for ONNX Runtime GenAI, converted once for all runs of the tests."""
    try:
        made_with = version("onnxruntime-genai")
    except PackageNotFoundError:
        pytest.skip('needs ONNX Runtime GenAI: pip install "recollect-llm[genai]"')
    entry = CATALOG["smollm2"]
    name = f"{entry.name}-{entry.sha256[:8]}-{precision}-{made_with}"
    folder = platformdirs.user_cache_path("recollect") / "tests" / name
    if not is_onnx_folder(folder):
        if find_spec("torch") is None or find_spec("onnx_ir") is None:
            needs = 'needs a converted model: pip install "recollect-llm[convert]"'
            pytest.fail(needs) if "CI" in os.environ else pytest.skip(needs)
        with original_of(entry.name, home=config.home()) as source:
            convert_to_onnx(source, folder, precision=precision)
    return folder


@pytest.fixture(scope="session")
def onnx_folder() -> Callable[[Precision], Path]:
    """Return a maker of the default model's ONNX GenAI folder, int8 or fp32."""
    return _onnx_folder


TEMPLATES = "llama-cpp-python==0.3.36"
TEMPLATES_FOLDER = "/vendor/llama.cpp/models/templates/"


REAL_FILES = {
    "smollm2": CATALOG["smollm2"].sha256,
    "qwen2.5-coder-0.5b": CATALOG["qwen2.5-coder-0.5b"].sha256,
    "gemma-3-270m": "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
}
"""Digests of GGUF files that tests run where they are kept in the data folder."""


@pytest.fixture(scope="session")
def real_gguf() -> Callable[[str], Path]:
    """Return what finds a real model's file by its name; the test is skipped where it is not here."""

    def find(name: str) -> Path:
        home = config.home()
        for path in sorted(sources_folder(home).rglob("*.gguf")):
            if cached_sha256(path, home=home) == REAL_FILES[name]:
                return path
        pytest.skip(f"needs the file of {name} in the data folder")

    return find


@pytest.fixture(scope="session")
def sources() -> dict[str, str]:
    """
    Return the real chat templates that llama.cpp keeps, by name; fetched once, and kept for later runs.

    They are in its Python package's source, which takes a minute or two to fetch.
    """
    cache = platformdirs.user_cache_path("recollect") / "tests"
    folder = cache / f"templates-{TEMPLATES.rpartition('=')[2]}"
    if not (folder / "whole").exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as fetched:
            command = [sys.executable, "-m", "pip", "download", TEMPLATES, "--no-deps"]
            kept = ["--no-binary", ":all:", "--quiet", "--dest", fetched]
            subprocess.run([*command, *kept], check=True)  # noqa: S603 - pip
            (archive,) = Path(fetched).glob("*.tar.gz")
            with tarfile.open(archive) as package:
                for member in package:
                    if TEMPLATES_FOLDER in f"/{member.name}" and member.name.endswith(".jinja"):
                        file = package.extractfile(member)
                        assert file is not None
                        (folder / Path(member.name).name).write_bytes(file.read())
        (folder / "whole").touch()
    return {file.stem: file.read_text("utf-8") for file in sorted(folder.glob("*.jinja"))}


@pytest.fixture
def nothing_read_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what a turn reads again is not hidden by what was read while nobody waited."""
    monkeypatch.setattr(IdleWork, "start", lambda _, sequence: sequence.release())


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | bytes], SamplingParams]:
    """Return what has a model with a byte per token say a text next, and how it is to be asked."""
    ids: list[int] = []

    def choose(_: object, __: object, *, history: Any, reply_start: int, **___: Any) -> int:
        return ids[len(history) - reply_start]

    def say(text: str | bytes) -> SamplingParams:
        said = text.encode() if isinstance(text, str) else text
        ids[:] = [*said, *ByteTokenizer().encode(END_OF_TURN)]
        return SamplingParams(max_tokens=400)

    monkeypatch.setattr(sampling, "choose_token", choose)
    return say


@pytest.fixture(scope="session")
def make_byte_tokenizer(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[Sequence[str]], HfTokenizer]:
    """Return what makes a tokenizer of bytes and control tokens, the first of which ends a reply."""
    tokenizers = pytest.importorskip("tokenizers")

    def make(control: Sequence[str]) -> HfTokenizer:
        bytes_of = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        vocabulary = {letter: number for number, letter in enumerate(sorted(bytes_of))}
        made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
            add_prefix_space=False, use_regex=False
        )
        made.decoder = tokenizers.decoders.ByteLevel()
        made.add_special_tokens(list(control))
        file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
        made.save(str(file))
        return HfTokenizer(file, frozenset({made.token_to_id(control[0])}), template=None)

    return make
