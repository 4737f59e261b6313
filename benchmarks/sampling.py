"""
What the choice of a token costs the engine's thread, for vocabularies of two sizes.

    python benchmarks/sampling.py [--save]

No weights are needed, and no forward pass is in the numbers. Probabilities fall with the rank, as
words' do, and the ids are in random order; the flat logits are normally distributed.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from time import perf_counter
from typing import Final

import numpy as np
import numpy.typing as npt

import recollect
from harness import Load, parser, report, say
from recollect.engine.sampling import choose_token, log_probabilities, most_likely
from recollect.proof.bench import Summary, summarize
from recollect.types import SamplingParams

VOCABULARIES: Final = (49_152, 151_936)
"""SmolLM2's and Qwen's."""
ROUNDS: Final = 300
HISTORY: Final = 4000
"""Tokens that penalties look at; the last quarter of them is the reply."""
ZIPF: Final = 1.5
"""Probabilities are the ranks to minus this power: three fifths are on the first three ranks."""
MOST_MILLISECONDS: Final = 0.5
"""For a token at temperature 0.8 of the larger vocabulary; promised."""

PLAIN: Final = "temperature 0.8"
FLAT: Final = "top_p 0.95, flat"
CASES: Final = {
    "greedy": SamplingParams(),
    PLAIN: SamplingParams(temperature=0.8),
    "top_p 0.95": SamplingParams(temperature=0.8, top_p=0.95),
    "top_k 40": SamplingParams(temperature=0.8, top_k=40),
    "min_p 0.05": SamplingParams(temperature=0.8, min_p=0.05),
    "all three": SamplingParams(temperature=0.8, top_k=40, top_p=0.95, min_p=0.05),
    "penalties": SamplingParams(
        temperature=0.8, repetition_penalty=1.1, presence_penalty=0.2, frequency_penalty=0.2
    ),
    FLAT: SamplingParams(temperature=0.8, top_p=0.95),
    "bias": SamplingParams(temperature=0.8, logit_bias={7: 2.0, 9: -1.0}),
}


def main() -> int:
    """Run, print, and return 1 where a token costs more than is promised."""
    arguments = parser(__doc__ or "", profile="exact").parse_args()
    load = Load()
    results = {str(size): measured(size) for size in VOCABULARIES}
    others = load.others()
    for size, cases in results.items():
        say(f"{int(size):,} ids, milliseconds a token: median, and the most")
        for name, times in cases.items():
            say(f"  {name:24} {times.median:7.3f} {times.maximum:7.3f}")
    fields: dict[str, object] = {
        "milliseconds": {
            size: {name: asdict(times) for name, times in cases.items()}
            for size, cases in results.items()
        },
        "others_load": others,
    }
    with recollect.load("reference", profile=arguments.profile, kv_disk=0) as model:
        report("sampling", model, fields, save=arguments.save)
    return 0 if results[str(VOCABULARIES[-1])][PLAIN].median <= MOST_MILLISECONDS else 1


def measured(size: int) -> dict[str, Summary]:
    """Return what each case costs, in milliseconds; the cases take turns, and the first is discarded."""
    random = np.random.default_rng(size)
    flat = (random.standard_normal(size) * 3).astype(np.float32)
    logits = (-ZIPF * np.log(random.permutation(size) + 1)).astype(np.float32)
    history = random.integers(0, size, HISTORY)
    choices = {
        name: partial(chosen, flat if name == FLAT else logits, params, history=history)
        for name, params in CASES.items()
    }
    allowed = random.random(size) < 0.1
    choices["with a grammar's mask"] = partial(
        chosen, logits, CASES[PLAIN], history=history, allowed=allowed
    )
    what: dict[str, Callable[[int], object]] = {
        **choices,
        "5 log probabilities": lambda _: likelihoods(logits, 5),
    }
    samples: dict[str, list[float]] = {name: [] for name in what}
    for number in range(ROUNDS + 1):
        for name, work in what.items():
            begun = perf_counter()
            work(number)
            samples[name].append((perf_counter() - begun) * 1e3)
    return {name: summarize(times[1:]) for name, times in samples.items()}


def chosen(
    logits: npt.NDArray[np.float32],
    params: SamplingParams,
    seed: int,
    *,
    history: npt.NDArray[np.int64],
    allowed: npt.NDArray[np.bool_] | None = None,
) -> int:
    """Choose one token, as the engine's thread does after each pass."""
    return choose_token(
        logits, params, history=history, reply_start=HISTORY * 3 // 4, seed=seed, allowed=allowed
    )


def likelihoods(logits: npt.NDArray[np.float32], count: int) -> list[float]:
    """Return the log probabilities of the likeliest tokens."""
    told: list[float] = log_probabilities(logits, most_likely(logits, count)).tolist()
    return told


if __name__ == "__main__":
    sys.exit(main())
