"""
Record the chat that the README shows: a real run on a pseudo-terminal, as text and as a picture.

    python docs/record_chat.py [--model NAME] [--characters N] [--into FOLDER]

Types the lines of `WALK` into `recollect chat`, and waits for each reply. The data folder is a new one, with
links to the models in the user's. Writes `chat.txt` (everything that was on the screen) and
`chat.svg` (the first chat) into the folder, and without `--into` puts the second chat into the README.
The replies have to be right: what `RIGHT` says of each has to be in it, unless the model has no weights.
"""

import argparse
import os
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from io import StringIO
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import pexpect
from rich.console import Console
from rich.terminal_theme import MONOKAI, TerminalTheme
from rich.text import Text

from recollect import config
from recollect.proof.report import Machine, this_machine

HERE: Final = Path(__file__).parent
README: Final = HERE.parent / "README.md"
MODEL: Final = "qwen2.5-coder-1.5b"
COLUMNS: Final = 96
ROWS: Final = 200
"""More than is ever written, so that nothing scrolls away."""

NEW: Final = "recollect chat --name license --system-file LICENSE -t 0 -m {model}"
RESUMED: Final = "recollect chat --resume license -t 0"
WALK: Final = (
    (
        NEW,
        (
            "May I sell a product that contains this software?",
            "/fork patents",
            "Does the license cover patents?",
            "/tree",
            "/quit",
        ),
    ),
    (RESUMED, ("May I change the files, too?", "/quit")),
)
"""Each chat: how it is called, and what is typed."""
RIGHT: Final = {
    "May I sell a product that contains this software?": r"\bYes\b.*\bsell\b",
    "Does the license cover patents?": r"\bYes\b.*\bpatents\b",
    "May I change the files, too?": r"\bYes\b.*\b(?:change|modify)\b",
}
"""What has to be in the reply to each question."""

PROMPT: Final = re.compile(r"^you(?: \(\w+\))?>")
COST: Final = re.compile(
    r"^  (?:cut at the token limit, /continue goes on · )?"
    r"(?:[\d,]+ new · )?(?:[\d,]+ read ahead · )?(?:[\d,]+ reused \((?P<tier>[a-z\d, ]+)\) · )?"
    r"first token [\d.]+ (?:ms|s|min) · [\d,.]+ tok/s$"
)
"""The line under a reply."""
KEY_S: Final = 0.15
"""Between two keys: a fast typist, with 80 words a minute. What is read meanwhile counts as read ahead."""
_LONGEST_SEQUENCE: Final = 64
"""Characters after which what looks like the beginning of a control sequence is none that is known."""
_QUIET_S: Final = 0.5
_PATIENCE_S: Final = 300.0


class Screen:
    """
    What a terminal shows, as rows of characters with the colours that each has.

    Knows the control sequences that the chat uses: colours, moving the cursor, erasing. Others are
    ignored.
    """

    _SEQUENCE: Final = re.compile(
        r"\x1b\[([?>]?)([\d;]*)([A-Za-z])|\x1b\][^\a\x1b]*(?:\a|\x1b\\)|\x1b[=>78]"
    )

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self._rows: list[list[tuple[str, str]]] = [[]]
        self._row = self._column = 0
        self._style = ""
        self._pending = ""

    def feed(self, written: str) -> None:
        """Show what a program wrote; the beginning of a sequence waits for the rest."""
        text, self._pending = self._pending + written, ""
        place = 0
        while place < len(text):
            if text[place] != "\x1b":
                self._put(text[place])
                place += 1
            elif found := self._SEQUENCE.match(text, place):
                if found[3] and not found[1]:
                    self._control(found[3], found[2])
                place = found.end()
            elif len(text) - place > _LONGEST_SEQUENCE:
                place += 1
            else:
                self._pending = text[place:]
                return

    def lines(self) -> list[str]:
        """Return the rows as text, without blanks at their ends."""
        shown = ["".join(character for character, _ in row).rstrip() for row in self._rows]
        while shown and not shown[-1]:
            shown.pop()
        return shown

    def styled(self) -> list[Text]:
        """Return the rows with their colours."""
        rows = []
        for row in self._rows[: len(self.lines())]:
            runs = groupby(row, key=lambda cell: cell[1])
            shown = ((style, "".join(character for character, _ in run)) for style, run in runs)
            rows.append(Text.from_ansi("".join(f"\x1b[0;{style}m{text}" for style, text in shown)))
        return rows

    def _put(self, character: str) -> None:
        if character == "\r":
            self._column = 0
        elif character == "\n":
            self._row += 1
        elif character == "\b":
            self._column = max(0, self._column - 1)
        elif character >= " ":
            if self._column >= self.columns:
                self._row, self._column = self._row + 1, 0
            row = self._line()
            row[self._column : self._column + 1] = [(character, self._style)]
            self._column += 1

    def _line(self) -> list[tuple[str, str]]:
        while len(self._rows) <= self._row:
            self._rows.append([])
        row = self._rows[self._row]
        row.extend([(" ", "")] * (self._column - len(row)))
        return row

    def _control(self, kind: str, parameters: str) -> None:
        number = int(parameters.split(";", maxsplit=1)[0] or 0)
        if kind == "m":
            self._style = self._styled_by(parameters)
        elif kind == "A":
            self._row = max(0, self._row - max(1, number))
        elif kind == "B":
            self._row += max(1, number)
        elif kind == "C":
            self._column = min(self.columns - 1, self._column + max(1, number))
        elif kind == "D":
            self._column = max(0, self._column - max(1, number))
        elif kind == "G":
            self._column = max(1, number) - 1
        elif kind == "K" and number in {0, 2}:
            row = self._line()
            del row[self._column if number == 0 else 0 :]
        elif kind == "J" and number == 0:
            row = self._line()
            del row[self._column :]
            del self._rows[self._row + 1 :]

    def _styled_by(self, parameters: str) -> str:
        """Return the style after one more sequence: those since the last reset, together."""
        first, _, rest = parameters.partition(";")
        if first in {"", "0"}:
            return rest
        return ";".join(part for part in (self._style, parameters) if part)


