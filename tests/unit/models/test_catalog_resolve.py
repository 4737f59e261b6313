from pathlib import Path

import pytest

from recollect.errors import UnknownModelError
from recollect.models.catalog import (
    CATALOG,
    FolderSource,
    GgufSource,
    HubFile,
    ReferenceModel,
    Source,
    resolve,
)


@pytest.mark.parametrize(
    ("reference", "source"),
    [
        ("reference", ReferenceModel()),
        ("smollm2", CATALOG["smollm2"]),
        ("org/repo:file.gguf", HubFile("org/repo", "file.gguf")),
        ("org/re.po-1:folder/file.Q4.GGUF", HubFile("org/re.po-1", "folder/file.Q4.GGUF")),
    ],
)
def test_a_reference_names_one_source(reference: str, source: Source) -> None:
    assert resolve(reference) == source


def test_files_and_folders_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.gguf").touch()
    (tmp_path / "export").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve("a.gguf") == GgufSource(tmp_path.resolve() / "a.gguf")
    assert resolve("export") == FolderSource(tmp_path.resolve() / "export")


def test_a_name_of_the_catalog_goes_before_a_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "smollm2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve("smollm2") == CATALOG["smollm2"]
    assert resolve("./smollm2") == FolderSource(tmp_path.resolve() / "smollm2")


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("smolm2", "did you mean smollm2"),
        ("SmolLM2", "did you mean smollm2"),
        ("qwen", r"did you mean qwen2\.5-coder-0\.5b or qwen2\.5-coder-1\.5b"),
        ("nothing-like-it", "`recollect models` lists"),
        ("", "`recollect models` lists"),
        ("./none.gguf", "check the path"),
        ("/none", "check the path"),
        ("org/repo", "org/repo:file.gguf"),
        ("org/repo:file.bin", "`recollect models` lists"),
    ],
)
def test_what_is_unknown_is_refused_with_a_remedy(reference: str, words: str) -> None:
    with pytest.raises(UnknownModelError, match=words):
        resolve(reference)
