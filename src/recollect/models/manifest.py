"""
The note that lies in a folder which recollect converted, with all that is needed to use it again.

Reads and writes one JSON file. Does not know how a model is converted, or when it has to be anew.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Self

from recollect import files

MANIFEST_NAME: Final = "recollect.json"
FORMAT_VERSION: Final = 3
_INEXACT_VERSION: Final = 2
"""
Of folders whose weights OpenVINO GenAI's reader rounded, and whose RoPE it left unscaled. Such a
folder runs as it did where the file cannot be fetched again; its fields are the same.
"""
_MOST_BYTES: Final = 4 * files.MIB
"""A hundred times what is written; the chat template is most of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What was known of a model when it was converted."""

    name: str
    """What the model was called when it was converted."""
    source_sha256: str
    source_bytes: int
    architecture: str
    context_length: int
    chat_template: str | None
    eos_token_ids: list[int]
    bos_token: str | None
    eos_token: str | None
    fingerprint: str
    library_versions: dict[str, str]
    """Package to version, of those that wrote the folder."""
    file_bytes: dict[str, int]
    """File name to size: a quick look shows whether the folder is still whole."""
    window: int | None = None
    """How many tokens its layers with a window see; None: it has none, or a version did not note it."""
    format_version: int = FORMAT_VERSION

    @property
    def is_exact(self) -> bool:
        """Return whether the folder's weights have the values of the file that they came from."""
        return self.format_version == FORMAT_VERSION

    def write(self, folder: Path) -> None:
        """Write the note into *folder*."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        (folder / MANIFEST_NAME).write_text(text + "\n", "utf-8")

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Return the note in *folder*, or None where there is none that can be understood."""
        try:
            path = files.inside(folder, MANIFEST_NAME)
            fields: Any = json.loads(files.read_text(path, most_bytes=_MOST_BYTES))
        except (OSError, ValueError, RecursionError):
            return None
        known = (FORMAT_VERSION, _INEXACT_VERSION)
        if not isinstance(fields, dict) or fields.get("format_version") not in known:
            return None
        try:
            return cls(**fields) if _is_sound(fields) else None
        except TypeError:  # a field too many or too few
            return None


_MOST_NUMBER: Final = 2**31 - 1  # positions and token ids are kept as int32
_TEXTS: Final = ("name", "source_sha256", "architecture", "fingerprint")
_NUMBERS: Final = ("source_bytes", "context_length")
_TABLES: Final = ("library_versions", "file_bytes")
_OPTIONAL: Final = ("chat_template", "bos_token", "eos_token")


def _is_sound(fields: dict[str, Any]) -> bool:
    """Return whether the fields hold what their types say: the file can have been edited."""
    ends = fields.get("eos_token_ids")
    return (
        all(isinstance(fields.get(name), str) for name in _TEXTS)
        and all(_is_number(fields.get(name)) for name in _NUMBERS)
        and 1 <= fields["context_length"] <= _MOST_NUMBER
        and all(isinstance(fields.get(name), str | None) for name in _OPTIONAL)
        and all(isinstance(fields.get(name), dict) for name in _TABLES)
        and (fields.get("window") is None or _is_number(fields["window"]))
        and isinstance(ends, list)
        and all(_is_number(token_id) and token_id <= _MOST_NUMBER for token_id in ends)
    )


def _is_number(value: object) -> bool:
    return type(value) is int and value >= 0
