"""Stores as the programs lay them out, with real GGUF files in them."""

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from recollect import files
from recollect.errors import UnknownModelError, UnsupportedModelError
from recollect.models import stores
from recollect.models.catalog import HubFile, resolve
from recollect.models.gguf import GLANCE_BYTES
from recollect.models.listing import KeptElsewhere, is_here, look_into, what_runs
from recollect.models.prepare import Llama, known_context_length, prepare
from recollect.models.stores import find, stored

MakeGguf = Callable[..., Path]
COMMIT, OLDER = "a" * 40, "b" * 40


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the home of somebody who has none of the programs."""
    home = tmp_path / "person"
    home.mkdir()
    monkeypatch.setattr(Path, "home", lambda: home)
    for name in ("LLAMA_CACHE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("OLLAMA_MODELS", str(home / ".ollama" / "models"))
    return home


def blob(models: Path, data: bytes) -> str:
    """Write a blob of Ollama's and return its digest."""
    digest = hashlib.sha256(data).hexdigest()
    (models / "blobs").mkdir(parents=True, exist_ok=True)
    (models / "blobs" / f"sha256-{digest}").write_bytes(data)
    return f"sha256:{digest}"


def layer(models: Path, kind: str, content: bytes | dict[str, Any]) -> dict[str, Any]:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    return {
        "mediaType": f"application/vnd.ollama.image.{kind}",
        "digest": blob(models, data),
        "size": len(data),
    }


