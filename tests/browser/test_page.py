"""The page in a browser, against a running server with smollm2: what a person does with it."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from person import (
    NUMBERS,
    Json,
    api,
    ask,
    counting,
    drawn,
    fresh,
    happens,
    large,
    last_reply,
    message,
    settled,
    tree_of,
    until,
)

pytestmark = [pytest.mark.model, pytest.mark.xdist_group("browser")]
MOST_ELEMENTS = 300
WEB = Path(str(resources.files("recollect"))) / "web"
HOSTILE = (
    "<img src=x onerror='window.hacked=1'><script>window.hacked=1</script>"
    "[a](javascript:window.hacked=1) ![b](http://example.invalid/c.png)\n\n"
    "```html\"><script>window.hacked=1</script>\n<b onclick='window.hacked=1'>\n```\n"
)


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
    page.locator(".message.assistant .pager", has_text="2 of 2").wait_for()
    settled(page)
    page.locator(".message.user").first.hover()
    page.get_by_label("Edit the question").first.click()
    page.get_by_label("The question, edited").fill("Name a desert.")
    page.get_by_role("button", name="Ask on a new branch").click()
    page.locator(".card.user", has_text="Name a desert.").wait_for()
    settled(page)
    found = tree_of(server.url, page)
    assert sum(node["parent_id"] is None for node in found["nodes"]) == 2
    assert len(found["tips"]) == 4


def test_a_question_that_is_edited_stays_open_when_a_reply_ends(
    server: Any, windows: Callable[..., Any]
) -> None:
    page = windows(f"{server.url}#{counting(server.url)}")
    page.locator(".message.assistant .markdown").wait_for()
    page.get_by_label("Question", exact=True).fill("Go on.")
    page.keyboard.press("Enter")
    page.locator(".growing").first.wait_for()
    page.locator(".message.user").first.hover()
    page.get_by_label("Edit the question").first.click()
    page.get_by_label("The question, edited").fill("Count to 9.")
    settled(page)
    page.locator(".message.assistant").nth(1).wait_for()
    assert page.get_by_label("The question, edited").input_value() == "Count to 9."


def test_what_is_stopped_or_cut_is_kept_and_goes_on(
    server: Any, windows: Callable[..., Any]
) -> None:
    made = counting(server.url)
    settings = {"max_output_tokens": "400", "temperature": "0"}
    page = windows(f"{server.url}#{made}", settings=settings)
    page.locator(".message.assistant").wait_for()
    page.get_by_label("Question", exact=True).fill("Count to 99.")
    page.keyboard.press("Enter")
    page.locator(".growing .assistant .markdown", has_text="3").wait_for()
    page.locator(".sprout.assistant", has_text="1 2 3").wait_for()  # in the tree, too
    page.get_by_role("button", name="Stop").click()
    page.locator(".growing").first.wait_for(state="detached")
    page.locator(".sprout").first.wait_for(state="detached")
    assert page.locator(".message").count() == 4
    assert "stopped" in page.locator(".cut").inner_text()
    stopped = last_reply(page)
    assert stopped.startswith("1 2 3")
    assert len(stopped) < len(" ".join(NUMBERS.split()))
    node = api(server.url, f"/v1/conversations/{made}/tree")["nodes"][-1]
    assert node["finish_reason"] == "cancelled"

    short = json.dumps({**settings, "max_output_tokens": "6"})
    page.evaluate(f"localStorage.setItem('recollect-settings', {json.dumps(short)})")
    page.reload()
    page.get_by_role("button", name="Continue").click()
    page.locator(".cut", has_text="token limit").wait_for()
    settled(page)
    longer = last_reply(page)
    assert longer.startswith(stopped)
    assert len(longer) > len(stopped)
    page.get_by_role("button", name="Continue").click()
    happens(page, lambda: len(last_reply(page)) > len(longer))
    settled(page)
    assert last_reply(page).startswith(longer)
    assert page.locator(".message").count() == 4


def test_a_reply_that_breaks_off_is_told_and_its_question_is_not_lost(
    server: Any, windows: Callable[..., Any]
) -> None:
    made = counting(server.url)
    page = windows(
        f"{server.url}#{made}", settings={"max_output_tokens": "400", "temperature": "0"}
    )
    page.locator(".message.assistant").wait_for()
    page.get_by_label("Question", exact=True).fill("Count to 99.")
    page.keyboard.press("Enter")
    page.locator(".growing .assistant .markdown", has_text="3").wait_for()
    server.kill()
    page.locator(".notice.error").wait_for()
    page.locator(".growing").first.wait_for(state="detached")
    field = page.get_by_label("Question", exact=True)
    kept = (
        page.locator(".message.user").count() == 2
    )  # the server may have kept the question already
    assert field.input_value() == ("" if kept else "Count to 99.")
    page.get_by_label("Dismiss").click()
    field.fill("Say one.")
    page.keyboard.press("Enter")
    page.locator(".notice.error", has_text="cannot be reached").wait_for()
    until(page, "document.getElementById('question').value === 'Say one.'")
    server.start()
    page.locator(".live.on").wait_for()
    field.press("Enter")
    page.locator(".message.user", has_text="Say one.").wait_for()


def test_an_agent_is_watched_as_it_branches(
    start_server: Callable[..., Any], windows: Callable[..., Any]
) -> None:
    """It knows nothing of the page, and sends the whole chat each time."""
    keeping = start_server("--keep-chats", model="reference")
    page = windows(keeping.url)
    page.locator(".live.on").wait_for()

    def agent(*messages: tuple[str, str]) -> str:
        body = {"messages": [{"role": role, "content": text} for role, text in messages]}
        reply = api(
            keeping.url, "/v1/chat/completions", {**body, "max_tokens": 8, "temperature": 0}
        )
        said: str = reply["choices"][0]["message"]["content"]
        return said

    first = [("system", "You work with files."), ("user", "Which files are there?")]
    first.append(("assistant", agent(*first)))
    page.locator(".entry").first.click()
    page.locator(".card").nth(2).wait_for()
    agent(*first, ("user", "Read the first one."))
    page.locator(".message.user", has_text="Read the first one.").wait_for()
    page.locator(".card").nth(4).wait_for()
    # The same beginning, another question: a branch, while one looks.
    agent(*first, ("user", "Delete the last one."))
    page.locator(".card.user", has_text="Delete the last one.").wait_for()
    page.locator(".card").nth(6).wait_for()
    assert page.locator(".entry").count() == 1
    assert "2 branches" in page.locator(".head-title").inner_text()
    # It changes what it has sent: what is read again for that is told, with the words.
    agent(*first[:2], ("assistant", "There are none."), ("user", "Delete the last one."))
    page.get_by_label("The next one").first.wait_for()
    page.locator(".card.assistant", has_text="There are none.").click()
    page.get_by_role("button", name="Delete the last one.").click()
    told = page.locator(".lost", has_text="tokens read again: Message 3:").inner_text()
    assert "none" in told
    keeping.stop()


def test_a_conversation_that_another_window_deletes_is_closed(
    quick: Any, windows: Callable[..., Any]
) -> None:
    made = counting(quick.url)
    one, two = windows(f"{quick.url}#{made}"), windows(f"{quick.url}#{made}")
    two.locator(".live.on").wait_for()
    two.locator(".message.assistant").wait_for()
    two.get_by_role("button", name="Memory").click()
    one.get_by_label("Delete the conversation").click()
    one.get_by_role("button", name="Delete", exact=True).click()
    two.locator(".notice", has_text="no longer there").wait_for()
    two.locator(".welcome").wait_for()
    assert two.locator(".card").count() == 0
    assert two.evaluate("location.hash") == ""
    # Nor is one that is named by an address only, and what is open is not taken for it.
    two.goto(f"{quick.url}#{counting(quick.url)}")
    two.locator(".message.assistant").wait_for()
    two.evaluate(f"location.hash = '{made}'")
    two.locator(".welcome").wait_for()
    assert two.locator(".card").count() == 0


def test_a_name_that_another_window_has_taken_is_not_in_the_way(
    quick: Any, windows: Callable[..., Any]
) -> None:
    made = counting(quick.url)
    page = windows(
        f"{quick.url}#{made}",
        script="const before = window.fetch; window.fetch = (path, ...more) =>"
        " path === '/v1/events' ? new Promise(() => {}) : before(path, ...more);",
    )
    page.locator(".message.assistant").wait_for()
    api(quick.url, f"/v1/conversations/{made}/fork", {"name": "name-a-desert"})
    page.locator(".message.user").hover()
    page.get_by_label("Edit the question").click()
    page.get_by_label("The question, edited").fill("Name a desert.")
    page.get_by_role("button", name="Ask on a new branch").click()
    page.locator(".where .tag", has_text="name-a-desert-2").wait_for()
    settled(page)
    assert page.locator(".notice").count() == 0


def test_older_conversations_stay_in_the_list(quick: Any, windows: Callable[..., Any]) -> None:
    for _ in range(51):
        api(quick.url, "/v1/conversations", {})
    page = windows(quick.url)
    page.locator(".live.on").wait_for()
    page.get_by_role("button", name="Older ones").click()
    until(page, "document.querySelectorAll('.entry').length > 50")
    before = page.locator(".entry").count()
    made = api(quick.url, "/v1/conversations", {"metadata": {"title": "The newest"}})["id"]
    page.locator(".entry", has_text="The newest").wait_for()
    assert page.locator(".entry").count() == before + 1
    api(quick.url, f"/v1/conversations/{made}", method="DELETE")
    until(page, f"document.querySelectorAll('.entry').length === {before}")


TAG = ".where .tag"


def test_a_tree_is_read_once_at_a_time_however_much_happens(
    quick: Any, windows: Callable[..., Any]
) -> None:
    """An answer that comes late would cover what a later one has brought."""
    made = counting(quick.url)
    page = windows(f"{quick.url}#{made}")
    page.locator(".live.on").wait_for()
    page.locator(".message.assistant").wait_for()
    waiting: list[Any] = []
    page.route(re.compile("/tree"), lambda route: waiting.append(route))  # noqa: PLW0108 - as above
    for number in range(4):
        api(quick.url, f"/v1/conversations/{made}/fork", {"name": f"idea-{number}"})
        happens(page, lambda: waiting)
        page.wait_for_timeout(400)
    assert len(waiting) == 1
    waiting[0].continue_()
    for number in range(1, 4):  # a third one where an event came after the second had begun
        happens(page, lambda: len(waiting) > number or page.locator(TAG, has_text="idea-3").count())  # noqa: B023 - called at once
        if len(waiting) == number:
            break
        assert len(waiting) == number + 1
        page.wait_for_timeout(400)
        assert len(waiting) == number + 1
        waiting[number].continue_()
    page.locator(TAG, has_text="idea-3").wait_for()
    page.wait_for_timeout(400)
    assert len(waiting) <= 3


def test_a_place_that_one_goes_to_while_a_tree_is_read_stays(
    quick: Any, windows: Callable[..., Any]
) -> None:
    made = counting(quick.url)
    page = windows(f"{quick.url}#{made}")
    page.locator(".live.on").wait_for()
    page.locator(".message.assistant").wait_for()
    waiting: list[Any] = []
    page.route(re.compile("/tree"), lambda route: waiting.append(route))  # noqa: PLW0108 - as above
    body = {"conversation": made, "input": "Said elsewhere", "max_output_tokens": 4}
    api(quick.url, "/v1/responses", body)
    happens(page, lambda: waiting)
    page.locator(".card").first.click()

    def is_there() -> bool:
        while waiting:
            waiting.pop().continue_()
        return bool(page.locator(".card.user", has_text="Said elsewhere").count())

    happens(page, is_there)
    drawn(page)
    assert page.locator(".message").count() == 1


def test_what_is_found_too_late_does_not_cover_the_list(
    quick: Any, windows: Callable[..., Any]
) -> None:
    made = counting(quick.url)
    page = windows(f"{quick.url}#{made}")
    page.locator(".entry").first.wait_for()
    waiting: list[Any] = []
    page.route(re.compile("search"), lambda route: waiting.append(route))  # noqa: PLW0108 - Playwright marks what it calls, which a method refuses
    field = page.get_by_label("Search what was said")
    field.fill("99")
    happens(page, lambda: waiting)
    field.fill("")
    with page.expect_response(re.compile("search")):
        waiting.pop().continue_()
    page.wait_for_timeout(300)
    assert page.locator(".entry").count() > 0
    assert page.locator(".hit").count() == 0


def test_a_page_from_another_machine_over_plain_http_asks_and_copies(
    quick: Any, windows: Callable[..., Any]
) -> None:
    """There a browser has neither random names nor a clipboard for scripts."""
    page = windows(
        quick.url,
        script="delete Crypto.prototype.randomUUID;"
        "Object.defineProperty(Navigator.prototype, 'clipboard', {value: undefined});",
    )
    fresh(page)
    ask(page, "Name a fish.")
    page.locator(".message.user").hover()
    page.locator(".message.user").get_by_label("Copy").click()
    page.get_by_label("Question", exact=True).focus()
    page.keyboard.press("Control+V")
    assert page.get_by_label("Question", exact=True).input_value() == "Name a fish."


def test_a_page_that_nobody_sees_holds_no_connection(
    quick: Any, windows: Callable[..., Any]
) -> None:
    """A browser has six for all its windows, so that the seventh would wait for ever."""
    page = windows(
        f"{quick.url}#{counting(quick.url)}",
        script="window.isHidden = false;"
        "Object.defineProperty(document, 'hidden', {get: () => window.isHidden});"
        "window.show = (is) => { isHidden = !is; document.dispatchEvent(new Event('visibilitychange')) };",
    )
    page.locator(".live.on").wait_for()
    opened: list[str] = []
    page.on("request", lambda one: opened.append(one.url) if "events" in one.url else None)
    ended = []
    page.on("requestfailed", lambda one: ended.append(one.url) if "events" in one.url else None)
    page.evaluate("show(false)")
    happens(page, lambda: ended)
    assert (len(opened), len(ended)) == (0, 1)
    conversation = page.evaluate("location.hash.slice(1)")
    body = {"conversation": conversation, "input": "Said meanwhile", "max_output_tokens": 4}
    api(quick.url, "/v1/responses", body)
    page.wait_for_timeout(500)
    assert page.locator(".message.user", has_text="Said meanwhile").count() == 0
    page.evaluate("show(true)")
    page.locator(".message.user", has_text="Said meanwhile").wait_for()
    assert (len(opened), len(ended)) == (1, 1)


def test_a_reply_that_grows_is_drawn_seldom_and_the_messages_before_it_not_at_all(
    server: Any, windows: Callable[..., Any]
) -> None:
    """Measured in elements that are made anew, which does not depend on the machine."""
    page = windows(
        f"{server.url}#{counting(server.url)}",
        settings={"max_output_tokens": "120", "temperature": "0"},
    )
    page.locator(".message.assistant .markdown p").wait_for()
    page.evaluate(
        """() => {
          window.drawn = {growing: 0, others: 0};
          new MutationObserver((all) => {
            const texts = new Set(all.map((one) => one.target).filter((one) => one.matches?.('.markdown')));
            for (const one of texts) window.drawn[one.closest('.growing') ? 'growing' : 'others'] += 1;
          }).observe(document.querySelector('.messages'), {childList: true, subtree: true});
        }"""
    )
    begun = monotonic()
    page.get_by_label("Question", exact=True).fill("Count to 99.")
    page.keyboard.press("Enter")
    page.locator(".growing .assistant .markdown").wait_for()
    settled(page)
    took, drawn = monotonic() - begun, page.evaluate("drawn")
    assert 3 <= drawn["growing"] <= 22 * took
    assert drawn["others"] <= 4  # the question and the reply, once they are in the tree


GROW = """async ({text, steps, wait}) => {
  const [{Markdown}, {h, render}, {Marked}] = await Promise.all(
    ["/web/markdown.js", "/web/vendor/preact.mjs", "/web/vendor/marked.js"].map((one) => import(one)));
  const kept = DOMPurify.sanitize;
  const found = {characters: 0, draws: 0};
  DOMPurify.sanitize = (html, how) => {
    found.characters += html.length;
    return kept.call(DOMPurify, html, how);
  };
  const plain = (element) => element.textContent.replace(/\\s+/g, '');
  const one = document.createElement('div');
  one.innerHTML = kept.call(DOMPurify, new Marked({gfm: true, breaks: true}).parse(text),
    {RETURN_TRUSTED_TYPE: true});
  const drawn = async (texts) => {
    const host = document.createElement('div');
    document.body.append(host);
    for (const one of texts) {
      render(h(Markdown, {text: one}), host);
      await new Promise((done) => setTimeout(done, wait));
    }
    const end = performance.now() + 60_000;  // what is long is drawn some time after it is there
    do await new Promise((done) => setTimeout(done, 300));
    while (!plain(host).endsWith(plain(one)) && performance.now() < end);
    const html = host.querySelector('.markdown').innerHTML;
    render(null, host);
    host.remove();
    return html;
  };
  const begun = performance.now();
  new MutationObserver(() => found.draws += 1).observe(document.body, {childList: true, subtree: true});
  const grown = await drawn(Array.from({length: steps}, (_, one) =>
    text.slice(0, Math.ceil((text.length * (one + 1)) / steps))));
  const counts = {...found, seconds: (performance.now() - begun) / 1000};
  const host = document.createElement('div');
  const html = new Marked({gfm: true, breaks: true}).parse(text);
  host.innerHTML = kept.call(DOMPurify, html, {RETURN_TRUSTED_TYPE: true, FORBID_TAGS: ['input']});
  const whole = await drawn([text]);
  DOMPurify.sanitize = kept;
  return {...counts, grown, whole, parsed: host.innerHTML};
}"""
"""Has the page draw a text as it grows, and at once; `characters`: those that became elements."""


def test_a_long_reply_is_drawn_block_by_block(quick: Any, windows: Callable[..., Any]) -> None:
    """Counted: of 2,000 tokens each is drawn a few times, not once for each that comes after it."""
    page = windows(quick.url)
    page.locator(".live.on").wait_for()
    part = (
        "## A heading\n\nThe *quick* brown fox jumps over the `lazy` dog, and then over another one.\n\n"
        "- one thing\n- another thing\n\n  which goes on\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n"
        "> Somebody said this,\nand did not stop.\n\n1. first\n2. second\n   - below it\n\n"
        "It ends with some more words, so that there is a paragraph of two lines\nhere. [A link](http://x.y)\n\n"
    )
    found = page.evaluate(GROW, {"text": part * 20, "steps": 120, "wait": 20})
    assert found["grown"] == found["whole"] == found["parsed"]
    assert found["characters"] <= 8 * len(found["whole"])
    # One block of that length has to be drawn as a whole, so it is drawn more seldom.
    code = "```python\n" + "for one in range(10):\n    print(one)\n" * 200 + "```\n"
    page.evaluate(GROW, {"text": code, "steps": 1, "wait": 20})  # the colours are there
    found = page.evaluate(GROW, {"text": code, "steps": 120, "wait": 20})
    assert found["grown"] == found["whole"]
    assert "hljs-keyword" in found["grown"]
    assert found["draws"] <= 80 + 6 * found["seconds"]


TEXTS = (
    "A title\n===\n\nthen\nlines  \nand more\n***\n- a\n\n\n- b\n* c\n",
    "- a\n  > quoted\n\n  still a\n    - deep\n\n      deeper\nlazy\n\nout\n",
    "Text\n    not code\n\n1) one\n2) two\n\n\n3. three\n\t- tab\n",
    "a | b\n--|--\n1 | 2\nno table\n\n~~gone~~ **bold\nover lines** <u@x.yz>\r\n\r\nend\r\n",
    "\n\n   \nfirst\n\n[one]: http://a.b\n[one]\n\n- [x] done\n- [ ] open\n",
)


def test_a_text_that_grows_ends_as_the_parser_has_it(
    quick: Any, windows: Callable[..., Any]
) -> None:
    page = windows(quick.url)
    page.locator(".live.on").wait_for()
    for text in TEXTS:
        found = page.evaluate(GROW, {"text": text, "steps": len(text), "wait": 2})
        assert found["grown"] == found["whole"] == found["parsed"]


def test_code_has_colours_in_every_language_that_the_page_has(
    quick: Any, windows: Callable[..., Any]
) -> None:
    languages = sorted(path.stem for path in (WEB / "vendor" / "languages").iterdir())
    code = '"text" 1\n+ a\n# A\n<a b="c">'  # something in it is coloured in each of them
    text = "\n\n".join(f"```{name}\n{code}\n```" for name in [*languages, "ts", "sqlite", "none"])
    made = api(quick.url, "/v1/conversations", {"items": [message("assistant", text)]})["id"]
    page = windows(f"{quick.url}#{made}")
    page.locator(".code").first.wait_for()
    has_colours = (
        "[...document.querySelectorAll('.code')].map((one) => !!one.querySelector('[class^=hljs]'))"
    )
    until(page, f"{has_colours}.filter(Boolean).length >= {len(languages) + 2}")
    assert page.evaluate(has_colours) == [True] * (len(languages) + 2) + [False]


def test_the_page_of_an_installed_wheel_is_whole(
    start_server: Callable[..., Any], windows: Callable[..., Any], tmp_path: Path
) -> None:
    """The server finds no other files than those that were installed."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    root, packages = Path(__file__).parents[2], tmp_path / "packages"
    build = [*pip, "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(root)]
    subprocess.run(build, check=True)  # noqa: S603 - our own
    wheel = next(tmp_path.glob("*.whl"))
    install = [*pip, "install", "--no-deps", "--target", str(packages), str(wheel)]
    subprocess.run(install, check=True)  # noqa: S603 - our own
    installed = start_server(model="reference", packages=packages)
    answered: list[str] = []
    page = windows(installed.url)
    page.on("response", lambda one: answered.append(one.url))
    page.reload()
    page.locator(".live.on").wait_for()
    ask(page, "Hello")
    names = {
        str(path.relative_to(WEB)) for path in WEB.glob("*.*") if path.suffix in {".js", ".css"}
    }
    assert {f"{installed.url}web/{name}" for name in names} <= set(answered)
    # It was this server's own package.
    run = [sys.executable, "-c", "import recollect.server.page as page; print(page.__file__)"]
    environment = {**os.environ, "PYTHONPATH": str(packages)}
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)  # noqa: S603 - our own
    assert Path(done.stdout.strip()).is_relative_to(packages)
    installed.stop()


