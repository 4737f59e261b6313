"""Energy comes from package domains alone, and a counter that wraps around still counts up."""

from pathlib import Path

import pytest

from recollect.proof.bench import EnergyMeter, Unreadable, open_meter


def _zone(root: Path, number: str, *, name: str, energy: int, largest: int = 999) -> Path:
    zone = root / f"intel-rapl:{number}"
    zone.mkdir(parents=True)
    (zone / "name").write_text(f"{name}\n")
    (zone / "energy_uj").write_text(f"{energy}\n")
    (zone / "max_energy_range_uj").write_text(f"{largest}\n")
    return zone


def _meter(root: Path) -> EnergyMeter:
    meter = open_meter(root)
    assert isinstance(meter, EnergyMeter)
    return meter


def test_the_energy_between_two_readings_is_in_joules(tmp_path: Path) -> None:
    zone = _zone(tmp_path, "0", name="package-0", energy=1_000_000, largest=10**12)
    meter = _meter(tmp_path)
    before = meter.read()
    (zone / "energy_uj").write_text("3500000")
    assert meter.joules(before, meter.read()) == pytest.approx(2.5)


def test_a_counter_that_wrapped_around_still_counts_up(tmp_path: Path) -> None:
    """From 990 over 999 and 0 to 14 are 24 steps."""
    zone = _zone(tmp_path, "0", name="package-0", energy=990)
    meter = _meter(tmp_path)
    before = meter.read()
    (zone / "energy_uj").write_text("14")
    assert meter.joules(before, meter.read()) == pytest.approx(24e-6)


def test_packages_add_up_and_their_parts_do_not_count_twice(tmp_path: Path) -> None:
    zones = [
        _zone(tmp_path, "0", name="package-0", energy=0),
        _zone(tmp_path, "0:0", name="core", energy=0),
        _zone(tmp_path, "1", name="package-1", energy=0),
    ]
    meter = _meter(tmp_path)
    before = meter.read()
    for zone in zones:
        (zone / "energy_uj").write_text("100")
    assert meter.joules(before, meter.read()) == pytest.approx(200e-6)


def test_says_that_there_is_no_powercap(tmp_path: Path) -> None:
    meter = open_meter(tmp_path / "powercap")
    assert isinstance(meter, Unreadable)
    assert "no" in meter.reason
    assert "powercap" in meter.reason


def test_says_that_there_is_no_package_domain(tmp_path: Path) -> None:
    _zone(tmp_path, "0", name="psys", energy=0)
    meter = open_meter(tmp_path)
    assert isinstance(meter, Unreadable)
    assert "package" in meter.reason


def test_says_that_only_the_administrator_may_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zone = _zone(tmp_path, "0", name="package-0", energy=0)
    read_text = Path.read_text

    def refuse(self: Path, *args: object, **kwargs: object) -> str:
        if self.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(self))
        return read_text(self)

    monkeypatch.setattr(Path, "read_text", refuse)
    meter = open_meter(tmp_path)
    assert meter == Unreadable(f"{zone / 'energy_uj'} may be read by the administrator only")


def test_a_counter_that_holds_no_number_is_unreadable(tmp_path: Path) -> None:
    zone = _zone(tmp_path, "0", name="package-0", energy=0)
    (zone / "energy_uj").write_text("what\n")
    assert isinstance(open_meter(tmp_path), Unreadable)