def manifest(models: Path, weights: bytes, *more: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest as Ollama writes it when it has pulled a model."""
    config = {"model_format": "gguf", "model_family": "llama", "file_type": "Q4_0"}
    return {
        "schemaVersion": 2,
        "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
        "config": {
            "mediaType": "application/vnd.docker.container.image.v1+json",
            "digest": blob(models, json.dumps(config).encode()),
            "size": 99,
        },
        "layers": [
            layer(models, "model", weights),
            layer(models, "template", b"{{ .Prompt }}"),
            layer(models, "license", b"MIT"),
            *more,
        ],
    }


def put(models: Path, name: str, content: dict[str, Any], folder: str = "manifests") -> Path:
    path = models / folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def ollama(machine: Path) -> Path:
    return machine / ".ollama" / "models"


@pytest.fixture
def weights(make_gguf: MakeGguf) -> bytes:
    return make_gguf("source.gguf").read_bytes()


def snapshot(machine: Path, name: str = "models--org--repo", commit: str = COMMIT) -> Path:
    """Return the folder of a commit in the Hugging Face cache, with a reference to it."""
    repository = machine / ".cache" / "huggingface" / "hub" / name
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    return folder


def link(folder: Path, name: str, data: bytes) -> Path:
    """Put a file into a snapshot as the cache does: a link to a blob."""
    blobs = next(one for one in folder.parents if one.name == "snapshots").parent / "blobs"
    blobs.mkdir(exist_ok=True)
    target = blobs / hashlib.sha256(data).hexdigest()
    target.write_bytes(data)
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(os.path.relpath(target, path.parent))
    return path


def names() -> list[str]:
    return [one.name for one in stored()]


def kept_elsewhere() -> list[KeptElsewhere]:
    """Return what is said of each model where llama.cpp is, without a graphics card."""
    return [look_into(one, "there") for one in stored()]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("registry.ollama.ai/library/llama3.2/latest", "ollama:llama3.2"),
        ("registry.ollama.ai/library/llama3.2/1b", "ollama:llama3.2:1b"),
        ("registry.ollama.ai/someone/model/latest", "ollama:someone/model"),
        ("hf.co/org/repo-GGUF/Q4_K_M", "ollama:hf.co/org/repo-GGUF:Q4_K_M"),
    ],
)
@pytest.mark.parametrize("folder", ["manifests", "manifests-v2"])
def test_ollama_models_have_the_names_that_ollama_gives_them(
    ollama: Path, weights: bytes, path: str, name: str, folder: str
) -> None:
    put(ollama, path, manifest(ollama, weights), folder)
    (found,) = stored()
    assert found == find(name)
    assert (found.name, found.program, found.fault) == (name, "Ollama", None)
    assert found.path.read_bytes() == weights
    assert found.size_bytes == len(weights)
    assert found.quantization == "Q4_0"


def test_a_manifest_of_ollama_may_be_a_link_to_a_blob(ollama: Path, weights: bytes) -> None:
    """As version 2 of its names has it."""
    digest = blob(ollama, json.dumps(manifest(ollama, weights)).encode())
    folder = ollama / "manifests-v2" / "ollama.com" / "library" / "llama3.2"
    folder.mkdir(parents=True)
    target = ollama / "blobs" / digest.replace(":", "-")
    (folder / "latest").symlink_to(os.path.relpath(target, folder))
    assert names() == ["ollama:llama3.2"]
    assert find("ollama:llama3.2") is not None


def test_of_a_list_for_several_runners_the_one_with_a_gguf_file_is_taken(
    ollama: Path, weights: bytes
) -> None:
    child = blob(ollama, json.dumps(manifest(ollama, weights)).encode())
    several = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.ollama.manifest.list.v2+json",
        "manifests": [
            {"mediaType": "m", "digest": f"sha256:{'0' * 64}", "runner": "mlx"},
            {"mediaType": "m", "digest": child, "runner": "ollama", "format": "gguf"},
        ],
    }
    put(ollama, "registry.ollama.ai/library/both/latest", several)
    (found,) = stored()
    assert (found.fault, found.size_bytes) == (None, len(weights))


@pytest.mark.slow
def test_how_ollama_samples_is_taken_where_the_file_does_not_say(
    ollama: Path, weights: bytes, tmp_path: Path
) -> None:
    params = {"temperature": 0.6, "top_k": 20, "repeat_penalty": 1.1, "stop": ["<|im_end|>"]}
    content = manifest(ollama, weights, layer(ollama, "params", params))
    put(ollama, "registry.ollama.ai/library/tiny/latest", content)
    model = prepare("ollama:tiny", home=tmp_path / "home")
    assert model.sampling == {"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1}
    assert model.name == "ollama:tiny"
    assert model.source == ollama / "blobs" / content["layers"][0]["digest"].replace(":", "-")
    assert model.chat_template is not None
    assert "im_start" in model.chat_template, "the file's own, and not Ollama's"
    assert known_context_length("ollama:tiny", tmp_path / "home") == model.context_length


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m, models: m["layers"].append(layer(models, "adapter", b"x")), "an adapter"),
        (
            lambda m, models: m["layers"].append(layer(models, "tensor; name=a", b"x")),
            "safetensors",
        ),
        (lambda m, _models: m["layers"].pop(0), "names 0 files of weights"),
        (lambda m, _models: m.update(layers=7), "names 0 files of weights"),
        (lambda m, _models: m["layers"][0].update(digest="sha256:../../etc"), "names 0 files"),
        (lambda m, _models: m["layers"][0].update(digest=f"sha256:{'0' * 64}"), "No such file"),
    ],
)
def test_what_cannot_be_used_of_ollama_is_listed_with_the_reason(
    ollama: Path, weights: bytes, change: Callable[..., Any], words: str, tmp_path: Path
) -> None:
    content = manifest(ollama, weights)
    change(content, ollama)
    put(ollama, "registry.ollama.ai/library/odd/latest", content)
    (found,) = kept_elsewhere()
    assert found.runs.runtime is None
    assert words in str(found.runs.reason)
    with pytest.raises(UnsupportedModelError, match=r"ollama:odd cannot be used: .*Ollama"):
        prepare("ollama:odd", home=tmp_path / "home")


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '{"layers": [1, null, {}]}', "\0"])
def test_damaged_manifests_are_listed_with_the_reason(ollama: Path, text: str) -> None:
    put(ollama, "registry.ollama.ai/library/odd/latest", {}).write_text(text)
    (found,) = kept_elsewhere()
    assert "damaged" in str(found.runs.reason)


@pytest.mark.parametrize("folder", [".lmstudio/models", ".cache/lm-studio/models"])
def test_models_of_lm_studio_are_found(
    machine: Path, make_gguf: MakeGguf, folder: str, tmp_path: Path
) -> None:
    place = machine / folder / "publisher" / "model"
    place.mkdir(parents=True)
    shutil.move(make_gguf(), place / "tiny.gguf")
    (place / "mmproj-tiny-f16.gguf").write_bytes(b"GGUF")
    (place / "notes.txt").touch()
    assert names() == ["lmstudio:publisher/model/tiny.gguf"]
    (found,) = kept_elsewhere()
    assert (found.architecture, found.quantization) == ("llama", "F16")
    assert found.runs.runtime == "OpenVINO"
    assert resolve(found.stored.name) == found.stored
    assert is_here(found.stored.name, tmp_path / "home")


@pytest.mark.parametrize("variable", [None, "LLAMA_CACHE", "XDG_CACHE_HOME"])
def test_llama_cpps_old_cache_is_found(
    machine: Path, monkeypatch: pytest.MonkeyPatch, make_gguf: MakeGguf, variable: str | None
) -> None:
    cache = machine / ".cache" / "llama.cpp"
    if variable is not None:
        monkeypatch.setenv(variable, str(machine / "x"))
        cache = machine / ("x/llama.cpp" if variable == "XDG_CACHE_HOME" else "x")
    cache.mkdir(parents=True)
    shutil.move(make_gguf(), cache / "org_repo-GGUF_tiny.gguf")
    (cache / "manifest=org=repo-GGUF=latest.json").write_text("{}")
    (cache / "org_repo-GGUF_tiny.gguf.etag").write_text("x")
    (cache / "org_repo_b.gguf.downloadInProgress").touch()
    assert names() == ["llamacpp:org_repo-GGUF_tiny.gguf"]


@pytest.mark.parametrize("variable", [None, "HF_HOME", "HF_HUB_CACHE", "LLAMA_CACHE"])
def test_the_hugging_face_cache_is_found(
    machine: Path, monkeypatch: pytest.MonkeyPatch, weights: bytes, variable: str | None
) -> None:
    folder = snapshot(machine)
    link(folder, "q8/tiny.gguf", weights)
    if variable is not None:
        hub = machine / ".cache" / "huggingface" / "hub"
        moved = machine / "there" / "hub"
        moved.parent.mkdir()
        hub.rename(moved)
        monkeypatch.setenv(variable, str(moved.parent if variable == "HF_HOME" else moved))
    assert names() == ["org/repo:q8/tiny.gguf"]
    found = find("org/repo:q8/tiny.gguf")
    assert found is not None
    assert (found.size_bytes, found.fault) == (len(weights), None)
    assert resolve("org/repo:other.gguf") == HubFile("org/repo", "other.gguf")


@pytest.mark.slow
def test_a_file_of_the_hub_that_is_in_the_cache_is_not_fetched(
    machine: Path, weights: bytes, tmp_path: Path
) -> None:
    link(snapshot(machine), "tiny.gguf", weights)
    model = prepare("org/repo:tiny.gguf", home=tmp_path / "home", offline=True)
    assert model.name == "org/repo:tiny.gguf"
    assert model.source is not None
    assert model.source.read_bytes() == weights


def test_the_snapshot_of_the_main_branch_is_taken(machine: Path, weights: bytes) -> None:
    link(snapshot(machine, commit=OLDER), "old.gguf", weights)
    link(snapshot(machine), "new.gguf", weights)
    assert names() == ["org/repo:new.gguf"]
    shutil.rmtree(machine / ".cache/huggingface/hub/models--org--repo/refs")
    os.utime(machine / f".cache/huggingface/hub/models--org--repo/snapshots/{OLDER}", (9e9, 9e9))
    assert names() == ["org/repo:old.gguf"]


def test_a_link_out_of_the_cache_is_not_followed(machine: Path, make_gguf: MakeGguf) -> None:
    folder = snapshot(machine)
    (folder / "tiny.gguf").symlink_to(make_gguf())
    (found,) = kept_elsewhere()
    assert "leads out of the folder" in str(found.runs.reason)
    assert resolve("org/repo:tiny.gguf") == HubFile("org/repo", "tiny.gguf"), "fetched instead"


def test_folders_in_the_hugging_face_cache_are_found(machine: Path) -> None:
    whole = snapshot(machine)
    for name in ("openvino_model.xml", "openvino_model.bin", "openvino_tokenizer.xml"):
        link(whole, name, name.encode())
    link(whole, "config.json", b'{"model_type": "qwen3"}')
    link(whole, "vae/openvino_model.xml", b"of something else")
    lacking = snapshot(machine, "models--org--lacking")
    link(lacking, "openvino_model.xml", b"x")
    (found_lacking, found) = kept_elsewhere()
    assert (found.stored.name, found.stored.format) == ("org/repo", "openvino")
    assert (found.architecture, found.runs.runtime) == ("qwen3", "OpenVINO")
    assert found_lacking.runs.reason == "openvino_tokenizer.xml is not in the cache"
    assert resolve("org/repo") == found.stored


def test_an_onnx_folder_inside_a_snapshot_runs(
    machine: Path, onnx_model_folder: Path, tmp_path: Path
) -> None:
    folder = snapshot(machine)
    for path in onnx_model_folder.iterdir():
        link(folder, f"cpu/int4/{path.name}", path.read_bytes())
    (found,) = kept_elsewhere()
    assert (found.stored.name, found.architecture) == ("org/repo:cpu/int4", "llama")
    assert found.runs.runtime == "ONNX Runtime GenAI"
    model = prepare("org/repo:cpu/int4", home=tmp_path / "home")
    assert (model.format, model.name) == ("onnx-genai", "org/repo:cpu/int4")


def test_parts_are_one_model(machine: Path, weights: bytes) -> None:
    place = machine / ".lmstudio" / "models" / "p" / "m"
    place.mkdir(parents=True)
    for number in (1, 2, 3):
        (place / f"big-0000{number}-of-00003.gguf").write_bytes(weights)
    (found,) = stored()
    assert (found.path.name, found.size_bytes) == ("big-00001-of-00003.gguf", 3 * len(weights))
    (place / "big-00002-of-00003.gguf").unlink()
    (found,) = stored()
    assert found.fault is not None
    assert found.fault.startswith("big-00002-of-00003.gguf cannot be read")


def test_what_is_foreign_or_damaged_is_listed_with_the_reason(
    machine: Path, make_gguf: MakeGguf, make_decoder: MakeGguf
) -> None:
    place = machine / ".lmstudio" / "models" / "p" / "m"
    place.mkdir(parents=True)
    data = make_gguf().read_bytes()
    (place / "a-html.gguf").write_text("<html>not found</html>")
    (place / "b-empty.gguf").touch()
    (place / "c-cut.gguf").write_bytes(data[:20])
    shutil.move(make_decoder(architecture="mamba"), place / "d-other.gguf")
    (place / "e-types.gguf").write_bytes(data[:24] + b"\xff" * 100)
    reasons = {one.stored.path.name: one.runs.reason for one in kept_elsewhere()}
    assert "not a GGUF file" in str(reasons["a-html.gguf"])
    assert "not a GGUF file" in str(reasons["b-empty.gguf"])
    assert reasons["c-cut.gguf"] is not None
    assert reasons["d-other.gguf"] is None  # llama.cpp runs it
    assert reasons["e-types.gguf"] is not None


def test_pipes_circles_and_links_to_nothing_are_left_out(
    machine: Path, make_gguf: MakeGguf
) -> None:
    root = machine / ".lmstudio" / "models"
    place = root / "p" / "m"
    place.mkdir(parents=True)
    os.mkfifo(place / "pipe.gguf")
    (place / "nothing.gguf").symlink_to("none")
    (place / "itself.gguf").symlink_to("itself.gguf")
    (place / "\x1b[2J.gguf").touch()
    (place / os.fsdecode(b"\xff.gguf")).touch()
    (place / "above").symlink_to(root)
    (root / "q").symlink_to(root / "p")
    (root / "r").mkdir()
    (root / "r" / "linked.gguf").symlink_to(make_gguf())
    assert names() == ["lmstudio:r/linked.gguf"]
    assert find("lmstudio:p/m/pipe.gguf") is None
    assert find("lmstudio:p/m/itself.gguf") is None
    os.mkfifo(machine / ".ollama")
    assert names() == ["lmstudio:r/linked.gguf"]


@pytest.mark.parametrize(
    "name",
    [
        "lmstudio:../../secret.gguf",
        "lmstudio:/etc/passwd.gguf",
        "llamacpp:a\0.gguf",
        "ollama:../x",
        "ollama:a:../../b",
        "ollama:",
        "ollama:a/b/c/d",
        "org/repo:../../../x.gguf",
        "org/repo:/x.gguf",
        "../..:x.gguf",
        "org/repo",
        "",
    ],
)
def test_no_name_leads_out_of_a_store(machine: Path, make_gguf: MakeGguf, name: str) -> None:
    snapshot(machine)
    (machine / ".lmstudio" / "models").mkdir(parents=True)
    shutil.move(make_gguf(), machine / "secret.gguf")
    assert find(name) is None


def test_a_folder_that_cannot_be_read_is_no_model(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link(snapshot(machine), "cpu/genai_config.json", b"{}")
    assert find("org/repo:cpu") is not None
    scandir = os.scandir

    def refusing(path: Path) -> Any:
        if path.name == "cpu":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert find("org/repo:cpu") is None


def test_a_name_that_is_not_there_suggests_those_that_are(ollama: Path, weights: bytes) -> None:
    put(ollama, "registry.ollama.ai/library/llama3.2/latest", manifest(ollama, weights))
    with pytest.raises(UnknownModelError, match=r"did you mean ollama:llama3\.2\?"):
        resolve("ollama:lama3.2")
    with pytest.raises(UnknownModelError, match=r"did you mean ollama:llama3\.2\?"):
        resolve("llama3.2")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return how many bytes were read of each strange file that was opened."""
    counted: list[int] = []
    usual = files.open_regular

    def opened(path: Path) -> BinaryIO:
        file = usual(path)
        counted.append(0)
        read = file.read

        class Counted:
            def __enter__(self) -> "Counted":
                return self

            def __exit__(self, *_: object) -> None:
                file.close()

            def fileno(self) -> int:
                return file.fileno()

            def read(self, size: int) -> bytes:
                data = read(size)
                counted[-1] += len(data)
                return data

        return Counted()  # type: ignore[return-value] # of a file only what is used

    monkeypatch.setattr(files, "open_regular", opened)
    return counted


@pytest.mark.slow
def test_ten_thousand_files_are_listed_with_one_short_read_each(
    machine: Path, make_gguf: MakeGguf, reads: list[int]
) -> None:
    """A header of 12 MB, as large vocabularies have, is not read for that."""
    place = machine / ".lmstudio" / "models" / "p" / "m"
    place.mkdir(parents=True)
    merges = [f"h {'x' * 1000}{number}" for number in range(12_000)]
    shutil.move(make_gguf(merges=merges), place / "0.gguf")
    assert (place / "0.gguf").stat().st_size > 12_000_000
    for number in range(1, 10_000):
        (place / f"{number}.gguf").hardlink_to(place / "0.gguf")
    begun = time.process_time()
    found = kept_elsewhere()
    assert len(found) == 10_000
    assert {one.architecture for one in found} == {"llama"}
    assert len(reads) == 10_000
    assert max(reads) <= GLANCE_BYTES[0]
    assert time.process_time() - begun < 30, "seconds; it takes two"
    reads.clear()
    assert len(stored()) == 10_000
    assert reads == [], "their names are known without opening them"


def test_no_more_is_looked_at_than_is_said(
    machine: Path, monkeypatch: pytest.MonkeyPatch, weights: bytes
) -> None:
    monkeypatch.setattr(stores, "MOST_ENTRIES", 10)
    place = machine / ".lmstudio" / "models"
    place.mkdir(parents=True)
    for number in range(30):
        (place / f"{number}.gguf").touch()
    deep = machine / ".cache" / "llama.cpp"
    deep.joinpath(*"abcdefgh").mkdir(parents=True)
    deep.joinpath(*"abcdefgh", "x.gguf").touch()
    assert len(stored()) == 10


@pytest.mark.parametrize(
    ("form", "architecture", "llama", "runtime"),
    [
        ("gguf", "llama", "there", "OpenVINO"),
        ("gguf", "llama", "quicker", "llama.cpp"),
        ("gguf", "gemma2", "there", "llama.cpp"),
        ("gguf", None, "there", "llama.cpp"),
        ("openvino", None, "quicker", "OpenVINO"),
        ("onnx-genai", "phi3", "quicker", "ONNX Runtime GenAI"),
    ],
)
def test_one_function_says_what_would_run_a_model(
    form: str, architecture: str | None, llama: Llama, runtime: str | None
) -> None:
    found = what_runs(form, architecture, llama)
    assert found.runtime == runtime
    assert (found.reason is None) == (runtime is not None)


def test_without_llama_cpp_what_it_would_run_says_how_to_install_it() -> None:
    assert what_runs("gguf", "llama", "missing").runtime == "OpenVINO"
    found = what_runs("gguf", "gemma2", "missing")
    assert found.runtime is None
    assert found.reason == "to run gemma2: pip install 'recollect-llm[llama]'"


def test_of_many_names_that_are_near_a_few_are_suggested(machine: Path) -> None:
    place = machine / ".lmstudio" / "models" / "Publisher"
    place.mkdir(parents=True)
    for number in range(30):
        (place / f"{number}.gguf").touch()
    with pytest.raises(UnknownModelError, match="did you mean lmstudio:Publisher/0") as raised:
        resolve("publisher")
    assert str(raised.value).count("lmstudio:") == 4
