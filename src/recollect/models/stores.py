"""
Models that other programs keep on this machine: Ollama, LM Studio, the Hugging Face cache, llama.cpp.

`find` returns the model of a name, `stored` all that there are. Names of files and small files with settings
are read here, and of a GGUF file nothing; `gguf.glance` says what is in one. How much is looked at is
bounded, whatever lies there. Changes and downloads nothing.

Sources: the code of the four programs, as of 2026. Ollama's names are the paths of its manifests, whose
layers name blobs by sha256; LM Studio has `publisher/model/file`; the Hugging Face cache has a folder for
each repository, with a snapshot for each commit; llama.cpp had `owner_repo_file` in its cache, and has since
2026 the layout of the Hugging Face cache.
"""

import contextlib
import json
import os
import re
import sys
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal

from recollect import files
from recollect.models.gguf_weights import part_names
from recollect.types import recommended

Program = Literal["Ollama", "LM Studio", "Hugging Face", "llama.cpp"]
FolderFormat = Literal["openvino", "onnx-genai"]

MOST_ENTRIES: Final = 50_000
"""Most entries of folders that are looked at in a store: a hundred times what people have."""
_MOST_DEPTH: Final = 6
_MOST_JSON_BYTES: Final = 1 << 20
"""Most bytes of a manifest or of settings; the largest known ones have some kilobytes."""
_OLLAMA, _LM_STUDIO, _LLAMA_CPP = "ollama:", "lmstudio:", "llamacpp:"
_OLLAMA_HOSTS: Final = ("registry.ollama.ai", "ollama.com")
"""The registries whose models go by their names alone."""
_OLLAMA_FOLDERS: Final = ("manifests-v2", "manifests")
_LAYER: Final = "application/vnd.ollama.image."
_DIGEST: Final = re.compile(r"sha256[:-]([0-9a-f]{64})")
_REPOSITORY: Final = re.compile(r"models--([\w.-]+?)--([\w.-]+)")
_HUB_NAME: Final = re.compile(r"([\w.-]+/[\w.-]+)(?::([^:\\]+))?")
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_LATER_PART: Final = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
_FOLDERS: Final[Mapping[str, FolderFormat]] = {
    "genai_config.json": "onnx-genai",
    "openvino_model.xml": "openvino",
    "openvino_language_model.xml": "openvino",
}
"""What a folder is that has such a file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A model that another program keeps."""

    name: str
    """What `prepare` and `recollect.load` take."""
    program: Program
    format: Literal["gguf"] | FolderFormat
    path: Path
    """The GGUF file or its first part, or the folder."""
    size_bytes: int
    quantization: str | None = None
    """As the program notes it; None: it does not."""
    sampling: Mapping[str, float] = field(default_factory=dict)
    """How the program samples it, as `types.recommended` has it; empty: it does not say."""
    fault: str | None = None
    """Why it cannot be used, as a clause; None: nothing is known."""


def stored() -> list[Stored]:
    """
    Return all models of other programs, in the order of their names.

    What is no model is left out, and so is a name that no terminal could show.
    """
    found = {one.name: one for finder in _FINDERS for one in finder() if one.name.isprintable()}
    return [found[name] for name in sorted(found)]


def find(name: str) -> Stored | None:
    """Return the model of that name; None: no program has one."""
    if name.startswith(_OLLAMA):
        return _find_in_ollama(name)
    if name.startswith(_LM_STUDIO):
        return _find_file(name, _lm_studio_roots(), "LM Studio", _LM_STUDIO)
    if name.startswith(_LLAMA_CPP):
        return _find_file(name, _llama_cpp_roots(), "llama.cpp", _LLAMA_CPP)
    return _find_in_hub_cache(name)


def _home() -> Path | None:
    with contextlib.suppress(RuntimeError):
        return Path.home()
    return None


def _roots(*paths: Path | None) -> list[Path]:
    """Return those of the folders that there are, each once, and that may be looked into."""
    found: dict[Path, None] = {}
    for path in paths:
        if path is not None:
            with contextlib.suppress(OSError, RuntimeError):
                real = path.expanduser().resolve(strict=True)
                if real.is_dir() and os.access(real, os.R_OK | os.X_OK):
                    found[real] = None
    return list(found)


def _given(variable: str) -> Path | None:
    text = os.environ.get(variable)
    return Path(text) if text else None


def _under(path: Path | None, *names: str) -> Path | None:
    return None if path is None else path.joinpath(*names)


