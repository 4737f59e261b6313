"""
Pictures of a chat at the terminal, from a real conversation: `python docs/pictures.py`.

Starts `recollect chat` on a pseudo-terminal of 80 and of 120 columns, types what a person would, and draws
what stands on the screen at the end: as SVG in `docs/pictures/`, on a dark and on a light background. The
data folder is an empty one; the models are those of this machine. Replies are greedy, so that the same model
draws the same pictures.
"""

import argparse
import html
import os
import sys
import tempfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pexpect
import pyte

from recollect import config

HERE = Path(__file__).parent / "pictures"
ROWS = 60
WIDTHS = (80, 120)
WAIT_S = 300
WALKS = {
    "chat": [
        "What is the capital of France?",
        "And of Italy?",
        "/rewind 1",
        "/fork spain",
        "And of Spain?",
        "/tree",
    ],
    "markdown": [
        "Make a table of three planets with their diameters. Then show a short Python function that "
        "returns the largest, and explain it in a list."
    ],
}
"""What is typed, for each picture."""

PALETTES = {
    "dark": {
        "background": "#1e1e1e",
        "default": "#d4d4d4",
        "black": "#000000",
        "red": "#f14c4c",
        "green": "#23d18b",
        "brown": "#f5f543",
        "blue": "#3b8eea",
        "magenta": "#d670d6",
        "cyan": "#29b8db",
        "white": "#e5e5e5",
    },
    "light": {
        "background": "#ffffff",
        "default": "#333333",
        "black": "#000000",
        "red": "#cd3131",
        "green": "#107c10",
        "brown": "#949800",
        "blue": "#0451a5",
        "magenta": "#bc05bc",
        "cyan": "#0598bc",
        "white": "#555555",
    },
}
"""The colours that Visual Studio Code gives its terminal."""
CHARACTER, LINE, MARGIN = 8.4, 18, 12
"""Pixels: the width of a character, the height of a row, the space around all."""


class Screen(pyte.Screen):
    """A screen that knows what is dim, which pyte does not: it is kept as a blink, which we never use."""

    def select_graphic_rendition(self, *attributes: int, **more: bool) -> None:
        """Take over the attributes of a sequence."""
        super().select_graphic_rendition(*(5 if one == 2 else one for one in attributes), **more)


def walk(lines: list[str], columns: int, model: str) -> Screen:
    """Return the screen after a conversation."""
    with tempfile.TemporaryDirectory() as home:
        (Path(home) / "models").symlink_to(config.home() / "models")
        environment = os.environ | {"RECOLLECT_HOME": home, "TERM": "xterm-256color"}
        environment["PROMPT_TOOLKIT_NO_CPR"] = "1"
        for name in ("COLUMNS", "LINES", "NO_COLOR"):
            environment.pop(name, None)
        screen = Screen(columns, ROWS)
        stream = pyte.Stream(screen)
        chat = ["-m", "recollect", "chat", "--model", model, "--temperature", "0", "-n", "400"]
        child = pexpect.spawn(
            sys.executable, chat, env=environment, dimensions=(ROWS, columns), encoding="utf-8"
        )
        for line in lines:
            stream.feed(until_prompt(child))
            child.send(line + "\r")
        stream.feed(until_prompt(child))
        child.close(force=True)
    return screen


def until_prompt(child: "pexpect.spawn[str]") -> str:
    """Return what comes until the chat waits for a line."""
    child.expect_exact(
        "\x1b[?2004h", timeout=WAIT_S
    )  # pasting is announced there, once for each line
    seen = child.before + child.after
    while True:
        try:
            seen += child.read_nonblocking(4096, timeout=1)
        except pexpect.TIMEOUT:
            return seen


def draw(screen: Screen, palette: dict[str, str]) -> str:
    """Return the rows that are in use as SVG."""
    used = [number for number, row in enumerate(screen.display) if row.strip()]
    first, last = used[0], used[-1]
    width = screen.columns * CHARACTER + 2 * MARGIN
    height = (last - first + 1) * LINE + 2 * MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        'font-family="ui-monospace,Menlo,Consolas,DejaVu Sans Mono,monospace" font-size="14">',
        f'<rect width="100%" height="100%" rx="6" fill="{palette["background"]}"/>',
    ]
    for number in range(first, last + 1):
        bottom = MARGIN + (number - first + 0.75) * LINE
        parts += runs(screen, number, bottom, palette)
    return "\n".join([*parts, "</svg>\n"])


def runs(screen: Screen, number: int, bottom: float, palette: dict[str, str]) -> Iterator[str]:
    """Yield the parts of a row that look the same."""
    row = [screen.buffer[number][column] for column in range(screen.columns)]
    place = 0
    for look, cells in groupby(row, key=lambda cell: cell._replace(data="")):
        text = "".join(cell.data for cell in cells)
        start, place = place, place + len(text)
        if not text.strip():
            continue
        lead = len(text) - len(text.lstrip())
        text = text.strip()
        style = f'fill="{palette.get(look.fg, palette["default"])}"'
        style += ' font-weight="bold"' if look.bold else ""
        style += ' font-style="italic"' if look.italics else ""
        style += ' text-decoration="underline"' if look.underscore else ""
        style += ' opacity="0.6"' if look.blink else ""
        yield (
            f'<text x="{MARGIN + (start + lead) * CHARACTER:g}" y="{bottom:g}" '
            f'textLength="{len(text) * CHARACTER:g}" xml:space="preserve" {style}>'
            f"{html.escape(text, quote=False)}</text>"
        )


def main() -> None:
    """Draw all pictures."""
    parser = argparse.ArgumentParser(description="Draw pictures of a chat at the terminal.")
    parser.add_argument("--model", default="qwen2.5-coder-0.5b")
    parser.add_argument("--only", choices=WALKS, help="draw one of them")
    arguments = parser.parse_args()
    HERE.mkdir(exist_ok=True)
    for name, lines in WALKS.items():
        if arguments.only not in {None, name}:
            continue
        for columns in WIDTHS:
            screen = walk(lines, columns, arguments.model)
            for shade, palette in PALETTES.items():
                path = HERE / f"{name}-{columns}-{shade}.svg"
                path.write_text(draw(screen, palette), encoding="utf-8")
                print(path)


if __name__ == "__main__":
    main()
