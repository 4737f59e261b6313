"""
Turns a model into a folder that can be loaded: a GGUF file into OpenVINO's format, once, and a GGUF
file or a Hugging Face folder into ONNX Runtime GenAI's.

The work is done by child processes, because a damaged file can crash a library, and because the
memory is given back. Each fills a folder beside its target, which is published by one rename: a
half-made folder is never seen, and two processes may convert the same model at once. Does not know
where a model came from, and does not load it.
"""

import errno
import itertools
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Final, Literal

from recollect.errors import ConfigError, UnsupportedModelError
from recollect.files import combine, scratch_folder
from recollect.models.fetch import run_program
from recollect.models.gguf import GgufHeader, read_header
from recollect.models.gguf_decoder import require_buildable
from recollect.models.gguf_weights import parts_of
from recollect.models.onnx_config import CONFIG_NAME
from recollect.models.onnx_folder import is_onnx_folder
from recollect.models.openvino_folder import MODEL_FILES, TOKENIZER_FILES, Manifest, warn_of_writers
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

    def on_line(line: str) -> None:
        done, _, total = line.strip().partition(" ")
        if done.isdecimal() and total.isdecimal():  # a library may print, too
            on_bytes(int(done), int(total))

    status, complaints = run_program(command, on_line)
    lines = complaints.strip().splitlines()
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


Precision = Literal["int8", "fp32"]
"""Four bits are not offered: they would be taken of weights that had been cut to four bits before."""

LIBRARIES: Final = ("torch", "transformers", "accelerate", "onnx_ir", "onnxruntime_genai")
_OFFLINE: Final = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}

_NO_CODE: Final = ("--extra_options", "hf_remote=false")
"""A folder's own Python does not run: said here, and not left to what a release takes for granted."""


_WRITE_FLOATS: Final = f"from {__name__} import write_floats; write_floats()"
"""A program for a process of its own, which gives the memory back: all weights are f32 in it."""


def convert_to_onnx(
    source: Path,
    folder: Path,
    *,
    precision: Precision = "int8",
    progress: Progress = no_progress,
) -> None:
    """
    Make *folder* a folder for ONNX Runtime GenAI on the CPU.

    Args:
        source: A GGUF file, or a folder as transformers' `save_pretrained` writes it.
        folder: Is made; must not be there, or be empty.
        precision: Of the weights. Activations and KV are f32 in both.

    Raises:
        ConfigError: There is something at *folder* already, or it cannot be written there.
        UnsupportedModelError: A library is missing, or the model cannot be converted.
    """
    require_convertible(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as scratch:
            made = _convert(source, Path(scratch), precision, progress)
            if folder.exists():
                folder.rmdir()
            made.rename(folder)
    except OSError as cause:
        raise ConfigError(
            f"{folder} cannot be written ({cause.strerror or cause}): name another place, with room "
            "for five times the model."
        ) from cause
    progress("writing ONNX", 2, 2)


def require_convertible(folder: Path) -> None:
    """
    Check, before anything is fetched, that a folder can be made of a model.

    Raises:
        ConfigError: There is something at *folder* already, or something above it is no folder.
        UnsupportedModelError: A library is missing.
    """
    missing = [name for name in LIBRARIES if find_spec(name) is None]
    if missing:
        raise UnsupportedModelError(
            f'Converting needs {", ".join(missing)}: pip install "recollect-llm[convert,genai]".'
        )
    above = next(way for way in folder.absolute().parents if way.exists())
    if not above.is_dir():
        raise ConfigError(f"{folder} cannot be made, because {above} is no folder: name another.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is there already: name a folder that is not, or remove it.")


def _convert(source: Path, scratch: Path, precision: Precision, progress: Progress) -> Path:
    """Return the finished folder inside *scratch*."""
    original = source
    if source.is_file():
        header = read_header(source)
        progress("writing ONNX", 0, 2)
        original = scratch / "original"
        ids = [str(number) for number in sorted(header.eos_token_ids)]
        _run(["-c", _WRITE_FLOATS, str(source), str(original), *ids], source)
    elif not (source / "config.json").is_file() or is_onnx_folder(source):
        raise UnsupportedModelError(
            f"{source} is no Hugging Face folder with float weights: give one, or a .gguf file."
        )
    progress("writing ONNX", 1, 2)
    made = scratch / "model"
    builder = ["-m", "onnxruntime_genai.models.builder", "-i", str(original), "-o", str(made)]
    options = ["-p", precision, "-e", "cpu", "-c", str(scratch / "cache")]
    _run([*builder, *options, *_NO_CODE], source)
    if not (made / CONFIG_NAME).is_file():
        raise _failed(source, f"no {CONFIG_NAME} was written")
    return made


def _run(arguments: list[str], source: Path) -> None:
    """Run a program of Python's without a network; say with its last line why it failed."""
    done = subprocess.run(  # noqa: S603 - our own interpreter
        [sys.executable, "-P", *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        check=False,
        env={**os.environ, **_OFFLINE},
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"]
        raise _failed(source, lines[-1].strip().rstrip("."))


def _failed(source: Path, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{source} could not be converted ({reason}): the model's architecture or tensor types may "
        "be unknown to transformers or to ONNX Runtime GenAI's builder; try the original model."
    )


def write_floats() -> None:
    """
    Write the GGUF file in `sys.argv[1]` as a Hugging Face folder with float weights.

    Its place is in `sys.argv[2]`; the ids of tokens that end a reply follow.
    """
    import torch  # noqa: PLC0415 - seconds, which only this program is to wait for
    import transformers  # noqa: PLC0415

    gguf, folder = Path(sys.argv[1]), Path(sys.argv[2])
    eos_token_ids = [int(number) for number in sys.argv[3:]]
    options = {"gguf_file": gguf.name, "dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):  # newer releases would keep the blocks as they are
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, **options)
    # The weights are plain numbers now; what says otherwise would keep them from being saved.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.architectures = [type(model).__name__]
    if eos_token_ids:  # a GGUF file names one; a chat can also end with another
        model.generation_config.eos_token_id = eos_token_ids
    model.save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(folder)
