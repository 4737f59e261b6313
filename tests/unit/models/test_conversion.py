import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import pytest

from recollect.errors import UnsupportedModelError
from recollect.files import sha256_file
from recollect.models.gguf import describe, read_content
from recollect.models.gguf_decoder import Conversion, convert
from recollect.models.openvino_folder import (
    MANIFEST_NAME,
    Manifest,
    find_converted,
    find_inexact,
    from_manifest,
)
from recollect.types import no_progress

MakeGguf = Callable[..., Path]


def run(path: Path, folder: Path, home: Path) -> Manifest:
    job = Conversion("tiny", path, sha256_file(path))
    return convert(job, folder, home=home, progress=no_progress)


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


@pytest.fixture
def converted(converted_once: Path, tmp_path: Path) -> Path:
    """A converted folder that the test may spoil."""
    return shutil.copytree(converted_once, tmp_path / "home" / "models" / "tiny")


@dataclass(frozen=True)
class Observed:
    """A conversion that several tests look at: it takes a second."""

    source: Path
    before: bytes
    """What the user's file held."""
    home: Path
    folder: Path
    made: Manifest
    reports: list[tuple[str, int, int | None]]


@pytest.fixture(scope="module")
def observed(converted_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Observed:
    (written,) = converted_once.parents[1].glob("*.gguf")
    parent = tmp_path_factory.mktemp("observed")
    source, home = Path(shutil.copy(written, parent)), parent / "home"
    before, reports = source.read_bytes(), list[tuple[str, int, int | None]]()
    job = Conversion("tiny", source, sha256_file(source))
    folder = home / "models" / "tiny"
    made = convert(job, folder, home=home, progress=lambda *report: reports.append(report))
    return Observed(source, before, home, folder, made, reports)


@pytest.mark.slow
def test_a_converted_folder_is_whole_and_found_again(observed: Observed) -> None:
    converted = observed.folder
    manifest = find_converted(converted, sha256_file(observed.source))
    assert manifest == observed.made
    assert manifest.name == "tiny"
    assert manifest.architecture == "llama"
    assert manifest.context_length == 512
    assert manifest.eos_token_ids == [0, 2]
    assert set(manifest.file_bytes) | {MANIFEST_NAME} == names(converted)
    assert list((observed.home / "tmp").iterdir()) == []


@pytest.mark.slow
def test_the_users_file_stays_as_it_was(observed: Observed) -> None:
    assert observed.source.read_bytes() == observed.before
    assert [file.name for file in observed.source.parent.glob("openvino*")] == []


def test_a_folder_of_another_source_is_not_found(converted: Path) -> None:
    assert find_converted(converted, "00" * 32) is None
    assert find_converted(converted, None) is not None


def test_a_folder_with_a_changed_or_missing_file_is_not_found(converted: Path) -> None:
    weights = converted / "openvino_model.bin"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    assert find_converted(converted, None) is None
    weights.unlink()
    assert find_converted(converted, None) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("release", "found"), [("2026.0.0.0", True), ("2025.4.1.0", False), ("", False)]
)
def test_a_folder_of_another_release_year_is_not_found(
    converted: Path, release: str, found: bool
) -> None:
    manifest = Manifest.read(converted)
    assert manifest is not None
    versions = manifest.library_versions | {"openvino-genai": release}
    replace(manifest, library_versions=versions).write(converted)
    assert (find_converted(converted, None) is not None) == found


def test_a_folder_with_rounded_weights_is_inexact(converted: Path) -> None:
    manifest = Manifest.read(converted)
    assert manifest is not None
    replace(manifest, format_version=2).write(converted)
    assert find_converted(converted, None) is None
    found = find_inexact(converted, manifest.source_sha256)
    assert found is not None
    assert not found.is_exact


@pytest.mark.slow
def test_a_folder_of_no_use_is_replaced(
    converted: Path, make_gguf: MakeGguf, tmp_path: Path
) -> None:
    (converted / "openvino_model.bin").write_bytes(b"half")
    (converted / "stray").touch()
    manifest = run(make_gguf(), converted, tmp_path / "home")
    assert find_converted(converted, manifest.source_sha256) == manifest
    assert not (converted / "stray").exists()


@pytest.mark.slow
def test_the_fingerprint_follows_weights_and_template(make_gguf: MakeGguf, tmp_path: Path) -> None:
    settings: list[dict[str, object]] = [{}, {}, {"seed": 1}, {"template": "other"}]
    prints = []
    for number, setting in enumerate(settings):
        path = make_gguf(f"{number}.gguf", **setting)
        prints.append(run(path, tmp_path / str(number), tmp_path).fingerprint)
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_a_file_without_weights_is_refused_before_the_converter_runs(
    make_gguf: MakeGguf, tmp_path: Path
) -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"tiny\.gguf holds a vocabulary alone, without weights"
    ):
        run(make_gguf(tensors=False), tmp_path / "m", tmp_path)
    assert not (tmp_path / "tmp").exists()


