"""
Which models are on this disk, and how one that somebody asked for gets there.

`prepare` says what is meant by a name, finds what is here already, and has the rest downloaded or
converted. `installed` lists what is here, with what came of comparing a model with its file. `prune`
deletes GGUF files that a model was converted from. Does not load a model.
"""

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, assert_never

from recollect import config, files
from recollect.errors import ConfigError, FetchError, UnknownModelError, UnsupportedModelError
from recollect.models.catalog import (
    CATALOG,
    REFERENCE_NAME,
    CatalogEntry,
    FolderSource,
    GgufSource,
    HubFile,
    LocalModel,
    ReferenceModel,
    Source,
    fetch_entry,
    fetch_hub_file,
    reference_model,
    require_online,
    resolve,
    source_path,
    sources_folder,
)
from recollect.models.compared import Compared
from recollect.models.gguf import read_header
from recollect.models.gguf_decoder import Conversion, convert, require_buildable
from recollect.models.gguf_weights import part_names, parts_of
from recollect.models.onnx_folder import is_onnx_folder, onnx_context_length, open_onnx_folder
from recollect.models.openvino_folder import (
    MODELS_FOLDER,
    Manifest,
    find_converted,
    find_inexact,
    from_manifest,
    open_folder,
    openvino_context_length,
)
from recollect.types import Progress, RuntimeChoice, no_progress

_log = logging.getLogger(__name__)

_NOT_IN_A_NAME: Final = re.compile(r"[^\w.-]+")
_DIGEST_LENGTH: Final = 12  # enough of a sha256 to tell files of the same name apart


def prepare(
    reference: str,
    *,
    home: Path,
    allow_native_code: str | None = None,
    progress: Progress = no_progress,
    catalog: Mapping[str, CatalogEntry] = CATALOG,
    offline: bool | None = None,
    with_source: bool = False,
    runtime: RuntimeChoice = "auto",
    prefers_llama: Callable[[], bool] = lambda: False,
) -> LocalModel:
    """
    Return the model that *reference* names, downloading and converting it the first time.

    Args:
        reference: A name of the catalog, the path of a .gguf file, of an OpenVINO or of an ONNX
            GenAI folder, `org/repo:file.gguf` on the model hub, or "reference" for the model
            without weights.
        home: Where models are kept.
        allow_native_code: As `onnx_config.check` takes it.
        catalog: The models that go by a name.
        offline: Whether what is not here is refused and not fetched; None: as RECOLLECT_OFFLINE says.
        with_source: Whether the GGUF file is fetched again of a model that is converted and has lost
            it, unless that is forbidden: what to compare it with.
        runtime: What is to run a GGUF file: OpenVINO, which it is converted for, or llama.cpp. `auto`:
            OpenVINO if it can, unless llama.cpp is preferred.
        prefers_llama: Returns whether llama.cpp is there and a file is to be given to it that OpenVINO could
            run, too; asked only with `auto`.

    Raises:
        UnknownModelError: Nothing goes by it.
        OfflineError: It is not here, and may not be fetched.
        FetchError: It cannot be downloaded, or something else came (`ChecksumError`).
        UnsupportedModelError: It cannot be read, or OpenVINO cannot run it.
        ConfigError: The data folder cannot be written to.
    """
    offline = config.is_offline() if offline is None else offline
    try:
        source = resolve(reference, catalog=catalog)
        if isinstance(source, GgufSource | CatalogEntry | HubFile):
            if runtime == "llama" or (runtime == "auto" and prefers_llama()):
                return _prepare_for_llama(source, home, progress, offline=offline)
        elif runtime == "llama":
            raise UnsupportedModelError(
                f"{reference} is no GGUF file, which is what llama.cpp runs: leave --runtime out, or name "
                "a .gguf file."
            )
        return _prepare(
            source,
            home,
            allow_native_code,
            progress,
            offline=offline,
            with_source=with_source and not offline,
        )
    except OSError as cause:
        raise ConfigError(
            f"{reference} could not be made ready ({cause.strerror or cause}): see that "
            f"{cause.filename or home} can be used and its disk has room, or set RECOLLECT_HOME."
        ) from cause


