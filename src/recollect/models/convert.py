"""
Turns a GGUF file into an OpenVINO folder, once.

The work is done in a scratch folder and published by one rename, so that a half-made folder is
never seen and two processes may do it at once. Does not know where the file came from.
"""

import errno
import itertools
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, Final

from recollect.errors import UnsupportedModelError
from recollect.files import combine, scratch_folder
from recollect.models.folder import MODEL_FILES, TOKENIZER_FILES
from recollect.models.gguf_decoder import require_buildable
from recollect.models.gguf_file import GgufHeader, read_header
from recollect.models.gguf_shards import parts_of
from recollect.models.manifest import Manifest
from recollect.text.other_tokenizers import warn_of_writers
from recollect.types import Progress

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
