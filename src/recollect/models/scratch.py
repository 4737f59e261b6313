"""
A private place for unfinished work, on the same disk as the finished.

What lies there is never used; it is moved out by one rename when it is whole.
"""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from recollect.errors import ConfigError

# A process that was killed leaves its folder behind; none works on one for longer than this.
_ABANDONED_AFTER_S: Final = 24 * 3600.0


@contextlib.contextmanager
def scratch_folder(home: Path) -> Iterator[Path]:
    """
    Yield a new empty folder under *home*, private to the user, that is gone afterwards.

    Raises:
        ConfigError: *home* cannot be written to.
    """
    parent = home / "tmp"
    try:
        make_private(parent, home)
        _sweep(parent)
        folder = Path(tempfile.mkdtemp(dir=parent))
    except OSError as cause:
        raise ConfigError(
            f"The data folder {home} cannot be written to ({cause.strerror}): "
            "set RECOLLECT_HOME to a folder of yours."
        ) from cause
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make_private(folder: Path, home: Path) -> None:
    """
    Make *home* and a folder directly in it, for the user alone, unless they are there.

    Raises:
        OSError: They cannot be made.
    """
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)


def link_or_copy(source: Path, target: Path) -> None:
    """
    Make the content of *source* available at *target*, without a second copy if that can be.

    Raises:
        OSError: Neither a link nor a copy can be made.
    """
    for link in (os.link, os.symlink):
        # Another file system refuses hard links, Windows without developer mode symbolic ones.
        with contextlib.suppress(OSError, NotImplementedError):
            link(source.resolve(), target)
            return
    shutil.copyfile(source, target)


def _sweep(parent: Path) -> None:
    for folder in parent.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > _ABANDONED_AFTER_S:
                shutil.rmtree(folder, ignore_errors=True)
