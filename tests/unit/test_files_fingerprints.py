import hashlib
import os
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from recollect.files import cached_sha256, combine, sha256_file

PARTS = st.lists(st.text(max_size=3), max_size=4)


@given(PARTS, PARTS)
def test_different_lists_have_different_fingerprints(first: list[str], second: list[str]) -> None:
    assert (combine(first) == combine(second)) == (first == second)


def test_a_file_hashes_to_its_sha256_and_progress_ends_at_its_size(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x" * (5 << 20))
    seen: list[tuple[str, int, int | None]] = []
    digest = sha256_file(path, progress=lambda *report: seen.append(report))
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert seen == [("checking a", 4 << 20, 5 << 20), ("checking a", 5 << 20, 5 << 20)]


def test_a_file_that_did_not_change_is_not_read_again(tmp_path: Path) -> None:
    path, home, reads = tmp_path / "a", tmp_path / "home", []
    path.write_bytes(b"one")
    for _ in range(2):
        digest = cached_sha256(path, home=home, progress=lambda *report: reads.append(report))
        assert digest == hashlib.sha256(b"one").hexdigest()
    assert len(reads) == 1


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    path, home = tmp_path / "a", tmp_path / "home"
    path.write_bytes(b"one")
    cached_sha256(path, home=home)
    path.write_bytes(b"two")
    os.utime(path, ns=(1, 1))
    assert cached_sha256(path, home=home) == hashlib.sha256(b"two").hexdigest()


def test_a_damaged_note_is_ignored(tmp_path: Path) -> None:
    path, home = tmp_path / "a", tmp_path / "home"
    path.write_bytes(b"one")
    cached_sha256(path, home=home)
    (note,) = (home / "hashes").iterdir()
    for damage in (
        "",
        "[]",
        "{",
        '{"path": 1}',
        note.read_text().replace('"sha256": "', '"sha256": 1, "x": "'),
    ):
        note.write_text(damage)
        assert cached_sha256(path, home=home) == hashlib.sha256(b"one").hexdigest()
