"""
Opens a folder that holds a model for ONNX Runtime GenAI: one with a genai_config.json.

Reads the small files beside the weights. Does not load the model, and does not convert anything.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from recollect.errors import UnsupportedModelError
from recollect.models.fingerprint import cached_sha256, combine
from recollect.models.hf_files import as_ids, chat_template, read_json, special_token
from recollect.models.local import LocalModel
from recollect.types import Progress, no_progress

CONFIG_NAME: Final = "genai_config.json"
TOKENIZER_NAME: Final = "tokenizer.json"


def is_onnx_folder(folder: Path) -> bool:
    """Return whether *folder* holds a model for ONNX Runtime GenAI."""
    return (folder / CONFIG_NAME).is_file()


def open_onnx_folder(
    folder: Path, *, name: str, home: Path, progress: Progress = no_progress
) -> LocalModel:
    """
    Return the model in *folder*.

    Raises:
        UnsupportedModelError: A file is missing, or does not say what is needed.
    """
    whole = read_json(folder / CONFIG_NAME)
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
    _require_weights(folder, decoder)
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
    )


def _require_weights(folder: Path, decoder: Mapping[str, Any]) -> None:
    """Check that the file which the config names is there; a pipeline names its files elsewhere."""
    filename = decoder.get("filename")
    if isinstance(filename, str) and filename and not (folder / filename).is_file():
        raise UnsupportedModelError(
            f"{folder} holds no {filename}, which its {CONFIG_NAME} names: get the whole folder."
        )


def _fingerprint(folder: Path, home: Path, progress: Progress) -> str:
    """Return a hash of all files: which of them a graph reads its weights from is its own business."""
    parts = ["onnx genai folder 1"]
    for file in sorted(folder.rglob("*")):
        path = file.relative_to(folder)
        is_hidden = any(part.startswith(".") for part in path.parts)
        if file.is_file() and not is_hidden and file.suffix != ".md":
            parts += [path.as_posix(), cached_sha256(file, home=home, progress=progress)]
    return combine(parts)


def _added_tokens(folder: Path) -> Iterator[tuple[int, str]]:
    added = read_json(folder / TOKENIZER_NAME).get("added_tokens")
    for token in added if isinstance(added, list) else ():
        number, content = _table(token).get("id"), _table(token).get("content")
        if isinstance(number, int) and isinstance(content, str):
            yield number, content


def _first(ids: list[int], texts: Mapping[int, str]) -> str | None:
    """Return the text of the first of the ids that has one."""
    return next((texts[number] for number in ids if number in texts), None)


def _table(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
