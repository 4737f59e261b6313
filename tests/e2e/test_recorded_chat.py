"""
The chat that the README and its picture show is a run of docs/record_chat.py, and what a run looks like.

The recorded run was one with real weights; its shape is compared with that of a run on the model that
has none, so a change of what the chat shows has to be recorded anew.
"""

import importlib.util
import os
import re
import subprocess
import sys
from html import unescape
from pathlib import Path
from types import ModuleType

import pytest

if sys.platform == "win32":
    pytest.skip("there are no pseudo-terminals", allow_module_level=True)

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docs" / "record_chat.py"
README = (ROOT / "README.md").read_text("utf-8")
RECORDED = (ROOT / "docs" / "chat.txt").read_text("utf-8").splitlines()
PICTURE = (ROOT / "docs" / "chat.svg").read_text("utf-8")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("record_chat", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def second_chat() -> int:
    """Return the line of the record with which the second chat begins."""
    return max(number for number, line in enumerate(RECORDED) if line.startswith("$ "))


def test_the_readme_shows_the_second_chat_as_it_was_recorded() -> None:
    (shown,) = re.findall(
        r"<!-- recorded by docs/record_chat.py -->\n```console\n(.*?)\n```\n\n"
        r"Recorded on \d+ cores \([^\n]+\) at a load of \d+[^\n]*\.\n<!-- end -->",
        README,
        re.DOTALL,
    )
    assert shown.splitlines() == RECORDED[second_chat() :]


def test_the_picture_shows_the_first_chat_as_it_was_recorded() -> None:
    """Each text of the picture stands in its line of the record, and nothing of a line is missing."""
    lines: dict[str, list[str]] = {}
    for clip, text in re.findall(r"clip-path=\"url\(#chat-line-(\d+)\)\">(.*?)</text>", PICTURE):
        lines.setdefault(clip, []).append(unescape(text).replace("\xa0", " "))
    shown = [
        re.sub(r"\s", "", "".join(parts))
        for _, parts in sorted(lines.items(), key=lambda one: int(one[0]))
    ]
    first = [re.sub(r"\s", "", line) for line in RECORDED[: second_chat()]]
    assert "".join(shown) == "".join(first)


def test_the_picture_asks_nobody_for_anything() -> None:
    assert re.findall(r"(?:href|src|url)\s*[=(]\s*[\"']?(?!#)[a-z]+:", PICTURE) == []
    assert "@font-face" not in PICTURE


def test_the_answers_are_right(script: ModuleType) -> None:
    said = script.replies(RECORDED)
    assert set(script.RIGHT) == set(said)
    for question, pattern in script.RIGHT.items():
        assert re.search(pattern, said[question]), question


def test_a_reply_after_the_restart_came_from_disk() -> None:
    (cost,) = [line for line in RECORDED[second_chat() :] if "first token" in line]
    new, reused = re.findall(r"([\d,]+) (?:new|reused)", cost)
    assert "reused (disk)" in cost
    assert int(reused.replace(",", "")) > 50 * int(new.replace(",", ""))


def test_the_screen_is_what_a_terminal_shows(script: ModuleType) -> None:
    screen = script.Screen(10)
    for written in (
        "one two\r\n",
        "\x1b[1mthree\x1b[",
        "0m\r\x1b[2Cr\x1b[K",
        "\x1b[?25l\x1b[A\r\x1b[4CT\b",
    ):
        screen.feed(written)
    assert screen.lines() == ["one Two", "thr"]
    (bold,) = screen.styled()[1].spans
    assert (bold.start, bold.end, bold.style.bold) == (0, 2, True)
    screen.feed("\r\x1b[J12345678901\x1b]52;c;eA==\a")
    assert screen.lines() == ["1234567890", "1"]


def test_a_run_has_the_shape_of_the_recorded_one(script: ModuleType, tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(SCRIPT),
        "--model",
        "reference",
        "--characters",
        "900",
        "--key-s",
        "0",
    ]
    environment = {**os.environ, "RECOLLECT_HOME": str(tmp_path / "home")}
    subprocess.run(  # noqa: S603 - our own script
        [*command, "--into", str(tmp_path)], check=True, env=environment, timeout=300
    )
    run = (tmp_path / "chat.txt").read_text("utf-8").split("\n")
    assert script.shape(run) == script.shape(RECORDED)