def test_settings_are_sent_with_what_is_asked(server: Any, windows: Callable[..., Any]) -> None:
    page = windows(server.url, settings={})
    page.locator(".live.on").wait_for()
    page.get_by_role("button", name="Settings").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Model").select_option("smollm2")
    dialog.get_by_label("System prompt of new conversations").fill("You are brief.")
    for name, value in {
        "Temperature": "0.5",
        "Top p": "0.9",
        "Most tokens": "8",
        "Seed": "7",
    }.items():
        dialog.get_by_label(name).fill(value)
    tools = dialog.get_by_label("Tools, as the Responses API takes them")
    tools.fill("{")
    dialog.get_by_role("alert").wait_for()
    tool = {"type": "function", "name": "weather", "parameters": {"type": "object"}}
    tools.fill(json.dumps([tool]))
    assert dialog.get_by_role("alert").count() == 0
    page.keyboard.press("Escape")
    until(page, "!document.querySelector('dialog')")
    page.get_by_label("New conversation").click()
    page.locator(".card.system").wait_for()
    with page.expect_request("**/v1/responses") as asked:  # the reply may be a call, or text
        page.get_by_label("Question", exact=True).fill("Is it warm in Rome?")
        page.keyboard.press("Enter")
    sent = asked.value.post_data_json
    wanted = {
        "model": "smollm2",
        "temperature": 0.5,
        "top_p": 0.9,
        "max_output_tokens": 8,
        "seed": 7,
    }
    assert {name: sent[name] for name in wanted} == wanted
    assert sent["tools"] == [tool]
    assert "You are brief." in page.locator(".card.system").inner_text()


