"""
From a name to a model that can be loaded.

`prepare` says what is meant by a name, finds what is here already, and has the rest downloaded or
converted. Does not load a model.
"""

import contextlib
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final, Literal, assert_never

from recollect import config, files
from recollect.errors import ConfigError, FetchError, MisuseError, UnsupportedModelError
from recollect.models.catalog import (
    CATALOG,
    CatalogEntry,
    FolderSource,
    GgufSource,
    HubFile,
    LocalModel,
    ReferenceModel,
    Source,
    hub_file,
    reference_model,
    resolve,
)
from recollect.models.fetch import (
    as_name,
    fetch_entry,
    fetch_hub_file,
    forget_downloads,
    require_online,
    source_path,
    sources_folder,
)
from recollect.models.gguf import glance, read_header
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
from recollect.models.stores import Stored
from recollect.types import Progress, RuntimeChoice, no_progress

_log = logging.getLogger(__name__)

Llama = Literal["missing", "there", "quicker"]
"""Whether llama.cpp can run a file here, and whether it has a graphics card, with which it is quicker."""

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
    llama: Callable[[], Llama] = lambda: "missing",
    llama_build: Callable[[], str] = lambda: "",
) -> LocalModel:
    """
    Return the model that *reference* names, downloading and converting it the first time.

    Args:
        reference: A name of the catalog, the path of a .gguf file, of an OpenVINO or of an ONNX
            GenAI folder, a name of `stores`, `org/repo:file.gguf` on the model hub, or "reference"
            for the model without weights.
        home: Where models are kept.
        allow_native_code: As `onnx_config.check` takes it.
        catalog: The models that go by a name.
        offline: Whether what is not here is refused and not fetched; None: as RECOLLECT_OFFLINE says.
        with_source: Whether the GGUF file is fetched again of a model that is converted and has lost
            it, unless that is forbidden: what to compare it with.
        runtime: What is to run a GGUF file: OpenVINO, which it is converted for, or llama.cpp, which takes
            it as it is. `auto`: OpenVINO if it reads the file and llama.cpp is not quicker.
        llama: Called for a GGUF file and `auto` alone, since loading the library, and waking the cards
            that it finds, takes time.
        llama_build: Called for a file that llama.cpp is to run: which build of it that is. A file is tried
            once with each.

    Raises:
        UnknownModelError: Nothing goes by it.
        OfflineError: It is not here, and may not be fetched.
        FetchError: It cannot be downloaded, or something else came (`ChecksumError`).
        UnsupportedModelError: It cannot be read, or OpenVINO cannot run it.
        ConfigError: The data folder cannot be written to.
    """
    offline = config.is_offline() if offline is None else offline
    try:
        source = _fetched_before(reference, home) or resolve(reference, catalog=catalog)
        is_gguf = isinstance(source, GgufSource | CatalogEntry | HubFile) or (
            isinstance(source, Stored) and source.format == "gguf"
        )
        if runtime == "llama" and not is_gguf:
            raise UnsupportedModelError(
                f"{reference} is no GGUF file, which is what llama.cpp runs: leave --runtime out, or name "
                "a .gguf file."
            )
        found = llama() if is_gguf and runtime == "auto" else "missing"
        try:
            if runtime == "llama" or found == "quicker":
                model = _prepare_for_llama(source, home, progress, llama_build, offline=offline)
            else:
                model = _prepare(
                    source,
                    home,
                    allow_native_code,
                    progress,
                    offline=offline,
                    with_source=with_source and not offline,
                )
        except UnsupportedModelError as error:
            if found != "there":
                raise
            _log.info("llama.cpp runs %s, because OpenVINO does not: %s", reference, error)
            model = _prepare_for_llama(source, home, progress, llama_build, offline=offline)
        return model if model.sampling else replace(model, sampling=_sampling_of_entry(model))
    except OSError as cause:
        raise ConfigError(
            f"{reference} could not be made ready ({cause.strerror or cause}): see that "
            f"{cause.filename or home} can be used and its disk has room, or set RECOLLECT_HOME."
        ) from cause


def _fetched_before(reference: str, home: Path) -> HubFile | None:
    """Return the file of the hub that was fetched and converted, also if it is in its cache since."""
    file = hub_file(reference)
    if file is None or find_inexact(_hub_folder(file, home), None) is None:
        return None
    return file


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
        case GgufSource(path):
            return _prepare_gguf(path, str(path), path.stem, home, progress)
        case FolderSource(path):
            return _prepare_folder(path, str(path), home, allow_native_code, progress)
        case Stored():
            return _prepare_stored(source, home, allow_native_code, progress)
        case HubFile():
            return _prepare_hub_file(
                source, home, progress, offline=offline, with_source=with_source
            )
        case _:
            assert_never(source)


