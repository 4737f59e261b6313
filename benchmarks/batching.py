"""
What several conversations at once cost each other.

    python benchmarks/batching.py [--model smollm2] [--profile fast] [--save]

1. Overhead: between the forward passes of 4 sequences that decode at 4,000 tokens each; that is
   scheduling, cache, sampling, detokenizing and hand-over, median per pass.
2. Throughput: tokens per second of 4 chats that decode at 1,000 tokens each, over that of one;
   and the same for the forward passes alone, which is the bound.
3. Gap: the longest wait between two tokens of a chat while another's prompt of 4,000 tokens is
   read, over the time of one of its chunks alone.

The runtime is wrapped to note when each pass begins and ends; nothing else is changed.
"""

import statistics
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from time import perf_counter

import recollect
from harness import Load, parser, report, say
from recollect import config
from recollect.models.prepare import prepare
from recollect.runtime.base import Pace, PassResult, Row, RuntimeInfo
from recollect.runtime.openvino import OpenVinoRuntime
from recollect.types import SamplingParams

DECODED = 48
SHARED_CHUNK = Pace().shared_chunk
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


@dataclass
class Pass:
    begun: float
    ended: float
    lengths: tuple[int, ...]

    @property
    def duration(self) -> float:
        return self.ended - self.begun

    @property
    def decodes(self) -> int:
        return sum(length == 1 for length in self.lengths)


@dataclass
class TimedRuntime:
    """A runtime that notes its passes."""

    runtime: OpenVinoRuntime
    passes: list[Pass] = field(default_factory=list)

    @property
    def info(self) -> RuntimeInfo:
        return self.runtime.info

    def allocate(self, num_blocks: int) -> None:
        self.runtime.allocate(num_blocks)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        self.runtime.copy_blocks(pairs)

    def warm_up(self) -> None:
        self.runtime.warm_up()

    def read_block(self, block: int, into: memoryview) -> None:
        self.runtime.read_block(block, into)

    def write_block(self, block: int, content: memoryview) -> None:
        self.runtime.write_block(block, content)

    def close(self) -> None:
        self.runtime.close()

    def forward(self, rows: Sequence[Row]) -> PassResult:
        begun = perf_counter()
        result = self.runtime.forward(rows)
        self.passes.append(Pass(begun, perf_counter(), tuple(len(row.token_ids) for row in rows)))
        return result


def main() -> None:
    args = parser("What conversations at once cost each other.", profile="fast").parse_args()
    load = Load()
    local = prepare(args.model, home=config.home())
    assert local.folder is not None, "the reference model has no forward pass to time"
    xml = local.folder / "openvino_model.xml"
    runtime = TimedRuntime(
        OpenVinoRuntime(xml, profile=args.profile, context_length=local.context_length)
    )
    with recollect.Model(
        local, runtime, profile=args.profile, home=config.home(), kv_memory=2 * 10**9
    ) as model:
        result: dict[str, object] = {
            "overhead": overhead(model, runtime, tokens=4000),
            "throughput": throughput(model, runtime, tokens=1000),
            "gap": gap(model, runtime, tokens=4000),
        }
        result["others_load"] = load.others()
        report("batching", model, result, save=args.save)


def overhead(model: recollect.Model, runtime: TimedRuntime, *, tokens: int) -> dict[str, object]:
    decode_together(model, runtime, 4, tokens)
    between = pauses(runtime.passes, decodes=4)
    between_ms = statistics.median(between) * 1e3
    pass_ms = statistics.median(p.duration for p in runtime.passes if p.decodes == 4) * 1e3
    result: dict[str, object] = {
        "sequences": 4,
        "tokens": tokens,
        "between_passes_ms": between_ms,
        "pass_ms": pass_ms,
        "samples": len(between),
    }
    say(
        f"overhead: {result['between_passes_ms']:.2f} ms beside passes of {result['pass_ms']:.1f} ms"
    )
    return result