def test_reasoning_is_folded_and_calls_are_seen(quick: Any, windows: Callable[..., Any]) -> None:
    thought = {"type": "reasoning_text", "text": "91 is 7 times 13."}
    call = {"type": "function_call", "call_id": "c", "name": "divide", "arguments": '{"by": 7}'}
    items = [
        message("user", "Is 91 prime?"),
        {"type": "reasoning", "summary": [], "content": [thought]},
        call,
        {"type": "function_call_output", "call_id": "c", "output": "13"},
        message("assistant", "No."),
    ]
    made = api(quick.url, "/v1/conversations", {"items": items})["id"]
    page = windows(f"{quick.url}#{made}")
    page.locator(".message.assistant", has_text="No.").wait_for()
    hidden = page.get_by_text("91 is 7 times 13.")
    assert not hidden.first.is_visible()
    page.get_by_text("Reasoning", exact=True).click()
    assert hidden.first.is_visible()
    assert page.locator(".message.assistant pre", has_text='"by": 7').is_visible()
    assert page.locator(".message.tool pre", has_text="13").is_visible()
    assert page.locator(".card", has_text="Calls divide").count() == 1


def test_search_leads_to_what_was_said_and_a_dropped_file_is_imported(
    quick: Any, windows: Callable[..., Any]
) -> None:
    items = [message("user", "Where do ospreys live?"), message("assistant", "By the water.")]
    made = api(quick.url, "/v1/conversations", {"items": [*items, message("user", "And owls?")]})
    file = api(quick.url, f"/v1/conversations/{made['id']}/export")
    page = windows(quick.url)
    page.locator(".live.on").wait_for()
    page.get_by_label("Search what was said").fill("ospreys")
    page.locator(".hit", has_text="ospreys").first.click()
    page.locator(".card.chosen", has_text="ospreys").wait_for()
    assert page.locator(".message").count() == 1
    before = page.evaluate("location.hash")
    page.evaluate(
        """(text) => {
          const dataTransfer = new DataTransfer();
          dataTransfer.items.add(new File([text], 'one.json'));
          document.querySelector('.tree').dispatchEvent(new DragEvent('drop', {dataTransfer, bubbles: true}));
        }""",
        json.dumps(file),
    )
    until(page, f"location.hash !== {json.dumps(before)}")
    page.locator(".card", has_text="And owls?").wait_for()
    for number, text in enumerate(["no", "", "null", "[]", "3", '{"a": 1}']):
        page.evaluate(
            """([name, text]) => {
              const dataTransfer = new DataTransfer();
              dataTransfer.items.add(new File([text], name));
              dispatchEvent(new DragEvent('drop', {dataTransfer}));
            }""",
            [f"{number}.json", text],
        )
        told = f"{number}.json is no exported conversation"
        page.locator(".notice.error", has_text=told).wait_for()