def _prepare(
    source: Source,
    home: Path,
    allow_native_code: str | None,
    progress: Progress,
    *,
    offline: bool,
    with_source: bool,
) -> LocalModel:
    match source:
        case ReferenceModel():
            return reference_model()
        case CatalogEntry():
            return _prepare_entry(source, home, progress, offline=offline, with_source=with_source)
        case GgufSource():
            return _prepare_gguf(source, home, progress)
        case FolderSource():
            name = str(source.path)
            if is_onnx_folder(source.path):
                return open_onnx_folder(
                    source.path,
                    name=name,
                    home=home,
                    allow_native_code=allow_native_code,
                    progress=progress,
                )
            return open_folder(source.path, name=name, home=home, progress=progress)
        case HubFile():
            return _prepare_hub_file(
                source, home, progress, offline=offline, with_source=with_source
            )
        case _:
            assert_never(source)


@contextmanager
def original_of(
    reference: str,
    *,
    home: Path,
    progress: Progress = no_progress,
    offline: bool | None = None,
) -> Iterator[Path]:
    """
    Yield the GGUF file or the folder that *reference* names, downloaded if it must be, not converted.

    Raises:
        UnknownModelError: Nothing goes by it.
        OfflineError: It is not here, and may not be fetched; *offline* is as in `prepare`.
        FetchError: It cannot be downloaded.
        UnsupportedModelError: It has no original: the model without weights.
    """
    offline = config.is_offline() if offline is None else offline
    match resolve(reference):
        case ReferenceModel():
            raise UnsupportedModelError(
                "The reference model has no weights to convert: name another."
            )
        case CatalogEntry() as entry:
            yield fetch_entry(entry, home=home, progress=progress, offline=offline)
        case HubFile() as file:
            require_online(str(file), offline=offline)
            with files.scratch_folder(home) as scratch:
                yield fetch_hub_file(file, scratch, progress)
        case GgufSource(path) | FolderSource(path):
            yield path


def known_context_length(reference: str, home: Path) -> int | None:
    """
    Return how long a model's context is, in tokens, without loading or fetching it; None: nobody knows.

    Raises:
        UnknownModelError: Nothing goes by the name.
    """
    source = resolve(reference)
    try:
        match source:
            case ReferenceModel():
                return reference_model().context_length
            case CatalogEntry():
                return source.context_length
            case GgufSource(path):
                return read_header(path).context_length
            case FolderSource(path):
                is_onnx = is_onnx_folder(path)
                return onnx_context_length(path) if is_onnx else openvino_context_length(path)
            case HubFile():
                return openvino_context_length(_hub_folder(source, home))
    except (UnsupportedModelError, OSError):
        return None  # who loads it is told


def models_folder(home: Path) -> Path:
    """Return where converted models lie, one folder each."""
    return home / MODELS_FOLDER


def kept_folder(folder: Path, home: Path) -> Path:
    """Return where the GGUF files of a converted *folder* are kept that are in no catalog."""
    return sources_folder(home) / folder.name


def _prepare_entry(
    entry: CatalogEntry, home: Path, progress: Progress, *, offline: bool, with_source: bool
) -> LocalModel:
    folder = models_folder(home) / entry.name
    manifest = find_converted(folder, entry.sha256)
    if manifest is None:
        try:
            gguf = fetch_entry(entry, home=home, progress=progress, offline=offline)
        except FetchError as error:
            manifest = _inexact(folder, entry.sha256, entry.name, error)
        else:
            manifest = _install(entry, gguf, folder, home, progress)
    if with_source:
        fetch_entry(entry, home=home, progress=progress)
    model = from_manifest(manifest, folder, entry.name)
    model = replace(model, sampling=model.sampling or entry.sampling)
    return _with_source(model, [source_path(entry, home)])