@pytest.mark.slow
def test_what_the_converter_refuses_is_said_in_its_words_and_leaves_nothing(
    make_gguf: MakeGguf, tmp_path: Path
) -> None:
    path = make_gguf(tensor_type=gguf.GGMLQuantizationType.Q8_0)
    tensor = read_content(path).tensors["blk.0.ffn_down.weight"]
    damaged = bytearray(path.read_bytes())
    damaged[tensor.start : tensor.start + 2] = b"\xff\x7f"  # a scale that is no number
    path.write_bytes(damaged)
    folder = tmp_path / "home" / "models" / "tiny"
    with pytest.raises(
        UnsupportedModelError,
        match=r"^tiny\.gguf holds blk\.0\.ffn_down\.weight with a scale that is infinite or no number:",
    ):
        run(path, folder, tmp_path / "home")
    assert not folder.exists()
    assert list((tmp_path / "home" / "tmp").iterdir()) == []


@pytest.mark.slow
def test_a_tokenizer_that_cannot_be_made_is_named(make_gguf: MakeGguf, tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"^tiny\.gguf has a tokenizer of the kind 'rwkv'"
    ):
        run(make_gguf(tokenizer="rwkv"), tmp_path / "m", tmp_path)


@pytest.mark.slow
def test_an_interrupt_leaves_nothing(make_gguf: MakeGguf, tmp_path: Path) -> None:
    def interrupt(_what: str, _done: int, total: int | None) -> None:
        if total is not None:
            raise KeyboardInterrupt

    path, home = make_gguf(), tmp_path / "home"
    with pytest.raises(KeyboardInterrupt):
        convert(
            Conversion("tiny", path, "00"), home / "models" / "m", home=home, progress=interrupt
        )
    assert [file for file in home.rglob("*") if file.is_file()] == []


@pytest.mark.parametrize("room", [-50_000, 100], ids=["while building", "while saving"])
@pytest.mark.slow
def test_a_full_disk_is_an_error_and_leaves_nothing(
    room: int, make_gguf: MakeGguf, tmp_path: Path
) -> None:
    """A limit on the size of files stands for it: matrices are built, then saved with all else."""
    resource = pytest.importorskip("resource")
    path, home = make_gguf(), tmp_path / "home"
    tensors = read_content(path).tensors.values()
    most_bytes = room + sum(tensor.size_bytes for tensor in tensors if len(tensor.shape) == 2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, before[1]))
    try:
        with pytest.raises(OSError, match=r"File too large|No space left"):
            run(path, home / "models" / "tiny", home)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [file for file in home.rglob("*") if file.is_file()] == []


def test_progress_counts_the_bytes_of_the_weights(observed: Observed) -> None:
    seen = observed.reports
    assert seen[0] == ("converting tiny", 0, None)
    assert seen[-1] == ("converting tiny", 1, 1)
    total = sum(tensor.size_bytes for tensor in read_content(observed.source).tensors.values())
    counted = [(done, of) for _, done, of in seen[1:-1]]
    assert counted
    assert all(0 < done <= total == of for done, of in counted)


@pytest.mark.slow
def test_two_processes_at_once_end_with_one_whole_folder(
    make_gguf: MakeGguf, tmp_path: Path
) -> None:
    """Each prints what it got; both must have got the same, and it must be what lies there."""
    program = (
        "import sys; from pathlib import Path\n"
        "from recollect.models.prepare import prepare\n"
        "print(prepare(sys.argv[1], home=Path(sys.argv[2])))"
    )
    command = [sys.executable, "-c", program, str(make_gguf()), str(tmp_path / "home")]
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: S603 - our own
        for _ in range(2)
    ]
    printed = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert len(set(printed)) == 1
    (folder,) = (tmp_path / "home" / "models").iterdir()
    assert find_converted(folder, None) is not None
    assert list((tmp_path / "home" / "tmp").iterdir()) == []


def test_the_manifest_is_plain_json(converted: Path) -> None:
    fields = json.loads((converted / MANIFEST_NAME).read_text("utf-8"))
    assert fields["format_version"] == 3


@pytest.mark.skipif(sys.platform == "win32", reason="modes of POSIX")
@pytest.mark.slow
def test_a_file_that_others_may_write_to_is_remarked_on(
    make_gguf: MakeGguf, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = make_gguf()
    path.chmod(0o666)
    run(path, tmp_path / "home" / "m", tmp_path / "home")
    (message,) = [text for text in caplog.messages if "changed by others" in text]
    assert f"{path} can be changed by others (everybody" in message


def test_the_window_is_noted_for_those_who_look_around_it(observed: Observed) -> None:
    assert observed.made.window is None
    assert from_manifest(observed.made, observed.folder, "tiny").boundaries == ()
    windowed = replace(observed.made, window=40)
    assert from_manifest(windowed, observed.folder, "tiny").boundaries == (40,)
    content = read_content(observed.source)
    content.fields["llama.attention.sliding_window"] = 40
    assert describe(content, observed.source).window == 40