def test_what_going_on_would_cost_is_told_before_and_is_what_it_costs(
    server: Any, windows: Callable[..., Any]
) -> None:
    """With where each message is: in memory, on disk, not kept; by edges of cards, and in numbers."""
    hello = {"messages": [message("user", "Hello.")], "max_tokens": 4}
    api(
        server.url, "/v1/chat/completions", hello
    )  # before a model has spoken, nobody knows its speed
    words = " ".join(f"word-{number}" for number in range(60))
    said = [message("user", f"Remember: {words}"), message("assistant", f"I do: {words}")]
    page = windows(f"{server.url}#{api(server.url, '/v1/conversations', {'items': said})['id']}")
    chosen = page.locator(".card.chosen.assistant")
    chosen.wait_for()

    def told() -> Json:
        """Return what the server says of the chosen message, once the page shows it."""
        for _ in range(100):
            node = tree_of(server.url, page)["nodes"][1]
            going = node["going_on"]
            shown = page.locator(".going").inner_text()
            is_shown = f"{going['to_compute']:,} token" in shown and going["seconds"] is not None
            edge = f"warm-{node['warmth']}" in chosen.get_attribute("class")
            if (
                is_shown
                and edge
                and f"{going['to_compute']:,} token" in chosen.get_attribute("title")
            ):
                assert re.search(r"\d (ms|s)$", chosen.locator(".card-cost").inner_text())
                return {**going, "warmth": node["warmth"]}
            page.wait_for_timeout(100)
        raise AssertionError((node, shown))

    before = told()
    assert (before["warmth"], before["on_disk"]) == ("none", 0)
    assert before["in_memory"] < 50  # what the template begins with, from other conversations
    assert before["to_compute"] > 200
    ask(page, "Say one.")
    usage = tree_of(server.url, page)["nodes"][-1]["usage"]
    assert 0 < usage["computed_tokens"] - before["to_compute"] < 30  # the question
    page.locator(".card.assistant").first.click()
    after = told()
    assert (after["warmth"], after["to_compute"]) == ("memory", 0)


