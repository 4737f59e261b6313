"""
Turns a GGUF file into an OpenVINO folder, once.

The work is done in a scratch folder and published by one rename, so that a half-made folder is
never seen and two processes may do it at once. Does not know where the file came from.
"""

import itertools
import logging
import signal
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final

from recollect.errors import UnsupportedModelError
from recollect.models.fingerprint import combine
from recollect.models.folder import MODEL_FILES, TOKENIZER_FILES
from recollect.models.gguf_file import GgufHeader, read_header, require_readable
from recollect.models.hf_files import warn_of_writers
from recollect.models.manifest import Manifest
from recollect.models.scratch import link_or_copy, scratch_folder
from recollect.types import Progress

_log = logging.getLogger(__name__)

_CONVERTER: Final = "openvino-genai"
_PUBLISH_ATTEMPTS: Final = 5
_KILLED: Final = -9  # minus SIGKILL, a name that Windows lacks
# In a process of its own: a damaged file can crash the converter, and its memory (four times the
# file's size at worst) is given back. recollect comes first, because it switches telemetry off.
_PROGRAM: Final = (
    "import sys, recollect, openvino_genai as genai; "
    "genai.LLMPipeline(sys.argv[1], 'CPU', enable_save_ov_model=True)"
)
_INT8: Final = "recollect.models.int8_weights"


@dataclass(frozen=True, slots=True)
class Conversion:
    """What is to be converted, and under which name the result is known."""

    name: str
    gguf: Path
    sha256: str
    """Of the GGUF file."""
    as_packed: bool = False
    """Whether weights stay as they are packed even where int8 is faster: to compare the two."""


def find_converted(folder: Path, sha256: str | None) -> Manifest | None:
    """
    Return the manifest of a folder that can be used as it is, or None.

    A folder is of no use when it came from another file, when a release of another year made it,
    or when its files have not the size that they had.

    Args:
        sha256: Of the file that it must have come from; None takes any.
    """
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
        UnsupportedModelError: The file is damaged, or OpenVINO cannot read it.
        OSError: The disk is full or cannot be written to.
    """
    header = read_header(job.gguf)
    require_readable(header, job.gguf)
    warn_of_writers(job.gguf.parent, (job.gguf.name,))
    progress(f"converting {job.name}", 0, None)
    with scratch_folder(home) as scratch:
        made = scratch / "model"
        made.mkdir()
        link = made / "model.gguf"
        link_or_copy(job.gguf, link)
        _run_converter(link, job)
        link.unlink()
        if not job.as_packed:
            _rewrite_weights(made, job.name, folder)
        manifest = _describe(job, header, made)
        manifest.write(made)
        manifest = _publish(made, folder, scratch, manifest)
    progress(f"converting {job.name}", 1, 1)
    return manifest


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603 - our own interpreter and programs
        [sys.executable, "-P", *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )


def _rewrite_weights(made: Path, name: str, folder: Path) -> None:
    """Give the model in *made* weights that are faster here; where that fails, it stays as it was."""
    done = _run("-m", _INT8, str(made))
    if done.returncode == 0:
        return
    for half_made in made.glob("*.int8.*"):
        half_made.unlink()
    reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
    _log.warning(
        "%s works, but may be slower than it could be (%s): make room in memory and on the disk, "
        "remove %s and start again.",
        name,
        reason.strip().rstrip("."),
        folder,
    )


def _run_converter(gguf: Path, job: Conversion) -> None:
    done = _run("-c", _PROGRAM, str(gguf))
    missing = [
        name for name in (*MODEL_FILES, *TOKENIZER_FILES) if not (gguf.parent / name).is_file()
    ]
    if done.returncode == 0 and not missing:
        return
    if done.returncode == _KILLED:
        reason = "it was killed, as happens when memory runs out"
    elif done.returncode < 0:
        reason = f"it crashed with {signal.Signals(-done.returncode).name}"
    else:
        lines = done.stderr.strip().splitlines() or [f"it wrote no {missing[:1]}"]
        reason = lines[-1].strip().rstrip(".")
    raise UnsupportedModelError(
        f"OpenVINO could not convert {job.gguf.name} ({reason}): download the file again, or "
        "export the original model with `optimum-cli export openvino`."
    )


def _describe(job: Conversion, header: GgufHeader, folder: Path) -> Manifest:
    versions = {package: version(package) for package in ("openvino", _CONVERTER)}
    return Manifest(
        name=job.name,
        source_sha256=job.sha256,
        source_bytes=job.gguf.stat().st_size,
        architecture=header.architecture,
        context_length=header.context_length,
        chat_template=header.chat_template,
        eos_token_ids=sorted(header.eos_token_ids),
        bos_token=header.bos_token,
        eos_token=header.eos_token,
        fingerprint=combine(
            ["converted gguf 1", job.sha256, versions[_CONVERTER], header.chat_template or ""]
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