def _require_usable(source: Stored) -> None:
    if source.fault is not None:
        raise UnsupportedModelError(
            f"{source.name} cannot be used: {source.fault}; see to it with {source.program}, or name "
            "another model that `recollect models` shows."
        )


def _prepare_stored(
    source: Stored, home: Path, allow_native_code: str | None, progress: Progress
) -> LocalModel:
    _require_usable(source)
    if source.format != "gguf":
        return _prepare_folder(source.path, source.name, home, allow_native_code, progress)
    model = _prepare_gguf(source.path, source.name, source.name, home, progress)
    return replace(model, sampling=model.sampling or source.sampling)


def _prepare_for_llama(
    source: Source, home: Path, progress: Progress, build: Callable[[], str], *, offline: bool
) -> LocalModel:
    """Return a GGUF file as it is."""
    sampling: Mapping[str, float] = {}
    match source:
        case GgufSource(path):
            parts, name = parts_of(path), str(path)
        case CatalogEntry():
            parts = [fetch_entry(source, home=home, progress=progress, offline=offline)]
            name, sampling = source.name, source.sampling
        case Stored():
            _require_usable(source)
            parts, name, sampling = parts_of(source.path), source.name, source.sampling
        case HubFile():
            parts, name = _have_hub_file(source, home, progress, offline=offline), str(source)
        case _:
            raise MisuseError("only GGUF files run on llama.cpp")
    header = read_header(parts[0])
    sha256 = _of_all(files.cached_sha256(part, home=home, progress=progress) for part in parts)
    _try_in_a_process(parts[0], files.combine([sha256, build()]), home)
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


_TRIED_FOLDER: Final = "tried"
_MOST_TRIED: Final = 256
"""Notes of files that were loaded; an older one costs a second trial."""
TRIAL: Final = "recollect.runtime.llama_model"
TRIAL_REFUSED: Final = 3
"""Exit status of the trial if the file is refused. The last line on stderr is the error."""
_TRIAL_S: Final = 900.0
"""A model of 70 GB is read from a slow disk in that time."""


def _try_in_a_process(path: Path, note_name: str, home: Path) -> None:
    """
    Have llama.cpp load a file that this build of it has not loaded here before, in a process of its own.

    Where its checks of a damaged or strange file fail, the library ends the process that it is in.

    Raises:
        UnsupportedModelError: It did, or it cannot load the file.
    """
    note = home / _TRIED_FOLDER / note_name
    if note.exists():
        return
    command = [sys.executable, "-m", TRIAL, str(path)]
    try:
        ended = subprocess.run(  # noqa: S603 - ourselves
            command, check=False, stdin=subprocess.DEVNULL, capture_output=True, timeout=_TRIAL_S
        )
    except subprocess.TimeoutExpired as cause:
        raise UnsupportedModelError(
            f"llama.cpp did not load {path.name} within {_TRIAL_S:.0f} s: try a smaller file of the model."
        ) from cause
    if ended.returncode == TRIAL_REFUSED:
        raise UnsupportedModelError(ended.stderr.decode(errors="replace").strip().splitlines()[-1])
    if ended.returncode:
        raise UnsupportedModelError(
            f"llama.cpp broke off while it loaded {path.name} (status {ended.returncode}): the file is "
            "damaged, or there is not enough memory; download it again, or take a smaller one."
        )
    files.make_private(note.parent, home)
    note.touch(mode=0o600)
    files.keep_newest(note.parent, _MOST_TRIED)


def _have_hub_file(file: HubFile, home: Path, progress: Progress, *, offline: bool) -> list[Path]:
    """Return the files of a model on the hub, fetched and kept where they are not here."""
    folder = _hub_folder(file, home)
    if not _kept_parts(file, folder, home):
        require_online(str(file), offline=offline)
        _keep(_download(file, home, progress), folder, home, take=os.replace)
        forget_downloads(file, home)
    return _kept_parts(file, folder, home)


def _sampling_of_entry(model: LocalModel) -> Mapping[str, float]:
    """Return what is recommended for the model of the catalog that has the same file; empty: none has."""
    same = (one.sampling for one in CATALOG.values() if one.sha256 == model.source_sha256)
    return next(same, {})


def _prepare_folder(
    path: Path, name: str, home: Path, allow_native_code: str | None, progress: Progress
) -> LocalModel:
    if not is_onnx_folder(path):
        return open_folder(path, name=name, home=home, progress=progress)
    return open_onnx_folder(
        path, name=name, home=home, allow_native_code=allow_native_code, progress=progress
    )


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
        UnsupportedModelError: It has no original: the model without weights; or another program keeps
            it in a way that cannot be used.
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
            yield _download(file, home, progress)[0]
            forget_downloads(file, home)
        case Stored() as kept:
            _require_usable(kept)
            yield kept.path
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
            case GgufSource(path) | Stored(path=path, format="gguf"):
                return glance(path).context_length
            case FolderSource(path) | Stored(path=path):
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
    model = _opened(manifest, folder, entry.name, [source_path(entry, home)])
    return replace(model, sampling=model.sampling or entry.sampling)


