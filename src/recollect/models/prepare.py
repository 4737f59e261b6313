"""
Makes the model that somebody asked for ready on this disk.

Ties the parts together: what is meant, what is here already, and what has to be downloaded or
converted first. Does not load the model.

Turns a GGUF file into an OpenVINO folder, once.

The work is done in a scratch folder and published by one rename, so that a half-made folder is
never seen and two processes may do it at once. Does not know where the file came from.
"""

import contextlib
import errno
import itertools
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import IO, Final, assert_never

from recollect import config
from recollect.errors import ConfigError, FetchError, UnsupportedModelError
from recollect.files import cached_sha256, combine, make_private, scratch_folder, sha256_file
from recollect.models.catalog import (
    CATALOG,
    CatalogEntry,
    FolderSource,
    GgufSource,
    HubFile,
    LocalModel,
    ReferenceModel,
    Source,
    reference_model,
    resolve,
)
from recollect.models.fetch import (
    fetch_entry,
    fetch_hub_file,
    require_online,
    source_path,
    sources_folder,
)
from recollect.models.gguf import GgufHeader, read_header
from recollect.models.gguf_decoder import require_buildable
from recollect.models.gguf_weights import part_names, parts_of
from recollect.models.onnx_folder import is_onnx_folder, open_onnx_folder
from recollect.models.openvino_folder import (
    MODEL_FILES,
    MODELS_FOLDER,
    TOKENIZER_FILES,
    Manifest,
    from_manifest,
    open_folder,
    warn_of_writers,
)
from recollect.types import Progress, no_progress

_CONVERTER: Final = "openvino-genai"
"""Whose release year counts: it makes the tokenizer, and the graph is paged by OpenVINO of its year."""
_PUBLISH_ATTEMPTS: Final = 5
_KILLED: Final = -9  # minus SIGKILL, a name that Windows lacks
_PROGRAM: Final = "recollect.models.gguf_to_openvino"
REFUSED: Final = 3
"""How it ends where the file cannot be converted; the last line of stderr is the reason, a sentence."""
NO_ROOM: Final = 4
"""How it ends where something cannot be written; the last line of stderr is the errno and the path."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """What is to be converted, and under which name the result is known."""

    name: str
    gguf: Path
    sha256: str
    """Of the GGUF file; of several parts, of their digests."""


def find_converted(folder: Path, sha256: str | None) -> Manifest | None:
    """
    Return the manifest of a folder that can be used as it is, or None.

    A folder is of no use when it came from another file, when its weights are not the file's own
    because an earlier recollect made it, when a release of another year made it, or when its files
    have not the size that they had.

    Args:
        sha256: Of the file that it must have come from; None takes any.
    """
    manifest = find_inexact(folder, sha256)
    return manifest if manifest is not None and manifest.is_exact else None


def find_inexact(folder: Path, sha256: str | None) -> Manifest | None:
    """Return the manifest of a folder that can be used, also where its weights are not the file's own."""
    manifest = Manifest.read(folder)
    if manifest is None or (sha256 is not None and manifest.source_sha256 != sha256):
        return None
    made_with = manifest.library_versions.get(_CONVERTER, "")
    if _year(made_with) != _year(version(_CONVERTER)):
        return None
    return manifest if manifest.file_bytes == _file_bytes(folder) else None


def convert(job: Conversion, folder: Path, *, home: Path, progress: Progress) -> Manifest:
    """
    Make *folder* the converted model, replacing what is there, and return its manifest.

    Raises:
        UnsupportedModelError: The file is damaged, or holds what cannot be built as it means it.
        OSError: The disk is full or cannot be written to.
    """
    header = read_header(job.gguf)
    require_buildable(job.gguf)
    warn_of_writers(job.gguf.parent, [part.name for part in parts_of(job.gguf)])
    what = f"converting {job.name}"
    progress(what, 0, None)
    with scratch_folder(home) as scratch:
        made = scratch / "model"
        made.mkdir()
        _run_converter(job, made, lambda done, total: progress(what, done, total))
        manifest = _describe(job, header, made)
        manifest.write(made)
        manifest = _publish(made, folder, scratch, manifest)
    progress(what, 1, 1)
    return manifest


def _run_converter(job: Conversion, folder: Path, on_bytes: Callable[[int, int], None]) -> None:
    """
    Fill *folder* by the program that converts; it does not outlive this call.

    Raises:
        UnsupportedModelError: It refused the file, or crashed.
        OSError: It could not write.
    """
    command = [sys.executable, "-P", "-m", _PROGRAM, str(job.gguf), str(folder)]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as complaints:
        status = _run(command, complaints, on_bytes)
        complaints.seek(0)
        lines = complaints.read().strip().splitlines()
    said = lines[-1].strip() if lines else ""
    missing = [name for name in (*MODEL_FILES, *TOKENIZER_FILES) if not (folder / name).is_file()]
    if status == 0 and not missing:
        return
    if status == REFUSED and said:
        raise UnsupportedModelError(said)
    if status == NO_ROOM and said:
        number, _, path = said.partition(" ")
        code = int(number) if number.isdecimal() else errno.EIO
        raise OSError(code, os.strerror(code), path)
    if status == _KILLED:
        reason = "it was killed, as happens when memory runs out"
    elif status < 0:
        reason = f"it crashed with {signal.Signals(-status).name}"
    else:
        reason = said.rstrip(".") or f"it wrote no {missing[:1]}"
    raise UnsupportedModelError(
        f"{job.gguf.name} could not be converted ({reason}): download the file again, or "
        "export the original model with `optimum-cli export openvino`."
    )


