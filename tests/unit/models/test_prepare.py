import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from recollect.conversation.formats import load_tokenizer
from recollect.errors import (
    ConfigError,
    FetchError,
    TemplateError,
    UnknownModelError,
    UnsupportedModelError,
)
from recollect.models.catalog import CATALOG, CatalogEntry, HubFile, Part
from recollect.models.fetch import downloads_folder
from recollect.models.listing import Compared, installed, prune, stamps_of
from recollect.models.openvino_folder import Manifest
from recollect.models.prepare import prepare
from recollect.text.template import ChatTemplate
from recollect.text.tokenizer import ByteTokenizer
from recollect.types import Profile, Progress

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


@pytest.mark.slow
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
    (kept,) = (home / "sources").iterdir()  # for a later recollect that converts in another way
    assert kept.read_bytes() == (tmp_path / "source.gguf").read_bytes()
    seen.clear()
    shutil.rmtree(tmp_path / "wheels")
    assert prepare("tiny", home=home, catalog=catalog, progress=report) == first
    assert seen == []


@pytest.mark.slow
def test_what_is_kept_is_private_to_the_user(entry: CatalogEntry, tmp_path: Path) -> None:
    home = tmp_path / "home"
    prepare("tiny", home=home, catalog={"tiny": entry})
    folders = [home, *(folder for folder in home.iterdir() if folder.is_dir())]
    assert len(folders) == 4
    assert {folder.stat().st_mode & 0o777 for folder in folders} == {0o700}


@pytest.mark.slow
def test_a_damaged_installation_is_made_anew(entry: CatalogEntry, tmp_path: Path) -> None:
    home, catalog = tmp_path / "home", {"tiny": entry}
    first = prepare("tiny", home=home, catalog=catalog)
    assert first.folder is not None
    (first.folder / "openvino_model.bin").write_bytes(b"")
    assert prepare("tiny", home=home, catalog=catalog) == first
    assert load_tokenizer(first).encode("h")


@pytest.mark.slow
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
    assert named.source_bytes == entry.bytes
    folder_bytes = sum(file.stat().st_size for file in named.path.iterdir())
    assert named.disk_bytes == folder_bytes + entry.bytes
    assert named.is_exact
    assert mine.source_bytes == 0  # it has another name: the user's
    assert (mine.name, mine.is_installed, mine.licence) == (own, True, None)


@pytest.mark.slow
def test_a_kept_file_can_be_pruned_and_the_model_stays(
    entry: CatalogEntry, make_gguf: MakeGguf, tmp_path: Path
) -> None:
    home, catalog = tmp_path / "home", {"tiny": entry}
    first = prepare("tiny", home=home, catalog=catalog)
    own = make_gguf("own.gguf", seed=2).resolve()
    mine = prepare(str(own), home=home, catalog=catalog)
    assert prune("tiny", home, catalog=catalog) == entry.bytes
    assert prune("tiny", home, catalog=catalog) == 0
    assert prune(str(own), home, catalog=catalog) == own.stat().st_size
    assert [file for file in (home / "sources").rglob("*") if file.is_file()] == []
    assert own.is_file()
    shutil.rmtree(tmp_path / "wheels")
    assert prepare("tiny", home=home, catalog=catalog) == replace(first, source=None)
    assert prepare(str(own), home=home, catalog=catalog) == mine
    with pytest.raises(UnknownModelError, match="recollect models"):
        prune("other", home, catalog=catalog)


@pytest.mark.slow
def test_a_users_file_is_kept_by_a_link(make_gguf: MakeGguf, tmp_path: Path) -> None:
    home, path = tmp_path / "home", make_gguf()
    model = prepare(str(path), home=home)
    assert model.folder is not None
    kept = home / "sources" / model.folder.name / "tiny.gguf"
    assert kept.samefile(path)


@pytest.mark.slow
def test_a_model_with_rounded_weights_is_converted_anew(
    entry: CatalogEntry, tmp_path: Path
) -> None:
    home, catalog = tmp_path / "home", {"tiny": entry}
    exact = prepare("tiny", home=home, catalog=catalog)
    make_inexact(home / "models" / "tiny")
    (listed,) = installed(home, catalog=catalog)
    assert (listed.is_installed, listed.is_exact) == (True, False)
    assert prepare("tiny", home=home, catalog=catalog) == exact
    (listed,) = installed(home, catalog=catalog)
    assert (listed.is_installed, listed.is_exact) == (True, True)


