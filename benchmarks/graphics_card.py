"""
What llama.cpp does on a graphics card: speed, KV in and out, truth, restart, refusals.

    python benchmarks/graphics_card.py --results results.json [--small] [--seconds 240]

Weights are random and made here, so nothing is fetched. Each part runs in a process of its own, because the
library ends the process where something goes badly wrong; what is done is in the results file at once.

- `devices`: what the library computes on.
- `truth`: a small model on the card and on the processor, in f32, against numpy on the file.
- `reuse`: what was rewound, forked, taken out of a lane and put into another, against a fresh prefill.
- `speed`: prefill and decode, by layers on the card; four rows in a pass.
- `kv`: blocks out of a lane and into one, against computing them.
- `restart`: the first token after 4,000 tokens: cold, from memory, from the disk in a new process.
- `refusal`: what is said where a card has no memory.
- `verify`: `recollect verify` on the card, with a real vocabulary where one was brought along.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from random_model import Shape, write_random_model
from recollect import config
from recollect.engine.engine import Engine
from recollect.errors import RecollectError
from recollect.kv.disk import DiskStore
from recollect.runtime.base import Logits, PagedRuntime, Row
from recollect.runtime.llama_library import library
from recollect.runtime.llama_model import LlamaOptions
from recollect.runtime.llamacpp import LlamaCppRuntime, load_llama

LARGE = Shape(
    architecture="qwen2",
    layers=28,
    width=1536,
    heads=12,
    kv_heads=2,
    head_size=128,
    feed_forward=8960,
    vocabulary=151_936,
    context=16_384,
    kind="F16",
    biases=True,
)
"""As Qwen 2.5 1.5B is built."""
MIDDLE = replace(
    LARGE,
    layers=4,
    width=256,
    heads=4,
    head_size=64,
    feed_forward=512,
    vocabulary=4096,
    context=8192,
)
"""The same on a smaller scale, for processors."""
SMALL = Shape(width=256, heads=4, kv_heads=2, head_size=64, feed_forward=512, context=2048)
CONTEXT = 8192
HISTORY = 4000


class Setting:
    """What the parts share."""

    def __init__(self, folder: Path, *, small: bool) -> None:
        self.folder = folder
        self.small = small
        self.shape = MIDDLE if small else LARGE
        self.large = folder / "large.gguf"
        self.little = folder / "little.gguf"

    def options(self, profile: str = "fast", layers: int | None = None) -> LlamaOptions:
        """Return how to run a model; a small one gains nothing from a second thread."""
        threads = 1 if self.small else None
        return LlamaOptions(
            profile=config.parse_profile(profile), gpu_layers=layers, threads=threads
        )

    @property
    def history(self) -> int:
        """Return how long the conversation is that is gone on with after a restart."""
        return 1000 if self.small else HISTORY

    @property
    def layers(self) -> int:
        """Return how many layers there are to put on a card."""
        return self.shape.layers + 1


@contextmanager
def opened(
    path: Path, options: LlamaOptions, *, context: int = CONTEXT, tokens: int = 0
) -> Iterator[LlamaCppRuntime]:
    runtime = load_llama(path, context_length=context, options=options)
    try:
        runtime.allocate((tokens or 4 * context) // runtime.info.block_size)
        assert isinstance(runtime, LlamaCppRuntime), "its KV is not understood"
        yield runtime
    finally:
        runtime.close()


def ids_of(length: int, shape: Shape, seed: int = 0) -> list[int]:
    return [int(one) for one in np.random.default_rng(seed).integers(5, shape.vocabulary, length)]


def read(
    runtime: PagedRuntime,
    ids: Sequence[int],
    blocks: Sequence[int],
    start: int = 0,
    chunk: int = 512,
) -> Logits:
    """Compute ids from *start* on in passes of *chunk* tokens; return the last logits."""
    logits = np.empty(0, np.float32)
    for at in range(start, len(ids), chunk):
        end = min(at + chunk, len(ids))
        given = runtime.forward([Row(ids[at:end], at, blocks, end == len(ids))]).logits
        logits = given[0] if len(given) else logits
    return logits


def timed(work: Callable[[], Any], rounds: int = 3) -> float:
    """Return the shortest time of some rounds, after one that does not count."""
    work()
    times = []
    for _ in range(rounds):
        begun = perf_counter()
        work()
        times.append(perf_counter() - begun)
    return min(times)


def table(tokens: int, first: int = 0) -> list[int]:
    return list(range(first, first + -(-tokens // 32)))


def devices(_: Setting) -> dict[str, Any]:
    lib = library()
    return {
        "build": lib.found.build,
        "origin": lib.found.origin,
        "version": lib.llama_version().decode(),
        "devices": [
            {
                "name": one.name,
                "is": one.description,
                "kind": one.kind,
                "free_bytes": one.free_bytes,
                "total_bytes": one.total_bytes,
            }
            for one in lib.devices()
        ],
    }


def make(setting: Setting) -> dict[str, Any]:
    begun = perf_counter()
    write_random_model(setting.large, setting.shape)
    write_random_model(setting.little, SMALL)
    return {"seconds": perf_counter() - begun, "bytes": setting.large.stat().st_size}


def truth(setting: Setting) -> dict[str, Any]:
    """Compare the small model with numpy's forward pass, on the card and on the processor."""
    from recollect.proof.gguf_reference import open_gguf  # noqa: PLC0415 - this part's alone
    from recollect.proof.reference_model import logits_at  # noqa: PLC0415 - this part's alone

    ids, places = ids_of(600, SMALL), [4, 40, 299, 599]
    expected = np.asarray(logits_at(*open_gguf(setting.little), ids, places))
    found: dict[str, Any] = {"deviation_of_logits": float(expected.std())}
    for layers in (None, 0):
        for profile in ("exact", "fast", "small"):
            options = setting.options(profile, layers)
            with opened(setting.little, options, context=2048) as runtime:
                worst = 0.0
                for number, place in enumerate(places):
                    logits = read(runtime, ids[: place + 1], table(place + 1))
                    worst = max(worst, float(np.abs(logits - expected[number]).max()))
                where = runtime.info.device
                found[f"{profile} on {where}, largest difference from numpy"] = worst
    return found


