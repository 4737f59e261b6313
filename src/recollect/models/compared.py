"""
What came of comparing a model with its file, as a note in the data folder.

One small JSON file for each model and profile, written by `recollect verify`, and shown by
`recollect models`. Loads no model.
"""

import json
import math
import re
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Self

from recollect import files
from recollect.models.openvino_folder import model_files
from recollect.types import Profile

_COMPARED_FOLDER: Final = "compared"
_NOT_IN_A_NAME: Final = re.compile(r"[^\w.-]+")
_MOST_BYTES: Final = 1 << 16
"""A hundred times what is written."""
_MOST_NOTES: Final = 256
"""Three for each of 85 models; older ones are deleted, which costs a line in `recollect models`."""
_STRICTEST_FIRST: Final[tuple[Profile, ...]] = ("exact", "fast", "small")

Stamps = dict[str, list[int]]
"""By name of a file with graph or weights, its size in bytes and the nanosecond of its last change."""


def stamps_of(folder: Path) -> Stamps:
    """
    Return what would show that a model's graph or weights are no longer the same bytes.

    Bytes that change under the same size and time, as a failing disk does it, are not seen.
    """
    stats = ((name, (folder / name).stat()) for name in model_files(folder))
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats}


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """What came of comparing a model with its file in one profile, and when."""

    outcome: str
    """PASS or FAIL."""
    profile: Profile
    largest: float | None
    """Difference of a logit; None: it was no finite number."""
    files: Stamps
    """Of the bytes that were loaded."""
    reason: str = ""
    at: str = ""
    """ISO 8601, UTC."""

    def write(self, home: Path, fingerprint: str) -> None:
        """
        Note this for the model of that fingerprint, in place of what was noted of it in this profile.

        Raises:
            OSError: It cannot be written.
        """
        folder = home / _COMPARED_FOLDER
        files.make_private(folder, home)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        temporary = (path := _note_path(home, fingerprint, self.profile)).with_suffix(".new")
        temporary.write_text(json.dumps(asdict(self) | {"at": now}) + "\n", encoding="utf-8")
        temporary.replace(path)
        for note in sorted(folder.iterdir(), key=lambda one: one.stat().st_mtime_ns)[:-_MOST_NOTES]:
            note.unlink(missing_ok=True)

    @classmethod
    def read(cls, home: Path, fingerprint: str, folder: Path) -> Self | None:
        """
        Return the note of the strictest profile; None where there is none.

        A note that cannot be understood, or is of other bytes than those in the model's *folder* now,
        counts as none.
        """
        for profile in _STRICTEST_FIRST:
            try:
                text = files.read_text(
                    _note_path(home, fingerprint, profile), most_bytes=_MOST_BYTES
                )
                said: Any = json.loads(text)
                datetime.fromisoformat(said["at"])
                is_known = said["outcome"] in ("PASS", "FAIL") and said["profile"] == profile
                largest = said["largest"]
                is_number = isinstance(largest, float) and math.isfinite(largest)
                is_plain = isinstance(said["reason"], str) and (largest is None or is_number)
                if is_known and is_plain and said["files"] == stamps_of(folder):
                    return cls(**said)
            except (OSError, ValueError, TypeError, KeyError, RecursionError):
                continue
        return None


def _note_path(home: Path, fingerprint: str, profile: Profile) -> Path:
    return home / _COMPARED_FOLDER / f"{_NOT_IN_A_NAME.sub('--', fingerprint)}-{profile}.json"
