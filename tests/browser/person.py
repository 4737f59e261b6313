"""What a person does with the page, and what another client does beside it; tests share it."""

import json
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from typing import Any

Json = dict[str, Any]
LONGEST_S = 90


def api(url: str, path: str, body: Json | None = None, *, method: str | None = None) -> Json:
    """Do what another client does."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(  # noqa: S310 - this machine
        url.rstrip("/") + path, data, {"Content-Type": "application/json"}, method=method
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    found: Json = json.load(direct.open(request, timeout=120))
    return found


def tree_of(url: str, page: Any) -> Json:
    return api(url, f"/v1/conversations/{page.evaluate('location.hash.slice(1)')}/tree")


def until(page: Any, holds: str) -> None:
    """Wait until an expression is true; Playwright's own way needs what the page's policy refuses."""
    happens(page, lambda: page.evaluate(holds), holds)


def happens(page: Any, holds: Callable[[], Any], what: object = None) -> None:
    """Wait until something is true here, while the browser goes on; `what` is told where it never is."""
    end = monotonic() + LONGEST_S
    while not holds():
        assert monotonic() < end, what
        page.wait_for_timeout(50)


def drawn(page: Any) -> None:
    """Wait until the page has drawn what it knows."""
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def fresh(page: Any) -> None:
    """Begin a conversation."""
    before = page.evaluate("location.hash")
    page.get_by_label("New conversation").click()
    until(page, f"location.hash && location.hash !== {json.dumps(before)}")
    until(page, "document.querySelectorAll('.message').length === 0")


def ask(page: Any, text: str) -> None:
    """Ask, and wait until the reply is there, however soon that is."""
    page.get_by_label("Question", exact=True).fill(text)
    page.keyboard.press("Enter")
    until(
        page,
        "(([asked, reply]) => !document.querySelector('.growing')"
        f" && asked?.querySelector('.markdown')?.innerText.trim() === {json.dumps(text)}"
        " && reply?.querySelector('.reuse'))([...document.querySelectorAll('.message')].slice(-2))",
    )


def settled(page: Any) -> None:
    page.locator(".growing").first.wait_for(state="detached")
    page.locator(".message.assistant .reuse").last.wait_for()


NUMBERS = "\n".join(str(number) for number in range(1, 100))
"""What the model says again where it stands already: a long reply, whatever the machine."""


def message(role: str, text: str) -> Json:
    return {"type": "message", "role": role, "content": text}


def counting(url: str) -> str:
    """Return a conversation in which the next reply is long."""
    items = [message("user", "Count to 99."), message("assistant", NUMBERS)]
    made: str = api(url, "/v1/conversations", {"items": items})["id"]
    return made


def last_reply(page: Any) -> str:
    """Return the words of the last reply, once they are drawn, which is after it is there."""
    shown = page.locator(".message.assistant .markdown").last
    shown.locator("> *").first.wait_for()
    text: str = shown.inner_text()
    return " ".join(text.split())


def large(
    url: str, parents: Sequence[int | None], *, tip: int, more: Mapping[str, int] | None = None
) -> str:
    """
    Return a conversation of many messages, each after the one that `parents` names; they count from 1.

    `tip`: where its branch stands; `more`: where others do.
    """
    moment = "2026-01-01T00:00:00+00:00"
    nodes = [
        {
            "id": number,
            "parent": parent,
            "role": "user",
            "content": f"Message {number}",
            "token_ids": None,
            "finish_reason": None,
            "usage": None,
            "created_at": moment,
            "fingerprint": None,
        }
        for number, parent in enumerate(parents, 1)
    ]
    file = {
        "format": "recollect-conversation",
        "version": 1,
        "name": "large",
        "model": "reference",
        "created_at": moment,
        "updated_at": moment,
        "fingerprint": "",
        "tips": {"main": tip, **(more or {})},
        "nodes": nodes,
    }
    made: str = api(url, "/v1/conversations/import", {"file": file})["id"]
    return made
