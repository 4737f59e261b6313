"""
Draw the growth curve.

Needs matplotlib, an extra; `require_matplotlib` says so before any work is done.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

from recollect.errors import ConfigError
from recollect.proof.growth import GrowthTurn
from recollect.proof.machine import MachineCard
from recollect.proof.report import require_writable, written_to
from recollect.proof.statistics import Summary

if TYPE_CHECKING:  # an extra: imported where it is used
    from matplotlib.axes import Axes

_WITHOUT: Final = {"color": "#b4532a", "label": "full prefill every turn"}
_REUSE: Final = {"color": "#1f6f8b", "label": "with reuse"}
_FORMATS: Final = (".png", ".svg", ".pdf")


def require_plot(path: Path) -> None:
    """
    Check that a plot can be drawn and written there.

    Raises:
        ConfigError: matplotlib is not installed, there is no such format, or one may not write there.
    """
    if find_spec("matplotlib") is None:
        raise ConfigError(
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
        f"{card.model}, profile {card.profile}, {card.cpu}, {cores} cores",
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
