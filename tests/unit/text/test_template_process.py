"""A template takes what it is given: time, memory, length; and what it renders is Jinja's."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any

import psutil
import pytest

from recollect.errors import TemplateError
from recollect.text.template import (
    MOST_PROCESSES,
    MOST_SOURCE,
    Bounds,
    ChatTemplate,
    TemplateProcesses,
)
from recollect.types import Message

HELLO: list[Message] = [{"role": "user", "content": "Hi"}]
# Time is short only where it is what is tested: the machine may have other work.
PATIENT = Bounds(seconds=60.0, memory_bytes=256 << 20, text_bytes=8 << 20)
HASTY = replace(PATIENT, seconds=5.0)


@pytest.fixture(scope="module")
def process() -> Iterator[TemplateProcesses]:
    process = TemplateProcesses(PATIENT)
    yield process
    process.close()


@pytest.fixture(scope="module")
def hasty() -> Iterator[TemplateProcesses]:
    hasty = TemplateProcesses(HASTY)
    yield hasty
    hasty.close()


def rendered(source: str, process: TemplateProcesses, messages: list[Message] | None = None) -> str:
    template = ChatTemplate(source, processes=process)
    return template.render(messages or HELLO, add_generation_prompt=True)


TOO_LONG, TOO_MUCH, TOO_LARGE = "takes longer", "takes more memory", "its text is larger"
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLED = "{% set ns = namespace(x=['x']) %}{% for i in range(40) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"


def _takes_long(source: str, bound: str | None) -> Any:
    """Return the parameters of a test that waits until the time is up."""
    return pytest.param(source, bound, marks=pytest.mark.slow)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("source", "bound"),
    [
        _takes_long(ENDLESS, TOO_LONG),
        _takes_long("{{ 10 ** (10 ** 8) }}", TOO_LONG),
        _takes_long("{% set x = 10 ** 7 %}{{ (10 ** x) // 3 }}", TOO_LONG),
        ("{{ 'x' * 10 ** 10 }}", TOO_MUCH),
        ("{% set n = messages | length * 10 ** 10 %}{{ 'x' * n }}", TOO_MUCH),
        ("{{ 'x' | center(2000000000) }}", TOO_MUCH),
        ("{{ 'x'.ljust(2000000000) }}", TOO_MUCH),
        ("{{ '%2000000000d' % 1 }}", TOO_MUCH),
        ("{{ '{:>2000000000}'.format(1) }}", TOO_MUCH),
        ("{{ ('x' * 99999).replace('x', 'x' * 99999) }}", TOO_MUCH),
        ("{{ {'x': 1} | tojson(indent=2000000000) }}", TOO_MUCH),
        ("{% set ns = namespace(x='x') %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}"
         "{% endfor %}{{ ns.x }}", TOO_MUCH),
        _takes_long(DOUBLED + "{{ ns.x }}", None),
        _takes_long(DOUBLED + "{{ ns.x == ns.x + [1] }}{{ ns.x | tojson }}", None),
        _takes_long("{% for i in range(9999) %}{{ lipsum(n=99, html=false) }}{% endfor %}", None),
        ("{{ 'x' * (9 * 1024 * 1024) }}", TOO_LARGE),
        _takes_long("{% for i in range(99999) %}{{ 'x' * 200 }}{% endfor %}", None),
    ],
)  # fmt: skip
def test_what_goes_beyond_a_bound_is_refused(
    source: str, bound: str | None, process: TemplateProcesses, hasty: TemplateProcesses
) -> None:
    """The next template is rendered as if nothing had been; None: it depends which bound is first."""
    chosen = process if bound in (TOO_MUCH, TOO_LARGE) else hasty
    with pytest.raises(TemplateError, match=f"{TOO_LONG}|{TOO_MUCH}|{TOO_LARGE}") as refusal:
        rendered(source, chosen)
    assert (bound or "") in str(refusal.value)
    assert rendered("{{ messages[0].content }}", chosen) == "Hi"


@pytest.mark.slow
def test_what_takes_too_long_is_refused() -> None:
    """That the next one is rendered all the same is shown where there is time to start a process."""
    processes = TemplateProcesses(replace(PATIENT, seconds=0.3))
    with pytest.raises(TemplateError, match=f"{TOO_LONG} than 0.3 s"):
        rendered(ENDLESS, processes)
    processes.close()


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "source",
    [
        "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{{ 1" + " + 1" * 50_000 + " }}",
        "{% for a in [1] %}" * 30 + "{% endfor %}" * 30,
        "{% if true %}" * 2000 + "{% endif %}" * 2000,
        "x" * (MOST_SOURCE + 1),
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ range(100001) }}",
        "{{ 1 / 0 }}{{ none + 1 }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{% extends 'x' %}",
    ],
)
def test_what_cannot_be_rendered_is_refused_in_a_sentence(
    source: str, process: TemplateProcesses
) -> None:
    with pytest.raises(TemplateError, match="chat template"):
        rendered(source, process)


def test_own_templates_and_those_of_strangers_are_rendered_alike(
    process: TemplateProcesses,
) -> None:
    source = (
        "{{ strftime_now('%d %b %Y %Z %z') }}|{{ messages[0].content }}|{{ messages | tojson }}|"
        "{{ messages[0] }}|{{ bos_token is defined }}|{{ tools }}|{{ 1.0 }}|{{ none }}|{{ true }}"
        "{# <tool_call> #}"
    )
    said: list[Message] = [{"role": "user", "content": "naïve 🎉 \ud800 \x00 </s>"}]
    now = datetime(2026, 11, 26, 23, 59, tzinfo=timezone(timedelta(hours=-8), "PST"))
    templates = [
        ChatTemplate(source, now=now, processes=process),
        ChatTemplate(source, now=now, is_own=True),
        ChatTemplate(source, now=now.replace(tzinfo=None), processes=process),
    ]
    foreign, own, without_zone = (
        template.render(said, add_generation_prompt=True, tools=[{"name": "é", "n": 1}])
        for template in templates
    )
    assert foreign == own
    assert foreign.startswith("26 Nov 2026 PST -0800|naïve 🎉 \ud800 \x00 </s>|")
    assert without_zone.startswith("26 Nov 2026  |")


def renderers() -> set[int]:
    """Return the processes that render templates for this one."""
    return {
        child.pid
        for child in psutil.Process().children()
        if child.status() != psutil.STATUS_ZOMBIE and "template_engine" in "".join(child.cmdline())
    }


@pytest.mark.slow
def test_many_threads_each_get_their_own_text(process: TemplateProcesses) -> None:
    template = ChatTemplate("{{ messages[0].content }}", processes=process)
    others = renderers()  # of other tests
    wrong: list[str] = []

    def ask(who: str) -> None:
        for number in range(50):
            said: list[Message] = [{"role": "user", "content": f"{who} {number}"}]
            text = template.render(said, add_generation_prompt=True)
            if text != f"{who} {number}":
                wrong.append(text)

    threads = [threading.Thread(target=ask, args=(str(n),)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert 1 <= len(renderers() - others) <= MOST_PROCESSES


@pytest.mark.slow
def test_a_slow_template_keeps_nobody_else_waiting() -> None:
    others = renderers()
    processes = TemplateProcesses(Bounds(seconds=600.0))
    quick = ChatTemplate("{{ messages[0].content }}", processes=processes)
    slow = ChatTemplate(ENDLESS, processes=processes)
    refusals: list[TemplateError] = []

    def ask() -> None:
        try:
            slow.render(HELLO, add_generation_prompt=True)
        except TemplateError as refusal:
            refusals.append(refusal)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    texts = set()
    while len(renderers() - others) < 2:  # until one has the slow template, and one is free
        texts.add(quick.render(HELLO, add_generation_prompt=True))
    texts.add(quick.render(HELLO, add_generation_prompt=True))
    assert texts == {"Hi"}
    assert refusals == []
    processes.close()  # the free one
    for busy in renderers() - others:
        os.kill(busy, signal.SIGKILL)
    thread.join(timeout=60)
    assert "crashed" in str(refusals[0])


def test_a_process_that_is_gone_is_replaced(process: TemplateProcesses) -> None:
    """Also one that met so many other templates that it has forgotten this one."""
    template = ChatTemplate("{{ messages[0].content }}", processes=process)
    process.close()
    assert template.render(HELLO, add_generation_prompt=True) == "Hi"
    for number in range(40):
        ChatTemplate(f"{number}", processes=process)
    assert template.render(HELLO, add_generation_prompt=True) == "Hi"


@pytest.mark.slow
def test_it_ends_with_the_program_that_started_it(tmp_path: object) -> None:
    """Also where that is killed: nobody is left behind."""
    program = (
        "import os, psutil\n"
        "from recollect.text.template import ChatTemplate\n"
        "ChatTemplate('x')\n"
        "print(*(child.pid for child in psutil.Process().children()), flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run(  # noqa: S603 - our own interpreter
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    (child,) = map(int, done.stdout.split())
    waited = threading.Event()
    for _ in range(200):
        try:
            with open(f"/proc/{child}/stat") as file:  # noqa: PTH123 - it may go while it is read
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return
        except OSError:
            return
        waited.wait(0.05)
    raise AssertionError(f"process {child} is still there")


def test_what_it_is_told_is_not_in_its_arguments_and_it_writes_no_file(
    process: TemplateProcesses,
) -> None:
    if not os.path.isdir("/proc"):  # noqa: PTH112 - a question, not a path of ours
        pytest.skip("reads /proc")
    rendered("secret {{ messages[0].content }}", process)
    children = [
        child
        for child in psutil.Process().children()
        if "template_engine" in "".join(child.cmdline())
    ]
    assert children
    for child in children:
        assert "secret" not in "".join(child.cmdline())
        with open(f"/proc/{child.pid}/limits") as file:  # noqa: PTH123 - as above
            limits = file.read()
        assert "Max file size             0 " in limits
        assert "Max core file size        0 " in limits
