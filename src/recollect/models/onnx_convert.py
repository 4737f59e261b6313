"""
Turns a GGUF file or a Hugging Face folder into a folder for ONNX Runtime GenAI, without a network.

The work is done in child processes and in a folder beside the target, which is published by one
rename. Does not know where the model came from.
"""

import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Final, Literal

from recollect.errors import ConfigError, UnsupportedModelError
from recollect.models.gguf_file import read_header
from recollect.models.onnx_config import CONFIG_NAME
from recollect.models.onnx_folder import is_onnx_folder
from recollect.types import Progress, no_progress

Precision = Literal["int8", "fp32"]
"""Four bits are not offered: they would be taken of weights that had been cut to four bits before."""

_LIBRARIES: Final = ("torch", "transformers", "accelerate", "onnx_ir", "onnxruntime_genai")
_OFFLINE: Final = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}

_NO_CODE: Final = ("--extra_options", "hf_remote=false")
"""A folder's own Python does not run: said here, and not left to what a release takes for granted."""


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
    missing = [name for name in _LIBRARIES if find_spec(name) is None]
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
        _run(["recollect.models.gguf_to_hf", str(source), str(original), *ids], source)
    elif not (source / "config.json").is_file() or is_onnx_folder(source):
        raise UnsupportedModelError(
            f"{source} is no Hugging Face folder with float weights: give one, or a .gguf file."
        )
    progress("writing ONNX", 1, 2)
    made = scratch / "model"
    builder = ["onnxruntime_genai.models.builder", "-i", str(original), "-o", str(made)]
    options = ["-p", precision, "-e", "cpu", "-c", str(scratch / "cache")]
    _run([*builder, *options, *_NO_CODE], source)
    if not (made / CONFIG_NAME).is_file():
        raise _failed(source, f"no {CONFIG_NAME} was written")
    return made


def _run(module: list[str], source: Path) -> None:
    done = subprocess.run(  # noqa: S603 - our own interpreter
        [sys.executable, "-P", "-m", *module],
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
