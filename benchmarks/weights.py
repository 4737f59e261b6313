"""
What it is worth to write packed weights as int8: the same model both ways, passes in turns.

    python benchmarks/weights.py [--model M] [--profile P] [--rounds 10] [--save]

A pass decodes one token of 1, 4 or 8 sequences at a context of 100 tokens, or reads 512 tokens.
"""

import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np

import recollect
from harness import Load, parser, report, say
from recollect import config
from recollect.models.convert import Conversion, convert
from recollect.models.fingerprint import sha256_file
from recollect.models.prepare import original_of
from recollect.runtime.base import Row
from recollect.runtime.openvino import BLOCK_SIZE, OpenVinoRuntime
from recollect.types import Profile, no_progress

CONTEXT, CHUNK, MOST_SEQUENCES = 100, 512, 8
BLOCKS_EACH = -(-(CONTEXT + 1) // BLOCK_SIZE)
DECODES = {f"decode {count}": count for count in (1, 4, MOST_SEQUENCES)}
REPEATS = 5
LARGEST_DIFFERENCE = 1e-3  # what `exact` promises of any two ways to the same logits


def main() -> int:
    """Run, print, and return 1 where int8 is slower, or not the same model."""
    options = parser(__doc__ or "", profile="exact")
    options.add_argument("--rounds", type=int, default=10)
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folders = both_ways(arguments.model, Path(scratch))
        runtimes = {name: started(path, arguments.profile) for name, path in folders.items()}
        load = Load()
        samples: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for number in range(arguments.rounds):
            for name in sorted(runtimes, reverse=number % 2 == 1):
                measure(runtimes[name], samples[name])
        others = load.others()
        difference = largest_difference(list(runtimes.values()))
    ratios = {
        what: median(samples["int8"][what]) / median(samples["packed"][what])
        for what in samples["packed"]
    }
    for what, ratio in ratios.items():
        times = ", ".join(f"{name} {median(s[what]) * 1e3:.1f} ms" for name, s in samples.items())
        say(f"{what:10}  {times}: int8 takes {ratio:.2f} of the time")
    say(f"largest difference of logits {difference:.1e}")
    with recollect.load(arguments.model, profile=arguments.profile, kv_disk=0) as model:
        result = {
            "ratios": ratios,
            "seconds": samples,
            "largest_difference": difference,
            "others_load": others,
        }
        report("weights", model, result, save=arguments.save)
    exact = arguments.profile != "exact" or difference <= LARGEST_DIFFERENCE
    return 0 if exact and all(ratio <= 1.05 for ratio in ratios.values()) else 1


def both_ways(model: str, scratch: Path) -> dict[str, Path]:
    """Convert a model twice, and return the folders."""
    folders = {}
    with original_of(model, home=config.home(), progress=no_progress) as gguf:
        sha256 = sha256_file(gguf)
        for name, as_packed in (("packed", True), ("int8", False)):
            folders[name] = scratch / "models" / name
            job = Conversion(name, gguf, sha256, as_packed)
            convert(job, folders[name], home=scratch, progress=no_progress)
    return folders


def started(folder: Path, profile: Profile) -> OpenVinoRuntime:
    """Return a runtime whose sequences have their context."""
    runtime = OpenVinoRuntime(
        folder / "openvino_model.xml", profile=profile, context_length=CHUNK + BLOCK_SIZE
    )
    runtime.allocate(MOST_SEQUENCES * BLOCKS_EACH + CHUNK // BLOCK_SIZE)
    runtime.warm_up()
    for number in range(MOST_SEQUENCES):
        runtime.forward([Row([5] * CONTEXT, 0, blocks_of(number))])
    return runtime


def blocks_of(number: int) -> list[int]:
    return list(range(number * BLOCKS_EACH, (number + 1) * BLOCKS_EACH))


def decode(count: int) -> list[Row]:
    return [Row([7], CONTEXT, blocks_of(number), wants_logits=True) for number in range(count)]


def prefill() -> list[Row]:
    first = MOST_SEQUENCES * BLOCKS_EACH
    blocks = list(range(first, first + CHUNK // BLOCK_SIZE))
    return [Row([7] * CHUNK, 0, blocks, wants_logits=True)]


def measure(runtime: OpenVinoRuntime, into: dict[str, list[float]]) -> None:
    """Time each kind of pass; the first of a kind lays out memory and is not counted."""
    for what, count in DECODES.items():
        runtime.forward(decode(count))
        for _ in range(REPEATS):
            into[what].append(timed(runtime, decode(count)))
    into["prefill"].append(timed(runtime, prefill()))


def timed(runtime: OpenVinoRuntime, rows: list[Row]) -> float:
    begun = perf_counter()
    runtime.forward(rows)
    return perf_counter() - begun


def largest_difference(runtimes: list[OpenVinoRuntime]) -> float:
    """Return how far the logits of the two are apart, over all kinds of passes."""
    passes = [prefill(), *map(decode, DECODES.values())]
    one, other = ([runtime.forward(rows) for rows in passes] for runtime in runtimes)
    return max(float(np.abs(a - b).max()) for a, b in zip(one, other, strict=True))


if __name__ == "__main__":
    sys.exit(main())
