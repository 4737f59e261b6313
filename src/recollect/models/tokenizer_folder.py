"""
Folders and files as far as an engine elsewhere needs them here: a tokenizer and a chat template.

A Hugging Face folder without weights will do: tokenizer.json, tokenizer_config.json, config.json. Of a GGUF
file the vocabulary is read, and no weight; of a model that was converted for OpenVINO, its tokenizer.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from recollect import files
from recollect.errors import UnsupportedModelError
from recollect.models.catalog import FolderSource, GgufSource, LocalModel, resolve
from recollect.models.gguf import read_header
from recollect.models.onnx_folder import is_onnx_folder
from recollect.models.openvino_folder import as_ids, chat_template, read_json, special_token
from recollect.models.prepare import prepare
from recollect.text.file_tokenizers import MOST_TOKENIZER_BYTES, TOKENIZER_NAME
from recollect.types import Progress, no_progress, recommended

_FILES: Final = (TOKENIZER_NAME, "tokenizer_config.json", "config.json", "generation_config.json")
_LENGTHS: Final = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")


def prepare_tokenizer(
    reference: str,
    *,
    home: Path,
    has_llama: Callable[[], bool],
    progress: Progress = no_progress,
    offline: bool | None = None,
) -> LocalModel:
    """
    Return what *reference* names, of which no weights are loaded.

    Args:
        reference: As `prepare` takes it, or a Hugging Face folder with a tokenizer.
        home: Where models are kept.
        has_llama: Returns whether llama.cpp is here, which reads the tokenizer of a GGUF file.
        progress: Called while a model is fetched or converted.
        offline: As `prepare` takes it.

    Raises:
        ModelError: It cannot be had or read; the subclass says why.
    """
    source = resolve(reference)
    if isinstance(source, FolderSource) and _is_plain(source.path):
        return _open_folder(source.path, home, progress)
    if isinstance(source, GgufSource) and has_llama():
        return _open_gguf(source.path, home, progress)
    return prepare(reference, home=home, progress=progress, offline=offline)


def _is_plain(folder: Path) -> bool:
    """Return whether a folder is one of Hugging Face's, which no runtime of ours loads."""
    is_ours = is_onnx_folder(folder) or (folder / "openvino_tokenizer.xml").is_file()
    return (folder / TOKENIZER_NAME).is_file() and not is_ours


def _open_folder(folder: Path, home: Path, progress: Progress) -> LocalModel:
    config = read_json(folder / "config.json")
    settings = read_json(folder / "tokenizer_config.json")
    generation = read_json(folder / "generation_config.json")
    text = config.get("text_config")
    inner: Mapping[str, Any] = text if isinstance(text, dict) else {}
    lengths = [table.get(name) for table in (config, inner) for name in _LENGTHS]
    length = next((one for one in lengths if isinstance(one, int) and one > 0), None)
    if length is None:
        raise UnsupportedModelError(
            f"{folder} has no config.json that says how long the context is: put the model's own there."
        )
    ends = as_ids(generation.get("eos_token_id")) or as_ids(
        config.get("eos_token_id", inner.get("eos_token_id"))
    )
    eos_token = special_token(settings, "eos_token")
    ends += [number for number, content in _added(folder) if content == eos_token]
    there = [name for name in (*_FILES, "chat_template.jinja") if (folder / name).is_file()]
    digests = [files.cached_sha256(folder / name, home=home, progress=progress) for name in there]
    return LocalModel(
        name=str(folder),
        format="tokenizer",
        folder=folder,
        context_length=length,
        chat_template=chat_template(folder),
        eos_token_ids=frozenset(ends),
        bos_token=special_token(settings, "bos_token"),
        eos_token=eos_token,
        fingerprint=files.combine(["tokenizer folder 1", *there, *digests]),
        sampling=recommended(generation),
        architecture=str(config.get("model_type", "")) or None,
    )


def _added(folder: Path) -> list[tuple[int, str]]:
    """Return the ids and texts of added tokens."""
    added = read_json(folder / TOKENIZER_NAME, most_bytes=MOST_TOKENIZER_BYTES).get("added_tokens")
    found = [one for one in added if isinstance(one, dict)] if isinstance(added, list) else []
    return [
        (one["id"], one["content"])
        for one in found
        if isinstance(one.get("id"), int) and isinstance(one.get("content"), str)
    ]


def _open_gguf(path: Path, home: Path, progress: Progress) -> LocalModel:
    header = read_header(path)
    sha256 = files.cached_sha256(path, home=home, progress=progress)
    return LocalModel(
        name=str(path),
        format="gguf",
        folder=path.parent,
        graph=path.name,
        context_length=header.context_length,
        chat_template=header.chat_template,
        eos_token_ids=header.eos_token_ids,
        bos_token=header.bos_token,
        eos_token=header.eos_token,
        fingerprint=files.combine([sha256, "gguf"]),
        architecture=header.architecture,
        boundaries=() if header.window is None else (header.window,),
        sampling=header.sampling,
        source=path,
        source_sha256=sha256,
    )
