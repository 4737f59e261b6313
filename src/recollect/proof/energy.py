"""
Energy that the processor package took, from Linux powercap.

Knows the counters of intel-rapl (AMD's are under the same name) and nothing of what runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

POWERCAP: Final = Path("/sys/class/powercap")
_JOULES_PER_MICROJOULE: Final = 1e-6


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Energy cannot be read here; `reason` is a sentence for people."""

    reason: str


@dataclass(frozen=True, slots=True)
class _Counter:
    path: Path
    range_uj: int
    """The counter begins again at 0 after this value."""


class EnergyMeter:
    """
    The energy counters of all processor packages.

    `read` before and after, then `joules` between the two readings. A counter may wrap around once
    in between; at 100 W that is after some ten minutes.
    """

    def __init__(self, counters: Sequence[_Counter]) -> None:
        self._counters = tuple(counters)

    def read(self) -> tuple[int, ...]:
        """
        Return the counters in microjoules, one per package.

        Raises:
            OSError: They cannot be read any more.
        """
        return tuple(_read_int(counter.path) for counter in self._counters)

    def joules(self, before: tuple[int, ...], after: tuple[int, ...]) -> float:
        """Return the energy between two readings, over all packages."""
        microjoules = 0
        for counter, first, last in zip(self._counters, before, after, strict=True):
            # The range is the largest value, so one step more is a whole turn.
            microjoules += (last - first) % (counter.range_uj + 1)
        return microjoules * _JOULES_PER_MICROJOULE


def open_meter(root: Path = POWERCAP) -> EnergyMeter | Unreadable:
    """Return a meter over the package domains under *root*, or why there is none."""
    if not root.is_dir():
        return Unreadable(f"this system has no {root} (Linux powercap)")
    packages = [zone for zone in sorted(root.glob("intel-rapl:*")) if _is_package(zone)]
    if not packages:
        return Unreadable(f"{root} has no intel-rapl package domain")
    try:
        counters = [
            _Counter(zone / "energy_uj", _read_int(zone / "max_energy_range_uj"))
            for zone in packages
        ]
        meter = EnergyMeter(counters)
        meter.read()
    except PermissionError as cause:
        return Unreadable(f"{cause.filename} may be read by the administrator only")
    except (OSError, ValueError) as cause:
        return Unreadable(f"the counters cannot be read: {cause}")
    return meter


def _is_package(zone: Path) -> bool:
    try:
        return (zone / "name").read_text().startswith("package")
    except OSError:
        return False


def _read_int(path: Path) -> int:
    return int(path.read_text())