def _prepare_for_llama(
    source: GgufSource | CatalogEntry | HubFile, home: Path, progress: Progress, *, offline: bool
) -> LocalModel:
    """Return a GGUF file as it is."""
    sampling: Mapping[str, float] = {}
    match source:
        case GgufSource():
            parts, name = parts_of(source.path), str(source.path)
        case CatalogEntry():
            parts = [fetch_entry(source, home=home, progress=progress, offline=offline)]
            name, sampling = source.name, source.sampling
        case HubFile():
            folder, name = _hub_folder(source, home), str(source)
            parts = _kept_parts(source, folder, home)
            if not parts:
                require_online(name, offline=offline)
                with files.scratch_folder(home) as scratch:
                    _keep(_download(source, scratch, progress), folder, home)
                parts = _kept_parts(source, folder, home)
    header = read_header(parts[0])
    digests = [files.cached_sha256(part, home=home, progress=progress) for part in parts]
    sha256 = digests[0] if len(digests) == 1 else files.combine(digests)
    return LocalModel(
        name=name,
        format="gguf",
        folder=parts[0].parent,
        graph=parts[0].name,
        context_length=header.context_length,
        chat_template=header.chat_template,
        eos_token_ids=header.eos_token_ids,
        bos_token=header.bos_token,
        eos_token=header.eos_token,
        fingerprint=files.combine([sha256, "gguf"]),
        architecture=header.architecture,
        boundaries=() if header.window is None else (header.window,),
        sampling=header.sampling or sampling,
        source=parts[0],
        source_sha256=sha256,
    )


def _with_source(model: LocalModel, parts: Iterable[Path]) -> LocalModel:
    """Return the model with the file that it was made of, where all of it is still there."""
    there = [part for part in parts if part.is_file()]
    return replace(model, source=there[0]) if there and there == list(parts) else model


def _install(
    entry: CatalogEntry, gguf: Path, folder: Path, home: Path, progress: Progress
) -> Manifest:
    job = Conversion(entry.name, gguf, entry.sha256)
    try:
        return convert(job, folder, home=home, progress=progress)
    except (UnsupportedModelError, OSError):
        # Another process may have finished just now, and its user deleted the file before we read it.
        finished = find_converted(folder, entry.sha256)
        if finished is None:
            raise
        return finished


def _inexact(folder: Path, sha256: str | None, name: str, error: FetchError) -> Manifest:
    """
    Return the manifest of a folder from before weights were the file's own, with a warning.

    Raises:
        FetchError: The one that is given: there is no such folder.
    """
    manifest = find_inexact(folder, sha256)
    if manifest is None:
        raise error
    _log.warning(
        "%s runs with rounded weights, as an earlier recollect converted it, because its file could "
        "not be fetched to convert it again: run `recollect pull %s` with a network.",
        name,
        name,
    )
    return manifest


def _prepare_gguf(source: GgufSource, home: Path, progress: Progress) -> LocalModel:
    parts = parts_of(source.path)
    if any(files.remembered_sha256(part, home=home) is None for part in parts):
        # Before minutes of hashing, which are for nothing where the file is refused.
        require_buildable(source.path)
    digests = [files.cached_sha256(part, home=home, progress=progress) for part in parts]
    sha256 = digests[0] if len(digests) == 1 else files.combine(digests)
    # Named by content: a file that was replaced under its old name is another model.
    folder = models_folder(home) / f"{_as_name(source.path.stem)}-{sha256[:_DIGEST_LENGTH]}"
    manifest = find_converted(folder, sha256)
    if manifest is None:
        job = Conversion(str(source.path), source.path, sha256)
        manifest = convert(job, folder, home=home, progress=progress)
        _keep(parts, folder, home)
    return _with_source(from_manifest(manifest, folder, str(source.path)), parts)


