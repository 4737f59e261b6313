"""Sizes, profiles and folders are read as people write them, or refused with a ConfigError."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import recollect
from recollect import config
from recollect.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1", 1),
        ("100000", 100_000),
        ("2GB", 2 * 10**9),
        ("512 MiB", 512 * 2**20),
        ("1.5k", 1500),
        (" 3gib ", 3 * 2**30),
        ("7b", 7),
        ("1Ki", 1024),
        ("0.1G", 10**8),
    ],
)
def test_a_size_is_read_with_its_unit(text: str, expected: int) -> None:
    assert config.parse_size(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "0", "0GB", "-1GB", "GB", "1TB", "1 2", "1e9", "0.4", "nan", "inf", "1..2", "9" * 400],
)
def test_what_is_not_a_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size"):
        config.parse_size(text)


@given(st.text())
def test_any_text_is_a_size_or_a_config_error(text: str) -> None:
    with contextlib.suppress(ConfigError):
        assert config.parse_size(text) > 0


@pytest.mark.parametrize("profile", config.PROFILES)
def test_each_profile_goes_by_its_name(profile: str) -> None:
    assert config.parse_profile(profile) == profile


def test_an_unknown_profile_is_refused_and_the_known_ones_are_named() -> None:
    with pytest.raises(ConfigError, match="exact, fast, small"):
        config.parse_profile("Fast")


@pytest.mark.parametrize(
    ("text", "expected"),
    [(None, False), ("", False), ("0", False), ("off", False), ("1", True), ("True", True)],
)
def test_offline_is_what_the_variable_says(
    text: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RECOLLECT_OFFLINE", raising=False)
    if text is not None:
        monkeypatch.setenv("RECOLLECT_OFFLINE", text)
    assert config.is_offline() is expected


def test_a_variable_that_says_neither_yes_nor_no_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RECOLLECT_OFFLINE", "perhaps")
    with pytest.raises(ConfigError, match="RECOLLECT_OFFLINE is 'perhaps': set it to 1 or 0"):
        config.is_offline()


def test_home_is_where_the_variable_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RECOLLECT_HOME", str(tmp_path))
    assert config.home() == tmp_path


def test_home_without_the_variable_is_the_platform_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, ""):
        if value is None:
            monkeypatch.delenv("RECOLLECT_HOME", raising=False)
        else:
            monkeypatch.setenv("RECOLLECT_HOME", value)
        assert config.home().name == "recollect"


def test_the_default_kv_memory_is_some_and_less_than_the_machine_has() -> None:
    assert 0 < config.default_kv_memory_bytes() < 2**50


@pytest.mark.parametrize("kind", [str, Path])
def test_a_data_folder_may_be_given_as_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Callable[[Path], str | Path]
) -> None:
    """As the standard library takes paths; `~` is the user's folder, as in RECOLLECT_HOME."""
    monkeypatch.setenv("HOME", str(tmp_path))
    with recollect.load("reference", home=kind(tmp_path / "data")) as model:
        assert model.session().respond("Hello").text
    assert recollect.explain(home=kind(tmp_path / "data")) == []
    assert recollect.unlock(kind(tmp_path / "data")) is None
    assert config.data_folder(kind(Path("~/data"))) == tmp_path / "data"


def test_a_data_folder_of_nobody_is_refused() -> None:
    with pytest.raises(ConfigError, match="name a folder"):
        config.data_folder("~nobody-of-this-name/data")