def reuse(setting: Setting) -> dict[str, Any]:
    return {
        f"{profile} {name}": reuse_in(setting, profile, path, shape)
        for profile in ("exact", "fast", "small")
        for name, path, shape in (
            ("little", setting.little, SMALL),
            ("large", setting.large, setting.shape),
        )
    }


def reuse_in(setting: Setting, profile: str, path: Path, shape: Shape) -> dict[str, float]:
    """Compare logits after each way of reuse with those of a fresh prefill of the same ids."""
    found: dict[str, float] = {}
    ids, more = ids_of(700, shape), ids_of(40, shape, 1)
    options = setting.options(profile)
    with opened(path, options, context=2048) as runtime:

        def fresh(of: list[int]) -> Logits:
            return read(runtime, of, table(len(of), 200))

        def note(name: str, got: Logits, of: list[int]) -> None:
            found[name] = float(np.abs(got - fresh(of)).max())
            runtime.check()

        note("prefill twice", read(runtime, ids, table(740)), ids)
        note("noise: token by token", read(runtime, ids[:150], table(150, 60), 0, 1), ids[:150])
        note("noise: chunks of 64", read(runtime, ids[:150], table(150, 60), 0, 64), ids[:150])
        note("one more", read(runtime, ids + more, table(740), 700), ids + more)
        runtime.copy_blocks([(21, 61)])  # the block in which 690 lies
        forked = [*table(672), 61, 62]
        note("fork", read(runtime, ids[:690] + more, forked, 690), ids[:690] + more)
        note("rewind", read(runtime, ids[:650] + more, table(740), 650), ids[:650] + more)
        for other in range(6):  # every lane is taken by others
            read(runtime, ids_of(100, shape, 7 + other), table(100, 100 + 4 * other))
        back = ids[:640] + more
        note("lane lost and restored", read(runtime, back, [*table(640), 70, 71], 640), back)
        content = bytearray(runtime.info.bytes_per_block)
        for block in table(640):
            runtime.read_block(block, memoryview(content))
            runtime.write_block(block + 80, memoryview(content))
        note("through bytes", read(runtime, back, [*table(640, 80), 72, 73], 640), back)
        runtime.write_block(85, memoryview(bytes(len(content))))
        wrong = read(runtime, back, [*table(640, 80), 74, 75], 640)
        found["planted: a block of zeros"] = float(np.abs(wrong - fresh(back)).max())
        found["deviation of logits"] = float(fresh(back).std())
    return found


def speed(setting: Setting) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    half = setting.layers // 2
    cases: list[tuple[str, int | None, str]] = [
        ("fast", None, "all"),
        ("small", None, "all"),
        ("exact", None, "all"),
    ]
    if any(device.is_graphics for device in library().devices()):
        cases += [("fast", half, f"{half} of {setting.layers}"), ("fast", 0, "none")]
    for profile, layers, name in cases:
        options = setting.options(profile, layers)
        slow = layers is not None
        with opened(setting.large, options) as runtime:
            rows[f"{profile}, {name} on the card"] = speed_of(setting, runtime, slow=slow)
    return rows


