"""The page in a browser, against a running server with smollm2: what a person does with it."""

import json
import re
import urllib.request
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

pytestmark = [pytest.mark.model, pytest.mark.xdist_group("browser")]
Json = dict[str, Any]
MOST_ELEMENTS = 300
HOSTILE = (
    "<img src=x onerror='window.hacked=1'><script>window.hacked=1</script>"
    "[a](javascript:window.hacked=1) ![b](http://example.invalid/c.png)\n\n"
    "```html\"><script>window.hacked=1</script>\n<b onclick='window.hacked=1'>\n```\n"
)


def api(url: str, path: str, body: Json | None = None) -> Json:
    """Do what another client does."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(  # noqa: S310 - this machine
        url.rstrip("/") + path, data, {"Content-Type": "application/json"}
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    found: Json = json.load(direct.open(request, timeout=120))
    return found


def tree_of(url: str, page: Any) -> Json:
    return api(url, f"/v1/conversations/{page.evaluate('location.hash.slice(1)')}/tree")


def until(page: Any, holds: str) -> None:
    """Wait until an expression is true; Playwright's own way needs what the page's policy refuses."""
    end = monotonic() + 90
    while not page.evaluate(holds):
        assert monotonic() < end, holds
        page.wait_for_timeout(50)


def fresh(page: Any) -> None:
    """Begin a conversation."""
    before = page.evaluate("location.hash")
    page.get_by_label("New conversation").click()
    until(page, f"location.hash && location.hash !== {json.dumps(before)}")
    until(page, "document.querySelectorAll('.message').length === 0")


def ask(page: Any, text: str) -> None:
    """Ask, and wait until the reply is there."""
    page.get_by_label("Question", exact=True).fill(text)
    page.keyboard.press("Enter")
    page.get_by_label("Stop").or_(page.locator(".growing")).first.wait_for()
    settled(page)


def settled(page: Any) -> None:
    page.locator(".growing").first.wait_for(state="detached")
    page.locator(".message.assistant .reuse").last.wait_for()


def test_asking_forking_and_editing_grow_a_tree(server: Any, windows: Callable[..., Any]) -> None:
    page = windows(server.url)
    fresh(page)
    ask(page, "Name a river.")
    ask(page, "Name a mountain.")
    assert page.locator(".card").count() == 4
    assert "from memory" in page.locator(".reuse").last.inner_text()

    # Ask at the first reply: a branch begins, which shares what comes before.
    page.locator(".card").nth(1).click()
    assert "new branch" in page.get_by_label("Question", exact=True).get_attribute("placeholder")
    ask(page, "Name a lake.")
    assert len(tree_of(server.url, page)["tips"]) == 2
    assert page.locator(".card.user").count() == 3

    # Another reply to the same question, then another question in place of the first.
    page.locator(".message.assistant").last.hover()
    page.get_by_label("Another reply").last.click()
    settled(page)
    page.locator(".pager", has_text="2 of 2").last.wait_for()
    page.locator(".message.user").first.hover()
    page.get_by_label("Edit the question").first.click()
    page.get_by_label("The question, edited").fill("Name a desert.")
    page.get_by_role("button", name="Ask on a new branch").click()
    page.locator(".card.user", has_text="Name a desert.").wait_for()
    settled(page)
    found = tree_of(server.url, page)
    assert sum(node["parent_id"] is None for node in found["nodes"]) == 2
    assert len(found["tips"]) == 4

    # What was cut goes on, and the longer reply is in its place.
    cut = page.get_by_role("button", name="Continue")
    if cut.count():
        before = page.locator(".message.assistant .markdown").last.inner_text()
        cut.click()
        page.locator(".growing").first.wait_for()
        settled(page)
        longer = page.locator(".message.assistant .markdown").last.inner_text()
        assert len(longer) > len(before)


def test_names_checkpoints_rewind_and_files(
    server: Any, windows: Callable[..., Any], tmp_path: Path
) -> None:
    page = windows(server.url)
    fresh(page)
    ask(page, "Say one.")
    page.get_by_label("Make a checkpoint here").click()
    page.get_by_label("Its name").fill("first")
    page.get_by_role("button", name="Keep").click()
    page.locator(".labels .checkpoint", has_text="first").wait_for()
    ask(page, "Say two.")
    page.locator(".card").nth(1).click()
    page.get_by_label("Rewind main to here").click()
    page.locator(".card", has_text="Say one").wait_for()
    page.locator(".where .tag.branch", has_text="main").wait_for()
    page.get_by_label("Begin a branch here").click()
    page.get_by_label("Its name").fill("idea")
    page.get_by_role("button", name="Fork").click()
    page.locator(".where .tag", has_text="idea").wait_for()
    page.locator(".where .tag", has_text="idea").click()
    page.get_by_label("Its name").fill("better")
    page.get_by_role("button", name="Rename").click()
    page.locator(".where .tag", has_text="better").wait_for()
    found = tree_of(server.url, page)
    assert set(found["tips"]) == {"main", "better"}
    assert found["checkpoints"]["first"] == found["tips"]["main"]

    with page.expect_download() as download:
        page.get_by_label("Export").click()
    file = tmp_path / "conversation.json"
    download.value.save_as(file)
    before = page.evaluate("location.hash")
    page.get_by_label("Import a file").set_input_files(file)
    until(page, f"location.hash !== {json.dumps(before)}")
    page.locator(".card").first.wait_for()
    assert len(tree_of(server.url, page)["nodes"]) == len(found["nodes"])

    # An item that is taken out stays in the other branches.
    page.locator(".card").nth(1).click()
    page.locator(".message.assistant").last.hover()
    page.get_by_label("Take out of this branch").last.click()
    page.locator(".message.assistant").first.wait_for(state="detached")
    page.get_by_label("Delete the conversation").click()
    page.get_by_role("button", name="Delete", exact=True).click()
    until(page, "location.hash === ''")


def test_four_ways_are_tried_compared_and_one_is_kept(
    server: Any, windows: Callable[..., Any]
) -> None:
    page = windows(server.url)
    fresh(page)
    ask(page, "Tell me of a city.")
    page.get_by_role("button", name="Explore").click()
    page.get_by_label("The question", exact=True).fill("What is good to eat there?")
    page.get_by_role("button", name="Try them").click()
    page.get_by_role("button", name="Keep this").nth(3).wait_for()
    found = tree_of(server.url, page)
    question = [node for node in found["nodes"] if node["role"] == "user"][-1]
    assert sum(node["parent_id"] == question["id"] for node in found["nodes"]) == 4
    boxes = page.locator(".way input[type=checkbox]")
    boxes.nth(0).check()
    boxes.nth(2).check()
    page.get_by_role("button", name="Compare two").click()
    assert "3 messages in common" in page.locator(".compare").inner_text()
    assert page.locator("mark.less").count() > 0
    assert page.locator("mark.more").count() > 0
    page.get_by_role("button", name="Explore").click()
    page.get_by_role("button", name="Keep this").nth(1).click()
    until(page, "!document.querySelector('.explore')")
    until(page, "document.querySelector('.head-title .hint').textContent.includes('2 branches')")


def test_two_windows_show_the_same_and_a_restart_goes_on_warm(
    server: Any, windows: Callable[..., Any]
) -> None:
    one = windows(server.url)
    fresh(one)
    ask(one, "Count to three, slowly and with many words between the numbers.")
    two = windows(server.url + one.evaluate("location.hash"))
    two.locator(".live.on").wait_for()
    ask(one, "Now backwards.")
    two.locator(".message.user", has_text="Now backwards.").wait_for()
    two.locator(".card").nth(3).wait_for()

    server.stop()
    two.locator(".live:not(.on)").wait_for()
    server.start()
    two.locator(".live.on").wait_for()
    ask(two, "And again.")
    assert "from disk" in two.locator(".reuse").last.inner_text()
    one.locator(".message.user", has_text="And again.").wait_for()


def test_a_key_is_asked_for_and_stays_in_the_tab(
    start_server: Callable[..., Any], windows: Callable[..., Any]
) -> None:
    keyed = start_server("--api-key", "rk-right")
    page = windows(keyed.url)
    page.get_by_label("Key").fill("rk-wrong")
    page.get_by_role("button", name="Go on").click()
    page.get_by_text("does not take that key").wait_for()
    page.get_by_label("Key").fill("rk-right")
    page.get_by_role("button", name="Go on").click()
    page.get_by_label("New conversation").wait_for()
    page.reload()
    page.get_by_label("New conversation").wait_for()
    ask(page, "Hello")
    assert page.evaluate("localStorage.getItem('recollect-key')") is None
    other = windows(keyed.url)
    other.get_by_label("Key").wait_for()
    keyed.stop()


def test_hostile_text_does_nothing(server: Any, windows: Callable[..., Any]) -> None:
    said: list[Json] = [
        {"type": "message", "role": role, "content": HOSTILE}
        for role in ("system", "user", "assistant")
    ]
    call = {
        "type": "function_call",
        "call_id": "c",
        "name": "look",
        "arguments": '{"a": "</script>"}',
    }
    result = {"type": "function_call_output", "call_id": "c", "output": HOSTILE}
    made = api(server.url, "/v1/conversations", {"items": [*said, said[1], call, result]})["id"]
    api(server.url, f"/v1/conversations/{made}", {"metadata": {"title": HOSTILE}})
    page = windows(f"{server.url}#{made}")
    page.locator(".card").nth(2).wait_for()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    for one in page.locator(".message a").all():
        assert re.match(r"https?:|mailto:", one.get_attribute("href") or "http:")
    page.get_by_role("button", name="Compare").click()
    page.wait_for_timeout(300)
    assert page.evaluate("window.hacked") is None
    assert page.locator(".message img, .message script, .card script").count() == 0
    assert [url for url in asked if not url.startswith(server.url)] == []
    # Nor does the page let anything run or load that its files do not name.
    refused = page.evaluate(
        "() => { try { document.body.innerHTML = '<b>'; return false } catch { return true } }"
    )
    assert refused


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 768, 1440])
def test_nothing_keeps_people_from_using_it(
    server: Any, windows: Callable[..., Any], modules: Path, tmp_path: Path, theme: str, width: int
) -> None:
    """No serious finding of axe, in any view, and nothing is wider than the window."""
    kept = api(server.url, "/v1/conversations", {})["id"]
    asked = {"input": "Why is the sky blue?", "conversation": kept, "max_output_tokens": 16}
    api(server.url, "/v1/responses", asked)
    how = {"color_scheme": theme, "bypass_csp": True}
    page = windows(f"{server.url}#{kept}", viewport={"width": width, "height": 860}, **how)
    page.locator(".message").first.wait_for()
    page.add_script_tag(path=modules / "axe-core" / "axe.min.js")
    views = ["Explore", "Compare", "Memory", "Settings"]
    if width < 760:
        page.get_by_role("button", name="Tree", exact=True).click()
    for view in [None, *views]:
        if view is not None:
            page.get_by_role("button", name=view, exact=True).click()
            page.wait_for_timeout(200)
        page.screenshot(path=tmp_path / f"{view}.png")
        wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert wide <= 0, view
        cut = page.evaluate(
            "[...document.querySelectorAll('.going, .legend')]"
            ".filter((one) => one.scrollWidth > one.clientWidth).map((one) => one.innerText)"
        )
        assert cut == [], view
        found = page.evaluate("axe.run({resultTypes: ['violations']})")["violations"]
        serious = [
            (one["id"], [node["html"][:120] for node in one["nodes"]])
            for one in found
            if one["impact"] in {"serious", "critical"}
        ]
        assert serious == [], view


def test_a_large_tree_is_drawn_in_few_elements_and_moved_by_keys(
    server: Any, windows: Callable[..., Any]
) -> None:
    nodes = [
        {
            "id": number,
            "parent": None if number == 1 else number - 1 if number % 10 else max(1, number // 3),
            "role": "user",
            "content": f"Message {number}",
            "token_ids": None,
            "finish_reason": None,
            "usage": None,
            "created_at": "2026-01-01T00:00:00+00:00",
            "fingerprint": None,
        }
        for number in range(1, 2001)
    ]
    moment = "2026-01-01T00:00:00+00:00"
    file = {
        "format": "recollect-conversation",
        "version": 1,
        "name": "large",
        "model": "smollm2",
        "created_at": moment,
        "updated_at": moment,
        "fingerprint": "",
        "tips": {"main": 1},
        "nodes": nodes,
    }
    made = api(server.url, "/v1/conversations/import", {"file": file})["id"]
    page = windows(f"{server.url}#{made}")
    page.locator(".card").first.wait_for()
    frame = page.get_by_role("tree")
    counts = []
    for key in ["", "ArrowDown", "ArrowRight", "End", "Home", "-", "-", "-", "-", "0", "+"]:
        if key:
            frame.press(key)
        page.wait_for_timeout(200)
        counts.append(page.locator(".tree-frame *").count())
    assert max(counts) <= MOST_ELEMENTS
    assert "2,000 messages" in page.locator(".head-title").inner_text()
    # What is folded is not drawn, and a dot leads to its message.
    frame.press("Home")
    frame.press(" ")
    page.locator(".fold.folded", has_text="+1999").wait_for()