@dataclass(frozen=True)
class Recorded:
    """One chat: how it was called, and what the screen showed."""

    command: str
    screen: Screen

    def lines(self) -> list[str]:
        """Return what a reader sees, the call included."""
        return [f"$ {self.command}", *self.screen.lines()]


def record(
    command: str, typed: tuple[str, ...], home: Path, *, key_s: float, columns: int = COLUMNS
) -> Recorded:
    """
    Run one chat, type the lines as soon as its prompt is there, and return what was shown.

    Args:
        command: How the chat is called.
        typed: The lines.
        home: The data folder, in which it runs.
        key_s: Seconds from one key to the next.
        columns: Of the terminal.
    """
    own = {"COLUMNS", "LINES", "NO_COLOR"}
    environment = {name: value for name, value in os.environ.items() if name not in own}
    child = pexpect.spawn(
        sys.executable,
        ["-m", *command.split()],
        cwd=home,
        dimensions=(ROWS, columns),
        encoding="utf-8",
        codec_errors="replace",
        env={
            **environment,
            "RECOLLECT_HOME": str(home),
            "TERM": "xterm-256color",
            "PROMPT_TOOLKIT_NO_CPR": "1",
            "PYTHONUTF8": "1",
        },
    )
    screen = Screen(columns)
    for line in typed:
        _read(child, screen, until_prompt=True)
        for key in line:
            child.send(key)
            screen.feed(_written(child, key_s))
        child.send("\r")
    _read(child, screen, until_prompt=False)
    child.close()
    assert child.exitstatus == 0, "\n".join(screen.lines())
    return Recorded(command, screen)


def link_models(home: Path) -> None:
    """Have a new data folder use the models of the user's."""
    for part in ("models", "sources", "hashes", "vocabularies"):
        if (config.home() / part).is_dir():
            (home / part).symlink_to(config.home() / part)


def _written(child: Any, seconds: float) -> str:
    """Return what a program has written after some time."""
    time.sleep(seconds)
    try:
        return str(child.read_nonblocking(4096, timeout=0))
    except pexpect.TIMEOUT:
        return ""


def _read(child: Any, screen: Screen, *, until_prompt: bool) -> None:
    """Read until nothing but the prompt has come for a while, or until the end of the program."""
    end = time.monotonic() + _PATIENCE_S
    while time.monotonic() < end:
        try:
            screen.feed(child.read_nonblocking(4096, timeout=_QUIET_S))
        except pexpect.TIMEOUT:
            lines = screen.lines()
            if until_prompt and lines and PROMPT.fullmatch(lines[-1]):
                return
        except pexpect.EOF:
            assert not until_prompt, "\n".join(screen.lines())
            return
    raise TimeoutError("\n".join(screen.lines()))


