"""Files that strangers made are opened without waiting, read within a bound, and only in their folder."""

import grp
import os
import pwd
import stat
import sys
from pathlib import Path

import pytest

from recollect import files

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="pipes, links and modes of POSIX")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / "a").write_text("one\r\ntwo\rthree\n")
    (folder / "inner" / "b").write_text("b")
    (tmp_path / "outside").write_text("secret")
    return folder


def test_what_is_no_file_is_refused_at_once(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    for path, kind in (
        (folder / "pipe", "a pipe"),
        (folder, "a folder"),
        (Path("/dev/zero"), "a device"),
    ):
        for read in (files.require_regular, lambda path: files.read_bytes(path, most_bytes=9)):
            with pytest.raises(OSError, match=f"it is {kind}, not a file"):
                read(path)
    with pytest.raises(FileNotFoundError):
        files.read_bytes(folder / "nothing", most_bytes=9)


def test_no_more_is_read_than_was_allowed(folder: Path) -> None:
    assert files.read_bytes(folder / "a", most_bytes=15) == b"one\r\ntwo\rthree\n"
    assert files.read_text(folder / "a", most_bytes=15) == "one\ntwo\nthree\n"
    with pytest.raises(OSError, match="it is larger than 14 bytes"):
        files.read_bytes(folder / "a", most_bytes=14)
    with (folder / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OSError, match="it is larger than 2 MiB"):
        files.read_bytes(folder / "sparse", most_bytes=2 * files.MIB)


def test_a_name_stays_inside_its_folder(folder: Path) -> None:
    (folder / "link").symlink_to("inner/b")
    assert files.inside(folder, "a") == folder / "a"
    assert files.inside(folder, "inner/b") == folder / "inner" / "b"
    assert files.inside(folder, "link") == folder / "inner" / "b"
    (folder / "out").symlink_to("../outside")
    (folder / "up").symlink_to("..")
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    for name in (
        *("", "../outside", "inner/../../outside", "..\\outside", "/etc/passwd", "C:\\x", "C:x"),
        *("\\\\host\\x", "a\0b", "out", "up/outside", "pipe", "inner", ".", "nothing"),
        *("loop", "a/b"),
    ):
        with pytest.raises(OSError, match=r"it |No such file|Not a directory|levels of symbolic"):
            files.inside(folder, name)


def test_links_into_the_blobs_of_the_hub_cache_are_inside(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    blobs = snapshot.parent.parent / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "0123").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/0123")
    (tmp_path / "models--org--name" / "other").write_text("x")
    (snapshot / "other").symlink_to("../../other")
    assert files.inside(snapshot, "config.json") == blobs / "0123"
    with pytest.raises(OSError, match="leads out of the folder"):
        files.inside(snapshot, "other")
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="leads out of the folder"):
        files.inside(snapshot, "config.json")


def test_who_else_may_write_is_said(folder: Path) -> None:
    file = folder / "a"
    file.chmod(0o644)
    assert files.others_may_write(file) is None
    file.chmod(0o666)
    assert files.others_may_write(file) == "everybody on this machine may write to it"
    folder.chmod(0o1777)  # as /tmp: nobody may replace what is not his own
    assert files.others_may_write(folder) is None


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="gives files away")
def test_other_owners_and_groups_are_named(folder: Path) -> None:
    file = folder / "a"
    nobody = pwd.getpwnam("nobody")
    os.chown(file, nobody.pw_uid, -1)
    assert files.others_may_write(file) == "it belongs to nobody"
    others = next(group for group in grp.getgrall() if group.gr_gid not in (os.getegid(), 0))
    os.chown(file, os.geteuid(), others.gr_gid)
    file.chmod(0o664)
    assert files.others_may_write(file) == f"the group {others.gr_name} may write to it"
    os.chown(file, os.geteuid(), pwd.getpwuid(os.geteuid()).pw_gid)
    assert stat.S_IMODE(file.stat().st_mode) & stat.S_IWGRP
    assert files.others_may_write(file) is None, "the user's own group"


def test_of_files_beyond_a_number_those_that_were_changed_last_stay(tmp_path: Path) -> None:
    for age, name in enumerate(["newest", "middle", "oldest"]):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    files.keep_newest(tmp_path, 3)
    assert len(list(tmp_path.iterdir())) == 3
    files.keep_newest(tmp_path, 2)
    assert {path.name for path in tmp_path.iterdir()} == {"newest", "middle"}
