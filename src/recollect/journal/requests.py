"""
What a server notes about its requests, and what `recollect explain` tells from that.

`RequestLog` keeps a line about each reply: counts, and where its prompt parts from earlier ones.
`explain` groups the lines by client and by that place.
"""

import base64
import json
import os
import re
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, get_args

from recollect import config, encryption
from recollect.encryption import Cipher
from recollect.errors import InvalidParameterError, StoreCorruptError
from recollect.files import read_bytes
from recollect.types import Reason, Usage

_PURPOSE: Final = "requests"
MOST_LOG_BYTES: Final = 4 << 20
"""Of lines about requests, 300 bytes each: the last 6,000 to 13,000."""
_WORDS: Final = ("was", "now", "difference")
"""What of a line may hold words of a prompt."""
MOST_WAITING: Final = 10_000
"""Lines that wait for a disk; what comes then is left out."""
_REASONS: Final = tuple(get_args(Reason))
_NO_COUNT: Final = 2**53
"""More than any count, and still a number that all readers of JSON agree about."""


class Parting(Protocol):
    """Where messages leave an earlier conversation, which is a `Change`."""

    @property
    def message(self) -> int:
        """Return which message, counted from 0."""

    @property
    def role(self) -> str:
        """Return whose it is."""

    @property
    def line(self) -> int:
        """Return which line of it, counted from 1."""

    @property
    def was(self) -> str:
        """Return the earlier text from there on, shortened."""

    @property
    def is_now(self) -> str:
        """Return the same of the new text."""


class RequestLog:
    """
    A file with a line about each reply of a server: counts, and where its prompt parts from earlier ones.

    Written behind, on a thread of its own; safe from any. In an encrypted folder each line is sealed.
    """

    def __init__(self, home: Path, cipher: Cipher | None, *, keeps_words: bool = True) -> None:
        """
        Write nothing yet.

        Args:
            home: The data folder.
            cipher: Of an encrypted one.
            keeps_words: Whether the first words that differ are kept; else only where they are.
        """
        self._path = home / config.REQUESTS_NAME
        self._cipher = None if cipher is None else cipher.for_purpose(_PURPOSE)
        self._keeps_words = keeps_words
        self._lock = threading.Lock()
        self._lines: list[bytes] = []
        self._writer: threading.Thread | None = None

    def note(self, model: str, client: str, usage: Usage, change: Parting | None) -> None:
        """Take note of a reply; returns at once."""
        line: dict[str, Any] = {
            "at": int(time.time()),
            "client": client,
            "model": model,
            "prompt": usage.prompt_tokens,
            "computed": usage.computed_tokens,
            "lost": usage.lost_tokens,
            "reason": usage.reason,
            "difference": usage.difference,
        }
        if change is not None and usage.reason in ("system_changed", "message_changed"):
            line |= {"message": change.message, "role": change.role, "line": change.line}
            line |= {"was": change.was, "now": change.is_now}
        if not self._keeps_words:
            line = {name: value for name, value in line.items() if name not in _WORDS}
        data = json.dumps(line).encode()
        if self._cipher is not None:
            data = base64.b64encode(self._cipher.seal(data, context=b"request"))
        with self._lock:
            if len(self._lines) < MOST_WAITING:
                self._lines.append(data)
            if self._writer is None:
                self._writer = threading.Thread(
                    target=self._write, name="recollect-log", daemon=True
                )
                self._writer.start()

    def close(self) -> None:
        """Write what is left."""
        with self._lock:
            writer = self._writer
        if writer is not None:
            writer.join()

    def _write(self) -> None:
        while True:
            with self._lock:
                lines, self._lines = self._lines, []
                if not lines:
                    self._writer = None
                    return
            with suppress(OSError):  # a full disk is no reason to refuse requests
                self._append(b"".join(line + b"\n" for line in lines))

    def _append(self, data: bytes) -> None:
        """Append to the file, and leave the older half of it out where it is full."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        with os.fdopen(os.open(self._path, flags, 0o600), "ab") as file:
            file.write(data)
            size = file.tell()
        if size > MOST_LOG_BYTES:
            kept = read_bytes(self._path, most_bytes=4 * MOST_LOG_BYTES)[-MOST_LOG_BYTES // 2 :]
            fresh = self._path.with_name(f"{self._path.name}.new-{uuid.uuid4().hex}")
            with os.fdopen(os.open(fresh, flags | os.O_EXCL, 0o600), "wb") as file:
                file.write(kept.partition(b"\n")[2])
            fresh.replace(self._path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Why a client's prompts were read again, at one place."""

    reason: Reason
    place: str
    """Where they part from earlier ones, in words; empty where the reason says it."""
    times: int
    computed_tokens: int
    """In all of these requests, new tokens among them."""
    lost_tokens: int
    """Of those, what the difference cost: tokens that had been read before, as `Usage.lost_tokens`."""
    example: str | None
    """The first words that differ, of the last of these requests; None where they are not kept."""
    advice: str

    def __str__(self) -> str:
        lost = f"{self.lost_tokens // self.times:,}"
        cost = f"{lost} tokens read again in each of {self.times:,} requests"
        if self.times == 1:
            cost = f"{lost} tokens read again, once"
        where = self.place or self.reason.replace("_", " ")
        example = "" if self.example is None else f" ({self.example})"
        return f"{where}{example}: {cost}. {self.advice}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What the requests of one client have cost, and why not less."""

    client: str
    requests: int
    prompt_tokens: int
    computed_tokens: int
    lost_tokens: int
    """Of those, what had been read before."""
    findings: tuple[Finding, ...]
    """The dearest first."""


