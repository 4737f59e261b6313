"""
Our engine against openvino_genai's own pipeline, on the same converted model.

    python benchmarks/runtime.py [--model M] [--profile P] [--repeats 9] [--sdpa] [--save]

Prefill of 2,048 tokens, and decode at a context of 512: alternating in one run, greedy, end of
sequence ignored, the same plugin properties for both. Theirs is the default back end of
`LLMPipeline`, paged attention; `--sdpa` adds the stateful one for information. A decode sample is
the median time between two tokens of a reply. Ratios are theirs / ours of the medians over the
rounds, so that above 1 we are faster. The first round is discarded, and so is a round in which
others kept more than a tenth of a core busy, as long as there are rounds left.
"""

import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from time import perf_counter, process_time

# First, because it switches off what the libraries below would report.
import recollect  # isort: skip

import numpy as np
import openvino as ov
import openvino_genai as genai

from harness import Load, parser, report, say
from recollect import config
from recollect.models.prepare import prepare
from recollect.proof.bench import bench_text, cut_to_length, summarize
from recollect.runtime.openvino import SETTINGS
from recollect.types import SamplingParams

PREFILL_TOKENS = 2048
DECODE_CONTEXT = 512
DECODE_TOKENS = 64
WANTED_RATIO = 0.95

MOST_OTHERS = 0.1
"""Cores that others may keep busy in a round that counts."""
ATTEMPTS_PER_ROUND = 4


@dataclass(frozen=True)
class Sample:
    """One reply."""

    ttft_s: float
    s_per_token: float
    """Median of the times between tokens; 0 for a single token."""
    cores: float
    """Processor seconds of this process per second."""


Measured = dict[str, float]
"""One round of one way, by the names in QUANTITIES."""
QUANTITIES = ("prefill_s", "decode_s_per_token", "prefill_cores", "decode_cores")

Way = Callable[[Sequence[int], int], Sample]


@dataclass(frozen=True)
class Round:
    """Every way once."""

    others: float
    """Cores that were busy with something else."""
    measured: dict[str, Measured]


def main() -> int:
    """Run, print the ratios, and return 1 where one is below what is wanted."""
    options = parser(__doc__ or "", profile="fast")
    options.add_argument("--repeats", type=int, default=9, help="rounds that count")
    options.add_argument("--sdpa", action="store_true", help="theirs without paged attention, too")
    arguments = options.parse_args()
    folder = prepare(arguments.model, home=config.home()).folder
    if folder is None:
        sys.exit("runtime.py: the reference model has no weights to compare with: name another.")
    properties = SETTINGS[config.parse_profile(arguments.profile)]
    with recollect.load(arguments.model, profile=arguments.profile, kv_disk=0) as model:
        ways: dict[str, Way] = {"ours": partial(ours, model)}
        for backend in ["PA", "SDPA"] if arguments.sdpa else ["PA"]:
            pipeline = genai.LLMPipeline(
                str(folder), "CPU", ATTENTION_BACKEND=backend, **properties
            )
            ways[backend] = partial(theirs, pipeline)
        ids = cut_to_length(model, bench_text(), PREFILL_TOKENS)
        rounds = _rounds(ways, ids, arguments.repeats)
        result = _summarized(list(ways), rounds)
        ratios = _ratios(result)
        details = {
            "properties": properties,
            "ratios_theirs_over_ours": ratios,
            "summaries": result,
            "rounds": [asdict(each) for each in rounds],
        }
        report("runtime", model, details, save=arguments.save)
    for name, ratio in ratios.items():
        say(f"{name}: {ratio:.3f}")
    return 0 if min(ratios["prefill_PA"], ratios["decode_PA"]) >= WANTED_RATIO else 1


