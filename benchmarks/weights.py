"""
What it costs to run a GGUF file's own weights: recollect's conversion and another, passes in turns.

    python benchmarks/weights.py [--model M] [--against FOLDER] [--profile P] [--rounds 10] [--save]

A pass decodes one token of 1, 2, 4 or 8 sequences at a context of 100 tokens, or reads 512 tokens.
The other conversion is a folder, such as one of an earlier release; without one it is made by OpenVINO
GenAI's reader, whose weights are rounded.
"""

import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median
from time import perf_counter, process_time

import numpy as np

import recollect
from harness import Load, parser, report, say
from recollect import config
from recollect.models.openvino_folder import MODEL_FILES
from recollect.models.prepare import original_of, prepare
from recollect.runtime.base import Row
from recollect.runtime.openvino import BLOCK_SIZE, OpenVinoRuntime
from recollect.types import Profile, no_progress

CONTEXT, CHUNK, MOST_SEQUENCES = 100, 512, 8
BLOCKS_EACH = -(-(CONTEXT + 1) // BLOCK_SIZE)
DECODES = {f"decode {count}": count for count in (1, 2, 4, MOST_SEQUENCES)}
REPEATS = 5
SLOWEST = {"prefill": 0.97, "decode 1": 0.95, "decode 2": 0.85, "decode 4": 0.85, "decode 8": 0.85}
"""Of the other's speed; less is a fault."""
GENAI = (
    "import sys, openvino_genai as genai; "
    "genai.LLMPipeline(sys.argv[1], 'CPU', enable_save_ov_model=True)"
)


def main() -> int:
    """Run, print, and return 1 where a pass is slower than it may be."""
    options = parser(__doc__ or "", profile="fast")
    options.add_argument("--rounds", type=int, default=10)
    options.add_argument("--against", type=Path)
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        ours = prepare(arguments.model, home=config.home()).folder
        assert ours is not None
        other = arguments.against or by_genai(arguments.model, Path(scratch))
        starts: dict[str, dict[str, float]] = {}
        runtimes = {
            name: started(folder, arguments.profile, starts.setdefault(name, {}))
            for name, folder in (("ours", ours), ("other", other))
        }
        load = Load()
        samples: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for number in range(arguments.rounds):
            for name in sorted(runtimes, reverse=number % 2 == 1):
                measure(runtimes[name], samples[name])
        others = load.others()
        difference = largest_difference(list(runtimes.values()))
    speeds = {
        what: median(samples["other"][what]) / median(samples["ours"][what])
        for what in samples["ours"]
    }
    for what, speed in speeds.items():
        times = ", ".join(f"{name} {median(s[what]) * 1e3:.1f} ms" for name, s in samples.items())
        say(f"{what:10}  {times}: {speed:.2f} of the other's speed")
    for name, start in starts.items():
        say(f"{name}: " + ", ".join(f"{what} {value:.2f}" for what, value in start.items()))
    say(f"largest difference of logits {difference:.1e}")
    with recollect.load(arguments.model, profile=arguments.profile, kv_disk=0) as model:
        result = {
            "speeds": speeds,
            "seconds": samples,
            "starts": starts,
            "largest_difference": difference,
            "others_load": others,
        }
        report("weights", model, result, save=arguments.save)
    return 0 if all(speed >= SLOWEST[what] for what, speed in speeds.items()) else 1


def by_genai(model: str, scratch: Path) -> Path:
    """Convert a model with OpenVINO GenAI's reader, and return the folder."""
    with original_of(model, home=config.home(), progress=no_progress) as gguf:
        link = scratch / "model.gguf"
        link.symlink_to(gguf.resolve())
        command = [sys.executable, "-c", GENAI, str(link)]
        subprocess.run(command, check=True)  # noqa: S603 - our own interpreter and program
    return scratch


def started(folder: Path, profile: Profile, costs: dict[str, float]) -> OpenVinoRuntime:
    """Return a runtime whose sequences have their context; note what it took to start."""
    begun = process_time()
    runtime = OpenVinoRuntime(
        folder / MODEL_FILES[0], profile=profile, context_length=CHUNK + BLOCK_SIZE
    )
    costs["load, CPU s"] = process_time() - begun
    runtime.allocate(MOST_SEQUENCES * BLOCKS_EACH + CHUNK // BLOCK_SIZE)
    begun = process_time()
    runtime.warm_up()
    costs["first passes, CPU s"] = process_time() - begun
    costs["weights, MB"] = (folder / MODEL_FILES[1]).stat().st_size / 1e6
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
    one, other = ([runtime.forward(rows).logits for rows in passes] for runtime in runtimes)
    return max(float(np.abs(a - b).max()) for a, b in zip(one, other, strict=True))


if __name__ == "__main__":
    sys.exit(main())
