"""
Opens a folder that holds a model for ONNX Runtime GenAI: one with a genai_config.json.

Reads the small files beside the weights. Does not load the model, and does not convert anything.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from recollect import files
from recollect.errors import UnsupportedModelError
from recollect.files import cached_sha256, combine
from recollect.models import onnx_config
from recollect.models.local import LocalModel
from recollect.models.onnx_config import CONFIG_NAME, MOST_CONFIG_BYTES
from recollect.models.onnx_graph import require_own_files
from recollect.text.other_tokenizers import (
    MOST_TOKENIZER_BYTES,
    TOKENIZER_NAME,
    as_ids,
    chat_template,
    read_json,
    read_text,
    special_token,
    warn_of_writers,
)
from recollect.types import Progress, no_progress

_MOST_FILES: Final = 10_000
"""In a folder: it has ten or so, and AMD's have a few hundred compiled parts."""


def is_onnx_folder(folder: Path) -> bool:
    """Return whether *folder* holds a model for ONNX Runtime GenAI."""
    return (folder / CONFIG_NAME).is_file()


def open_onnx_folder(
    folder: Path,
    *,
    name: str,
    home: Path,
    allow_native_code: str | None = None,
    progress: Progress = no_progress,
) -> LocalModel:
    """
    Return the model in *folder*.

    Args:
        allow_native_code: As `onnx_config.check` takes it.

    Raises:
        UnsupportedModelError: A file is missing, does not say what is needed, or asks for what no
            model needs: native code that was not allowed, files elsewhere.
    """
    path = folder / CONFIG_NAME
    whole = onnx_config.parse(read_text(path, most_bytes=MOST_CONFIG_BYTES), path)
    config = _table(whole.get("model"))
    decoder = _table(config.get("decoder"))
    context_length = config.get("context_length")
    if not isinstance(context_length, int) or context_length < 1 or not decoder:
        raise UnsupportedModelError(
            f"{folder / CONFIG_NAME} describes no language model (it names no decoder and context "
            "length): convert the model again, with `recollect convert MODEL --to onnx-genai OUT`."
        )
    if not (folder / TOKENIZER_NAME).is_file():
        raise UnsupportedModelError(
            f"{folder} holds no {TOKENIZER_NAME}: save the model's fast tokenizer there, with "
            "transformers' `AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER)`."
        )
    checked = onnx_config.check(whole, folder, allow_native_code=allow_native_code)
    for file_name in checked.file_names:
        if onnx_config.is_graph(file_name):
            require_own_files(files.inside(folder, file_name), folder)
    warn_of_writers(folder, (CONFIG_NAME, *checked.file_names))
    tokenizer_config = read_json(folder / "tokenizer_config.json")
    added = dict(_added_tokens(folder))
    eos = as_ids(config.get("eos_token_id"))
    return LocalModel(
        name=name,
        format="onnx-genai",
        folder=folder,
        context_length=context_length,
        chat_template=chat_template(folder),
        eos_token_ids=frozenset(eos),
        bos_token=special_token(tokenizer_config, "bos_token")
        or _first(as_ids(config.get("bos_token_id")), added),
        eos_token=special_token(tokenizer_config, "eos_token") or _first(eos, added),
        fingerprint=_fingerprint(folder, home, progress),
        search_defaults=_table(whole.get("search")),
        architecture=str(config.get("type", "")) or None,
        onnx_config=checked.content,
        native_library=checked.native_library,
    )


def _fingerprint(folder: Path, home: Path, progress: Progress) -> str:
    """Return a hash of all files: which of them a graph reads its weights from is its own business."""
    parts = ["onnx genai folder 1"]
    for path in sorted(_visible(folder)):
        file = folder / path
        if file.suffix != ".md" and (file.is_symlink() or file.is_file()):
            try:
                real = files.inside(folder, path.as_posix())
            except OSError as cause:
                raise UnsupportedModelError(
                    f"{file} cannot be taken ({cause.strerror or cause}): copy what it links to into "
                    "the folder, or remove it."
                ) from cause
            parts += [path.as_posix(), cached_sha256(real, home=home, progress=progress)]
    return combine(parts)


def _visible(folder: Path) -> list[Path]:
    """Return what is in the folder and below, relative to it, but for hidden names."""
    found = []
    for number, file in enumerate(folder.rglob("*"), 1):
        if number > _MOST_FILES:
            raise UnsupportedModelError(
                f"{folder} holds more than {_MOST_FILES:,} files: give a folder that holds the model "
                "alone."
            )
        path = file.relative_to(folder)
        if not any(part.startswith(".") for part in path.parts):
            found.append(path)
    return found


def _added_tokens(folder: Path) -> Iterator[tuple[int, str]]:
    added = read_json(folder / TOKENIZER_NAME, most_bytes=MOST_TOKENIZER_BYTES).get("added_tokens")
    for token in added if isinstance(added, list) else ():
        number, content = _table(token).get("id"), _table(token).get("content")
        if isinstance(number, int) and isinstance(content, str):
            yield number, content


def _first(ids: list[int], texts: Mapping[int, str]) -> str | None:
    """Return the text of the first of the ids that has one."""
    return next((texts[number] for number in ids if number in texts), None)


def _table(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
