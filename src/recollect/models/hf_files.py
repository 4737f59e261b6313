"""
Reads the small files that Hugging Face's tools put beside weights, whatever the weights' format is.

Knows what is in them; not what a model needs of it.
"""

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from recollect import files
from recollect.errors import UnsupportedModelError

_log = logging.getLogger(__name__)

MOST_TEXT_BYTES: Final = 16 * files.MIB
"""Of a settings file. The largest known, with a vocabulary's added tokens, has 1.2 MB."""
MOST_TOKENIZER_BYTES: Final = 256 * files.MIB
"""Of a tokenizer.json. The largest known, of 262,144 tokens, has 33 MB."""


def read_text(path: Path, *, most_bytes: int = MOST_TEXT_BYTES) -> str:
    """
    Return the content of a text file in a model's folder.

    Raises:
        UnsupportedModelError: It cannot be read, is too large, or lies outside the folder.
    """
    try:
        files.inside(path.parent, path.name)
        return files.read_text(path, most_bytes=most_bytes)
    except UnicodeDecodeError as cause:
        raise UnsupportedModelError(
            f"{path} cannot be read (it is not UTF-8 text): export the model again."
        ) from cause
    except OSError as cause:
        raise UnsupportedModelError(
            f"{path} cannot be read ({cause.strerror or cause}): export the model again."
        ) from cause


def read_json(path: Path, *, most_bytes: int = MOST_TEXT_BYTES) -> Mapping[str, Any]:
    """
    Return the object in a JSON file; empty where there is no file, or no object in it.

    Raises:
        UnsupportedModelError: It cannot be read, or is not JSON.
    """
    if not path.exists() and not path.is_symlink():
        return {}
    try:
        content: Any = json.loads(read_text(path, most_bytes=most_bytes))
    except (ValueError, RecursionError) as cause:  # ValueError: also a number of 5,000 digits
        raise UnsupportedModelError(f"{path} is not valid JSON: export the model again.") from cause
    return content if isinstance(content, dict) else {}


def warn_of_writers(folder: Path, names: Iterable[str]) -> None:
    """Say in one line who else may change the folder or one of its files, if anybody may."""
    for path in (folder, *(folder / name for name in names)):
        who = files.others_may_write(path) if path.exists() else None
        if who is not None:
            _log.warning(
                "%s can be changed by others (%s): they can change what the model says, or read "
                "into it; keep models in a folder of your own.",
                path,
                who,
            )
            return


def chat_template(folder: Path) -> str | None:
    """Return the chat template from whichever of three files holds it, or None."""
    file = folder / "chat_template.jinja"
    if file.exists() or file.is_symlink():
        return read_text(file)
    for name in ("tokenizer_config.json", "chat_template.json"):
        template = _default_template(read_json(folder / name).get("chat_template"))
        if template:
            return template
    return None


def special_token(tokenizer_config: Mapping[str, Any], name: str) -> str | None:
    """Return the text of `bos_token` or `eos_token` in a tokenizer_config.json, or None."""
    found = tokenizer_config.get(name)
    if isinstance(found, dict):
        found = found.get("content")
    return found if isinstance(found, str) else None


_MOST_IDS_TEXT: Final = 4096  # some hundred ids; models have up to ten ends
_MOST_DIGITS: Final = 10  # of an id
MOST_ID: Final = 2**31 - 1
"""Token ids are kept as int32."""


def as_ids(value: object) -> list[int]:
    """Return the ids in a number, a list, or the text of either, as runtime info has it."""
    if isinstance(value, str):
        parts = value[:_MOST_IDS_TEXT].replace(",", " ").split()
        value = [int(part) for part in parts if is_id(part)]
    items = value if isinstance(value, list) else [value]
    return [item for item in items if type(item) is int and 0 <= item <= MOST_ID]


def is_id(text: str) -> bool:
    """Return whether a text is a token id in digits."""
    return text.isdecimal() and len(text) <= _MOST_DIGITS and int(text) <= MOST_ID


def _default_template(found: object) -> str | None:
    """Return the template, or of several named ones the default."""
    if isinstance(found, list):
        found = next(
            (
                item.get("template")
                for item in found
                if isinstance(item, dict) and item.get("name") == "default"
            ),
            None,
        )
    return found if isinstance(found, str) else None