def _keep(parts: Iterable[Path], folder: Path, home: Path) -> None:
    """
    Keep a model's files, so that a later recollect can convert it anew when they are gone.

    By links, where the files lie on the same disk: then they take no room. What the user has is not
    copied; where there can be no link, the file has to stay where it is.
    """
    kept = kept_folder(folder, home)
    files.make_private(kept.parent, home)
    kept.mkdir(mode=0o700, exist_ok=True)
    for part in parts:
        with contextlib.suppress(OSError):
            os.link(part, kept / part.name)


def _prepare_hub_file(
    file: HubFile, home: Path, progress: Progress, *, offline: bool, with_source: bool
) -> LocalModel:
    folder = _hub_folder(file, home)
    manifest = find_converted(folder, None)
    if manifest is None:
        try:
            manifest = _install_hub_file(file, folder, home, progress, offline=offline)
        except FetchError as error:
            manifest = _inexact(folder, None, str(file), error)
    if with_source and not _kept_parts(file, folder, home):
        with files.scratch_folder(home) as scratch:
            _keep(_download(file, scratch, progress), folder, home)
    parts = _kept_parts(file, folder, home)
    return _with_source(from_manifest(manifest, folder, str(file)), parts)


def _hub_folder(file: HubFile, home: Path) -> Path:
    """Return a folder's name with a digest: without, two files could get the same one."""
    digest = files.combine([file.repository, file.filename])
    return models_folder(home) / f"{_as_name(str(file))}-{digest[:_DIGEST_LENGTH]}"


def _install_hub_file(
    file: HubFile, folder: Path, home: Path, progress: Progress, *, offline: bool
) -> Manifest:
    kept = _kept_parts(file, folder, home)
    if not kept:
        require_online(str(file), offline=offline)
    with files.scratch_folder(home) as scratch:
        parts = kept or _download(file, scratch, progress)
        digests = [files.sha256_file(part, progress=progress) for part in parts]
        sha256 = digests[0] if len(digests) == 1 else files.combine(digests)
        job = Conversion(str(file), parts[0], sha256)
        manifest = convert(job, folder, home=home, progress=progress)
        _keep(parts, folder, home)
    return manifest


def _kept_parts(file: HubFile, folder: Path, home: Path) -> list[Path]:
    """Return the files that were kept of a model on the hub; none where one is missing."""
    kept = [kept_folder(folder, home) / Path(name).name for name in part_names(file.filename)]
    return kept if all(part.is_file() for part in kept) else []


def _download(file: HubFile, scratch: Path, progress: Progress) -> list[Path]:
    """Return the files of a model on the hub: one, or all parts where its name says how many."""
    files = [HubFile(file.repository, name) for name in part_names(file.filename)]
    return [fetch_hub_file(part, scratch, progress) for part in files]


def _as_name(text: str) -> str:
    """Return *text* as part of a folder's name."""
    return _NOT_IN_A_NAME.sub("--", text)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStatus:
    """One line of `recollect models`."""

    name: str
    """What `prepare` and `recollect.load` take."""
    description: str
    licence: str | None
    """None where we do not know it: a file of the user's own."""
    download_bytes: int | None
    """None where there is nothing to download."""
    is_installed: bool
    """Whether it can be loaded now, without a network and without converting it."""
    is_exact: bool
    """Whether what is installed has the weights of its file: an earlier recollect rounded them."""
    disk_bytes: int
    """What it takes on this disk, the GGUF file included that was kept."""
    source_bytes: int
    """What of it is that GGUF file; 0 where it is only a link to a file that lies elsewhere, too."""
    path: Path | None
    """Its folder, or None where there is none."""
    compared: Compared | None = None
    """What came of comparing it with its file, in the strictest profile; None: nobody has."""


def installed(home: Path, *, catalog: Mapping[str, CatalogEntry] = CATALOG) -> list[ModelStatus]:
    """Return every model of the catalog, in its order, then the others that are on this disk."""
    entries = [_entry_status(entry, home) for entry in catalog.values()]
    folders = models_folder(home)
    found = sorted(folders.iterdir()) if folders.is_dir() else []
    others = [_folder_status(folder, home) for folder in found if folder.name not in catalog]
    return entries + [status for status in others if status is not None]