@pytest.mark.slow
def test_a_model_with_rounded_weights_runs_where_its_file_cannot_be_had(
    entry: CatalogEntry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    home, catalog = tmp_path / "home", {"tiny": entry}
    prepare("tiny", home=home, catalog=catalog)
    make_inexact(home / "models" / "tiny")
    prune("tiny", home, catalog=catalog)
    shutil.rmtree(tmp_path / "wheels")
    (tmp_path / "wheels").mkdir()
    assert prepare("tiny", home=home, catalog=catalog).fingerprint == "rounded"
    assert sum("tiny runs with rounded weights" in message for message in caplog.messages) == 1
    shutil.rmtree(home / "models")
    with pytest.raises(FetchError):
        prepare("tiny", home=home, catalog=catalog)


@pytest.mark.slow
def test_a_folder_with_rounded_weights_that_is_named_by_its_path_says_so(
    make_gguf: MakeGguf, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = prepare(str(make_gguf()), home=tmp_path / "home")
    assert model.folder is not None
    assert prepare(str(model.folder), home=tmp_path / "home").fingerprint == model.fingerprint
    assert caplog.records == []
    make_inexact(model.folder)
    prepare(str(model.folder), home=tmp_path / "home")
    (record,) = caplog.records
    assert "runs with rounded weights" in record.getMessage()


def make_inexact(folder: Path) -> None:
    """Make a folder what an earlier recollect would have left."""
    manifest = Manifest.read(folder)
    assert manifest is not None
    replace(manifest, format_version=2, fingerprint="rounded").write(folder)


@pytest.mark.slow
def test_a_model_in_several_files_is_one_model(make_gguf: MakeGguf, tmp_path: Path) -> None:
    whole = prepare(str(make_gguf()), home=tmp_path / "home")
    parts = split(tmp_path / "tiny.gguf", "part")
    model = prepare(str(parts[0]), home=tmp_path / "home")
    assert whole.folder is not None
    assert model.folder is not None
    weights = [folder / "openvino_model.bin" for folder in (whole.folder, model.folder)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert model.fingerprint != whole.fingerprint
    kept = home_files(tmp_path / "home" / "sources" / model.folder.name)
    assert kept == [part.name for part in parts]
    with pytest.raises(UnsupportedModelError, match=r"name the first, part-00001-of-00002\.gguf"):
        prepare(str(parts[1]), home=tmp_path / "home")
    parts[1].unlink()
    with pytest.raises(UnsupportedModelError, match=r"part-00002-of-00002\.gguf is not beside it"):
        prepare(str(parts[0]), home=tmp_path / "home")


@pytest.mark.slow
def test_a_model_of_the_hub_is_fetched_once_in_all_its_parts(
    make_gguf: MakeGguf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    split(make_gguf(), "part")
    fetched: list[str] = []

    def download(file: HubFile, home: Path, _progress: Progress) -> Path:
        fetched.append(file.filename)
        folder = downloads_folder(file, home)
        folder.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(tmp_path / Path(file.filename).name, folder))

    def fail(file: HubFile, _home: Path, _progress: Progress) -> Path:
        raise FetchError(f"{file} cannot be had")

    monkeypatch.setattr("recollect.models.prepare.fetch_hub_file", download)
    home, name = tmp_path / "home", "org/repo:q/part-00001-of-00002.gguf"
    model = prepare(name, home=home)
    assert fetched == ["q/part-00001-of-00002.gguf", "q/part-00002-of-00002.gguf"]
    assert model.folder is not None
    monkeypatch.setattr("recollect.models.prepare.fetch_hub_file", fail)
    make_inexact(model.folder)
    assert prepare(name, home=home) == model  # made anew of what was kept
    assert prune(name, home) > 0
    assert prepare(name, home=home).source is None
    monkeypatch.setattr("recollect.models.prepare.fetch_hub_file", download)
    assert prepare(name, home=home, with_source=True) == model, "fetched again, to compare with"
    assert prune(name, home) > 0
    monkeypatch.setattr("recollect.models.prepare.fetch_hub_file", fail)
    make_inexact(model.folder)
    assert prepare(name, home=home).fingerprint == "rounded"
    assert "runs with rounded weights" in caplog.text


def home_files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def split(path: Path, stem: str) -> list[Path]:
    """Write a file's tensors into two, as llama.cpp's gguf-split does."""
    reader = gguf.GGUFReader(path)
    half = len(reader.tensors) // 2
    parts = []
    for number, tensors in enumerate((reader.tensors[:half], reader.tensors[half:])):
        part = path.with_name(f"{stem}-{number + 1:05}-of-00002.gguf")
        writer = gguf.GGUFWriter(part, "llama")
        for name, field in () if number else reader.fields.items():
            if not name.startswith("GGUF.") and name != "general.architecture":
                item = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(name, field.contents(), field.types[0], item)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in tensors:
            writer.add_tensor(tensor.name, np.asarray(tensor.data), raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        parts.append(part)
    return parts


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_gguf_file_under_another_name_is_not_converted_again(
    make_gguf: MakeGguf, entry: CatalogEntry, tmp_path: Path
) -> None:
    """Ollama calls a file by its sha256, and LM Studio by its name; the catalog has a third."""
    home = tmp_path / "home"
    named = prepare("tiny", home=home, catalog={"tiny": entry})
    for name in ("source.gguf", "other.gguf", f"sha256-{entry.sha256}"):
        copy = tmp_path / "elsewhere" / name
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(make_gguf("source.gguf"), copy)
        model = prepare(str(copy), home=home)
        assert (model.name, model.source) == (str(copy), copy)
        assert (model.folder, model.fingerprint) == (named.folder, named.fingerprint)
    assert [one.name for one in (home / "models").iterdir()] == ["tiny"]


@pytest.mark.slow
def test_a_gguf_file_with_a_strange_name_is_prepared(make_gguf: MakeGguf, tmp_path: Path) -> None:
    path = make_gguf("my model (é) #1.gguf")
    model = prepare(str(path), home=tmp_path / "data é")
    assert model.name == str(path.resolve())
    assert load_tokenizer(model).encode("h")


@pytest.mark.slow
def test_a_folder_that_was_converted_here_can_be_named_by_its_path(
    make_gguf: MakeGguf, tmp_path: Path
) -> None:
    by_file = prepare(str(make_gguf()), home=tmp_path / "home")
    by_folder = prepare(str(by_file.folder), home=tmp_path / "home")
    assert by_folder.fingerprint == by_file.fingerprint
    assert by_folder.context_length == by_file.context_length


@pytest.mark.slow
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


def noted(folder: Path, outcome: str, profile: Profile) -> Compared:
    return Compared(outcome=outcome, profile=profile, largest=1e-4, files=stamps_of(folder))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with graph and weights, of which only size and time count."""
    made = tmp_path / "model"
    made.mkdir()
    for name in ("openvino_model.xml", "openvino_model.bin"):
        (made / name).write_bytes(b"1234")
    return made


def test_each_profile_has_a_note_and_the_strictest_is_shown(folder: Path, tmp_path: Path) -> None:
    """A FAIL in exact is not taken back by a PASS in a profile that sees less."""
    assert Compared.read(tmp_path, "ab/cd", folder) is None
    noted(folder, "PASS", "small").write(tmp_path, "ab/cd")
    found = Compared.read(tmp_path, "ab/cd", folder)
    assert found is not None
    assert (found.outcome, found.profile, found.largest) == ("PASS", "small", 1e-4)
    assert found.at.startswith("20")
    noted(folder, "FAIL", "exact").write(tmp_path, "ab/cd")
    noted(folder, "PASS", "fast").write(tmp_path, "ab/cd")
    found = Compared.read(tmp_path, "ab/cd", folder)
    assert found is not None
    assert (found.outcome, found.profile) == ("FAIL", "exact")
    assert Compared.read(tmp_path, "other", folder) is None


@pytest.mark.parametrize("name", ["openvino_model.xml", "openvino_model.bin"])
def test_a_note_is_of_the_bytes_that_were_compared(name: str, folder: Path, tmp_path: Path) -> None:
    noted(folder, "PASS", "exact").write(tmp_path, "ab")
    path = folder / name
    stat = path.stat()
    path.write_bytes(b"1235")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert Compared.read(tmp_path, "ab", folder) is None
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert Compared.read(tmp_path, "ab", folder) is not None, "or size and time are not what counts"
    path.write_bytes(b"12345")
    assert Compared.read(tmp_path, "ab", folder) is None
    path.unlink()
    assert Compared.read(tmp_path, "ab", folder) is None


@pytest.mark.parametrize(
    "change",
    [
        {"outcome": 3}, {"outcome": "GOOD"}, {"outcome": None}, {"profile": "small"}, {"profile": []},
        {"at": 20}, {"at": None}, {"at": "yesterday"}, {"largest": "0"}, {"largest": math.nan}, {"reason": 1},
        {"files": None}, {"files": []}, {"more": 1}, {"at": "2026-01-01\x1b[2J"},
    ],
)  # fmt: skip
def test_a_damaged_note_counts_as_none(
    change: dict[str, object], folder: Path, tmp_path: Path
) -> None:
    noted(folder, "PASS", "exact").write(tmp_path, "ab")
    (note,) = (tmp_path / "compared").iterdir()
    note.write_text(json.dumps(json.loads(note.read_text()) | change))
    assert Compared.read(tmp_path, "ab", folder) is None


@pytest.mark.parametrize("text", ["", "[1]", "null", "{}", "[" * 100_000, '"PASS"', "\xff"])
def test_a_note_that_is_none_counts_as_none(text: str, folder: Path, tmp_path: Path) -> None:
    noted(folder, "PASS", "exact").write(tmp_path, "ab")
    (note,) = (tmp_path / "compared").iterdir()
    note.write_text(text, encoding="latin-1")
    assert Compared.read(tmp_path, "ab", folder) is None


@pytest.mark.slow
def test_notes_do_not_grow_without_end(folder: Path, tmp_path: Path) -> None:
    for number in range(260):
        noted(folder, "PASS", "exact").write(tmp_path, f"model {number}")
    assert len(list((tmp_path / "compared").iterdir())) == 256
    assert Compared.read(tmp_path, "model 259", folder) is not None


@pytest.mark.slow
def test_a_file_that_is_gone_is_fetched_again_where_it_is_asked_for(
    entry: CatalogEntry, tmp_path: Path
) -> None:
    home, catalog = tmp_path / "home", {"tiny": entry}
    model = prepare("tiny", home=home, catalog=catalog)
    assert model.source is not None
    assert model.source_sha256 == entry.sha256
    prune("tiny", home, catalog=catalog)
    assert prepare("tiny", home=home, catalog=catalog).source is None
    without = prepare("tiny", home=home, catalog=catalog, offline=True, with_source=True)
    assert without.source is None, "what is here runs without a network"
    assert prepare("tiny", home=home, catalog=catalog, with_source=True) == model
    assert model.source.is_file()


def test_a_file_that_cannot_be_built_is_refused_before_it_is_hashed(
    make_gguf: MakeGguf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, read = make_gguf("strange.gguf", architecture="mamba"), []
    monkeypatch.setattr("recollect.files.sha256_file", lambda *_, **__: read.append(1))
    with pytest.raises(UnsupportedModelError, match="mamba"):
        prepare(str(path), home=tmp_path / "home")
    assert read == []


def forget_sampling(folder: Path) -> None:
    """Leave out of a manifest what versions did not write that knew no recommended sampling."""
    path = folder / "recollect.json"
    said = json.loads(path.read_text())
    del said["sampling"]
    path.write_text(json.dumps(said))


@pytest.mark.slow
def test_how_a_model_is_sampled_that_was_converted_before_is_read_from_its_file(
    make_gguf: MakeGguf, tmp_path: Path
) -> None:
    home, path = tmp_path / "home", make_gguf(temperature=0.5)
    first = prepare(str(path), home=home)
    assert first.folder is not None
    assert first.sampling == {"temperature": 0.5}
    forget_sampling(first.folder)
    assert prepare(str(path), home=home) == first


@pytest.mark.slow
def test_where_no_file_says_how_a_model_is_sampled_the_catalog_does(
    make_gguf: MakeGguf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also under another name: the file is known by its sha256."""
    home, path = tmp_path / "home", make_gguf()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    same = replace(CATALOG["smollm2"], sha256=digest, sampling={"temperature": 0.3})
    monkeypatch.setattr("recollect.models.prepare.CATALOG", {"same": same})
    model = prepare(str(path), home=home)
    assert model.folder is not None
    assert model.sampling == {"temperature": 0.3}
    assert prepare(str(model.folder), home=home).sampling == {"temperature": 0.3}
    forget_sampling(model.folder)
    assert prepare(str(path), home=home).sampling == {"temperature": 0.3}