def speed_of(setting: Setting, runtime: LlamaCppRuntime, *, slow: bool) -> dict[str, Any]:
    shape, rounds = setting.shape, 1 if slow else 3
    result: dict[str, Any] = {"layers": runtime.info.kv_format}
    for tokens in (512,) if slow or setting.small else (512, 2048, HISTORY):
        ids = ids_of(tokens, shape)
        seconds = timed(partial(read, runtime, ids, table(tokens)), rounds)
        result[f"prefill of {tokens}, tokens/s"] = tokens / seconds
        decoded = 16 if slow else 64

        def decode(tokens: int = tokens, decoded: int = decoded) -> None:
            for at in range(tokens, tokens + decoded):
                runtime.forward([Row([at % 1000 + 5], at, table(tokens + decoded))])

        result[f"decode after {tokens}, tokens/s"] = decoded / timed(decode, rounds)
    lanes = runtime.info.pace.most_rows
    tables = [table(600, 100 + 20 * lane) for lane in range(lanes)]
    for lane in range(lanes):
        read(runtime, ids_of(500, shape, lane), tables[lane])

    def together() -> None:
        for at in range(500, 532):
            runtime.forward([Row([7], at, blocks) for blocks in tables])

    result[f"decode of {lanes} rows after 500, tokens/s"] = 32 * lanes / timed(together, 1)
    return result


def kv(setting: Setting) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for profile in ("fast", "small", "exact"):
        options = setting.options(profile)
        with opened(setting.large, options) as runtime:
            for tokens in (256, 1024) if setting.small else (256, 2048, HISTORY):
                found[f"{profile}, {tokens} tokens"] = kv_of(setting, runtime, tokens)
    return found


def kv_of(setting: Setting, runtime: LlamaCppRuntime, tokens: int) -> dict[str, float]:
    shape, content = setting.shape, bytearray(runtime.info.bytes_per_block)
    ids = ids_of(tokens + 1, shape, tokens)
    blocks = table(tokens + 1)
    begun = perf_counter()
    read(runtime, ids[:tokens], blocks)
    computed = perf_counter() - begun
    begun = perf_counter()
    runtime.read_block(0, memoryview(content))  # all that is dirty in the lane comes with it
    out = perf_counter() - begun
    for number in range(runtime.info.pace.most_rows):  # no lane has it any more
        read(runtime, [5 + number, 6], [250 + number])
    begun = perf_counter()
    runtime.forward([Row(ids[tokens:], tokens, blocks)])
    into = perf_counter() - begun
    again = timed(lambda: runtime.forward([Row(ids[tokens:], tokens, blocks)]))
    return {
        "bytes": runtime.info.bytes_per_block / 32 * tokens,
        "computing, ms": 1e3 * computed,
        "out of a lane, ms": 1e3 * out,
        "into a lane, ms": 1e3 * (into - again),
    }


def restart(setting: Setting) -> dict[str, Any]:
    """Time a first token: cold, from memory, and from the disk in another process."""
    found: dict[str, Any] = {}
    for way in ("write", "disk", "memory", "cold"):
        command = [sys.executable, __file__, "--folder", str(setting.folder), "--first", way]
        command += ["--small"] if setting.small else []
        ended = subprocess.run(command, check=True, stdout=subprocess.PIPE)  # noqa: S603 - ourselves
        found[way] = json.loads(ended.stdout)
    differs = np.subtract(found["memory"].pop("logits"), found["disk"].pop("logits"))
    found["cold"].pop("logits")
    del found["write"]
    found["memory and disk differ by"] = float(np.abs(differs).max())
    return found