def test_memory_tells_what_the_server_keeps_and_what_that_has_saved(
    server: Any, windows: Callable[..., Any]
) -> None:
    page = windows(server.url)
    fresh(page)
    ask(page, "Name a bird.")
    ask(page, "Name a fish.")
    page.get_by_label("Make a checkpoint here").click()
    page.get_by_label("Its name").fill("pinned")
    page.keyboard.press("Enter")
    page.locator(".labels .checkpoint", has_text="pinned").wait_for()
    page.get_by_role("button", name="Memory").click()
    row = page.locator(".memory tbody tr", has_text="Name a bird.").first
    row.wait_for()
    page.get_by_label("Read anew").click()
    kv = api(server.url, "/v1/kv")
    here = page.evaluate("location.hash.slice(1)")
    (held,) = [one["branches"]["main"] for one in kv["data"] if one["id"] == here]
    numbers = [f"{held[name]:,}" for name in ("in_memory", "on_disk")]
    happens(page, lambda: row.locator("td.number").all_inner_texts()[:2] == numbers, numbers)
    page.get_by_text("1 checkpoint: pinned").wait_for()
    assert f"{kv['saved']['tokens']:,}" in page.locator(".figure").first.inner_text()
    assert kv["saved"]["tokens"] > 0
    assert page.locator(".figure", has_text="tokens in memory of").count() == len(kv["models"])
    nexts = page.locator(".nexts li").all_inner_texts()
    assert [int(re.sub(r"\D.*", "", one.replace(",", ""))) for one in nexts] == [
        one["tokens"] for one in kv["evicted_next"]
    ]
    row.get_by_role("button", name="Name a bird.").click()
    until(page, "!document.querySelector('section.memory')")


def test_hands_move_the_tree_and_the_look_stays_as_one_has_it(
    quick: Any, windows: Callable[..., Any]
) -> None:
    page = windows(f"{quick.url}#{counting(quick.url)}", color_scheme="light")
    page.locator(".card").nth(1).wait_for()
    drawn(page)
    box = page.get_by_role("tree").bounding_box()
    before = page.locator(".card").first.bounding_box()
    page.mouse.move(box["x"] + 30, box["y"] + 30)
    page.mouse.down()
    page.mouse.move(box["x"] + 80, box["y"] + 70, steps=3)
    page.mouse.up()
    drawn(page)
    after = page.locator(".card").first.bounding_box()
    assert (round(after["x"] - before["x"]), round(after["y"] - before["y"])) == (50, 40)
    page.locator(".card").first.hover()
    page.get_by_label("Fold what follows").click()
    page.locator(".fold.folded", has_text="+1").click()
    page.locator(".card").nth(1).wait_for()

    themes = "[document.documentElement.dataset.theme, getComputedStyle(document.body).colorScheme]"
    assert page.evaluate(themes) == ["light", "light"]
    page.get_by_label("Light or dark").click()
    until(page, f"{themes}.join() === 'dark,dark'")
    page.reload()
    page.locator(".card").nth(1).wait_for()
    assert page.evaluate(themes) == ["dark", "dark"]


