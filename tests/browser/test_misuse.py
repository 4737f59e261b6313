"""The page in hasty hands, over connections that are lost, with more of everything than anybody has."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from person import (
    api,
    ask,
    counting,
    drawn,
    happens,
    large,
    message,
    settled,
    tree_of,
    until,
)

pytestmark = [pytest.mark.model, pytest.mark.xdist_group("browser")]
BREAKING = """
const before = window.fetch;
window.fetch = async (path, how) => {
  if (window.isGone) throw new TypeError("gone");
  const answer = await before(path, how);
  if (path !== "/v1/responses" || !answer.ok) return answer;
  const reader = answer.body.getReader();
  const body = new ReadableStream({
    async pull(control) {
      const {done, value} = await reader.read();
      if (done) return control.close();
      control.enqueue(value);
      if (window.breaks) { reader.cancel(); control.error(new TypeError("broken")); }
    },
  });
  return new Response(body, {status: answer.status, headers: answer.headers});
};
"""
"""Has a reply break off (`breaks`), or nothing be reached (`isGone`), while the server goes on."""


def newest(url: str) -> set[str]:
    """Return the ids of the newest conversations: a server that tests share has more than a page of them."""
    return {one["id"] for one in api(url, "/v1/conversations?limit=100")["data"]}


def test_two_quick_clicks_do_what_one_does(quick: Any, windows: Callable[..., Any]) -> None:
    page = windows(quick.url, settings={"max_output_tokens": "8", "temperature": "0"})
    page.locator(".live.on").wait_for()
    before = newest(quick.url)
    page.get_by_label("New conversation").dblclick()
    until(page, "location.hash !== ''")
    ask(page, "Name a river.")
    assert len(newest(quick.url) - before) == 1

    page.locator(".message.assistant").hover()
    page.get_by_label("Another reply").dblclick()
    page.locator(".message.assistant .pager", has_text="2 of 2").wait_for()
    settled(page)
    assert len(tree_of(quick.url, page)["tips"]) == 2

    page.locator(".message.user").hover()
    page.get_by_label("Edit the question").click()
    page.get_by_label("The question, edited").fill("Name a desert.")
    page.evaluate("['', ''].forEach(() => document.querySelector('.editor').requestSubmit())")
    page.locator(".card.user", has_text="Name a desert.").wait_for()
    settled(page)
    assert len(tree_of(quick.url, page)["tips"]) == 3

    cut = page.get_by_role("button", name="Continue")
    if cut.count():
        cut.dblclick()
        settled(page)
        until(page, "!document.querySelector('.notice')")

    # The button that begins is followed, at the same place, by the one that stops.
    page.get_by_role("button", name="Explore").click()
    page.get_by_label("The question", exact=True).fill("Name a lake.")
    page.get_by_role("button", name="Try them").dblclick()
    page.get_by_role("button", name="Keep this").nth(3).wait_for()
    assert page.locator(".way .lost").count() == 0
    page.get_by_role("button", name="Keep this").first.click()

    page.locator(".message.assistant").last.hover()
    page.get_by_label("Take out of this branch").last.dblclick()
    until(page, "document.querySelectorAll('.message.assistant').length === 1")
    drawn(page)
    assert page.locator(".notice").count() == 0


def test_what_was_asked_when_the_connection_was_lost_is_not_asked_twice(
    quick: Any, windows: Callable[..., Any]
) -> None:
    page = windows(f"{quick.url}#{counting(quick.url)}", script=BREAKING)
    page.locator(".message.assistant .markdown").wait_for()
    field = page.get_by_label("Question", exact=True)
    # The server has it: a connection that breaks in the middle of the reply loses nothing.
    page.evaluate("window.breaks = true")
    field.fill("Kept by the server")
    field.press("Enter")
    page.locator(".notice.error", has_text="connection was lost").wait_for()
    page.locator(".message.user", has_text="Kept by the server").wait_for()
    assert field.input_value() == ""
    page.evaluate("window.breaks = false")
    page.get_by_label("Dismiss").click()

    # It never came there: the words are in the field again, those of an edit too.
    page.evaluate("window.isGone = true")
    field.fill("Not yet asked")
    field.press("Enter")
    page.locator(".notice.error", has_text="cannot be reached").wait_for()
    until(page, "document.getElementById('question').value === 'Not yet asked'")
    field.fill("")
    page.locator(".message.user").first.hover()
    page.get_by_label("Edit the question").first.click()
    page.get_by_label("The question, edited").fill("An edit")
    page.get_by_role("button", name="Ask on a new branch").click()
    drawn(page)
    assert page.get_by_label("The question, edited").input_value() == "An edit"
    # The branch was begun, and then the connection is gone.
    page.evaluate("window.isGone = false")
    with page.expect_response(re.compile("/fork")):
        page.evaluate(
            """() => {
              const before = window.fetch;
              window.fetch = (path, how) => {
                if (path === '/v1/responses') window.isGone = true;
                return before(path, how);
              };
            }"""
        )
        page.get_by_role("button", name="Ask on a new branch").click()
    until(page, "document.getElementById('question').value === 'An edit'")


def test_words_that_one_has_typed_since_stand_beside_those_that_were_not_asked(
    quick: Any, windows: Callable[..., Any]
) -> None:
    page = windows(f"{quick.url}#{counting(quick.url)}")
    page.locator(".message.assistant .markdown").wait_for()
    waiting: list[Any] = []
    page.route("**/v1/responses", lambda route: waiting.append(route))  # noqa: PLW0108 - Playwright marks what it calls, which a method refuses
    field = page.get_by_label("Question", exact=True)
    field.fill("Not asked")
    field.press("Enter")
    happens(page, lambda: waiting)
    field.fill("And then")
    waiting.pop().abort()
    page.locator(".notice.error", has_text="cannot be reached").wait_for()  # no reply had begun
    until(page, "document.getElementById('question').value === 'Not asked\\n\\nAnd then'")


@pytest.mark.parametrize(
    "what", ["Rewind", "Make a checkpoint", "Begin a branch", "Take out", "Export"]
)
def test_an_action_that_does_not_reach_the_server_is_told_and_can_be_done_again(
    quick: Any, windows: Callable[..., Any], what: str
) -> None:
    made = counting(quick.url)
    page = windows(f"{quick.url}#{made}", script=BREAKING)
    page.locator(".message.assistant .markdown").wait_for()
    if what == "Rewind":
        page.locator(".card.user").click()
        page.get_by_label("Rewind main to here").wait_for()
    before = tree_of(quick.url, page)

    def act() -> None:
        if what == "Take out":
            page.locator(".message").last.hover()
        page.get_by_label(what).last.click()
        if what in {"Make a checkpoint", "Begin a branch"}:
            page.get_by_label("Its name").fill("place")
            page.keyboard.press("Enter")

    page.evaluate("window.isGone = true")
    act()
    page.locator(".notice.error", has_text="cannot be reached").wait_for()
    page.evaluate("window.isGone = false")
    page.get_by_label("Dismiss").click()
    places = [
        {key: one[key] for key in ("tips", "checkpoints")}
        for one in (before, tree_of(quick.url, page))
    ]
    assert places[0] == places[1]
    if what == "Export":
        with page.expect_download():
            act()
        return
    act()
    happens(page, lambda: {key: tree_of(quick.url, page)[key] for key in places[0]} != places[0])
    until(page, "!document.querySelector('.notice.error')")


def test_a_page_that_is_there_before_its_server_answers_comes_to_life(
    quick: Any, windows: Callable[..., Any]
) -> None:
    made = counting(quick.url)
    page = windows(f"{quick.url}#{made}", script="window.isGone = true;" + BREAKING)
    page.locator(".notice.error", has_text="cannot be reached").wait_for()
    page.evaluate("window.isGone = false")
    page.locator(".live.on").wait_for()
    page.locator(".message.assistant").wait_for()
    assert page.locator(".entry").count() > 0


def test_what_two_windows_do_at_one_place_harms_neither(
    server: Any, windows: Callable[..., Any]
) -> None:
    made = counting(server.url)
    both = [windows(f"{server.url}#{made}") for _ in range(2)]
    for page in both:
        page.locator(".live.on").wait_for()
        page.locator(".message.assistant .markdown").wait_for()
    # Both ask at the same place: one after the other, or it is said why not, and nothing is lost.
    for page, text in zip(both, ["From one", "From two"], strict=True):
        page.get_by_label("Question", exact=True).fill(text)
    for page in both:
        page.keyboard.press("Enter")
    for page in both:
        page.locator(".growing").first.wait_for(state="detached")
    said = [
        node["items"][0]["content"][0]["text"] for node in tree_of(server.url, both[0])["nodes"]
    ]
    for page, text in zip(both, ["From one", "From two"], strict=True):
        kept = page.get_by_label("Question", exact=True).input_value()
        assert (text in said) != (kept == text), (said, kept)
        for notice in page.locator(".notice").all():
            assert "busy" in notice.inner_text() or "already" in notice.inner_text()
    # One deletes the conversation while a reply comes in the other.
    one, two = both
    field = one.get_by_label("Question", exact=True)
    field.fill("Count to 99.")
    field.press("Enter")
    one.locator(".growing").first.wait_for()
    two.get_by_label("Delete the conversation").click()
    two.get_by_role("button", name="Delete", exact=True).click()
    for page in both:
        until(page, f"location.hash !== '#{made}'")
        page.locator(".growing").first.wait_for(state="detached")


def test_what_was_tried_in_one_conversation_is_not_kept_in_another(
    quick: Any, windows: Callable[..., Any]
) -> None:
    """Branches have names of their questions, so both have the same."""
    ids = [counting(quick.url), counting(quick.url)]
    page = windows(f"{quick.url}#{ids[0]}")
    for one in ids:
        page.evaluate(f"location.hash = '{one}'")
        page.locator(".message.assistant .markdown").wait_for()
        page.get_by_role("button", name="Explore").click()
        assert page.locator(".way").count() == 0
        page.get_by_label("The question", exact=True).fill("Name a lake.")
        page.get_by_label("Ways").fill("2")
        page.get_by_role("button", name="Try them").click()
        page.get_by_role("button", name="Keep this").nth(1).wait_for()
    page.get_by_role("button", name="Keep this").first.click()
    until(page, "!document.querySelector('.explore')")
    page.evaluate(f"location.hash = '{ids[0]}'")
    page.locator(".card.assistant").nth(2).wait_for()
    page.get_by_role("button", name="Explore").click()
    drawn(page)
    page.keyboard.press("Escape")
    until(page, "!document.querySelector('.explore')")
    tips = api(quick.url, f"/v1/conversations/{ids[0]}/tree")["tips"]
    assert set(tips) == {"main", "name-a-lake", "name-a-lake-2"}


def test_a_conversation_that_the_list_does_not_reach_has_its_title(
    quick: Any, windows: Callable[..., Any]
) -> None:
    made = counting(quick.url)
    api(quick.url, f"/v1/conversations/{made}", {"metadata": {"title": "Old", "kept": "yes"}})
    for _ in range(51):
        api(quick.url, "/v1/conversations", {})
    page = windows(f"{quick.url}#{made}")
    title = page.locator(".head .title", has_text="Old")
    title.click()
    page.get_by_label("Its name").fill("Older")
    page.get_by_role("button", name="Name", exact=True).click()
    page.locator(".head .title", has_text="Older").wait_for()
    found = api(quick.url, f"/v1/conversations/{made}")["metadata"]
    assert found == {"title": "Older", "kept": "yes"}


def test_a_text_is_dropped_into_the_field_and_only_files_are_imported(
    quick: Any, windows: Callable[..., Any]
) -> None:
    page = windows(quick.url)
    page.locator(".live.on").wait_for()
    taken = page.evaluate(
        """() => [['text/plain', 'words'], [new File(['no'], 'two.json')]].map((what) => {
          const dataTransfer = new DataTransfer();
          dataTransfer.items.add(...what.reverse());
          return ['dragover', 'drop'].map((name) => {
            const event = new DragEvent(name, {dataTransfer, bubbles: true, cancelable: true});
            document.getElementById('question').dispatchEvent(event);
            return event.defaultPrevented;
          });
        })"""
    )
    assert taken == [[False, False], [True, True]]
    page.locator(".notice.error", has_text="two.json").wait_for()


def test_ten_thousand_ends_and_names_are_few_elements(
    quick: Any, windows: Callable[..., Any]
) -> None:
    """Everywhere, not in the tree alone."""
    names = {f"idea-{number}": 2 for number in range(40)}
    made = large(quick.url, [None, *[1] * 9_999], tip=2, more=names)
    page = windows(f"{quick.url}#{made}")
    page.locator(".message").nth(1).wait_for()
    assert page.locator(".where .tag").count() <= 12
    assert "and 29 more" in page.locator(".where").inner_text()
    page.get_by_role("tree").press("Home")
    page.get_by_text("It goes on in 9999 ways").wait_for()
    every = "document.querySelectorAll('*').length"
    assert page.evaluate(every) < 1000
    page.get_by_role("button", name="Compare").click()
    page.locator(".side:not(.none)").first.wait_for()
    assert page.evaluate(every) < 2000
    page.get_by_role("button", name="Memory").click()
    page.locator(".memory td").first.wait_for()
    while not page.locator(".memory td", has_text="and 21 more").count():
        rows = page.locator(".memory td").count()  # those used last come first
        page.get_by_role("button", name="Older conversations").click()
        until(page, f"document.querySelectorAll('.memory td').length > {rows}")


def test_long_branches_are_compared_a_part_at_a_time(
    quick: Any, windows: Callable[..., Any]
) -> None:
    made = large(quick.url, [None, *range(1, 3001), 1, *range(3002, 6002)], tip=3001)
    api(quick.url, f"/v1/conversations/{made}/fork", {"name": "other"})
    page = windows(f"{quick.url}#{made}")
    page.locator(".message").nth(1).wait_for()
    page.get_by_role("tree").press("Home")
    page.get_by_role("button", name="Compare").click()
    # What is shown is named, though it is the end of no branch.
    shown = page.get_by_label("The first branch")
    assert shown.evaluate("(one) => one.selectedOptions[0]?.text") == "Message 1"
    ends = page.get_by_label("The second branch").locator("option").all_inner_texts()
    shown.select_option("main")
    page.get_by_label("The second branch").select_option(next(one for one in ends if "6002" in one))
    page.get_by_text("1 message in common").wait_for()
    assert page.locator(".side").count() == 120
    page.get_by_role("button", name="more of 2,941").click()
    until(page, "document.querySelectorAll('.side').length === 520")


LONG = "W" * 4000
ODD = "\u202e" + "x" * 500
"""What is written from right to left, and on and on."""


@pytest.mark.parametrize("width", [320, 900])
def test_words_without_an_end_stay_in_their_place(
    quick: Any, windows: Callable[..., Any], width: int
) -> None:
    call = {
        "type": "function_call",
        "call_id": "c",
        "name": "f" * 64,
        "arguments": json.dumps({LONG: ODD}),
    }
    items = [
        message("system", LONG),
        message("user", ODD + LONG),
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": LONG}]},
        call,
        {"type": "function_call_output", "call_id": "c", "output": LONG},
        message(
            "assistant",
            f"# {LONG}\n\n`{LONG}`\n\n```{'z' * 300}\n{LONG}\n```\n\n| {LONG} |\n|---|\n| a |\n\n[{LONG}](http://x.y/{LONG})",
        ),
    ]
    made = api(quick.url, "/v1/conversations", {"items": items})["id"]
    api(quick.url, f"/v1/conversations/{made}", {"metadata": {"title": ODD[:480]}})
    for name in ("n" * 64, "m" * 64):
        api(quick.url, f"/v1/conversations/{made}/fork", {"name": name})
        api(quick.url, f"/v1/conversations/{made}/checkpoint", {"name": name})
    page = windows(f"{quick.url}#{made}", viewport={"width": width, "height": 860})
    page.locator(".message .markdown a").wait_for()
    page.evaluate("import('/web/state.js').then((one) => one.tell('E'.repeat(20000)))")
    page.locator(".notice").wait_for()
    wide = """
      [...document.querySelectorAll('body *')].filter((one) => {
        const box = one.getBoundingClientRect();
        const scrolls = one.closest('pre, .tree-frame, table, .over, .list, select, .scrolls');
        return box.width && !scrolls && (box.right > innerWidth + 1 ||
          box.bottom > innerHeight + 1 && one.closest('.notice'));
      }).map((one) => one.outerHTML.slice(0, 80))"""
    assert page.evaluate(wide) == []
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    copy = page.locator(".code .copy").bounding_box()
    assert copy["x"] + copy["width"] <= width
    page.get_by_label("Dismiss").click()
    for view in ["Explore", "Compare", "Memory"]:
        page.get_by_role("button", name=view, exact=True).click()
        page.locator(".memory-body" if view == "Memory" else ".over").wait_for()
        drawn(page)
        assert page.evaluate(wide) == [], view
        inner = "((one) => one.scrollWidth - one.clientWidth)(document.querySelector('.over'))"
        assert page.evaluate(inner) <= 0, view


MARKS = ("_a*", "**a", "a**b", "a*_", "> ", "1. ", "- ", "[", "`a``b")
WORDS = {"java": "a", "cpp": "1e", "javascript": "a(", "yaml": "a "}


def test_text_of_marks_alone_is_drawn_in_steps_by_its_length(
    quick: Any, windows: Callable[..., Any]
) -> None:
    """Counted in seconds of the processor, of which others on the machine take nothing."""
    page = windows(quick.url)
    page.locator(".live.on").wait_for()
    tools = page.context.new_cdp_session(page)
    tools.send("Performance.enable", {"timeDomain": "threadTicks"})

    def spent() -> float:
        found = tools.send("Performance.getMetrics")["metrics"]
        return float({one["name"]: one["value"] for one in found}["ScriptDuration"])

    def draw(text: str, until: str) -> None:
        page.evaluate(
            """async ([text, until]) => {
              const [{Markdown}, {h, render}] = await Promise.all(
                ["/web/markdown.js", "/web/vendor/preact.mjs"].map((one) => import(one)));
              const host = document.createElement('div');
              document.body.append(host);
              render(h(Markdown, {text}), host);
              while (!host.querySelector(until)) await new Promise((done) => setTimeout(done, 20));
              host.remove();
            }""",
            [text, until],
        )

    for language in WORDS:  # what has no colours yet is drawn again with them
        draw(f"```{language}\n1\n```", "[class^=hljs]")
    texts = [part * (60_000 // len(part)) for part in MARKS]
    codes = [f"```{name}\n{part * (59_000 // len(part))}\n```" for name, part in WORDS.items()]
    for text in [*texts, *codes]:
        before = spent()
        draw(text, ".markdown > *")
        assert spent() - before < 4, text[:20]
