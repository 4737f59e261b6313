"""
Make the pictures of the page: a real server with smollm2, in the system's Chromium.

    python docs/page_pictures.py [FOLDER]

What is said is generated; only the questions are written here. The pictures show how long first tokens
took: where other programs made them wait, the conversation is had once more, and nothing is written
where that never ends. Each picture has 256 colours, which keeps it small. Needs `playwright`, Chromium
and Pillow, which matplotlib brings.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from PIL import Image
from playwright.sync_api import sync_playwright

from recollect import config
from recollect.models.prepare import models_folder, prepare

PICTURES: Final = Path(__file__).parent / "pictures"
SETTINGS: Final = (
    "localStorage.setItem('recollect-settings', "
    "JSON.stringify({max_output_tokens: '70', temperature: '0.3', seed: '7', "
    "system: 'You are a patient teacher. Answer in two or three short sentences.'}))"
)
SLOWEST_S: Final = 1.0
"""Seconds until a first token; a machine that does nothing else takes less to read these questions."""
ATTEMPTS: Final = 5
SIZES: Final = ((1440, "light"), (1440, "dark"), (900, "dark"), (390, "light"))


def served(home: Path) -> tuple[subprocess.Popen[str], str]:
    """Start a server; return it, and the address of its page."""
    models_folder(home).symlink_to(models_folder(config.home()))
    process = subprocess.Popen(
        [sys.executable, "-m", "recollect", "serve", "--model", "smollm2", "--port", "0"],
        env={**os.environ, "RECOLLECT_HOME": str(home)},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r"trees: (http\S+)", line):
            return process, found[1]
    raise RuntimeError("the server has not started")


def ask(page: Any, text: str) -> None:
    """Ask, and wait for the reply."""
    page.get_by_label("Question", exact=True).fill(text)
    page.keyboard.press("Enter")
    page.locator(".growing").first.wait_for()
    page.locator(".growing").first.wait_for(state="detached")


def converse(page: Any) -> None:
    """Have a conversation that branches."""
    page.get_by_label("New conversation").click()
    page.locator(".card.system").wait_for()
    ask(page, "Why is the sky blue?")
    ask(page, "And why is it red in the evening?")
    page.locator(".card.assistant").first.click()
    ask(page, "Explain it to a child.")
    page.locator(".card.assistant").first.click()
    page.get_by_role("button", name="Explore").click()
    page.get_by_label("The question", exact=True).fill("Name an experiment that shows it.")
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
    prepare("smollm2", home=config.home())
    with sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=program)
        is_done = any(in_one_go(browser, folder) for _ in range(ATTEMPTS))
        browser.close()
    if not is_done:
        sys.exit("This machine is busy: make the pictures once it does nothing else.")


def in_one_go(browser: Any, folder: Path) -> bool:
    """Make all pictures with a server of its own, if it is quick; return whether it is."""
    with tempfile.TemporaryDirectory() as home:
        process, url = served(Path(home))
        try:
            page = browser.new_page(viewport={"width": 1440, "height": 860})
            page.set_default_timeout(300_000)
            page.add_init_script(SETTINGS)
            page.goto(url)
            converse(page)
            if slowest(page) > SLOWEST_S:
                return False
            page.wait_for_timeout(800)
            take(page, folder / "page-explore-light.png")
            page.get_by_label("Close").click()
            address = page.url
            for width, theme in SIZES:
                page = browser.new_page(
                    viewport={"width": width, "height": 860},
                    color_scheme=theme,
                    reduced_motion="reduce",
                )
                page.goto(address)
                page.locator(".message").first.wait_for()
                if width == SIZES[0][0]:  # in others not all cards are in sight
                    page.locator(".card.assistant").nth(2).click()
                page.wait_for_timeout(4500)
                take(page, folder / f"page-{width}-{theme}.png")
        finally:
            process.terminate()
            process.wait(timeout=60)
    return True


if __name__ == "__main__":
    main()
