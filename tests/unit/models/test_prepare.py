import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from recollect.errors import ConfigError, TemplateError, UnknownModelError, UnsupportedModelError
from recollect.models.byte_tokenizer import ByteTokenizer
from recollect.models.catalog import CatalogEntry, Part
from recollect.models.prepare import prepare
from recollect.models.status import installed
from recollect.models.template import ChatTemplate
from recollect.models.tokenizer import load_tokenizer

MakeGguf = Callable[..., Path]
MakeWheel = Callable[[str, dict[str, bytes]], Path]


@pytest.fixture
def entry(make_gguf: MakeGguf, make_wheel: MakeWheel, only_local_wheels: None) -> CatalogEntry:
    content = make_gguf("source.gguf").read_bytes()
    make_wheel("tiny-a", {"tiny_a/data/part1.bin": content[:50_000]})
    make_wheel("tiny-b", {"tiny_b/data/part2.bin": content[50_000:]})
    return CatalogEntry(
        name="tiny",
        description="a tiny model",
        licence="MIT",
        context_length=512,
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        parts=tuple(Part(f"tiny-{letter}", "1.0", "*/data/part*.bin") for letter in "ab"),
    )


def test_the_reference_model_needs_no_disk(tmp_path: Path) -> None:
    model = prepare("reference", home=tmp_path / "home")
    assert model.format == "reference"
    assert model.folder is None
    assert isinstance(load_tokenizer(model), ByteTokenizer)
    assert not (tmp_path / "home").exists()
    text = ChatTemplate(model.chat_template).render(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_a_named_model_is_downloaded_and_converted_once(
    entry: CatalogEntry, tmp_path: Path
) -> None:
    home, catalog, seen = tmp_path / "home", {"tiny": entry}, []

    def report(what: str, _done: int, _total: int | None) -> None:
        seen.append(what)

    first = prepare("tiny", home=home, catalog=catalog, progress=report)
    assert list(dict.fromkeys(seen)) == ["downloading tiny", "checking tiny", "converting tiny"]
    assert first.name == "tiny"
    assert first.folder == home / "models" / "tiny"
    assert list((home / "sources").iterdir()) == []  # the folder holds all of it
    seen.clear()
    shutil.rmtree(tmp_path / "wheels")
    assert prepare("tiny", home=home, catalog=catalog, progress=report) == first
    assert seen == []


def test_what_is_kept_is_private_to_the_user(entry: CatalogEntry, tmp_path: Path) -> None:
    home = tmp_path / "home"
    prepare("tiny", home=home, catalog={"tiny": entry})
    folders = [home, *(folder for folder in home.iterdir() if folder.is_dir())]
    assert len(folders) == 4
    assert {folder.stat().st_mode & 0o777 for folder in folders} == {0o700}


def test_a_damaged_installation_is_made_anew(entry: CatalogEntry, tmp_path: Path) -> None:
    home, catalog = tmp_path / "home", {"tiny": entry}
    first = prepare("tiny", home=home, catalog=catalog)
    assert first.folder is not None
    (first.folder / "openvino_model.bin").write_bytes(b"")
    assert prepare("tiny", home=home, catalog=catalog) == first
    assert load_tokenizer(first).encode("h")


def test_what_is_installed_is_listed(
    entry: CatalogEntry, make_gguf: MakeGguf, tmp_path: Path
) -> None:
    home, catalog = tmp_path / "home", {"tiny": entry}
    (before,) = installed(home, catalog=catalog)
    assert not before.is_installed
    assert (before.path, before.disk_bytes) == (None, 0)
    assert before.download_bytes == entry.bytes
    prepare("tiny", home=home, catalog=catalog)
    own = str(make_gguf("own.gguf", seed=2).resolve())
    prepare(own, home=home, catalog=catalog)
    (home / "models" / "stray").mkdir()
    named, mine = installed(home, catalog=catalog)
    assert named.is_installed
    assert named.path == home / "models" / "tiny"
    assert named.disk_bytes == sum(file.stat().st_size for file in named.path.iterdir())
    assert (mine.name, mine.is_installed, mine.licence) == (own, True, None)


def test_a_gguf_file_that_changed_under_its_name_is_another_model(
    make_gguf: MakeGguf, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    first = prepare(str(make_gguf()), home=home)
    same = prepare(str(make_gguf()), home=home)
    other = prepare(str(make_gguf(seed=1)), home=home)
    assert same == first
    assert other.fingerprint != first.fingerprint
    assert other.folder != first.folder


def test_a_gguf_file_with_a_strange_name_is_prepared(make_gguf: MakeGguf, tmp_path: Path) -> None:
    path = make_gguf("my model (é) #1.gguf")
    model = prepare(str(path), home=tmp_path / "data é")
    assert model.name == str(path.resolve())
    assert load_tokenizer(model).encode("h")


def test_a_folder_that_was_converted_here_can_be_named_by_its_path(
    make_gguf: MakeGguf, tmp_path: Path
) -> None:
    by_file = prepare(str(make_gguf()), home=tmp_path / "home")
    by_folder = prepare(str(by_file.folder), home=tmp_path / "home")
    assert by_folder.fingerprint == by_file.fingerprint
    assert by_folder.context_length == by_file.context_length


def test_a_model_without_a_template_is_ready_and_says_so_when_it_chats(
    make_gguf: MakeGguf, tmp_path: Path
) -> None:
    model = prepare(str(make_gguf(template=None)), home=tmp_path / "home")
    with pytest.raises(TemplateError, match="tuned for chat"):
        ChatTemplate(model.chat_template)


def test_an_empty_folder_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"holds no openvino_model\.xml"):
        prepare(str(tmp_path), home=tmp_path / "home")


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownModelError):
        prepare("smollm3", home=tmp_path)


def test_a_home_that_cannot_be_used_is_a_config_error(make_gguf: MakeGguf, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.touch()
    with pytest.raises(ConfigError, match="RECOLLECT_HOME"):
        prepare(str(make_gguf()), home=home)
