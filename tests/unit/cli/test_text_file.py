"""A file that an option names is read without waiting, and not without end."""

import os
import sys
from pathlib import Path

import pytest

from recollect.cli.batch import MOST_BYTES, read_text
from recollect.errors import ConfigError


def test_the_line_ends_after_it_are_not_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n\r\n")
    assert read_text(tmp_path / "f") == "one\ntwo"


def test_what_is_too_large_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "f").open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(ConfigError, match="larger than 64 MiB"):
        read_text(tmp_path / "f")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such pipes")
def test_a_pipe_that_nobody_writes_to_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="it is a pipe, not a file"):
        read_text(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="a folder"):
        read_text(tmp_path)
