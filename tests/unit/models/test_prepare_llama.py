"""GGUF files for llama.cpp: as they are, tried in a process first, and who gets a file."""

import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from random_model import WITH_EXPERTS, write_random_model
from recollect.errors import UnsupportedModelError
from recollect.models import prepare as module
from recollect.models.prepare import Llama, prepare

MakeGguf = Callable[..., Path]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_random_model(tmp_path / "random.gguf", WITH_EXPERTS)


@pytest.mark.slow
def test_a_file_is_taken_as_it_is_and_tried_once(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    model = prepare(str(path), home=home, runtime="llama")
    assert model.format == "gguf"
    assert (model.folder, model.graph, model.source) == (path.parent, path.name, path)
    assert model.context_length == 512
    assert not (home / "models").exists()
    monkeypatch.setattr(subprocess, "run", None)  # a second trial would fail
    assert prepare(str(path), home=home, runtime="llama") == model


@pytest.mark.slow
def test_another_build_tries_the_file_again(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one release loads can be what the next one breaks off at."""
    begun: list[object] = []
    runs = subprocess.run

    def run(command: list[str], **options: Any) -> object:
        begun.append(command)
        return runs(command, **options)

    monkeypatch.setattr(subprocess, "run", run)
    for build, trials in (("a-1", 1), ("a-1", 1), ("a-2", 2), ("a-1", 2)):
        prepare(str(path), home=tmp_path / "home", runtime="llama", llama_build=partial(str, build))
        assert len(begun) == trials, build


@pytest.mark.slow
def test_what_openvino_does_not_read_goes_to_llama_where_that_is_here(
    path: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError):
        prepare(str(path), home=tmp_path / "home")
    with pytest.raises(UnsupportedModelError):
        prepare(str(path), home=tmp_path / "home", runtime="openvino", llama=lambda: "there")
    assert prepare(str(path), home=tmp_path / "home", llama=lambda: "there").format == "gguf"


@pytest.mark.slow
def test_a_file_that_both_read_goes_to_the_quicker_one(make_gguf: MakeGguf, tmp_path: Path) -> None:
    file, home = str(make_gguf()), tmp_path / "home"
    assert prepare(file, home=home, llama=lambda: "there").format == "openvino"
    assert prepare(file, home=home, llama=lambda: "quicker").format == "gguf"
    assert (
        prepare(file, home=home, llama=lambda: "quicker", runtime="openvino").format == "openvino"
    )


@pytest.mark.slow
def test_the_library_is_not_asked_for_where_it_does_not_matter(
    make_gguf: MakeGguf, tmp_path: Path
) -> None:
    asked: list[None] = []

    def llama() -> Llama:
        asked.append(None)
        return "there"

    file, home = str(make_gguf()), tmp_path / "home"
    prepare("reference", home=home, llama=llama)
    prepare(file, home=home, runtime="openvino", llama=llama)
    assert not asked
    prepare(file, home=home, llama=llama)
    assert len(asked) == 1


def test_what_is_no_gguf_file_is_not_for_llama(tmp_path: Path) -> None:
    for name in ("reference", str(tmp_path)):
        with pytest.raises(UnsupportedModelError, match="no GGUF file, which is what"):
            prepare(name, home=tmp_path / "home", runtime="llama")


@pytest.mark.slow
def test_a_file_that_the_library_refuses_is_one_sentence(path: Path, tmp_path: Path) -> None:
    data = path.read_bytes()
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(data.replace(b"blk.0.attn_q.weight", b"blk.0.attn_x.weight"))
    with pytest.raises(UnsupportedModelError, match=r"cannot load broken\.gguf"):
        prepare(str(broken), home=tmp_path / "home", runtime="llama")


def test_a_library_that_ends_the_process_is_one_sentence(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TRIAL", "faulthandler_does_not_exist")
    with pytest.raises(UnsupportedModelError, match=r"broke off while it loaded random\.gguf"):
        prepare(str(path), home=tmp_path / "home", runtime="llama")
    assert not (tmp_path / "home" / "tried").exists()
