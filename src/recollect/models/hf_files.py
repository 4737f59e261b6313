"""
Reads the small files that Hugging Face's tools put beside weights, whatever the weights' format is.

Knows what is in them; not what a model needs of it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recollect.errors import UnsupportedModelError


def read_text(path: Path) -> str:
    """
    Return the content of a text file.

    Raises:
        UnsupportedModelError: It cannot be read.
    """
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as cause:
        raise UnsupportedModelError(f"{path} cannot be read: export the model again.") from cause


def read_json(path: Path) -> Mapping[str, Any]:
    """
    Return the object in a JSON file; empty where there is no file, or no object in it.

    Raises:
        UnsupportedModelError: It cannot be read, or is not JSON.
    """
    if not path.is_file():
        return {}
    try:
        content: Any = json.loads(read_text(path))
    except json.JSONDecodeError as cause:
        raise UnsupportedModelError(f"{path} is not valid JSON: export the model again.") from cause
    return content if isinstance(content, dict) else {}


def chat_template(folder: Path) -> str | None:
    """Return the chat template from whichever of three files holds it, or None."""
    file = folder / "chat_template.jinja"
    if file.is_file():
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


def as_ids(value: object) -> list[int]:
    """Return the ids in a number, a list, or the text of either, as runtime info has it."""
    if isinstance(value, str):
        value = [int(part) for part in value.replace(",", " ").split() if part.isdecimal()]
    if isinstance(value, int) and not isinstance(value, bool):
        return [value]
    return [item for item in value if isinstance(item, int)] if isinstance(value, list) else []


def _default_template(found: object) -> str | None:
    """Return the template, or of several named ones the default."""
    if isinstance(found, list):
        named = {item.get("name"): item.get("template") for item in found if isinstance(item, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None