def first_token(setting: Setting, way: str) -> dict[str, Any]:
    """Read a history, or find it; then time the token after its next turn."""
    ids, asked = ids_of(setting.history, setting.shape, 3), ids_of(20, setting.shape, 4)
    store = DiskStore(setting.folder / "kv", budget_bytes=8 << 30)
    runtime = load_llama(setting.large, context_length=CONTEXT, options=setting.options())
    engine = Engine(runtime, num_blocks=2 * CONTEXT // 32, fingerprint="random", store=store)
    try:
        engine.wait_until_warm()
        namespace = {"write": "", "disk": ""}.get(way, way)
        if way in ("write", "memory"):
            before = engine.new_sequence(namespace)
            before.append(ids)
            engine.compute([before])
            before.release()
        if way == "write":  # and it leaves its blocks on disk
            return {}
        counted = engine.computed_tokens
        begun = perf_counter()
        sequence = engine.new_sequence(namespace)
        sequence.append(ids + asked)
        engine.compute([sequence])
        seconds = perf_counter() - begun
        assert sequence.logits is not None, "they were just computed"
        return {
            "first token, ms": 1e3 * seconds,
            "computed tokens": engine.computed_tokens - counted,
            "logits": sequence.logits[:2000].tolist(),
        }
    finally:
        engine.close()


def refusal(setting: Setting) -> dict[str, Any]:
    """Ask for more than there is."""
    found: dict[str, Any] = {}

    def said(name: str, work: Callable[[], str]) -> None:
        try:
            found[name] = work()
        except RecollectError as error:
            found[name] = f"{type(error).__name__}: {error}"

    def with_context(context: int, layers: int | None) -> str:
        options = setting.options(layers=layers)
        with opened(setting.large, options, context=context, tokens=4 * context) as runtime:
            rows = runtime.info.pace.most_rows
            ids = ids_of(64, setting.shape)
            read(runtime, ids, table(64))
            return f"runs with {rows} lanes, {runtime.info.kv_format}"

    lib = library()
    cards = [one for one in lib.devices() if one.is_graphics]
    if not cards:
        said("layers without a card", lambda: with_context(512, 10))
        return found
    import torch  # noqa: PLC0415 - only to fill the card's memory

    size = setting.large.stat().st_size
    free = torch.cuda.mem_get_info()[0]
    for name, left in (
        ("half of the weights fit", size // 2 + (1 << 30)),
        ("nothing fits", 600 << 20),
    ):
        held = torch.empty(max(0, free - left), dtype=torch.uint8, device="cuda")
        said(f"{name}, --gpu-layers auto", lambda: with_context(2048, None))
        said(f"{name}, all asked for", lambda: with_context(2048, setting.layers))
        del held
        torch.cuda.empty_cache()
    held = torch.empty(max(0, free - size - (3 << 30)), dtype=torch.uint8, device="cuda")
    said("weights fit, four lanes of 131,072 do not", lambda: with_context(131_072, None))
    said("the same, all asked for", lambda: with_context(131_072, setting.layers))
    del held
    return found


def verify(setting: Setting) -> dict[str, Any]:
    """Run our own proof, where the command can be had."""
    found: dict[str, Any] = {}
    vocabulary = os.environ.get("RANDOM_MODEL_VOCABULARY")
    if vocabulary is None:
        return {"not run": "no vocabulary was brought along"}
    path = setting.folder / "spoken.gguf"
    shape = Shape(
        width=576, heads=9, kv_heads=3, head_size=64, feed_forward=1536, layers=6, context=2048
    )
    write_random_model(path, shape, vocabulary_of=Path(vocabulary))
    for profile in ("exact", "fast"):
        command = [sys.executable, "-m", "recollect", "verify", "--model", str(path)]
        command += ["--runtime", "llama", "--profile", profile, "--operations", "60"]
        ended = subprocess.run(  # noqa: S603 - ourselves
            command, check=False, capture_output=True, text=True, timeout=120
        )
        found[profile] = {"status": ended.returncode, "said": (ended.stdout + ended.stderr)[-3000:]}
    return found


PARTS: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "devices": devices,
    "make": make,
    "truth": truth,
    "reuse": reuse,
    "speed": speed,
    "kv": kv,
    "restart": restart,
    "verify": verify,
    "refusal": refusal,
}


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--results", type=Path)
    options.add_argument("--small", action="store_true", help="a small model, for processors")
    options.add_argument("--seconds", type=float, default=300, help="for everything")
    options.add_argument("--folder", type=Path, help="for itself")
    options.add_argument("--part", help="for itself")
    options.add_argument("--first", help="for itself")
    args = options.parse_args()
    if args.first:
        print(json.dumps(first_token(Setting(args.folder, small=args.small), args.first)))
        return 0
    if args.part:
        print(json.dumps(PARTS[args.part](Setting(args.folder, small=args.small))))
        return 0
    begun, results = perf_counter(), {}
    with tempfile.TemporaryDirectory() as folder:
        for part in PARTS:
            left = args.seconds - (perf_counter() - begun)
            results[part] = run_part(part, Path(folder), left, small=args.small)
            print(f"{part}: {json.dumps(results[part], indent=1)}", flush=True)
            if args.results:
                args.results.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    return 0 if all("failed" not in result for result in results.values()) else 1


def run_part(part: str, folder: Path, seconds: float, *, small: bool) -> dict[str, Any]:
    if seconds < 5:
        return {"not run": "there was no time left"}
    command = [sys.executable, __file__, "--folder", str(folder), "--part", part]
    begun = perf_counter()
    try:
        ended = subprocess.run(  # noqa: S603 - ourselves
            command + (["--small"] if small else []),
            check=False,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"it took longer than {seconds:.0f} s"}
    took = {"took_s": perf_counter() - begun}
    if ended.returncode:
        return {"failed": ended.returncode, "said": ended.stderr[-3000:], **took}
    said = ended.stderr.strip()
    result: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return result | took | ({"said": said[-1500:]} if said else {})


if __name__ == "__main__":
    sys.exit(main())