def throughput(model: recollect.Model, runtime: TimedRuntime, *, tokens: int) -> dict[str, object]:
    rates: dict[int, list[float]] = {1: [], 4: []}
    bounds: dict[int, list[float]] = {1: [], 4: []}
    for _ in range(5):
        for count in (1, 4):
            decode_together(model, runtime, count, tokens)
            steady = [p for p in runtime.passes if p.lengths == (1,) * count]
            rates[count].append(count * (len(steady) - 1) / (steady[-1].ended - steady[0].ended))
            bounds[count].append(count / statistics.median(p.duration for p in steady))
    medians = {count: statistics.median(rates[count]) for count in rates}
    ratio = medians[4] / medians[1]
    forward_ratio = statistics.median(bounds[4]) / statistics.median(bounds[1])
    result: dict[str, object] = {
        "tokens": tokens,
        "tokens_per_s": medians,
        "samples": rates,
        "ratio": ratio,
        "forward_ratio": forward_ratio,
    }
    say(
        f"throughput: {medians[4]:.0f} against {medians[1]:.0f} tok/s, {ratio:.2f} times; "
        f"the forward pass alone {forward_ratio:.2f}"
    )
    return result


def gap(model: recollect.Model, runtime: TimedRuntime, *, tokens: int) -> dict[str, object]:
    alone = chunk_alone(model, runtime, tokens // 2)
    streaming = model.session(prompt(900, "streaming"), namespace="gap")
    params = SamplingParams(max_tokens=400, ignore_eos=True)
    arrivals = []
    with streaming.stream("Go on.", params=params) as stream:
        other = None
        for _ in stream:
            arrivals.append(perf_counter())
            if len(arrivals) == 5:
                other = threading.Thread(
                    target=lambda: model.session(prompt(tokens, "other"), namespace="gap").prewarm()
                )
                runtime.passes.clear()
                other.start()
            if other is not None and len(arrivals) > 10 and not other.is_alive():
                break
    longest = max(later - earlier for earlier, later in pairwise(arrivals[5:]))
    result: dict[str, object] = {
        "prompt_tokens": tokens,
        "chunk_tokens": SHARED_CHUNK,
        "chunk_alone_ms": alone * 1e3,
        "longest_wait_ms": longest * 1e3,
        "ratio": longest / alone,
        "tokens_meanwhile": len(arrivals) - 5,
    }
    say(f"gap: {longest * 1e3:.0f} ms at most, a chunk alone takes {alone * 1e3:.0f} ms")
    return result


def chunk_alone(model: recollect.Model, runtime: TimedRuntime, past: int) -> float:
    """Return the median time of a pass over one chunk in the middle of a prompt."""
    ids = model.tokenizer.encode(prompt(past + 8 * SHARED_CHUNK, "alone"))
    sequence = model.engine.new_sequence(namespace=None)
    sequence.append(ids[:past])
    model.engine.compute([sequence])
    runtime.passes.clear()
    for start in range(past, past + 5 * SHARED_CHUNK, SHARED_CHUNK):
        sequence.append(ids[start : start + SHARED_CHUNK])
        model.engine.compute([sequence])
    sequence.release()
    return statistics.median(p.duration for p in runtime.passes)


def decode_together(model: recollect.Model, runtime: TimedRuntime, count: int, tokens: int) -> None:
    """Let that many conversations of that many tokens decode at once; the passes are noted."""
    params = SamplingParams(max_tokens=DECODED, ignore_eos=True)
    sessions = [model.session(prompt(tokens, f"chat {n}")) for n in range(count)]
    for session in sessions:
        session.prewarm()
    runtime.passes.clear()
    threads = [
        threading.Thread(target=session.respond, args=("Go on.",), kwargs={"params": params})
        for session in sessions
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def pauses(passes: Sequence[Pass], *, decodes: int) -> list[float]:
    """Return the times between passes in which exactly that many sequences decoded."""
    return [
        later.begun - earlier.ended
        for earlier, later in pairwise(passes)
        if earlier.lengths == later.lengths == (1,) * decodes
    ]


def prompt(tokens: int, start: str) -> str:
    """Return a text of about that many tokens, a different one for each start."""
    return " ".join([start, *(WORDS[n % len(WORDS)] for n in range(tokens - 2))])


if __name__ == "__main__":
    main()
