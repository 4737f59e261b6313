"""
What the benchmark scripts share: the command line, a progress line, the result file.

No product logic: what is measured is in the scripts and in `recollect.proof`.
"""

import argparse
import json
import re
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter, process_time

import psutil

import recollect
from recollect.proof.report import Machine, card_lines, machine_card

RESULTS = Path(__file__).parent / "results"


def parser(about: str, *, profile: str, runtimes: bool = False) -> argparse.ArgumentParser:
    """Return a command line with the options of every script, and `--runtime` where it is asked for."""
    options = argparse.ArgumentParser(description=about)
    options.add_argument("--model", default="smollm2", help="as `recollect chat --model` takes it")
    options.add_argument("--profile", default=profile, choices=["exact", "fast", "small"])
    if runtimes:
        options.add_argument("--runtime", default="auto", choices=["auto", "openvino", "llama"])
    options.add_argument("--save", action="store_true", help="keep the result under results/")
    return options


def say(line: str) -> None:
    """Write a line of progress to stderr."""
    print(line, file=sys.stderr, flush=True)


class Load:
    """
    How many cores the rest of the machine kept busy since this was made.

    Other processes, and whatever else a virtual machine's host does with the processor.
    """

    def __init__(self) -> None:
        self._begun = perf_counter(), _busy_s(), process_time()

    def others(self) -> float:
        """Return the cores that were busy and not ours, on average."""
        begun, busy, own = self._begun
        others_s = _busy_s() - busy - (process_time() - own)
        return max(0.0, others_s / (perf_counter() - begun))


def _busy_s() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0))


def report(name: str, model: recollect.Model, result: dict[str, object], *, save: bool) -> None:
    """Print the machine card and exactly one JSON line; keep it under results/ if asked to."""
    card = machine_card(model)
    say("\n".join(card_lines(card)))
    whole = {"benchmark": name, "date": _today(), "machine": asdict(card), **result}
    print(json.dumps(whole))
    if save:
        keep(name, card.profile, card, whole)


def report_models(
    name: str, profile: str, machine: Machine, result: dict[str, object], *, save: bool
) -> None:
    """Do the same for a result of several models, each measured in a process of its own."""
    say(f"\n{machine.cpu}, {machine.logical_cores} threads, profile {profile}")
    whole = {"benchmark": name, "date": _today(), "machine": asdict(machine), **result}
    print(json.dumps(whole))
    if save:
        keep(name, profile, machine, whole)


def keep(name: str, profile: str, machine: Machine, result: dict[str, object]) -> None:
    """Write a result below `RESULTS`."""
    folder = RESULTS / slug(machine)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{_today()}-{name}-{profile}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    say(f"kept as {path.relative_to(RESULTS.parent)}")


def slug(card: Machine) -> str:
    """Return a folder name for the processor, such as `amd-epyc-2-cores`."""
    cores = card.physical_cores or card.logical_cores
    return re.sub(r"[^a-z0-9]+", "-", f"{card.cpu} {cores} cores".lower()).strip("-")


def _today() -> str:
    return datetime.now(tz=UTC).date().isoformat()
