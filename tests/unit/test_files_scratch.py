import os
from pathlib import Path

import pytest

from recollect.errors import ConfigError
from recollect.files import scratch_folder


def test_a_scratch_folder_is_private_and_gone_afterwards(tmp_path: Path) -> None:
    with scratch_folder(tmp_path / "home") as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
        assert (tmp_path / "home").stat().st_mode & 0o777 == 0o700
        (folder / "a").touch()
    assert not folder.exists()


def test_it_is_gone_after_an_error_too(tmp_path: Path) -> None:
    with pytest.raises(KeyError), scratch_folder(tmp_path) as folder:
        raise KeyError
    assert not folder.exists()


def test_two_at_once_are_two_folders(tmp_path: Path) -> None:
    with scratch_folder(tmp_path) as first, scratch_folder(tmp_path) as second:
        assert first != second


def test_what_a_killed_process_left_a_day_ago_is_swept(tmp_path: Path) -> None:
    old, new = tmp_path / "tmp" / "old", tmp_path / "tmp" / "new"
    for folder in (old, new):
        folder.mkdir(parents=True)
        (folder / "half").touch()
    os.utime(old, (1, 1))
    with scratch_folder(tmp_path):
        assert not old.exists()
        assert new.exists()


def test_a_home_that_is_a_file_is_said_to_be_unusable(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.touch()
    with pytest.raises(ConfigError, match="RECOLLECT_HOME"), scratch_folder(home):
        pass