def picture(recorded: Recorded, theme: TerminalTheme = MONOKAI) -> str:
    """Return one chat as SVG. Its font is the reader's own: nothing is fetched to show it."""
    console = Console(record=True, width=recorded.screen.columns, file=StringIO())
    console.print(Text(f"$ {recorded.command}", style="bold"))
    for row in recorded.screen.styled():
        console.print(row)
    drawn = console.export_svg(title="recollect chat", theme=theme, unique_id="chat")
    drawn = re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL)
    return drawn.replace("Fira Code", "ui-monospace, Menlo, Consolas")


def shape(lines: list[str]) -> list[str]:
    """
    Return what of a transcript does not depend on the model, the machine and the moment.

    What was typed stays; a reply is one entry, its cost says where KV came from, and of everything
    else numbers, times and the model's name are left out.
    """
    found: list[str] = []
    said = False
    for line in lines:
        if line.startswith("$ "):
            found.append(re.sub(r" -m \S+", " -m NAME", line))
            said = False
        elif PROMPT.match(line):
            found.append(line)
            said = not line.split("> ")[-1].startswith("/")
        elif cost := COST.match(line):
            found.append("COST disk" if "disk" in (cost["tier"] or "") else "COST")
            said = False
        elif line.startswith("you: "):  # the last turn of a conversation that goes on
            found.append(line)
            said = True
        elif said:
            found += ["REPLY"] if found[-1] != "REPLY" else []
        elif line:
            plain = re.sub(r"^[●◎◐○] (\d+) .*?→ .*?#", r"● \1 SAID → REPLY #", line)
            plain = re.sub(r"^\S+ · (?:exact|fast|small) · ", "NAME · PROFILE · ", plain)
            found.append(re.sub(r"\d[\d,.]*", "N", plain))
    return found


def replies(lines: list[str]) -> dict[str, str]:
    """Return the reply to each message, on one line."""
    found: dict[str, str] = {}
    asked = ""
    for line in lines:
        if PROMPT.match(line):
            asked = line.split("> ", 1)[-1]
        elif COST.match(line):
            asked = ""
        elif asked and not asked.startswith("/"):
            found[asked] = f"{found.get(asked, '')} {line}".strip()
    return found


def about(machine: Machine) -> str:
    """Return the sentence that says where a chat was recorded, and how busy that machine was."""
    cores, load = machine.physical_cores or machine.logical_cores or 1, machine.load_average or 0.0
    busy = "" if load < cores else "; seconds are longer for that, tokens are not more"
    return f"Recorded on {cores} cores ({machine.cpu}) at a load of {load:.0f}{busy}."


def into_readme(lines: list[str], machine: Machine) -> None:
    """Put a transcript into the README in place of the one between its two marks."""
    text = README.read_text(encoding="utf-8")
    block = "\n".join(["```console", *lines, "```", "", about(machine)])
    text, changed = re.subn(
        r"(<!-- recorded by docs/record_chat.py -->\n).*?(?=\n<!-- end -->)",
        lambda found: found[1] + block,
        text,
        flags=re.DOTALL,
    )
    assert changed == 1
    README.write_text(text, encoding="utf-8")


def main() -> int:
    """Record, check, and write."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[1])
    options.add_argument("--model", default=MODEL, help="as `recollect chat --model` takes it")
    options.add_argument(
        "--characters", type=int, help="of the licence, for models with little room"
    )
    options.add_argument("--key-s", type=float, default=KEY_S, help="seconds from key to key")
    options.add_argument("--into", type=Path, help="a folder; the README stays as it is then")
    args = options.parse_args()
    machine = this_machine()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        link_models(home)
        licence = (HERE.parent / "LICENSE").read_text(encoding="utf-8")
        (home / "LICENSE").write_text(licence[: args.characters], encoding="utf-8")
        chats = [
            record(call.format(model=args.model), typed, home, key_s=args.key_s)
            for call, typed in WALK
        ]
    whole = [line for chat in chats for line in chat.lines()]
    if args.model != "reference":
        for question, pattern in RIGHT.items():
            assert re.search(pattern, replies(whole)[question]), (
                question,
                replies(whole)[question],
            )
    into: Path = args.into or HERE
    (into / "chat.txt").write_text("\n".join(whole) + "\n", encoding="utf-8")
    (into / "chat.svg").write_text(picture(chats[0]), encoding="utf-8")
    if args.into is None:
        into_readme(chats[1].lines(), machine)
    return 0


if __name__ == "__main__":
    sys.exit(main())