def test_code_is_copied_without_what_is_around_it(quick: Any, windows: Callable[..., Any]) -> None:
    text = "Words.\n\n```python\nif a < b:\n    print('&amp;')\n```\n"
    items = {"items": [message("assistant", text)]}
    page = windows(f"{quick.url}#{api(quick.url, '/v1/conversations', items)['id']}")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator(".code").get_by_role("button", name="Copy", exact=True).click()
    # It says "Copied" for a moment only, so what counts is looked at.
    copied = "if a < b:\n    print('&amp;')"
    happens(page, lambda: page.evaluate("navigator.clipboard.readText()") == copied)


def test_how_far_a_long_prompt_is_read_is_shown(server: Any, windows: Callable[..., Any]) -> None:
    page = windows(server.url)
    fresh(page)
    words = " ".join(f"word-{number}" for number in range(400))
    page.evaluate(  # it may be gone before it is looked for from here
        """() => {
          window.read = [];
          new MutationObserver(() => {
            const one = document.querySelector('.reading progress');
            if (one) read.push([one.value, one.max, one.parentElement.innerText]);
          }).observe(document.querySelector('.messages'), {childList: true, subtree: true, attributes: true});
        }"""
    )
    page.get_by_label("Question", exact=True).fill(f"Which is the last of these? {words}")
    page.keyboard.press("Enter")
    until(page, "read.length > 0")
    page.locator(".message.assistant .reuse").wait_for()
    for value, most, told in page.evaluate("read"):
        assert 0 <= value <= most
        assert most > 1000
        assert told.strip().endswith(f"of {most:,} tokens read")


def test_what_was_saved_is_told_by_the_engines_own_measure(
    quick: Any, windows: Callable[..., Any]
) -> None:
    """Not by the first prompt after a start, which takes many times as long as others."""
    page = windows(quick.url)
    page.locator(".live.on").wait_for()
    speeds = page.evaluate(
        """async () => {
          const [state, {readTree}] = await Promise.all(
            ["/web/state.js", "/web/tree.js"].map((one) => import(one)));
          const said = (id, parent_id, usage, going_on) =>
            ({id, parent_id, role: "assistant", items: [], usage, going_on});
          const first = said("1", null, {prefill_tps: 16}, {to_compute: 0, on_disk: 0, seconds: 0});
          const second = said("2", "1", {prefill_tps: 70}, {to_compute: 6, on_disk: 0, seconds: 0.03});
          const ahead = {prefill_tps: 9e9, read_ahead_tokens: 5};
          const third = said("3", "2", ahead, {to_compute: 9, on_disk: 64, seconds: 0.001});
          return [[], [first], [first, second, third]].map((nodes) => {
            state.tree.value = readTree({id: "one", nodes, tips: {}, checkpoints: {}});
            return state.readingSpeed.value;
          });
        }"""
    )
    assert speeds[:2] == [None, 16]
    assert speeds[2] == pytest.approx(200)


def test_words_that_differ_are_marked_with_the_space_between_them(
    quick: Any, windows: Callable[..., Any]
) -> None:
    page = windows(quick.url)
    sides = page.evaluate(
        """async () => {
          const {differences, sideOf} = await import("/web/differences.js");
          const runs = differences("one two, three four", "five six, three");
          return ["less", "more"].map((kind) => sideOf(runs, kind).map((run) => [run.kind, run.text]));
        }"""
    )
    assert sides == [
        [["less", "one two"], ["same", ", three"], ["less", " four"]],
        [["more", "five six"], ["same", ", three"]],
    ]


def test_what_cannot_be_tried_is_told_before_it_is_asked(
    quick: Any, windows: Callable[..., Any]
) -> None:
    page = windows(f"{quick.url}#{counting(quick.url)}")
    page.locator(".message.assistant .markdown").wait_for()
    asked: list[str] = []
    page.on("request", lambda one: asked.append(one.url) if "/explore" in one.url else None)
    page.get_by_role("button", name="Explore").click()
    page.get_by_label("The question", exact=True).fill("Name a lake.")
    heats = page.get_by_label("Temperatures")
    for value, is_right in {
        **dict.fromkeys(["", "0", "2", "2.0", ".5", "0.2, 0.9", "1; 1.5 0.25,"], True),
        **dict.fromkeys(["5", "2.1", "1.2.3", "-1", "1e9", "warm", "0.2, 12"], False),
    }.items():
        heats.fill(value)
        assert heats.evaluate("(one) => one.validity.valid") == is_right, value
    page.get_by_role("button", name="Try them").click()
    heats.fill("")
    page.get_by_text("Several questions, one a line").click()
    page.get_by_label("The questions", exact=True).fill("Why?\n" * 9)
    page.get_by_role("button", name="Try them").click()
    page.locator(".notice.error", has_text="At most 8 questions").wait_for()
    assert asked == []


def test_the_browsers_back_leads_to_the_conversation_before(
    quick: Any, windows: Callable[..., Any]
) -> None:
    made = counting(quick.url)
    page = windows(f"{quick.url}#{made}")
    page.locator(".message.assistant .markdown").wait_for()
    fresh(page)
    # One that has nothing to say yet takes an example, and asks it.
    page.get_by_role("button", name="Plan a weekend").click()
    page.keyboard.press("Enter")
    page.locator(".message.user", has_text="Plan a weekend").wait_for()
    settled(page)
    other = page.evaluate("location.hash")
    page.go_back()
    page.locator(".message.user", has_text="Count to 99.").wait_for()
    assert page.evaluate("location.hash") == f"#{made}"
    page.go_forward()
    page.locator(".message.user", has_text="Plan a weekend").wait_for()
    assert page.evaluate("location.hash") == other


def test_several_questions_are_tried_together(quick: Any, windows: Callable[..., Any]) -> None:
    page = windows(f"{quick.url}#{counting(quick.url)}")
    page.locator(".message.assistant").wait_for()
    page.get_by_role("button", name="Explore").click()
    page.get_by_text("Several questions, one a line").click()
    page.get_by_label("The questions", exact=True).fill(
        "What is a fish?\nWhat is a bird?\n\nAnd a cow?"
    )
    page.get_by_role("button", name="Try them").click()
    page.get_by_role("button", name="Keep this").nth(2).wait_for()
    heads = page.locator(".way header b").all_inner_texts()
    assert heads == ["What is a fish?", "What is a bird?", "And a cow?"]
    assert set(tree_of(quick.url, page)["tips"]) == {
        "main",
        "what-is-a-fish",
        "what-is-a-bird",
        "and-a-cow",
    }
    page.get_by_role("button", name="Keep this").nth(1).click()
    page.locator(".message.user", has_text="What is a bird?").wait_for()


