"""
How long a browser takes until the page is there, and until 2,000 and 10,000 messages are drawn.

    python benchmarks/web.py [--runs 5] [--save]

A server with the reference model, whose time is that of no model, and the system's Chromium without a
window. First paint is what the browser itself reports. The tree is drawn with its first cards or dots,
and whole once the message at which it opens is seen: of 10,000 messages the first 2,000 are drawn
while the others are read. A key is the slowest of four that move the view, with its drawing.
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
import threading
import urllib.request
from time import perf_counter
from typing import Any

from playwright.sync_api import sync_playwright

from harness import report_models, say
from recollect.proof.report import this_machine
from recollect.server.page import page_files

SIZES = (2000, 10_000)
LONGEST_S = 120
"""A wait of so many seconds is an error."""
MOMENT = "2026-01-01T00:00:00+00:00"


def conversation(messages: int) -> dict[str, Any]:
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
        for number in range(1, messages + 1)
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
    # Without glides of the view, which take their time on any machine.
    how = {"viewport": {"width": 1440, "height": 900}, "reduced_motion": "reduce"}
    page = browser.new_context(**how).new_page()
    page.set_default_timeout(LONGEST_S * 1000)
    begun = perf_counter()
    page.goto(url)
    page.locator(".card, .dots").first.wait_for(state="attached")
    drawn = perf_counter() - begun
    page.locator(".card.chosen").wait_for()
    whole = perf_counter() - begun
    paint = page.evaluate(
        "performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? null"
    )
    frame = page.locator(".tree-frame")
    times, elements = [], []
    for key in ("-", "0", "End", "Home"):
        begun = perf_counter()
        frame.press(key)
        page.evaluate(
            "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
        )
        times.append(perf_counter() - begun)
        elements.append(page.locator(".tree-frame *").count())
    page.context.close()
    return {
        "first_paint_s": paint / 1000,
        "tree_drawn_s": drawn,
        "tree_whole_s": whole,
        "key_s": max(times),
        "elements": max(elements),
    }


def run(runs: int) -> dict[int, list[dict[str, float]]]:
    """
    Measure each size several times; the first time, which reads files from the disk, does not count.

    Returns:
        By the number of messages.
    """
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
        # Each request is a line: a pipe that nobody reads is full some time, and the server waits.
        threading.Thread(target=process.stderr.read, daemon=True).start()
        browser = tools.chromium.launch(executable_path=program)
        try:
            found = {}
            for size in SIZES:
                made = posted(url, "/v1/conversations/import", {"file": conversation(size)})
                found[size] = [measured(browser, f"{url}#{made['id']}") for _ in range(runs + 1)][
                    1:
                ]
            return found
        finally:
            browser.close()
            process.terminate()
            process.wait(timeout=60)


def main() -> None:
    """Print a table for people, and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="keep the result under results/")
    args = parser.parse_args()
    found = run(args.runs)
    size = sum(len(file.content) for file in page_files().values())
    say(f"files: {size:,} bytes")
    conversations: dict[str, Any] = {}
    for messages, each in found.items():
        of = conversations[str(messages)] = {}
        for name in each[0]:
            values = [one[name] for one in each]
            of[name] = {
                "median": round(statistics.median(values), 4),
                "worst": round(max(values), 4),
            }
            say(
                f"{messages:,} messages, {name}: {of[name]['median']}, at worst {of[name]['worst']}"
            )
    result = {"bytes": size, "runs": args.runs, "messages": conversations}
    report_models("web", "reference", this_machine(), result, save=args.save)


if __name__ == "__main__":
    main()
