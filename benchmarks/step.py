"""
Where the time of one decode step goes, from one pass to the next and to the readers' text.

    python benchmarks/step.py [--model M] [--profile P] [--tokens 1000] [--decoded 64] [--rounds 3] [--save]

1, 4 and 8 conversations of 1,000 tokens decode greedily, each with a reader of its own. Noted are the
times of the forward pass (its inputs, the inference, the logits), of the choice of tokens, of the hand-over
to the readers, of all else between two passes, and when the text is at its readers.

Beside it is this machine's floor: the bytes of weights and KV that a step reads over the speed at which
as many bytes are read here, or its multiplications over the speed of a large product, whichever is longer.
"""

import statistics
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, Final

# First, because it switches off what the library below would report.
import recollect  # isort: skip

import numpy as np
import openvino as ov
import psutil
from openvino import opset13 as ops

from batching import prompt
from harness import Load, parser, report, say
from recollect import config
from recollect.engine.decoder import Task
from recollect.models.prepare import prepare
from recollect.runtime.base import PassResult, Row
from recollect.runtime.openvino import OpenVinoRuntime
from recollect.types import SamplingParams

COUNTS: Final = (1, 4, 8)
PRODUCT: Final = 2048
"""Rows, columns and depth of the product that says how fast this machine multiplies."""
REPEATS: Final = 15
"""Of each measurement of the machine, of which the quickest counts."""
MOST_BETWEEN_MS: Final = 0.3
"""Between the passes of 4 sequences; promised."""

Parts = dict[str, float]
"""Seconds, by what they were spent on."""


@dataclass
class Pass:
    lengths: tuple[int, ...]
    begun: float = 0.0
    inferred: tuple[float, float] = (0.0, 0.0)
    ended: float = 0.0
    cpu_s: float = 0.0
    """Of the whole process, when it ended."""
    after: Parts = field(default_factory=lambda: defaultdict(float))
    """What came between it and the next."""


class TimedRequest:
    """An inference request that notes when inference begins and ends."""

    def __init__(self, request: Any) -> None:
        self._request = request
        self.inferred = 0.0, 0.0

    def infer(self, **options: Any) -> Any:
        begun = perf_counter()
        results = self._request.infer(**options)
        self.inferred = begun, perf_counter()
        return results

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)


class TimedRuntime(OpenVinoRuntime):
    """A runtime that notes its passes."""

    def __init__(self, xml: Path, **options: Any) -> None:
        super().__init__(xml, **options)
        self.passes: list[Pass] = []
        self._request: Any = TimedRequest(self._request)

    def forward(self, rows: Sequence[Row]) -> PassResult:
        noted = Pass(tuple(len(row.token_ids) for row in rows), perf_counter())
        result = super().forward(rows)
        noted.ended, noted.cpu_s = perf_counter(), process_time()
        noted.inferred = self._request.inferred
        self.passes.append(noted)
        return result

    def timed(self, work: Callable[[], bool], what: str) -> Callable[[], bool]:
        """Return what does the same, and is counted to what comes after the latest pass."""

        def working() -> bool:
            begun = perf_counter()
            try:
                return work()
            finally:
                if self.passes:
                    self.passes[-1].after[what] += perf_counter() - begun

        return working


def main() -> int:
    """Run, print, and return 1 where more than is promised lies between the passes."""
    options = parser(__doc__ or "", profile="fast")
    options.add_argument("--tokens", type=int, default=1000, help="of each conversation")
    options.add_argument("--decoded", type=int, default=64, help="of each reply")
    options.add_argument("--rounds", type=int, default=3)
    arguments = options.parse_args()
    local = prepare(arguments.model, home=config.home())
    assert local.folder is not None, "the reference model has no forward pass to time"
    xml = local.folder / "openvino_model.xml"
    weights, numbers = weights_of(xml)
    load = Load()
    runtime = TimedRuntime(xml, profile=arguments.profile, context_length=local.context_length)
    with recollect.Model(
        local, runtime, profile=arguments.profile, home=config.home(), kv_memory=10**9
    ) as model:
        time_tasks(model, runtime)
        machine = {
            "weights_bytes": weights,
            "weights": numbers,
            "flops_per_s": multiplied_per_s(),
        }
        samples: dict[int, list[Parts]] = {count: [] for count in COUNTS}
        for number in range(arguments.rounds + 1):
            for count in COUNTS:
                found = decoded(model, runtime, count, arguments.tokens, arguments.decoded)
                samples[count] += found if number else []
        steps = {
            str(count): step(found, floor(model, machine, count, arguments.tokens))
            for count, found in samples.items()
        }
        result: dict[str, object] = {
            "tokens": arguments.tokens,
            "machine_speed": machine,
            "steps": steps,
            "others_load": load.others(),
        }
        for name, times in steps.items():
            say(f"{name} sequences: " + ", ".join(f"{k} {v:.2f}" for k, v in times.items()))
        report(f"step-{Path(model.name).name}", model, result, save=arguments.save)
    return 0 if steps["4"]["between_ms"] <= MOST_BETWEEN_MS else 1


