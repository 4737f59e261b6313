"""
Pictures of a chat at the terminal, from a real conversation: `python docs/pictures.py`.

Runs chats as `record_chat` does, on terminals of 80 and of 120 columns, and draws what stands on the screen
at the end: as SVG in `docs/pictures/`, on a dark and on a light background. Replies are greedy, so that the
same model draws the same pictures.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Final

from rich.terminal_theme import DEFAULT_TERMINAL_THEME, MONOKAI

from record_chat import link_models, picture, record

HERE: Final = Path(__file__).parent / "pictures"
WIDTHS: Final = (80, 120)
THEMES: Final = {"dark": MONOKAI, "light": DEFAULT_TERMINAL_THEME}
CHAT: Final = "recollect chat -t 0 -n 400 -m {model}"
WALKS: Final = {
    "chat": (
        "What is the capital of France?",
        "And of Italy?",
        "/rewind 1",
        "/fork spain",
        "And of Spain?",
        "/tree",
        "/quit",
    ),
    "markdown": (
        "Make a table of three planets with their diameters. Then show a short Python function that "
        "returns the largest, and explain it in a list.",
        "/quit",
    ),
}
"""What is typed, for each picture."""


def main() -> None:
    """Draw all pictures."""
    parser = argparse.ArgumentParser(description="Draw pictures of a chat at the terminal.")
    parser.add_argument("--model", default="qwen2.5-coder-0.5b")
    parser.add_argument("--only", choices=WALKS, help="draw one of them")
    arguments = parser.parse_args()
    HERE.mkdir(exist_ok=True)
    for name, typed in WALKS.items():
        if arguments.only not in {None, name}:
            continue
        for columns in WIDTHS:
            with tempfile.TemporaryDirectory() as folder:
                link_models(Path(folder))
                command = CHAT.format(model=arguments.model)
                recorded = record(command, typed, Path(folder), key_s=0, columns=columns)
            for shade, theme in THEMES.items():
                path = HERE / f"{name}-{columns}-{shade}.svg"
                path.write_text(picture(recorded, theme), encoding="utf-8")
                print(path)


if __name__ == "__main__":
    main()