def is_here(reference: str, home: Path) -> bool:
    """Return whether a model can be loaded without fetching anything."""
    known = any(status.name == reference and status.is_installed for status in installed(home))
    return known or reference == REFERENCE_NAME or Path(reference).expanduser().exists()


def names_by_fingerprint(home: Path) -> dict[str, str]:
    """Return what the models on this disk are called, by their fingerprints."""
    folder = models_folder(home)
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    manifests = [manifest for path in found if (manifest := Manifest.read(path)) is not None]
    reference = reference_model()
    return {manifest.fingerprint: manifest.name for manifest in manifests} | {
        reference.fingerprint: reference.name
    }


def prune(reference: str, home: Path, *, catalog: Mapping[str, CatalogEntry] = CATALOG) -> int:
    """
    Delete the GGUF file that an installed model was converted from; return how many bytes it had.

    The model stays as it is. A later recollect that converts in another way fetches the file again.

    Raises:
        UnknownModelError: No model of that name is installed.
        ConfigError: The file cannot be deleted.
    """
    for status in installed(home, catalog=catalog):
        if status.name == reference and status.is_installed and status.path is not None:
            files = _sources(status.path, home, catalog.get(reference))
            size = sum(file.stat().st_size for file in files)
            try:
                for file in files:
                    file.unlink()
            except OSError as cause:
                raise ConfigError(
                    f"{cause.filename} cannot be deleted ({cause.strerror}): see to its permissions."
                ) from cause
            return size
    raise UnknownModelError(
        f"There is no model {reference!r} on this disk: `recollect models` lists what there is."
    )


def _sources(folder: Path, home: Path, entry: CatalogEntry | None) -> list[Path]:
    """Return the GGUF files that are kept of a model."""
    own = kept_folder(folder, home)
    files = sorted(own.iterdir()) if own.is_dir() else []
    if entry is not None and (fetched := source_path(entry, home)).is_file():
        files.append(fetched)
    return files


def _entry_status(entry: CatalogEntry, home: Path) -> ModelStatus:
    folder = models_folder(home) / entry.name
    source_bytes = _own_bytes(_sources(folder, home, entry))
    manifest = find_inexact(folder, entry.sha256)
    return ModelStatus(
        name=entry.name,
        description=entry.description,
        licence=entry.licence,
        download_bytes=entry.bytes,
        is_installed=manifest is not None,
        is_exact=manifest is not None and manifest.is_exact,
        disk_bytes=size_bytes(folder) + source_bytes,
        source_bytes=source_bytes,
        path=folder if folder.is_dir() else None,
        compared=None if manifest is None else Compared.read(home, manifest.fingerprint, folder),
    )


def _folder_status(folder: Path, home: Path) -> ModelStatus | None:
    manifest = Manifest.read(folder)
    if manifest is None:
        return None
    source_bytes = _own_bytes(_sources(folder, home, None))
    return ModelStatus(
        name=manifest.name,
        description=f"{manifest.architecture}, {manifest.context_length:,} tokens of context",
        licence=None,
        download_bytes=None,
        is_installed=find_inexact(folder, None) is not None,
        is_exact=manifest.is_exact,
        disk_bytes=size_bytes(folder) + source_bytes,
        source_bytes=source_bytes,
        path=folder,
        compared=Compared.read(home, manifest.fingerprint, folder),
    )


def _own_bytes(files: Iterable[Path]) -> int:
    """Return the size of files that have no other name: what deleting them would free."""
    stats = [file.stat() for file in files]
    return sum(stat.st_size for stat in stats if stat.st_nlink == 1)


def size_bytes(path: Path) -> int:
    """Return the size of a file, or of all files in a folder; 0 where there is nothing."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
