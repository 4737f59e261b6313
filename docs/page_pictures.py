"""
Make the pictures of the page: a real server with qwen2.5-coder-1.5b, in the system's Chromium.

    python docs/page_pictures.py [FOLDER]

What is said is generated; only the questions are written here. The server is started three times, the
first time without a disk, so that of three ways on one is in memory, one on disk, and one not kept.
The pictures show how long first tokens took: where other programs made them wait, the conversation is
had once more, and nothing is written where that never ends. Each picture has 256 colours, which keeps
it small. Needs `playwright`, Chromium and Pillow, which matplotlib brings.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, Final

from PIL import Image
from playwright.sync_api import sync_playwright

from recollect import config
from recollect.models.prepare import models_folder, prepare

PICTURES: Final = Path(__file__).parent / "pictures"
MODEL: Final = "qwen2.5-coder-1.5b"
SETTINGS: Final = (
    "localStorage.setItem('recollect-settings', "
    "JSON.stringify({max_output_tokens: '160', temperature: '0', seed: '7', "
    "system: 'You help with Python. Answer with a short piece of code, or in one or two sentences.'}))"
)
SLOWEST_S: Final = 3.0
"""Seconds until a first token; a machine that does nothing else takes less to read these questions."""
WARM_MS: Final = 20_000
"""In that time a server runs its first passes, in which weights are laid out, and which take seconds."""
ATTEMPTS: Final = 3
SIZES: Final = ((1440, "light"), (1440, "dark"), (900, "dark"), (390, "light"))
SMALLEST: Final = 760
"""Below it a window shows the tree and the chat one at a time."""


class Served:
    """A server, and a window at its page."""

    def __init__(self, browser: Any, home: Path, *arguments: str) -> None:
        self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and package
            [
                sys.executable,
                "-m",
                "recollect",
                "serve",
                "--model",
                MODEL,
                "--port",
                "0",
                *arguments,
            ],
            env={**os.environ, "RECOLLECT_HOME": str(home)},
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stderr is not None
        line = next((one for one in self._process.stderr if "trees:" in one), "")
        (self.url,) = re.findall(r"http\S+", line)
        # Each request is a line: a pipe that nobody reads is full some time, and the server waits.
        threading.Thread(target=self._process.stderr.read, daemon=True).start()
        self.page = browser.new_page(viewport={"width": 1440, "height": 860})
        self.page.set_default_timeout(300_000)
        self.page.add_init_script(SETTINGS)
        self.page.goto(self.url)
        self.page.wait_for_timeout(WARM_MS)

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *_: object) -> None:
        self.page.close()
        self._process.terminate()
        self._process.wait(timeout=60)


def ask(page: Any, text: str) -> None:
    """Ask, and wait for the reply."""
    before = page.locator(".card").count()
    page.get_by_label("Question", exact=True).fill(text)
    page.keyboard.press("Enter")
    page.locator(".card").nth(before + 1).wait_for()
    page.locator(".growing").first.wait_for(state="detached")


def converse(browser: Any, home: Path) -> None:
    """Have a conversation that branches, over two restarts."""
    with Served(browser, home, "--kv-disk", "0") as first:
        first.page.get_by_label("New conversation").click()
        first.page.locator(".card.system").wait_for()
        ask(first.page, "Write a function that merges two sorted lists.")
        ask(first.page, "Why is it fast?")
    with Served(browser, home) as second:
        second.page.locator(".card.assistant").first.click()
        ask(second.page, "Write a test for it.")
        second.page.wait_for_timeout(4000)  # what is new goes to disk while nobody asks


def go_on(page: Any) -> None:
    """Ask in a third way, twice, and name the place where the three part."""
    page.locator(".card.assistant").first.click()
    ask(page, "Make it work for any number of lists.")
    ask(page, "And for a sorted list that never ends?")
    page.locator(".card.assistant").first.click()
    page.get_by_label("Make a checkpoint here").click()
    page.get_by_label("Its name").fill("merged")
    page.get_by_role("button", name="Keep").click()
    page.locator(".labels .checkpoint").wait_for()


def explore(page: Any) -> None:
    """Try several replies from the first one."""
    page.locator(".card.assistant").first.click()
    page.get_by_role("button", name="Explore").click()
    page.get_by_label("The question", exact=True).fill("Write it in one line.")
    page.get_by_label("Ways").fill("3")
    page.get_by_role("button", name="Try them").click()
    page.get_by_role("button", name="Keep this").nth(2).wait_for()


def slowest(page: Any) -> float:
    """Return the most seconds that a reply of the conversation had to wait for its first token."""
    usages = page.evaluate(
        """async () => (await (await fetch(`/v1/conversations/${location.hash.slice(1)}/tree`)).json())
             .nodes.map((node) => node.usage).filter((usage) => usage)"""
    )
    return max(float(usage["ttft_s"]) for usage in usages)


def take(page: Any, path: Path) -> None:
    """Take a picture of what is seen."""
    page.screenshot(path=path)
    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(
            256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE
        )
    small.save(path, optimize=True)


def main() -> None:
    """Make all pictures."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURES
    program = os.environ.get("CHROMIUM") or shutil.which("chromium")
    prepare(MODEL, home=config.home())
    with sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=program)
        is_done = any(in_one_go(browser, folder) for _ in range(ATTEMPTS))
        browser.close()
    if not is_done:
        sys.exit("This machine is busy: make the pictures once it does nothing else.")


def in_one_go(browser: Any, folder: Path) -> bool:
    """Make all pictures in a home of their own, if it is quick; return whether it is."""
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        models_folder(home).symlink_to(models_folder(config.home()))
        converse(browser, home)
        with Served(browser, home) as third:
            go_on(third.page)
            if slowest(third.page) > SLOWEST_S:
                return False
            for width, theme in SIZES:
                page = browser.new_page(
                    viewport={"width": width, "height": 860},
                    color_scheme=theme,
                    reduced_motion="reduce",
                )
                page.goto(third.page.url)
                page.locator(".message").first.wait_for()
                tabs = page.get_by_label("Parts")
                if width < SMALLEST:
                    tabs.get_by_text("Tree").click()
                for key in ("Home", "End"):  # to the newest way
                    page.get_by_role("tree").press(key)
                page.evaluate("document.activeElement.blur()")
                if width < SMALLEST:
                    tabs.get_by_text("Chat", exact=True).click()
                page.wait_for_timeout(4500)
                take(page, folder / f"page-{width}-{theme}.png")
                page.close()
            explore(third.page)
            third.page.wait_for_timeout(800)
            take(third.page, folder / "page-explore-light.png")
    return True


if __name__ == "__main__":
    main()
