"""
Which model to begin with: what each costs before the first prompt, how it replies, what it gets right.

    python benchmarks/default_model.py [--model M ...] [--megabytes-per-s 5] [--prompts 40] [--scenarios 6]
        [--at-once 6] [--timed 5] [--profile P] [--save]

Each model runs in a process of its own, in a data folder that is empty but for its GGUF file, which
`recollect pull M` fetches beforehand. Measured are the start of Python, the check of the file, its
conversion and loading; what fetching takes is worked out from its size at the stated speed. Then come the
first prompts of `first_replies.txt`, one at a time for the times and all of them for the lengths, as
`first_replies.py` asks them, and the six scenarios of `recollect scenarios`, greedily: one is passed if no
fact is missing in it. Peak memory is that of the process with the model, and of the one that converts.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Final

import psutil

import recollect
from first_replies import LONG, PROMPTS, ask
from harness import report_models, say
from recollect import config
from recollect.models.catalog import CATALOG
from recollect.models.fetch import fetch_entry
from recollect.proof.report import this_machine
from recollect.proof.scenarios import ScenarioResult, load_scenarios, play_all
from recollect.types import no_progress

MOST_START_S: Final = 120.0
"""Seconds from nothing to the first prompt after which nobody is left."""
MOST_TOKENS: Final = 48
"""Of a reply that is timed."""


def main() -> int:
    """Measure each model in a process of its own, and print a table and one JSON line."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    options.add_argument("--model", nargs="+", default=list(CATALOG), choices=list(CATALOG))
    options.add_argument("--profile", default="fast", choices=["exact", "fast", "small"])
    options.add_argument("--megabytes-per-s", type=float, default=5.0, help="10**6 bytes a second")
    options.add_argument(
        "--prompts", type=int, default=len(PROMPTS), help="how many, for a try-out"
    )
    options.add_argument("--scenarios", type=int, default=len(load_scenarios()), help="likewise")
    options.add_argument(
        "--at-once", type=int, default=6, help="replies, where lengths are counted"
    )
    options.add_argument("--timed", type=int, default=5, help="prompts that are timed")
    options.add_argument("--save", action="store_true", help="keep the result under results/")
    options.add_argument("--only", metavar="GGUF", help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.only is not None:
        print(json.dumps(measure(Path(args.only), args)))
        return 0
    machine = this_machine()
    found = {}
    for name in args.model:
        say(f"\n{name}")
        found[name] = start_of(name, args.megabytes_per_s) | in_a_process(name, sys.argv[1:])
        found[name]["start_s"] = found[name]["fetch_s"] + found[name]["ready_s"]
    say(table(found, args.megabytes_per_s))
    result: dict[str, object] = {"megabytes_per_s": args.megabytes_per_s, "models": found}
    report_models("default-model", args.profile, machine, result, save=args.save)
    return 0


def start_of(name: str, megabytes_per_s: float) -> dict[str, Any]:
    """Return what has to be fetched of a model, and how long that takes at a speed."""
    size = CATALOG[name].bytes
    return {"fetch_bytes": size, "fetch_s": size / (megabytes_per_s * 10**6)}


def in_a_process(name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Return what a process of its own measures of a model, in an empty data folder."""
    gguf = fetch_entry(CATALOG[name], home=config.home(), progress=no_progress)
    with tempfile.TemporaryDirectory() as home:
        command = [sys.executable, __file__, *arguments, "--only", str(gguf)]
        done = subprocess.run(  # noqa: S603 - this script
            command,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env=os.environ | {"RECOLLECT_HOME": home},
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(gguf: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Return how long a model takes to be ready in this process, and what it does then."""
    with recollect.load(gguf, profile=args.profile, kv_disk=0) as model:
        ready_s = time.time() - psutil.Process().create_time()
        converting = peak_bytes(resource.RUSAGE_CHILDREN)
        say(f"ready after {ready_s:.1f} s")
        return {
            "ready_s": ready_s,
            **times(model, PROMPTS[: args.timed]),
            **lengths(model, args.prompts, args.at_once),
            **scenarios(model, args.scenarios),
            "peak_bytes": peak_bytes(resource.RUSAGE_SELF),
            "converting_peak_bytes": converting,
            "sampling": dict(model.local.sampling),
        }


def peak_bytes(who: int) -> int:
    """Return the most memory that this process, or the largest that it has waited for, has had."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(who).ru_maxrss * unit


def times(model: recollect.Model, prompts: Sequence[str]) -> dict[str, Any]:
    """Return the medians of the time to a first token and of the speed after it, one reply at a time."""
    params = replace(model.sampling, max_tokens=MOST_TOKENS, seed=0)
    usages = [model.session(params=params).respond(prompt).usage for prompt in prompts]
    speeds = [usage.decode_tps for usage in usages if usage.decode_tps is not None]
    return {
        "first_token_s": median(usage.ttft_s for usage in usages) if usages else None,
        "tokens_per_s": median(speeds) if speeds else None,
    }


def lengths(model: recollect.Model, count: int, at_once: int) -> dict[str, Any]:
    """Return how many of the first replies are long, with all texts."""
    with ThreadPoolExecutor(at_once) as threads:
        replies = list(threads.map(partial(ask, model), range(min(count, len(PROMPTS)))))
    return {
        "prompts": len(replies),
        "long_replies": sum(reply["tokens"] > LONG for reply in replies),
        "ran_away": sum(reply["ran_away"] for reply in replies),
        "median_tokens": median(reply["tokens"] for reply in replies) if replies else None,
        "replies": replies,
    }


def scenarios(model: recollect.Model, count: int) -> dict[str, Any]:
    """Return how many scenarios are passed, and how many facts are right in all of them."""
    played = list(play_all(model, load_scenarios()[:count]))
    facts = [fact for one in played for turn in one.turns for fact in turn.reuse.facts]
    return {
        "scenarios": len(played),
        "passed": sum(is_passed(one) for one in played),
        "facts": len(facts),
        "facts_right": sum(fact.recalled for fact in facts),
    }


def is_passed(played: ScenarioResult) -> bool:
    """Return whether no fact is missing in a scenario."""
    return all(fact.recalled for turn in played.turns for fact in turn.reuse.facts)


def table(found: dict[str, dict[str, Any]], megabytes_per_s: float) -> str:
    """Return the figures of all models as lines for people."""
    shown: dict[str, Callable[[dict[str, Any]], str]] = {
        "to fetch, MB": lambda one: _number(one["fetch_bytes"], 1e-6),
        f"to the first prompt at {megabytes_per_s:g} MB/s, s": lambda one: _number(one["start_s"]),
        "  of it after fetching, s": lambda one: f"{one['ready_s']:.1f}",
        f"within {MOST_START_S:.0f} s": lambda one: (
            "yes" if one["start_s"] <= MOST_START_S else "no"
        ),
        "first token, ms": lambda one: _number(one["first_token_s"], 1000),
        "tokens/s": lambda one: _number(one["tokens_per_s"]),
        f"replies past {LONG:,} tokens": lambda one: f"{one['long_replies']} of {one['prompts']}",
        "  ended as repetition": lambda one: str(one["ran_away"]),
        "scenarios passed": lambda one: f"{one['passed']} of {one['scenarios']}",
        "  facts right": lambda one: f"{one['facts_right']} of {one['facts']}",
        "peak memory, MB": lambda one: _number(one["peak_bytes"], 1e-6),
        "  while converting, MB": lambda one: _number(one["converting_peak_bytes"], 1e-6),
    }
    rows = [("", *found)]
    rows += [(label, *map(show, found.values())) for label, show in shown.items()]
    first, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    return "\n".join(
        row[0].ljust(first)
        + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths, strict=True))
        for row in rows
    )


def _number(value: float | None, factor: float = 1.0) -> str:
    return "-" if value is None else f"{value * factor:,.0f}"


if __name__ == "__main__":
    sys.exit(main())
