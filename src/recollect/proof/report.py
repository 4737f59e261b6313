"""
Results for people: the bench's table and verdicts in words, the machine card, the growth curve.

The card says on which machine and with which versions a number was measured; it names no host and no
path. The curve needs matplotlib, an extra; `require_plot` says so before any work is done. Measures
nothing.
"""

import contextlib
import json
import os
import platform
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

import psutil
from rich import box
from rich.table import Table
from rich.text import Text

from recollect import __version__
from recollect.conversation.model import Model
from recollect.engine.decoder import Decoder
from recollect.errors import ConfigError, MissingPackageError
from recollect.proof.bench import (
    BenchSummary,
    GrowthTurn,
    Iteration,
    ResponseSummary,
    Summary,
    Unreadable,
)

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from matplotlib.axes import Axes


_CPUINFO: Final = Path("/proc/cpuinfo")
_PACKAGES: Final = ("openvino", "openvino-genai", "onnxruntime-genai", "onnxruntime", "numpy")
_INTERESTING_FLAGS: Final = ("avx2", "avx512f", "avx512_bf16", "avx_vnni", "amx_bf16", "amx_int8")
"""What decides the arithmetic of the CPU plugin: without a bf16 flag, `fast` computes in f32."""


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine, and what is installed on it."""

    cpu: str
    cpu_features: tuple[str, ...]
    """Those that decide how fast matrices are multiplied; empty where unknown."""
    physical_cores: int | None
    logical_cores: int | None
    memory_bytes: int
    load_average: float | None
    """Of the last minute, before the measurement; None where unknown."""
    system: str
    python: str
    versions: dict[str, str]


@dataclass(frozen=True, slots=True)
class MachineCard(Machine):
    """Where a measurement was taken."""

    model: str
    profile: str
    """`elsewhere` where an engine elsewhere computes: it chooses its own precision."""
    runtime: str
    kv_bytes_per_token: int | None
    """None: the KV is elsewhere, and nobody here knows; likewise below."""
    kv_blocks: int | None
    context_length: int

    @property
    def title(self) -> str:
        """Return what was measured on which machine, on one line."""
        if self.kv_blocks is None:
            return f"{self.model}, {self.runtime} elsewhere"
        return f"{self.model}, profile {self.profile}, {self.cpu}"


def machine_card(model: Model) -> MachineCard:
    """Return the card of this machine with that model on it."""
    info = model.engine.info
    is_elsewhere = isinstance(model.engine, Decoder)
    return MachineCard(
        **asdict(this_machine()),
        model=Path(model.name).name,
        profile="elsewhere" if is_elsewhere else model.profile,
        runtime=info.name,
        kv_bytes_per_token=None if is_elsewhere else info.bytes_per_block // info.block_size,
        kv_blocks=None if is_elsewhere else model.engine.pool.num_blocks,
        context_length=model.context_length,
    )


def this_machine() -> Machine:
    """Return what this machine is."""
    return Machine(
        cpu=_cpu_name(),
        cpu_features=_cpu_features(),
        physical_cores=psutil.cpu_count(logical=False),
        logical_cores=psutil.cpu_count(),
        memory_bytes=psutil.virtual_memory().total,
        load_average=psutil.getloadavg()[0],
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        versions={"recollect": __version__, **_versions()},
    )


def _versions() -> dict[str, str]:
    installed = {}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):  # some are extras
            installed[name] = metadata.version(name)
    return installed


def _cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpu_features() -> tuple[str, ...]:
    present = set(_cpuinfo("flags").split())
    return tuple(flag for flag in _INTERESTING_FLAGS if flag in present)


def _cpuinfo(field: str) -> str:
    """Return a field of the first processor; empty where the system has none."""
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return ""


_GIB: Final = 2**30
_DO_NOT_WAIT: Final[int] = getattr(os, "O_NONBLOCK", 0)  # for somebody who reads a FIFO


def card_lines(card: MachineCard) -> list[str]:
    """Return the machine card as lines of text."""
    versions = ", ".join(f"{name} {version}" for name, version in card.versions.items())
    features = f" ({', '.join(card.cpu_features)})" if card.cpu_features else ""
    load = "unknown" if card.load_average is None else f"{card.load_average:.2f}"
    context = f"context {card.context_length:,} tokens"
    if card.kv_blocks is None:
        model = f"model    {card.model}, {context}"
        kv = f"engine   {card.runtime}, elsewhere: it computes, and has the KV"
    else:
        model = f"model    {card.model}, profile {card.profile}, {context}"
        kv = f"KV       {card.kv_bytes_per_token:,} bytes per token, {card.kv_blocks:,} blocks"
    return [
        f"CPU      {card.cpu}{features}",
        f"cores    {card.physical_cores or '?'} physical, {card.logical_cores or '?'} logical; "
        f"memory {card.memory_bytes / _GIB:.1f} GiB; load before {load}",
        f"system   {card.system}, Python {card.python}",
        f"versions {versions}",
        model,
        kv,
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
    kept = len(iterations) - 1
    return [
        f"{kept} iteration{'s' * (kept != 1)}; one more went before and was discarded as warm-up. "
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


_WITHOUT: Final = {"color": "#b4532a", "label": "full prefill every turn"}
_REUSE: Final = {"color": "#1f6f8b", "label": "with reuse"}
_FORMATS: Final = (".png", ".svg", ".pdf")


def require_plot(path: Path) -> None:
    """
    Check that a plot can be drawn and written there.

    Raises:
        MissingPackageError: matplotlib is not installed.
        ConfigError: There is no such format, or one may not write there.
    """
    if find_spec("matplotlib") is None:
        raise MissingPackageError(
            "Plots need matplotlib, which is missing: python -m pip install 'recollect-llm[plot]'."
        )
    if path.suffix.lower() not in _FORMATS:
        raise ConfigError(f"{path.name} is no kind of plot: end it in {', '.join(_FORMATS)}.")
    require_writable(path)


def draw_growth(turns: Sequence[GrowthTurn], card: MachineCard, path: Path) -> None:
    """
    Write the first-token time and the latency of every turn, with and without reuse, to *path*.

    The lines are medians, the bands go from the fastest to the slowest conversation.

    Raises:
        ConfigError: The file cannot be written.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - see the module's docstring

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    first, whole = figure.subplots(1, 2, sharex=True)
    numbers = [turn.turn for turn in turns]
    _line(first, numbers, [turn.without_ttft_s for turn in turns], _WITHOUT)
    _line(first, numbers, [turn.reuse_ttft_s for turn in turns], _REUSE)
    _line(whole, numbers, [turn.without_latency_s for turn in turns], _WITHOUT)
    _line(whole, numbers, [turn.reuse_latency_s for turn in turns], _REUSE)
    labels = [f"{turn.turn}\n{turn.prompt_tokens:,}" for turn in turns]
    for axes, title in ((first, "Time to the first token"), (whole, "Time of the whole response")):
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel("turn, and tokens of its prompt")
        axes.set_ylabel("seconds")
        axes.set_ylim(bottom=0)
        axes.set_xticks(numbers, labels, fontsize=7.5)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    first.legend(frameon=False, loc="upper left")
    cores = card.physical_cores or card.logical_cores
    figure.suptitle(
        f"{card.title}, {cores} cores" if card.kv_blocks is not None else card.title,
        fontsize=9,
        color="#555555",
    )
    with written_to(path):
        figure.savefig(path, dpi=150)


def _line(
    axes: "Axes", numbers: Sequence[int], values: Sequence[Summary], style: dict[str, str]
) -> None:
    axes.plot(
        numbers,
        [value.median for value in values],
        marker="o",
        markersize=4,
        color=style["color"],
        label=style["label"],
    )
    axes.fill_between(
        numbers,
        [value.minimum for value in values],
        [value.maximum for value in values],
        color=style["color"],
        alpha=0.15,
        linewidth=0,
    )
