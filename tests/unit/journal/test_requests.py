"""What a server notes of its requests says where clients lose, and what that costs."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from recollect.encryption import Cipher
from recollect.errors import InvalidParameterError
from recollect.journal import requests
from recollect.journal.requests import RequestLog, explain
from recollect.types import Reason, Usage


@dataclass(frozen=True)
class Parts:
    message: int = 0
    role: str = "system"
    line: int = 3
    was: str = "2026-11-26. Be brief."
    is_now: str = "2026-11-27. Be brief."


def usage(reason: Reason = "new", computed: int = 100, difference: str | None = None) -> Usage:
    """Return what a reply cost; of what was computed, 30 tokens are new."""
    return Usage(
        lost_tokens=0 if reason == "new" else max(0, computed - 30),
        prompt_tokens=1_000,
        reused_tokens=1_000 - computed,
        computed_tokens=computed,
        generated_tokens=1,
        ttft_s=0.1,
        prefill_tps=None,
        decode_tps=None,
        reason=reason,
        difference=difference,
    )


def noted(home: Path, cipher: Cipher | None = None, *, keeps_words: bool = True) -> None:
    log = RequestLog(home, cipher, keeps_words=keeps_words)
    for _ in range(4):
        log.note("m", "opencode", usage("system_changed", 800), Parts())
        log.note("m", "opencode", usage(), None)
    log.note("m", "aider", usage("tools_changed", 500, "Tools: added secret."), None)
    log.close()


def test_a_date_in_the_instructions_is_named_with_its_line_and_its_cost(tmp_path: Path) -> None:
    noted(tmp_path)
    first, second = explain(home=tmp_path)
    assert (first.client, first.requests, first.prompt_tokens) == ("opencode", 8, 8_000)
    assert first.computed_tokens == 4 * 800 + 4 * 100
    assert first.lost_tokens == 4 * 770, "what is new is no cost of the difference"
    (finding,) = first.findings
    assert (finding.reason, finding.times) == ("system_changed", 4)
    assert (finding.computed_tokens, finding.lost_tokens) == (3_200, 3_080)
    assert str(finding) == (
        "Line 3 of the instructions is a date or a time ('2026-11-26. Be brief.' became "
        "'2026-11-27. Be brief.'): 770 tokens read again in each of 4 requests. Put what changes at "
        "the end of the instructions, or into a message."
    )
    assert [one.reason for one in second.findings] == ["tools_changed"]
    assert "secret" in str(second.findings[0])


def test_a_line_without_what_was_lost_counts_what_was_computed(tmp_path: Path) -> None:
    """As earlier versions wrote them."""
    lines = [{**GOOD, "computed": 70}, {**GOOD, "computed": 9, "reason": "new"}]
    (tmp_path / "requests").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (one,) = explain(home=tmp_path)
    assert (one.computed_tokens, one.lost_tokens) == (79, 70)
    assert "70 tokens read again, once." in str(one.findings[0])


def test_lines_that_wait_for_a_slow_disk_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "MOST_WAITING", 5)
    home = tmp_path / "home"
    os.mkfifo(home_of := tmp_path / "fifo")
    home.mkdir()
    (home / "requests").symlink_to(home_of)
    log = RequestLog(home, None)
    for number in range(50):
        log.note("m", f"client {number}", usage(), None)
    with home_of.open("rb") as disk:  # by now the writer waits for a reader, with what it took
        log.close()
        os.set_blocking(disk.fileno(), False)
        written = disk.read().splitlines()
    assert 5 <= len(written) <= 10


def test_clients_are_chosen_by_name_and_requests_by_age(tmp_path: Path) -> None:
    noted(tmp_path)
    assert [one.client for one in explain("OPEN", home=tmp_path)] == ["opencode"]
    (latest,) = explain(home=tmp_path, last=1)
    assert (latest.client, latest.requests) == ("aider", 1)
    (last_two,) = explain("opencode", 2, home=tmp_path)
    assert (last_two.requests, len(last_two.findings)) == (2, 1)
    with pytest.raises(InvalidParameterError):
        explain(home=tmp_path, last=0)
    assert explain(home=tmp_path / "empty") == []


def test_without_words_counts_and_places_are_left(tmp_path: Path) -> None:
    noted(tmp_path, keeps_words=False)
    file = tmp_path / "requests"
    assert b"Be brief" not in file.read_bytes()
    assert b"secret" not in file.read_bytes()
    (finding,) = explain("opencode", home=tmp_path)[0].findings
    assert str(finding).startswith("Line 3 of the instructions changes: 770 tokens")


def test_in_an_encrypted_folder_each_line_is_sealed(tmp_path: Path) -> None:
    cipher = Cipher(bytes(32))
    noted(tmp_path, cipher)
    data = (tmp_path / "requests").read_bytes()
    assert b"opencode" not in data
    assert b"system" not in data
    assert [one.client for one in explain(home=tmp_path, cipher=cipher)] == ["opencode", "aider"]
    assert explain(home=tmp_path, cipher=Cipher(bytes([1]) * 32)) == []


@pytest.mark.slow
def test_the_file_is_bounded_and_for_its_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "MOST_LOG_BYTES", 20_000)
    log = RequestLog(tmp_path, None)
    for number in range(500):
        log.note("m", f"client {number}", usage(), None)
        log.close()
    file = tmp_path / "requests"
    assert 8_000 < file.stat().st_size <= 20_200
    assert file.stat().st_mode & 0o077 == 0
    found = {one.client for one in explain(home=tmp_path)}
    assert "client 499" in found
    assert "client 0" not in found
    assert [*tmp_path.iterdir()] == [file]


WRONG: tuple[object, ...] = ([], {}, True, -1, 1.5, 10**400)
GOOD = {"client": "a", "prompt": 1, "computed": 1, "reason": "system_changed"}


NO_LINES = [
    *(b"", b"{", b"[]", b"{}", b"\xff", b'{"client": 1}', b"[" * 100_000),
    *(
        json.dumps({**GOOD, name: value}).encode()
        for name in (*GOOD, "message", "line", "lost", "role", "was", "now", "difference")
        for value in WRONG
    ),
]


def test_a_line_that_is_none_is_left_out(tmp_path: Path) -> None:
    noted(tmp_path)
    file = tmp_path / "requests"
    good = file.read_bytes()
    for line in NO_LINES:
        file.write_bytes(line + b"\n" + good)
        assert len(explain(home=tmp_path)) == 2, line[:80]


def test_a_folder_that_cannot_be_written_refuses_no_request(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.write_text("no folder")
    noted(home)
    assert home.read_text() == "no folder"


def test_what_a_client_is_called_is_nothing_that_a_terminal_obeys(tmp_path: Path) -> None:
    log = RequestLog(tmp_path, None)
    log.note("m", "evil\x1b]0;title\x07\x9b2J\u202e", usage("tools_changed", 1, "\x1b[2J"), None)
    log.close()
    (one,) = explain(home=tmp_path)
    assert one.client.startswith("evil")
    assert all(text.isprintable() for text in (one.client, *map(str, one.findings)))