_ADVICE: Final[Mapping[str, str]] = {
    "system_changed": "Put what changes at the end of the instructions, or into a message.",
    "message_changed": "Leave what was said as it was, and say what is new at the end.",
    "tools_changed": "Offer the same tools, in the same order and words.",
    "template_rewrote": "The model's template shows its replies otherwise afterwards: nothing to change "
    "in the client.",
    "other_model": "Stay with one model in a conversation.",
    "evicted": "Give more room: --kv-memory, or --kv-disk.",
    "moved": "Route by x-session-id, and add replicas while few conversations are open.",
}
_DATE: Final = re.compile(
    r"\d{1,4}[-/.:]\d{1,2}|\b(?:mon|tues|wednes|thurs|fri|satur|sun)day\b|"
    r"\b(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\b",
    re.IGNORECASE,
)


def explain(
    client: str | None = None,
    last: int | None = None,
    *,
    home: str | os.PathLike[str] | None = None,
    cipher: Cipher | None = None,
) -> list[Explanation]:
    """
    Return for each client of `recollect serve` where its prompts part from earlier ones, and the cost.

    Args:
        client: Only of clients whose name has this in it, whatever its case; None: of all.
        last: Only of so many requests, the latest; None: of all that are known.
        home: The data folder; None: `RECOLLECT_HOME` or the user's.
        cipher: Of an encrypted one; None: that of its keyring, or of `RECOLLECT_PASSPHRASE`.

    Raises:
        InvalidParameterError: *last* is below 1.
        ConfigError: The folder is encrypted with another key, or cannot be read.
    """
    if last is not None and last < 1:
        raise InvalidParameterError(f"last is {last}: give 1 or more.")
    home = config.data_folder(home)
    cipher = encryption.unlock(home) if cipher is None else cipher
    lines = [
        line
        for line in _read(home / config.REQUESTS_NAME, cipher)
        if client is None or client.lower() in line["client"].lower()
    ]
    by_client = defaultdict[str, list[dict[str, Any]]](list)
    for line in lines[-last:] if last is not None else lines:
        by_client[_printable(line["client"]) or "no name"].append(line)
    found = [_explained(name, lines) for name, lines in by_client.items()]
    return sorted(found, key=lambda one: (-one.lost_tokens, -one.computed_tokens))


def _read(path: Path, cipher: Cipher | None) -> Iterator[dict[str, Any]]:
    """Yield the lines of a log, the oldest first; what is none, or does not open, is left out."""
    try:
        data = read_bytes(path, most_bytes=4 * MOST_LOG_BYTES)
    except OSError:
        return
    sealer = None if cipher is None else cipher.for_purpose(_PURPOSE)
    for sealed in data.splitlines():
        with suppress(ValueError, RecursionError, StoreCorruptError):
            plain = sealed
            if sealer is not None:
                plain = sealer.open(base64.b64decode(sealed), context=b"request")
            line = json.loads(plain)
            if _is_a_line(line):
                # Lines of earlier versions lack what was lost: all that was computed, at the most.
                yield {"lost": 0 if line["reason"] == "new" else line["computed"], **line}


def _is_a_line(line: Any) -> bool:
    """Return whether a value is what `RequestLog` writes."""
    return (
        isinstance(line, dict)
        and isinstance(line.get("client"), str)
        and line.get("reason") in _REASONS
        and all(_is_count(line.get(name)) for name in ("prompt", "computed"))
        and all(_is_count(line[name]) for name in ("message", "line", "lost") if name in line)
        and all(isinstance(line[name], str) for name in ("role", "was", "now") if name in line)
        and isinstance(line.get("difference"), str | None)
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _NO_COUNT


def _printable(text: str) -> str:
    """Return a client's text as a terminal can be given it: a terminal obeys control characters."""
    return "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text
    )


def _explained(client: str, lines: Sequence[Mapping[str, Any]]) -> Explanation:
    groups = defaultdict[tuple[Any, ...], list[Mapping[str, Any]]](list)
    for line in lines:
        if line["reason"] != "new":
            place = line.get("role"), line.get("message"), line.get("line")
            groups[
                line["reason"], *(place if line["reason"] == "system_changed" else place[:1])
            ].append(line)
    findings = [_finding(group) for group in groups.values()]
    return Explanation(
        client=client,
        requests=len(lines),
        prompt_tokens=sum(line["prompt"] for line in lines),
        computed_tokens=sum(line["computed"] for line in lines),
        lost_tokens=sum(line["lost"] for line in lines),
        findings=tuple(sorted(findings, key=lambda one: -one.lost_tokens)),
    )


def _finding(lines: Sequence[Mapping[str, Any]]) -> Finding:
    """Return what requests have in common that part from earlier ones for one reason at one place."""
    line = lines[-1]
    words = [line[name] for name in ("was", "now") if name in line]
    place = ""
    if line["reason"] == "system_changed":
        is_date = len(words) == 2 and all(_DATE.search(text[:24]) for text in words)
        place = f"Line {line.get('line', 1)} of the instructions " + (
            "is a date or a time" if is_date else "changes"
        )
    elif line["reason"] == "message_changed":
        role, number = _printable(line.get("role", "user")), line.get("message", 0) + 1
        place = f"A message of the {role} changes, number {number}"
    example = f"{words[0][:30]!r} became {words[1][:30]!r}" if len(words) == 2 else None
    return Finding(
        reason=line["reason"],
        place=place,
        times=len(lines),
        computed_tokens=sum(one["computed"] for one in lines),
        lost_tokens=sum(one["lost"] for one in lines),
        example=example
        if place or line.get("difference") is None
        else _printable(line["difference"]),
        advice=_ADVICE.get(line["reason"], ""),
    )
