"""
Makes the model that somebody asked for ready on this disk.

Ties the parts together: what is meant, what is here already, and what has to be downloaded or
converted first. Does not load the model.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final, assert_never

from recollect import config
from recollect.errors import ConfigError, UnsupportedModelError
from recollect.models.catalog import CATALOG, CatalogEntry, HubFile
from recollect.models.convert import Conversion, convert, find_converted
from recollect.models.fetch import fetch_entry, fetch_hub_file, require_online
from recollect.models.fingerprint import cached_sha256, combine, sha256_file
from recollect.models.folder import MODELS_FOLDER, from_manifest, open_folder
from recollect.models.local import LocalModel
from recollect.models.manifest import Manifest
from recollect.models.onnx_folder import is_onnx_folder, open_onnx_folder
from recollect.models.reference import reference_model
from recollect.models.resolve import FolderSource, GgufSource, ReferenceModel, Source, resolve
from recollect.models.scratch import scratch_folder
from recollect.types import Progress, no_progress

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

    Raises:
        UnknownModelError: Nothing goes by it.
        OfflineError: It is not here, and may not be fetched.
        FetchError: It cannot be downloaded, or something else came (`ChecksumError`).
        UnsupportedModelError: It cannot be read, or OpenVINO cannot run it.
        ConfigError: The data folder cannot be written to.
    """
    offline = config.is_offline() if offline is None else offline
    try:
        return _prepare(
            resolve(reference, catalog=catalog),
            home,
            allow_native_code,
            progress,
            offline=offline,
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
) -> LocalModel:
    match source:
        case ReferenceModel():
            return reference_model()
        case CatalogEntry():
            return _prepare_entry(source, home, progress, offline=offline)
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
            return _prepare_hub_file(source, home, progress, offline=offline)
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
            gguf = fetch_entry(entry, home=home, progress=progress, offline=offline)
            yield gguf
            gguf.unlink(missing_ok=True)  # as after every conversion; it can be had again
        case HubFile() as file:
            require_online(str(file), offline=offline)
            with scratch_folder(home) as scratch:
                yield fetch_hub_file(file, scratch, progress)
        case GgufSource(path) | FolderSource(path):
            yield path


def models_folder(home: Path) -> Path:
    """Return where converted models lie, one folder each."""
    return home / MODELS_FOLDER


def _prepare_entry(
    entry: CatalogEntry, home: Path, progress: Progress, *, offline: bool
) -> LocalModel:
    folder = models_folder(home) / entry.name
    manifest = find_converted(folder, entry.sha256)
    if manifest is None:
        gguf = fetch_entry(entry, home=home, progress=progress, offline=offline)
        manifest = _install(entry, gguf, folder, home, progress)
    return from_manifest(manifest, folder, entry.name)


def _install(
    entry: CatalogEntry, gguf: Path, folder: Path, home: Path, progress: Progress
) -> Manifest:
    job = Conversion(entry.name, gguf, entry.sha256)
    try:
        manifest = convert(job, folder, home=home, progress=progress)
    except (UnsupportedModelError, OSError):
        # Another process may have finished just now, and removed the file before we opened it.
        finished = find_converted(folder, entry.sha256)
        if finished is None:
            raise
        manifest = finished
    gguf.unlink(missing_ok=True)  # the folder holds all of it
    return manifest


def _prepare_gguf(source: GgufSource, home: Path, progress: Progress) -> LocalModel:
    sha256 = cached_sha256(source.path, home=home, progress=progress)
    # Named by content: a file that was replaced under its old name is another model.
    folder = models_folder(home) / f"{_as_name(source.path.stem)}-{sha256[:_DIGEST_LENGTH]}"
    manifest = find_converted(folder, sha256)
    if manifest is None:
        job = Conversion(str(source.path), source.path, sha256)
        manifest = convert(job, folder, home=home, progress=progress)
    return from_manifest(manifest, folder, str(source.path))


def _prepare_hub_file(
    file: HubFile, home: Path, progress: Progress, *, offline: bool
) -> LocalModel:
    # A name loses some characters, so two files could get the same one; the digest sees them all.
    digest = combine([file.repository, file.filename])
    folder = models_folder(home) / f"{_as_name(str(file))}-{digest[:_DIGEST_LENGTH]}"
    manifest = find_converted(folder, None)
    if manifest is None:
        require_online(str(file), offline=offline)
        with scratch_folder(home) as scratch:
            gguf = fetch_hub_file(file, scratch, progress)
            job = Conversion(str(file), gguf, sha256_file(gguf, progress=progress))
            manifest = convert(job, folder, home=home, progress=progress)
    return from_manifest(manifest, folder, str(file))


def _as_name(text: str) -> str:
    """Return *text* as part of a folder's name."""
    return _NOT_IN_A_NAME.sub("--", text)