def ours(model: recollect.Model, ids: Sequence[int], tokens: int) -> Sample:
    """
    Prefill and decode with our engine, in a sequence of its own.

    It shares with nobody and leaves nothing behind, so every round writes to the same blocks, as
    their pipeline does: pages that were never touched before cost a twentieth of the prefill.
    """
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    with closing(recollect.Generator(model.engine, params, namespace=None)) as generator:
        cpu, begun = process_time(), perf_counter()
        generator.append_tokens(ids)
        times = []
        while not generator.is_done():
            generator.generate_next_token()
            times.append(perf_counter())
        cores = (process_time() - cpu) / (times[-1] - begun)
    return Sample(times[0] - begun, _median_step_s(times), cores)


def theirs(pipeline: genai.LLMPipeline, ids: Sequence[int], tokens: int) -> Sample:
    """Prefill and decode with their pipeline, timed token by token by its own metrics."""
    array = np.array([ids], np.int64)
    inputs = genai.TokenizedInputs(ov.Tensor(array), ov.Tensor(np.ones_like(array)))
    wanted = genai.GenerationConfig()
    wanted.max_new_tokens, wanted.ignore_eos, wanted.do_sample = tokens, True, False
    cpu, begun = process_time(), perf_counter()
    metrics = pipeline.generate(inputs, wanted).perf_metrics
    cores = (process_time() - cpu) / (perf_counter() - begun)
    times = [stamp / 1000 for stamp in metrics.raw_metrics.m_new_token_times]
    assert metrics.get_num_generated_tokens() == len(times) == tokens, "not the length asked for"
    return Sample(metrics.get_ttft().mean / 1000, _median_step_s(times), cores)


def _median_step_s(times: Sequence[float]) -> float:
    steps = [after - before for before, after in pairwise(times)]
    return statistics.median(steps) if steps else 0.0


def _rounds(ways: dict[str, Way], ids: list[int], repeats: int) -> list[Round]:
    """Return *repeats* rounds: quiet ones, and the quietest others where there are not as many."""
    measured: list[Round] = []
    for number in range(1 + ATTEMPTS_PER_ROUND * repeats):
        measured.append(_round(ways, ids, number))
        quiet = [each for each in measured[1:] if each.others <= MOST_OTHERS]
        if len(quiet) == repeats:
            break
    return sorted(measured[1:], key=lambda each: each.others)[:repeats]


def _round(ways: dict[str, Way], ids: list[int], number: int) -> Round:
    """Measure every way once, in an order that turns from round to round."""
    names = list(ways)
    first = number % len(names)
    load = Load()
    measured: dict[str, Measured] = {}
    for name in names[first:] + names[:first]:
        # Another first token every time: their pipeline keeps prefixes, and a hit is no prefill.
        prefill = ways[name]([100 + 2 * number, *ids[1:]], 1)
        decode = ways[name]([101 + 2 * number, *ids[1:DECODE_CONTEXT]], DECODE_TOKENS)
        values = (prefill.ttft_s, decode.s_per_token, prefill.cores, decode.cores)
        measured[name] = dict(zip(QUANTITIES, values, strict=True))
    done = Round(load.others(), measured)
    times = (
        f"{name} {sample['prefill_s']:.3f} s + {sample['decode_s_per_token'] * 1000:.2f} ms"
        for name, sample in measured.items()
    )
    say(f"round {number}: {', '.join(times)}; others {done.others:.2f} cores")
    return done


def _summarized(
    names: Sequence[str], rounds: Sequence[Round]
) -> dict[str, dict[str, dict[str, float]]]:
    return {
        name: {
            what: asdict(summarize([each.measured[name][what] for each in rounds]))
            for what in QUANTITIES
        }
        for name in names
    }


def _ratios(result: dict[str, dict[str, dict[str, float]]]) -> dict[str, float]:
    return {
        f"{label}_{name}": summaries[what]["median"] / result["ours"][what]["median"]
        for name, summaries in result.items()
        if name != "ours"
        for label, what in (("prefill", "prefill_s"), ("decode", "decode_s_per_token"))
    }


if __name__ == "__main__":
    sys.exit(main())
