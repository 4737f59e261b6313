"""
How long a browser takes until the page is there, and until 2,000 messages are drawn.

    python benchmarks/web.py [--runs 5]

A server with the reference model, whose time is that of no model, and the system's Chromium without a
window. First paint is what the browser itself reports; the tree is there with its first card. The last
line is JSON.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from time import perf_counter
from typing import Any

from playwright.sync_api import sync_playwright

from recollect.server.page import page_files

MESSAGES = 2000
MOMENT = "2026-01-01T00:00:00+00:00"


def conversation() -> dict[str, Any]:
    """Return a conversation that branches at every tenth message, as a file."""
    nodes = [
        {
            "id": number,
            "parent": None if number == 1 else number - 1 if number % 10 else max(1, number // 3),
            "role": "user",
            "content": f"Message {number}: " + "words that are shown " * 5,
            "token_ids": None,
            "finish_reason": None,
            "usage": None,
            "created_at": MOMENT,
            "fingerprint": None,
        }
        for number in range(1, MESSAGES + 1)
    ]
    return {
        "format": "recollect-conversation",
        "version": 1,
        "name": "large",
        "created_at": MOMENT,
        "updated_at": MOMENT,
        "model": "reference",
        "fingerprint": "",
        "tips": {"main": 1},
        "nodes": nodes,
    }


def posted(url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Post to the server; return what it answers."""
    request = urllib.request.Request(  # noqa: S310 - this machine
        url.rstrip("/") + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    found: dict[str, Any] = json.load(direct.open(request, timeout=120))
    return found


def measured(browser: Any, url: str) -> dict[str, float]:
    """Open the page in a window of its own; return seconds, and how many elements the tree has."""
    page = browser.new_context(viewport={"width": 1440, "height": 900}).new_page()
    begun = perf_counter()
    page.goto(url)
    page.locator(".card").first.wait_for()
    drawn = perf_counter() - begun
    paint = page.evaluate(
        "performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? null"
    )
    frame = page.locator(".tree-frame")
    times = []
    for key in ("-", "0", "End", "Home"):
        begun = perf_counter()
        frame.press(key)
        page.evaluate(
            "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
        )
        times.append(perf_counter() - begun)
    elements = page.locator(".tree-frame *").count()
    page.context.close()
    return {
        "first_paint_s": paint / 1000,
        "tree_drawn_s": drawn,
        "key_s": max(times),
        "elements": elements,
    }


def run(runs: int) -> list[dict[str, float]]:
    """Measure several times; the first time, which reads files from the disk, does not count."""
    program = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with tempfile.TemporaryDirectory() as home, sync_playwright() as tools:
        process = subprocess.Popen(
            [sys.executable, "-m", "recollect", "serve", "--model", "reference", "--port", "0"],
            env={**os.environ, "RECOLLECT_HOME": home},
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        line = next(line for line in process.stderr if "trees:" in line)
        url = re.findall(r"http\S+", line)[0]
        made = posted(url, "/v1/conversations/import", {"file": conversation()})
        browser = tools.chromium.launch(executable_path=program)
        try:
            return [measured(browser, f"{url}#{made['id']}") for _ in range(runs + 1)][1:]
        finally:
            browser.close()
            process.terminate()
            process.wait(timeout=60)


def main() -> None:
    """Print a table for people, and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    found = run(parser.parse_args().runs)

    def middle(name: str) -> float:
        return statistics.median(one[name] for one in found)

    size = sum(len(file.content) for file in page_files().values())
    print(f"files: {size:,} bytes")
    for name in ("first_paint_s", "tree_drawn_s", "key_s"):
        worst = max(one[name] for one in found)
        print(f"{name}: median {middle(name):.3f}, worst {worst:.3f}")
    print(f"elements of {MESSAGES:,} messages: {middle('elements'):.0f}")
    values = {name: round(middle(name), 4) for name in found[0]}
    print(json.dumps({"bytes": size, "messages": MESSAGES, "runs": len(found), **values}))


if __name__ == "__main__":
    main()
