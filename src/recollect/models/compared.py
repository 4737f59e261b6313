"""
What came of comparing a model with its file, noted in the home: one small JSON file for each model.

Reads and writes notes; does not know how one compares.
"""

import json
import re
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Self

from recollect import files
from recollect.files import make_private

FOLDER: Final = "compared"
_MOST_BYTES: Final = 1 << 16
"""A hundred times what is written."""
_NOT_IN_A_NAME: Final = re.compile(r"[^0-9A-Za-z_.-]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """An outcome, and when it came."""

    outcome: str
    """PASS, FAIL or NOT COMPARED."""
    profile: str
    largest: float
    """Difference of a logit."""
    reason: str = ""
    at: str = ""
    """ISO 8601, UTC."""

    def write(self, home: Path, fingerprint: str) -> None:
        """Note this for the model of that fingerprint, in place of what was noted before."""
        make_private(home / FOLDER, home)
        now = datetime.now(UTC).replace(microsecond=0).isoformat()
        path = _path(home, fingerprint)
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps(asdict(self) | {"at": now}) + "\n", encoding="utf-8")
        temporary.replace(path)

    @classmethod
    def read(cls, home: Path, fingerprint: str) -> Self | None:
        """Return what was noted of a model; None where nothing was, or nothing that can be read."""
        try:
            fields: Any = json.loads(
                files.read_text(_path(home, fingerprint), most_bytes=_MOST_BYTES)
            )
            return cls(**fields)
        except (OSError, ValueError, TypeError):
            return None


def _path(home: Path, fingerprint: str) -> Path:
    return home / FOLDER / f"{_NOT_IN_A_NAME.sub('-', fingerprint)}.json"