def time_tasks(model: recollect.Model, runtime: TimedRuntime) -> None:
    """Have the work of the engine's thread for each task counted."""
    submit = model.engine.submit

    def submitted(task: Task) -> None:
        task.on_logits = runtime.timed(task.on_logits, "choosing")
        task.hand_over = runtime.timed(task.hand_over, "handing_over")
        submit(task)

    model.engine.submit = submitted  # type: ignore[method-assign]


def decoded(
    model: recollect.Model, runtime: TimedRuntime, count: int, tokens: int, wanted: int
) -> list[Parts]:
    """Let that many conversations decode at once; return the parts of each step of all of them."""
    sessions = [model.session(prompt(tokens, f"chat {n}"), namespace="step") for n in range(count)]
    for session in sessions:
        session.prewarm()
    runtime.passes.clear()
    arrivals: list[list[float]] = [[] for _ in sessions]
    readers = [
        threading.Thread(target=read, args=(session, wanted, into))
        for session, into in zip(sessions, arrivals, strict=True)
    ]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    return [
        parts(earlier, later, arrivals)
        for earlier, later in pairwise(runtime.passes)
        if earlier.lengths == later.lengths == (1,) * count
    ]


def read(session: recollect.Session, wanted: int, arrivals: list[float]) -> None:
    params = SamplingParams(max_tokens=wanted, ignore_eos=True)
    with session.stream("Go on.", params=params) as stream:
        for _ in stream:
            arrivals.append(perf_counter())


def parts(earlier: Pass, later: Pass, arrivals: Sequence[Sequence[float]]) -> Parts:
    """Return what the step took that begins with the end of a pass and ends with that of the next."""
    texts = [
        time - earlier.ended
        for of_reader in arrivals
        for time in of_reader
        if earlier.ended < time <= later.ended
    ]
    between = later.begun - earlier.ended
    return {
        "step": later.ended - earlier.ended,
        "cpu": later.cpu_s - earlier.cpu_s,
        "inputs": later.inferred[0] - later.begun,
        "inference": later.inferred[1] - later.inferred[0],
        "logits": later.ended - later.inferred[1],
        "between": between,
        **earlier.after,
        "else_between": between - sum(earlier.after.values()),
        "first_text": min(texts, default=0.0),
        "last_text": max(texts, default=0.0),
    }


def step(samples: Sequence[Parts], least: dict[str, float]) -> dict[str, float]:
    """Return the medians in milliseconds, the floor, and how much of the inference it is."""
    found = {
        f"{what}_ms": statistics.median(sample[what] for sample in samples) * 1e3
        for what in samples[0]
    }
    floor_ms = max(least.values()) * 1e3
    return {
        **found,
        **{f"floor_{what}_ms": seconds * 1e3 for what, seconds in least.items()},
        "floor_share": floor_ms / found["inference_ms"],
        "samples": len(samples),
    }


def floor(
    model: recollect.Model, machine: dict[str, float], count: int, tokens: int
) -> dict[str, float]:
    """Return the seconds that a step takes at least here: for what it reads, and for what it multiplies."""
    kv = model.engine.info.bytes_per_block // model.engine.block_size * tokens * count
    size = int(machine["weights_bytes"]) + kv
    return {
        "bytes": read_s(size),
        "flops": 2 * machine["weights"] * count / machine["flops_per_s"],
    }


def read_s(size: int) -> float:
    """Return how long reading that many bytes takes, by all cores together, again and again."""
    cores = psutil.cpu_count(logical=False) or 1
    shares = [np.ones(size // 4 // cores, np.float32) for _ in range(cores)]
    with ThreadPoolExecutor(cores) as threads:
        return quickest(lambda: list(threads.map(np.max, shares)))


def multiplied_per_s() -> float:
    """Return how many multiplications and additions a second OpenVINO does in a large product."""
    rows = ops.parameter([PRODUCT, PRODUCT], np.float32)
    matrix = np.random.default_rng(0).standard_normal((PRODUCT, PRODUCT), np.float32)
    product = ov.Model([ops.matmul(rows, ops.constant(matrix), False, True)], [rows])
    settings = {"PERFORMANCE_HINT": "LATENCY"}
    request = ov.Core().compile_model(product, "CPU", settings).create_infer_request()
    request.set_input_tensor(ov.Tensor(matrix))
    return 2 * PRODUCT**3 / quickest(request.infer)


def quickest(work: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS):
        begun = perf_counter()
        work()
        times.append(perf_counter() - begun)
    return min(times)


def weights_of(xml: Path) -> tuple[int, int]:
    """Return the bytes of all that matrices are made of, and how many numbers these matrices have."""
    seen: dict[str, int] = {}
    numbers = 0
    for node in ov.Core().read_model(xml).get_ordered_ops():
        if node.get_type_name() == "MatMul" and node.get_input_partial_shape(1).is_static:
            found = constants(node.input_value(1).get_node())
            numbers += int(np.prod(node.get_input_shape(1))) if found else 0
            seen |= found
    return sum(seen.values()), numbers


def constants(node: ov.Node) -> dict[str, int]:
    """Return the bytes of the constants that a value is made of; none where it is made of more."""
    if node.get_type_name() == "Constant":
        return {node.get_friendly_name(): node.get_byte_size()}
    found: dict[str, int] = {}
    for place in range(node.get_input_size()):
        below = constants(node.input_value(place).get_node())
        if not below:
            return {}
        found |= below
    return found


if __name__ == "__main__":
    raise SystemExit(main())