def _run(command: Sequence[str], complaints: IO[str], on_bytes: Callable[[int, int], None]) -> int:
    """Run a program to its end, and pass on the pairs of numbers that it prints."""
    with subprocess.Popen(  # noqa: S603 - our own interpreter and program
        command,
        stdout=subprocess.PIPE,
        stderr=complaints,
        stdin=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
        errors="replace",
    ) as process:
        try:
            for line in process.stdout or ():
                done, _, total = line.strip().partition(" ")
                if done.isdecimal() and total.isdecimal():  # a library may print, too
                    on_bytes(int(done), int(total))
            return process.wait()
        finally:
            process.kill()


def _describe(job: Conversion, header: GgufHeader, folder: Path) -> Manifest:
    versions = {package: version(package) for package in ("openvino", _CONVERTER)}
    return Manifest(
        name=job.name,
        source_sha256=job.sha256,
        source_bytes=sum(part.stat().st_size for part in parts_of(job.gguf)),
        architecture=header.architecture,
        context_length=header.context_length,
        chat_template=header.chat_template,
        eos_token_ids=sorted(header.eos_token_ids),
        bos_token=header.bos_token,
        eos_token=header.eos_token,
        window=header.window,
        fingerprint=combine(
            ["gguf weights 1", job.sha256, versions[_CONVERTER], header.chat_template or ""]
        ),
        library_versions=versions,
        file_bytes=_file_bytes(folder),
    )


def _file_bytes(folder: Path) -> dict[str, int]:
    files = [folder / name for name in (*MODEL_FILES, *TOKENIZER_FILES)]
    return {file.name: file.stat().st_size for file in files if file.is_file()}


def _publish(made: Path, folder: Path, scratch: Path, manifest: Manifest) -> Manifest:
    """Rename the folder to its place; whoever comes second uses what the first put there."""
    folder.parent.mkdir(mode=0o700, exist_ok=True)  # in the home that the scratch folder is in
    for attempt in itertools.count(1):
        existing = find_converted(folder, manifest.source_sha256)
        if existing is not None:
            return existing
        try:
            if folder.exists():  # of no use: out of the way, and gone with the scratch folder
                folder.rename(scratch / f"replaced{attempt}")
            made.rename(folder)
        except OSError:
            # Another process put its own there in between: look again. Anything else stays.
            if attempt == _PUBLISH_ATTEMPTS:
                raise
        else:
            break
    return manifest


def _year(release: str) -> str:
    return release.partition(".")[0]


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
            yield fetch_entry(entry, home=home, progress=progress, offline=offline)
        case HubFile() as file:
            require_online(str(file), offline=offline)
            with scratch_folder(home) as scratch:
                yield fetch_hub_file(file, scratch, progress)
        case GgufSource(path) | FolderSource(path):
            yield path


def models_folder(home: Path) -> Path:
    """Return where converted models lie, one folder each."""
    return home / MODELS_FOLDER


def kept_folder(folder: Path, home: Path) -> Path:
    """Return where the GGUF files of a converted *folder* are kept that are in no catalog."""
    return sources_folder(home) / folder.name


def _prepare_entry(
    entry: CatalogEntry, home: Path, progress: Progress, *, offline: bool
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
    return _with_source(from_manifest(manifest, folder, entry.name), [source_path(entry, home)])


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
    digests = [cached_sha256(part, home=home, progress=progress) for part in parts]
    sha256 = digests[0] if len(digests) == 1 else combine(digests)
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
    make_private(kept.parent, home)
    kept.mkdir(mode=0o700, exist_ok=True)
    for part in parts:
        with contextlib.suppress(OSError):
            os.link(part, kept / part.name)


def _prepare_hub_file(
    file: HubFile, home: Path, progress: Progress, *, offline: bool
) -> LocalModel:
    # A name loses some characters, so two files could get the same one; the digest sees them all.
    digest = combine([file.repository, file.filename])
    folder = models_folder(home) / f"{_as_name(str(file))}-{digest[:_DIGEST_LENGTH]}"
    manifest = find_converted(folder, None)
    if manifest is None:
        try:
            manifest = _install_hub_file(file, folder, home, progress, offline=offline)
        except FetchError as error:
            manifest = _inexact(folder, None, str(file), error)
    parts = _kept_parts(file, folder, home)
    return _with_source(from_manifest(manifest, folder, str(file)), parts)


def _install_hub_file(
    file: HubFile, folder: Path, home: Path, progress: Progress, *, offline: bool
) -> Manifest:
    kept = _kept_parts(file, folder, home)
    if not kept:
        require_online(str(file), offline=offline)
    with scratch_folder(home) as scratch:
        parts = kept or _download(file, scratch, progress)
        digests = [sha256_file(part, progress=progress) for part in parts]
        sha256 = digests[0] if len(digests) == 1 else combine(digests)
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