def _cache_folder() -> Path | None:
    return _given("XDG_CACHE_HOME") or _under(_home(), ".cache")


def _walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """
    Yield each folder at or below *root* with the names of its files, in order.

    Links are followed, each folder once; pipes, devices and what cannot be read are left out.
    """
    ahead, seen, left = deque([(root, 0)]), set[tuple[int, int]](), MOST_ENTRIES
    while ahead:
        folder, depth = ahead.popleft()
        names: list[str] = []
        try:
            stat = folder.stat()
            if (stat.st_dev, stat.st_ino) in seen:
                continue
            seen.add((stat.st_dev, stat.st_ino))
            with os.scandir(folder) as entries:
                for entry in islice(entries, left):
                    left -= 1
                    with contextlib.suppress(OSError):  # a link to nothing, or to itself
                        if entry.is_file():
                            names.append(entry.name)
                        elif depth < _MOST_DEPTH and entry.is_dir():
                            ahead.append((folder / entry.name, depth + 1))
        except OSError:
            continue
        yield folder, sorted(names)


def _read_json(path: Path) -> Mapping[str, Any]:
    """Return the object in a small JSON file; an empty one where there is none, or it is damaged."""
    try:
        content: Any = json.loads(files.read_text(path, most_bytes=_MOST_JSON_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_model_file(name: str) -> bool:
    """Return whether a GGUF file is named like a whole model or its first part."""
    lowered = name.lower()
    return lowered.endswith(".gguf") and "mmproj" not in lowered and not _LATER_PART.search(lowered)


def _gguf(name: str, program: Program, path: Path) -> Stored:
    """Return the model in a GGUF file, whose other parts are beside it."""
    sizes, fault = [], None
    for part in part_names(path.name):
        try:
            files.require_regular(path.with_name(part))
            sizes.append(path.with_name(part).stat().st_size)
        except OSError as error:
            fault = fault or f"{part} cannot be read ({error.strerror or error})"
    return Stored(
        name=name, program=program, format="gguf", path=path, size_bytes=sum(sizes), fault=fault
    )


# LM Studio, and llama.cpp's cache as it was: files by their paths.


def _lm_studio_roots() -> list[Path]:
    home = _home()
    return _roots(
        _under(home, ".lmstudio", "models"), _under(home, ".cache", "lm-studio", "models")
    )


def _llama_cpp_roots() -> list[Path]:
    given = _given("LLAMA_CACHE")
    if given is not None:
        return _roots(given)
    if sys.platform == "darwin":
        return _roots(_under(_home(), "Library", "Caches", "llama.cpp"))
    if sys.platform == "win32":
        return _roots(_under(_given("LOCALAPPDATA"), "llama.cpp"))
    return _roots(_under(_cache_folder(), "llama.cpp"))


def _files_in(roots: Iterable[Path], program: Program, prefix: str) -> Iterator[Stored]:
    for root in roots:
        for folder, names in _walk(root):
            for name in filter(_is_model_file, names):
                relative = (folder / name).relative_to(root).as_posix()
                if not relative.startswith("models--"):  # in the layout of the Hugging Face cache
                    yield _gguf(f"{prefix}{relative}", program, folder / name)


def _find_file(name: str, roots: Iterable[Path], program: Program, prefix: str) -> Stored | None:
    relative = PurePosixPath(name.removeprefix(prefix))
    if relative.is_absolute() or ".." in relative.parts or not _is_model_file(relative.name):
        return None
    for root in roots:
        with contextlib.suppress(OSError, ValueError):  # ValueError: a zero byte
            if (root / relative).is_file():
                return _gguf(name, program, root / relative)
    return None


# Ollama: manifests by name, whose layers are blobs.


def _ollama_roots() -> list[Path]:
    given = _given("OLLAMA_MODELS")
    if given is not None:
        return _roots(given)
    services = [Path("/usr/share/ollama/.ollama/models"), Path("/var/lib/ollama")]
    return _roots(_under(_home(), ".ollama", "models"), *services)


def _in_ollama() -> Iterator[Stored]:
    for root in _ollama_roots():
        for folder_name in reversed(_OLLAMA_FOLDERS):  # of equal names the last is used
            manifests = root / folder_name
            for folder, names in _walk(manifests):
                place = folder.relative_to(manifests).parts
                if len(place) == 3:  # host, namespace, model; the files are its tags
                    for tag in (name for name in names if not name.startswith(".")):
                        yield _ollama_model(_ollama_name(*place, tag), root, folder / tag)


def _ollama_name(host: str, namespace: str, model: str, tag: str) -> str:
    parts = [host, namespace, model]
    if host in _OLLAMA_HOSTS:
        parts = [model] if namespace == "library" else [namespace, model]
    return f"{_OLLAMA}{'/'.join(parts)}" + ("" if tag == "latest" else f":{tag}")


def _find_in_ollama(name: str) -> Stored | None:
    path, _, tag = name.removeprefix(_OLLAMA).partition(":")
    parts = path.split("/")
    if "/" in tag or len(parts) > 3:
        return None
    if any(one in ("", ".", "..") or "\\" in one for one in (*parts, tag or "latest")):
        return None
    hosts: Iterable[str] = parts[:1] if len(parts) == 3 else _OLLAMA_HOSTS
    model = ["library", *parts][-2:] if len(parts) < 3 else parts[1:]
    for root in _ollama_roots():
        for folder in _OLLAMA_FOLDERS:
            for host in hosts:
                manifest = root.joinpath(folder, host, *model, tag or "latest")
                with contextlib.suppress(OSError, ValueError):
                    if manifest.is_file():
                        return _ollama_model(name, root, manifest)
    return None


def _ollama_model(name: str, root: Path, path: Path) -> Stored:
    """Return what a manifest describes, of which the weights are taken, and how it is sampled."""
    manifest = _manifest_for_gguf(_read_json(path), root)
    layers = manifest.get("layers")
    by_kind: dict[str, list[Path]] = {}
    for layer in layers if isinstance(layers, list) else ():
        kind, blob = _layer(layer, root)
        if kind.startswith(_LAYER) and blob is not None:
            by_kind.setdefault(kind.removeprefix(_LAYER), []).append(blob)
    weights = by_kind.get("model", [])
    config = _layer(manifest.get("config"), root)[1]
    noted = _read_json(config) if config is not None else {}
    size, fault = 0, None
    if "tensor" in by_kind:
        fault = "Ollama keeps it as safetensors"
    elif "adapter" in by_kind:
        fault = "Ollama changes its weights by an adapter, which recollect does not know"
    elif len(weights) != 1:
        fault = f"its manifest is damaged, or names {len(weights)} files of weights"
    else:
        try:
            files.require_regular(weights[0])
            size = weights[0].stat().st_size
        except OSError as error:
            fault = f"its weights cannot be read ({error.strerror or error})"
    quantization = noted.get("file_type")
    params = [_read_json(blob) for blob in by_kind.get("params", ())]
    return Stored(
        name=name,
        program="Ollama",
        format="gguf",
        path=weights[0] if weights else path,
        size_bytes=size,
        quantization=quantization if isinstance(quantization, str) else None,
        sampling=_ollama_sampling(params[0] if params else {}),
        fault=fault,
    )


def _manifest_for_gguf(manifest: Mapping[str, Any], root: Path) -> Mapping[str, Any]:
    """Return the manifest itself; of a list with one for each of Ollama's runners, that with a GGUF file."""
    children = manifest.get("manifests")
    for child in children if isinstance(children, list) else ():
        if isinstance(child, dict) and child.get("runner") in ("ollama", "llamacpp"):
            blob = _layer(child, root)[1]
            return child if blob is None else _read_json(blob)
    return manifest


def _layer(layer: object, root: Path) -> tuple[str, Path | None]:
    """Return the kind of a layer and its blob; None: it names none."""
    if not isinstance(layer, dict):
        return "", None
    kind, digest = layer.get("mediaType"), layer.get("digest")
    found = _DIGEST.fullmatch(digest) if isinstance(digest, str) else None
    blob = None if found is None else root / "blobs" / f"sha256-{found[1]}"
    # Media types may have parameters, such as the name of a tensor.
    return kind.partition(";")[0] if isinstance(kind, str) else "", blob


def _ollama_sampling(params: Mapping[str, Any]) -> dict[str, float]:
    """Return what a layer with parameters says of sampling."""
    return recommended({**params, "repetition_penalty": params.get("repeat_penalty")})


# The Hugging Face cache, where llama.cpp keeps its files too.


def _hub_roots() -> list[Path]:
    own = _given("HF_HUB_CACHE") or _given("HUGGINGFACE_HUB_CACHE")
    own = own or _under(_given("HF_HOME") or _under(_cache_folder(), "huggingface"), "hub")
    return _roots(own, _given("LLAMA_CACHE"))


def _in_hub_cache() -> Iterator[Stored]:
    for root in _hub_roots():
        names: list[str] = []
        with contextlib.suppress(OSError), os.scandir(root) as entries:
            names = [one.name for one in islice(entries, MOST_ENTRIES)]
        for found in filter(None, map(_REPOSITORY.fullmatch, sorted(names))):
            snapshot = _snapshot(root / found[0])
            if snapshot is not None:
                yield from _in_snapshot(f"{found[1]}/{found[2]}", snapshot)


def _snapshot(repository: Path) -> Path | None:
    """Return the snapshot of the main branch, or else the one that came last."""
    with contextlib.suppress(OSError, ValueError):
        commit = files.read_text(repository / "refs" / "main", most_bytes=100).strip()
        if _COMMIT.fullmatch(commit) and (repository / "snapshots" / commit).is_dir():
            return repository / "snapshots" / commit
    with contextlib.suppress(OSError, ValueError):
        with os.scandir(repository / "snapshots") as entries:
            found = [one for one in islice(entries, MOST_ENTRIES) if one.is_dir()]
        return Path(max(found, key=lambda one: one.stat().st_mtime).path)
    return None


def _in_snapshot(repository: str, snapshot: Path) -> Iterator[Stored]:
    for folder, names in _walk(snapshot):
        relative = folder.relative_to(snapshot).as_posix()
        form = _format_of(names)
        # Parts of other models, such as image generators, lie in folders of their own.
        if form == "onnx-genai" or (form == "openvino" and relative == "."):
            yield _hub_folder(repository, relative, folder, names, form)
        for name in filter(_is_model_file, names):
            path = name if relative == "." else f"{relative}/{name}"
            yield _hub_gguf(f"{repository}:{path}", snapshot, path)


def _format_of(names: Collection[str]) -> FolderFormat | None:
    """Return the format of a folder with files of these names; None: it holds no model of its own."""
    return next((form for name, form in _FOLDERS.items() if name in names), None)


def _hub_folder(
    repository: str, relative: str, folder: Path, names: Collection[str], form: FolderFormat
) -> Stored:
    sizes = []
    for name in names:
        with contextlib.suppress(OSError):
            sizes.append((folder / name).stat().st_size)
    lacks = "openvino_tokenizer.xml" if form == "openvino" else "tokenizer.json"
    return Stored(
        name=repository if relative == "." else f"{repository}:{relative}",
        program="Hugging Face",
        format=form,
        path=folder,
        size_bytes=sum(sizes),
        fault=None if lacks in names else f"{lacks} is not in the cache",
    )


def _hub_gguf(name: str, snapshot: Path, path: str) -> Stored:
    """Return the model in a file of a snapshot, which may be a link into the cache's blobs alone."""
    found = _gguf(name, "Hugging Face", snapshot / path)
    try:
        for part in part_names(path):
            files.inside(snapshot, part)
    except OSError as error:
        fault = found.fault or f"{path} cannot be taken ({error.strerror or error})"
        return replace(found, fault=fault)
    return found


def _find_in_hub_cache(name: str) -> Stored | None:
    found = _HUB_NAME.fullmatch(name)
    if found is None:
        return None
    folder_name = f"models--{found[1].replace('/', '--')}"
    path = PurePosixPath(found[2] or ".")
    if path.is_absolute() or ".." in path.parts:
        return None
    for root in _hub_roots():
        snapshot = _snapshot(root / folder_name)
        if snapshot is None:
            continue
        with contextlib.suppress(OSError, ValueError):
            place = snapshot / path
            if _is_model_file(path.name) and place.is_file():
                return _hub_gguf(name, snapshot, str(path))
            _, names = next(_walk(place), (place, []))
            form = _format_of(names)
            if form is not None:
                return _hub_folder(found[1], str(path), place, names, form)
    return None


def _in_lm_studio() -> Iterator[Stored]:
    return _files_in(_lm_studio_roots(), "LM Studio", _LM_STUDIO)


def _in_llama_cpp() -> Iterator[Stored]:
    return _files_in(_llama_cpp_roots(), "llama.cpp", _LLAMA_CPP)


_FINDERS: Final = (_in_ollama, _in_lm_studio, _in_llama_cpp, _in_hub_cache)