def test_the_legend_does_not_cover_what_is_chosen(quick: Any, windows: Callable[..., Any]) -> None:
    made = large(quick.url, [None, *range(1, 9)], tip=9)
    page = windows(f"{quick.url}#{made}", viewport={"width": 360, "height": 780})
    page.get_by_role("button", name="Tree", exact=True).click()
    for key in ["", "Home", "End", "0"]:
        if key:
            page.get_by_role("tree").press(key)
        page.locator(".card.chosen").wait_for()
        drawn(page)
        card, legend = (page.locator(one).bounding_box() for one in (".card.chosen", ".legend"))
        assert card["y"] + card["height"] <= legend["y"], key


def test_what_is_opened_leaves_nothing_behind(quick: Any, windows: Callable[..., Any]) -> None:
    """Listeners and elements after a hundred conversations are those after four."""
    lonely = api(quick.url, "/v1/conversations", {"items": [message("user", "Hello")]})["id"]
    made = [counting(quick.url), lonely]  # of two messages, and of one
    page = windows(f"{quick.url}#{made[0]}")
    page.locator(".message.assistant").wait_for()
    tools = page.context.new_cdp_session(page)
    tools.send("Performance.enable")
    tools.send("HeapProfiler.enable")

    def kept(openings: int) -> dict[str, float]:
        for number in range(openings):
            page.evaluate(f"location.hash = '{made[(number + 1) % 2]}'")
            until(page, f"document.querySelectorAll('.message').length === {1 + number % 2}")
        tools.send("HeapProfiler.collectGarbage")
        found = tools.send("Performance.getMetrics")["metrics"]
        return {one["name"]: one["value"] for one in found}

    before, after = kept(4), kept(100)
    assert after["JSEventListeners"] <= before["JSEventListeners"] + 20
    assert after["Nodes"] <= before["Nodes"] + 200


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
    page.get_by_label("Make a checkpoint here").click()
    page.get_by_label("Its name").fill("middle")
    page.get_by_role("button", name="Keep").click()
    page.locator(".labels .checkpoint", has_text="middle").wait_for()
    until(page, "!document.querySelector('.labels .branch')?.textContent.includes('middle')")
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
    page.get_by_label("Temperatures").fill("0.2, 0.9")
    with page.expect_request("**/explore") as asked:
        page.get_by_role("button", name="Try them").click()
    ways = asked.value.post_data_json["branches"]
    assert [one["temperature"] for one in ways] == [0.2, 0.9, 0.2, 0.9]
    assert len({one["seed"] for one in ways}) == 4
    page.get_by_role("button", name="Keep this").nth(3).wait_for()
    found = tree_of(server.url, page)
    question = [node for node in found["nodes"] if node["role"] == "user"][-1]
    assert sum(node["parent_id"] == question["id"] for node in found["nodes"]) == 4
    boxes = page.locator(".way input[type=checkbox]")
    boxes.nth(0).check()
    boxes.nth(2).check()
    page.get_by_role("button", name="Compare two").click()
    assert "3 messages in common" in page.locator(".compare").inner_text()
    # Replies are drawn: one of the two may have all that the other says, and more.
    assert page.locator("mark.less, mark.more").count() > 0
    page.get_by_role("button", name="Explore").click()
    page.get_by_role("button", name="Keep this").nth(1).click()
    until(page, "!document.querySelector('.explore')")
    until(page, "document.querySelector('.head-title .hint').textContent.includes('2 branches')")
    # The others are folded away; one that is gone to is seen, and all are once a person wants that.
    page.locator(".fold.folded", has_text="+3").wait_for()
    assert page.locator(".card.assistant").count() == 2
    page.get_by_label("The next one").last.click()
    page.locator(".fold.folded", has_text="+2").wait_for()
    assert page.locator(".card.assistant").count() == 3
    page.locator(".fold.folded").click()
    page.locator(".card.assistant").nth(4).wait_for()


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
    keyed = start_server("--api-key", "rk-right", model="reference")
    page = windows(keyed.url)
    page.get_by_label("Key").fill("ключ")  # which no header can carry
    page.get_by_role("button", name="Go on").click()
    page.get_by_text("does not take that key").wait_for()
    page.reload()
    page.get_by_text("does not take that key").wait_for()
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

    # A key that is taken away while the page is open is asked for anew, and another is another's.
    page.get_by_label("Question", exact=True).fill("Not yet asked")
    keyed.stop()
    keyed.start("--model", "reference", "--api-key", "rk-other")
    page.get_by_text("does not take that key").wait_for()
    page.get_by_label("Key").fill("rk-other")
    page.get_by_role("button", name="Go on").click()
    page.locator(".welcome").wait_for()
    assert page.locator(".entry").count() == 0
    assert page.get_by_label("Question", exact=True).input_value() == "Not yet asked"
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
    until(
        page,
        "(all => all.length === 4 && all.every((one) => one.innerText.includes('onerror')))"
        "([...document.querySelectorAll('.message .markdown')].filter((one) => one.innerHTML))",
    )
    page.get_by_role("button", name="Compare").click()
    page.locator(".side:not(.none)").first.wait_for()
    page.get_by_label("Search what was said").fill("hacked")
    page.locator(".hit", has_text="onerror").first.wait_for()
    page.evaluate(  # what an error names
        """(name) => {
          const dataTransfer = new DataTransfer();
          dataTransfer.items.add(new File(['no'], name));
          dispatchEvent(new DragEvent('drop', {dataTransfer}));
        }""",
        HOSTILE,
    )
    page.locator(".notice", has_text="onerror").wait_for()
    drawn(page)
    assert page.evaluate("window.hacked") is None
    assert page.locator(".hit img, .hit script, .notice img, .notice script").count() == 0
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
    quick: Any, windows: Callable[..., Any], modules: Path, tmp_path: Path, theme: str, width: int
) -> None:
    """No serious finding of axe, in any view, and nothing is wider than the window."""
    kept = api(quick.url, "/v1/conversations", {})["id"]
    asked = {"input": "Why is the sky blue?", "conversation": kept, "max_output_tokens": 16}
    api(quick.url, "/v1/responses", asked)
    how = {"color_scheme": theme, "bypass_csp": True}
    page = windows(f"{quick.url}#{kept}", viewport={"width": width, "height": 860}, **how)
    page.locator(".message").first.wait_for()
    assert page.locator(".head-title").bounding_box()["width"] >= 180  # some words of it are seen
    page.add_script_tag(path=modules / "axe-core" / "axe.min.js")
    views = ["Explore", "Compare", "Memory", "Settings"]
    if width < 760:
        page.get_by_role("button", name="Tree", exact=True).click()
    for view in [None, *views]:
        if view is not None:
            page.get_by_role("button", name=view, exact=True).click()
            page.locator(
                {"Memory": ".memory-body", "Settings": "dialog"}.get(view, ".over")
            ).wait_for()
            drawn(page)
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


