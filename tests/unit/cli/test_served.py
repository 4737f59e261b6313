"""What the models of a server are called, and what they weigh."""

from pathlib import Path

import pytest

from recollect.cli.serve import default_references, public_names, weight_bytes
from recollect.errors import ConfigError
from recollect.models.listing import ModelStatus


def gguf(path: Path, size: int = 1) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    return str(path)


def test_files_of_one_stem_are_both_offered(tmp_path: Path) -> None:
    one, other = gguf(tmp_path / "a/model.gguf"), gguf(tmp_path / "b/model.gguf")
    named = public_names(["smollm2", one, other, one])
    assert named == {"smollm2": "smollm2", "a/model.gguf": one, "b/model.gguf": other}
    assert public_names([one]) == {"model": one}


def test_a_file_does_not_take_the_place_of_a_folder_or_of_a_name(tmp_path: Path) -> None:
    file, folder = gguf(tmp_path / "m.gguf"), tmp_path / "m"
    gguf(folder / "openvino_model.bin")
    assert public_names([file, str(folder)]) == {"m.gguf": file, "m": str(folder)}
    same = gguf(tmp_path / "smollm2.gguf")
    assert public_names([same, "smollm2"]) == {"smollm2.gguf": same, "smollm2": "smollm2"}


def test_a_folder_keeps_the_dots_of_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "qwen2.5-0.5b"
    folder.mkdir()
    assert public_names([str(folder)]) == {"qwen2.5-0.5b": str(folder)}


def test_what_cannot_be_told_apart_is_refused(tmp_path: Path) -> None:
    files = [gguf(tmp_path / side / "x/model.gguf") for side in "ab"]
    with pytest.raises(ConfigError, match=r"the same: .*Rename one"):
        public_names(files)


def test_a_model_given_by_its_path_has_a_weight(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    gguf(folder / "openvino_model.bin", 1000)
    gguf(folder / "deeper/openvino_model.xml", 24)
    assert weight_bytes(gguf(tmp_path / "m.gguf", 500), tmp_path / "home") == 500
    for number in (1, 2, 3):
        gguf(tmp_path / f"large-{number:05}-of-00003.gguf", 100 * number)
    assert weight_bytes(str(tmp_path / "large-00001-of-00003.gguf"), tmp_path / "home") == 600
    assert weight_bytes(str(folder), tmp_path / "home") == 1024
    assert weight_bytes("reference", tmp_path / "home") == 0
    assert weight_bytes("smollm2", tmp_path / "home") > 50_000_000  # what will be fetched


def test_what_was_converted_from_a_file_that_is_gone_is_not_offered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = gguf(tmp_path / "there.gguf")
    names = ["smollm2", there, str(tmp_path / "gone.gguf"), "org/repo:file.gguf"]
    statuses = [
        ModelStatus(
            name=name,
            description="",
            licence=None,
            download_bytes=None,
            is_installed=True,
            is_exact=True,
            disk_bytes=10,
            source_bytes=4,
            path=None,
        )
        for name in names
    ]
    monkeypatch.setattr("recollect.cli.serve.installed", lambda _home: statuses)
    assert weight_bytes("smollm2", tmp_path) == 6  # the GGUF file that is kept takes no memory
    offered = public_names(default_references(tmp_path))
    assert list(offered) == ["smollm2", "there", "org/repo:file.gguf"]
