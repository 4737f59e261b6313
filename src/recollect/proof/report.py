"""
Results for people: the machine card, the bench's table and its verdicts in words.

Takes values and returns what rich can print; measures nothing.
"""

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich import box
from rich.table import Table
from rich.text import Text

from recollect.errors import ConfigError
from recollect.proof.bench import BenchSummary, Iteration, ResponseSummary
from recollect.proof.energy import Unreadable
from recollect.proof.growth import GrowthTurn
from recollect.proof.machine import MachineCard
from recollect.proof.statistics import Summary

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_GIB: Final = 2**30
_DO_NOT_WAIT: Final[int] = getattr(os, "O_NONBLOCK", 0)  # for somebody who reads a FIFO


def card_lines(card: MachineCard) -> list[str]:
    """Return the machine card as lines of text."""
    versions = ", ".join(f"{name} {version}" for name, version in card.versions.items())
    features = f" ({', '.join(card.cpu_features)})" if card.cpu_features else ""
    load = "unknown" if card.load_average is None else f"{card.load_average:.2f}"
    return [
        f"CPU      {card.cpu}{features}",
        f"cores    {card.physical_cores or '?'} physical, {card.logical_cores or '?'} logical; "
        f"memory {card.memory_bytes / _GIB:.1f} GiB; load before {load}",
        f"system   {card.system}, Python {card.python}",
        f"versions {versions}",
        f"model    {card.model}, profile {card.profile}, context {card.context_length:,} tokens",
        f"KV       {card.kv_bytes_per_token:,} bytes per token, {card.kv_blocks:,} blocks",
    ]


def responses_table(summary: BenchSummary) -> Table:
    """Return both responses of both cases in seconds: medians, and the spread of the latency."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="Seconds", title_justify="left")
    table.add_column("case, response", no_wrap=True)
    for heading in ("first token", "decode", "latency", "mean", "sd"):
        table.add_column(heading, justify="right", no_wrap=True)
    _add_response(table, "without reuse, 1", summary.without_first)
    _add_response(table, "without reuse, 2", summary.without_second)
    _add_response(table, "with reuse, 1", summary.reuse_first)
    _add_response(table, "with reuse, 2", summary.reuse_second)
    return table


def saving_lines(summary: BenchSummary, iterations: Sequence[Iteration]) -> list[str]:
    """Return what reuse saves, in words."""
    last = iterations[-1]
    second = last.reuse.second
    return [
        f"{len(iterations) - 1} iterations; one more went before and was discarded as warm-up. "
        "Times are "
        "medians; mean and sd (standard deviation) are the latency's.",
        f"Response 2 with reuse: {second.reused_tokens:,} of {second.prompt_tokens:,} prompt "
        f"tokens reused, {second.computed_tokens:,} computed; without: "
        f"{last.without.second.computed_tokens:,} computed.",
        f"Saving in response 2: {_plus_minus(summary.saving_s)}; "
        f"ideal (prefill of {last.ideal_tokens:,} tokens): {_plus_minus(summary.ideal_s)}; "
        f"share of the ideal: {summary.share_of_ideal:.1%}.",
        f"Up to the first token: {_plus_minus(summary.ttft_saving_s)}, "
        f"{summary.ttft_share_of_ideal:.1%} of the ideal; "
        f"first-token time is {summary.ttft_ratio:.3f} of that without reuse.",
    ]


def energy_lines(summary: BenchSummary, unreadable: Unreadable | None) -> list[str]:
    """Return the energy of each response, or why there is none."""
    without, reuse = summary.without_second.energy_j, summary.reuse_second.energy_j
    if unreadable is not None:
        return [f"Energy: cannot be read here, because {unreadable.reason}."]
    if without is None or reuse is None:
        return ["Energy: was not read."]
    return [
        f"Energy of response 2 (processor package): {without.median:.1f} J without reuse, "
        f"{reuse.median:.1f} J with."
    ]


def growth_table(turns: Sequence[GrowthTurn]) -> Table:
    """Return the growth curve, medians in seconds."""
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title="Seconds per turn: full prefill -> with reuse",
        title_justify="left",
    )
    for heading in ("turn", "prompt tokens", "first token", "whole response"):
        table.add_column(heading, justify="right", no_wrap=True)
    for turn in turns:
        table.add_row(
            str(turn.turn),
            f"{turn.prompt_tokens:,}",
            f"{turn.without_ttft_s.median:.3f} -> {turn.reuse_ttft_s.median:.3f}",
            f"{turn.without_latency_s.median:.3f} -> {turn.reuse_latency_s.median:.3f}",
        )
    return table


def require_writable(path: Path) -> None:
    """
    Check, before minutes of work, that a result can be written there.

    Raises:
        ConfigError: The folder does not exist, *path* is a folder itself, or one may not write there.
    """
    if not path.parent.is_dir():
        raise ConfigError(f"There is no folder {path.parent}: create it first.")
    if path.is_dir():
        raise ConfigError(f"{path} is a folder: name a file in it.")
    try:
        if path.exists():
            os.close(os.open(path, os.O_WRONLY | os.O_APPEND | _DO_NOT_WAIT))
        else:
            tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as cause:
        raise _not_written(path, cause) from cause


@contextmanager
def written_to(path: Path) -> Iterator[None]:
    """
    Run what writes a result there.

    Raises:
        ConfigError: It could not be written.
    """
    try:
        yield
    except OSError as cause:
        raise _not_written(path, cause) from cause


def write_json(path: Path, **parts: object) -> None:
    """
    Write dataclasses and plain values under their names as one JSON object.

    Raises:
        ConfigError: It could not be written.
    """
    text = json.dumps(parts, default=_plain, ensure_ascii=False, indent=1)
    with written_to(path):
        path.write_text(text + "\n", encoding="utf-8")


def _not_written(path: Path, cause: OSError) -> ConfigError:
    return ConfigError(
        f"{path} cannot be written ({cause.strerror or cause}): name a file that can, on a disk "
        "with room."
    )


def _plain(value: "DataclassInstance") -> object:
    """Return a dataclass as JSON knows it; `asdict` refuses whatever is none."""
    return asdict(value)


def _add_response(table: Table, name: str, summary: ResponseSummary) -> None:
    latency = summary.latency_s
    table.add_row(
        name,
        f"{summary.ttft_s.median:.3f}",
        f"{summary.decode_s.median:.3f}",
        Text(f"{latency.median:.3f}", style="bold"),
        f"{latency.mean:.3f}",
        f"{latency.stdev:.3f}",
    )


def _plus_minus(seconds: Summary) -> str:
    return f"{seconds.median:.3f} s (sd {seconds.stdev:.3f})"