def drawn_by_keys(page: Any) -> list[int]:
    """Return how many elements the tree has after each of the keys that move it."""
    frame = page.get_by_role("tree")
    counts = []
    for key in ["", "ArrowDown", "ArrowRight", "End", "Home", "-", "-", "-", "-", "0", "+"]:
        if key:
            frame.press(key)
        drawn(page)
        counts.append(page.locator(".tree-frame *").count())
    return counts


def test_a_large_tree_is_drawn_in_few_elements_and_moved_by_keys(
    quick: Any, windows: Callable[..., Any]
) -> None:
    parents = [
        None if number == 1 else number - 1 if number % 10 else max(1, number // 3)
        for number in range(1, 2001)
    ]
    made = large(quick.url, parents, tip=1)
    page = windows(f"{quick.url}#{made}")
    page.locator(".card").first.wait_for()
    frame = page.get_by_role("tree")
    assert max(drawn_by_keys(page)) <= MOST_ELEMENTS
    assert "2,000 messages" in page.locator(".head-title").inner_text()
    # What is folded is not drawn, and a dot leads to its message.
    frame.press("0")
    frame.press("Home")
    frame.press(" ")
    page.locator(".fold.folded", has_text="+1999").wait_for()


def test_ten_thousand_messages_are_seen_before_all_are_read(
    quick: Any, windows: Callable[..., Any]
) -> None:
    """Counted: requests, elements, and messages of the path; the path here is some 9,900 messages long."""
    parents = [
        None if number == 1 else number - 1 if number % 100 else number - 2
        for number in range(1, 10_001)
    ]
    made = large(quick.url, parents, tip=9999)
    page = windows(f"{quick.url}#{counting(quick.url)}")  # by itself it would open the newest one
    page.locator(".card").first.wait_for()
    page.locator(".live.on").wait_for()
    read: list[str] = []
    waiting: list[Any] = []
    page.on("request", lambda one: read.append(one.url) if "/tree" in one.url else None)
    page.route(re.compile("after="), lambda route: waiting.append(route))  # noqa: PLW0108 - as above
    page.evaluate(f"location.hash = '{made}'")
    until(
        page, "(document.querySelector('.dots')?.getAttribute('d') ?? '').split('M').length > 1900"
    )
    assert "2,000 messages so far" in page.locator(".head-title").inner_text()
    assert page.locator(".tree-frame *").count() <= MOST_ELEMENTS
    happens(page, lambda: len(read) == 2)  # the next page has been asked for
    assert page.locator(".card").count() == 0

    def is_read() -> bool:
        while waiting:
            waiting.pop().continue_()
        return bool(page.locator(".card").count())

    happens(page, is_read)
    page.locator(".card.chosen", has_text="Message 9999").wait_for()
    assert "10,000 messages, 1 branch" in page.locator(".head-title").inner_text()
    assert page.locator(".message").count() <= 60
    assert max(drawn_by_keys(page)) <= MOST_ELEMENTS
    assert len(read) == 5


def test_the_view_glides_and_ends_where_a_person_moves_it(
    quick: Any, windows: Callable[..., Any]
) -> None:
    page = windows(
        f"{quick.url}#{counting(quick.url)}", reduced_motion="no-preference", has_touch=True
    )
    page.locator(".card").nth(1).wait_for()
    drawn(page)
    page.evaluate(
        """() => {
          window.scales = [];
          const cards = document.querySelector('.cards');
          const scale = () => Number(/scale\\((.*)\\)/.exec(cards.style.transform)[1]);
          new MutationObserver(() => scales.push(scale())).observe(cards, {attributeFilter: ['style']});
        }"""
    )
    frame = page.get_by_role("tree")
    frame.press("-")
    until(page, "scales.at(-1) < 0.7701 && scales.at(-1) > 0.7691")
    gone = page.evaluate("scales")
    assert gone == sorted(gone, reverse=True)
    # A wheel in the middle of a glide: it goes on from there, and the glide does not.
    box = frame.bounding_box()
    page.mouse.move(box["x"] + 40, box["y"] + 40)
    before = page.evaluate(
        """() => {
          document.querySelector('.tree-frame').dispatchEvent(
            new KeyboardEvent('keydown', {key: '-', bubbles: true}));
          document.querySelector('.tree-frame').dispatchEvent(
            new WheelEvent('wheel', {deltaY: -200, clientX: 400, clientY: 400, bubbles: true}));
          return new Promise((done) => setTimeout(() => done(scales.at(-1)), 400));
        }"""
    )
    assert before > gone[-1]
    # A finger that taps twice looks closer.
    for _ in range(2):
        page.touchscreen.tap(box["x"] + 40, box["y"] + 40)
    until(page, f"scales.at(-1) > {before}")


def test_laying_out_a_long_conversation_takes_steps_by_its_length(
    quick: Any, windows: Callable[..., Any]
) -> None:
    """Counted: how often the library sets a height, and names of branches are gone through."""
    page = windows(quick.url)
    page.locator(".live.on").wait_for()
    counts = page.evaluate(
        """async () => {
          const [{layout, readTree, branchesAt}, {hierarchy}] =
            await Promise.all([import("/web/tree.js"), import("/web/vendor/d3-hierarchy.mjs")]);
          const found = {heights: 0, names: 0, places: 0, standing: 0};
          Object.defineProperty(hierarchy.prototype, "height", {
            get() { return this.kept },
            set(value) { found.heights += 1; this.kept = value },
          });
          const size = 5000;
          const nodes = [...Array(size)].map((_, number) => ({
            id: `${number}`, parent_id: number ? `${number - 1}` : null, role: "user", items: [],
          }));
          const names = Object.fromEntries(nodes.map(({id}) => [`branch-${id}`, id]));
          const tips = new Proxy(names, {
            get(all, name) { found.names += 1; return all[name] },
          });
          const tree = readTree({id: "one", nodes, tips, checkpoints: {}});
          const places = layout(tree, new Set());
          found.places = places.size;
          found.last = places.get(`${size - 1}`).y - places.get("0").y;
          for (const {id} of nodes) found.standing += branchesAt(tree, id).length;
          return found;
        }"""
    )
    assert counts["places"] == counts["standing"] == 5000
    assert counts["last"] == 4999 * 122
    assert counts["heights"] <= 2 * 5001
    assert counts["names"] <= 2 * 5000