def _opened(manifest: Manifest, folder: Path, name: str, parts: Sequence[Path]) -> LocalModel:
    """
    Return the model in a converted folder, with the file that it was made of where all of it is there.

    What an earlier version did not note of the file is read from it again.
    """
    model = from_manifest(manifest, folder, name)
    if not parts or not all(part.is_file() for part in parts):
        return model
    sampling = model.sampling
    if manifest.sampling is None:
        with contextlib.suppress(UnsupportedModelError):  # it is not the file that it was
            sampling = glance(parts[0]).sampling
    return replace(model, source=parts[0], sampling=sampling)


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


def _prepare_gguf(path: Path, name: str, stem: str, home: Path, progress: Progress) -> LocalModel:
    parts = parts_of(path)
    if any(files.remembered_sha256(part, home=home) is None for part in parts):
        # Before minutes of hashing, which are for nothing where the file is refused.
        require_buildable(path)
    sha256 = _of_all(files.cached_sha256(part, home=home, progress=progress) for part in parts)
    # Named by content: a file that was replaced under its old name is another model.
    folder = models_folder(home) / f"{as_name(stem)}-{sha256[:_DIGEST_LENGTH]}"
    folder, manifest = _converted_before(sha256, folder, home)
    if manifest is None:
        job = Conversion(name, path, sha256)
        manifest = convert(job, folder, home=home, progress=progress)
        _keep(parts, folder, home)
    return _opened(manifest, folder, name, parts)


def _of_all(digests: Iterable[str]) -> str:
    """Return the digest of a model, given those of its files: of a single file its own."""
    one, *others = digests
    return files.combine([one, *others]) if others else one


def _converted_before(sha256: str, folder: Path, home: Path) -> tuple[Path, Manifest | None]:
    """Return the folder that was made of the same file, *folder* or one under another name of the file."""
    kept = models_folder(home)
    for one in (folder, *(sorted(kept.iterdir()) if kept.is_dir() else ())):
        if (manifest := find_converted(one, sha256)) is not None:
            return one, manifest
    return folder, None


def _keep(
    parts: Iterable[Path],
    folder: Path,
    home: Path,
    *,
    take: Callable[[Path, Path], object] = os.link,
) -> None:
    """
    Keep a model's files, so that a later recollect can convert it anew when they are gone.

    By links, where the files lie on the same disk: then they take no room. What the user has is not
    copied; where there can be no link, the file has to stay where it is.

    Args:
        parts: The files.
        folder: Of the converted model.
        home: The data folder.
        take: What gives a file its new place; `os.replace` for files that are ours.
    """
    kept = kept_folder(folder, home)
    files.make_private(kept.parent, home)
    kept.mkdir(mode=0o700, exist_ok=True)
    for part in parts:
        with contextlib.suppress(OSError):
            take(part, kept / part.name)


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
    if with_source:
        parts = _have_hub_file(file, home, progress, offline=offline)
    else:
        parts = _kept_parts(file, folder, home)
    return _opened(manifest, folder, str(file), parts)


def _hub_folder(file: HubFile, home: Path) -> Path:
    """Return a folder's name with a digest: without, two files could get the same one."""
    digest = files.combine([file.repository, file.filename])
    return models_folder(home) / f"{as_name(str(file))}-{digest[:_DIGEST_LENGTH]}"


def _install_hub_file(
    file: HubFile, folder: Path, home: Path, progress: Progress, *, offline: bool
) -> Manifest:
    kept = _kept_parts(file, folder, home)
    if not kept:
        require_online(str(file), offline=offline)
    parts = kept or _download(file, home, progress)
    sha256 = _of_all(files.sha256_file(part, progress=progress) for part in parts)
    try:
        manifest = convert(
            Conversion(str(file), parts[0], sha256), folder, home=home, progress=progress
        )
    except UnsupportedModelError:
        forget_downloads(file, home)  # after any other interruption they need not be fetched again
        raise
    _keep(parts, folder, home, take=os.replace)
    forget_downloads(file, home)
    return manifest


def _kept_parts(file: HubFile, folder: Path, home: Path) -> list[Path]:
    """Return the files that were kept of a model on the hub; none where one is missing."""
    kept = [kept_folder(folder, home) / Path(name).name for name in part_names(file.filename)]
    return kept if all(part.is_file() for part in kept) else []


def _download(file: HubFile, home: Path, progress: Progress) -> list[Path]:
    """Return the files of a model on the hub: one, or all parts where its name says how many."""
    files = [HubFile(file.repository, name) for name in part_names(file.filename)]
    return [fetch_hub_file(part, home, progress) for part in files]
