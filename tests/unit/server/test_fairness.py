"""One key's flood, and what others wait for; counted in forward passes."""

import gc
import io
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from itertools import count
from typing import Any

import httpx
import pytest

from recollect.conversation.model import Model
from recollect.engine.decoder import Task
from recollect.engine.engine import Engine
from recollect.errors import RuntimeFailure
from recollect.runtime.base import Pace, PassResult, ReferenceRuntime, Row
from recollect.server.access import namespace_of
from recollect.server.settings import Limits

Json = dict[str, Any]
Until = Callable[[Callable[[], bool]], None]
WAIT_S = 60  # for what takes milliseconds: a test that would hang fails instead
SHARED_CHUNK = Pace().shared_chunk
SHORT, LONG = "short", "of three chunks " * (3 * SHARED_CHUNK // 16)
LIMITS = Limits(concurrent=4, queue=16, shutdown_s=5)


class Gate:
    """Holds forward passes of the reference runtime while it is shut, and notes what they feed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passes: list[list[Row]] = []
        self._open = threading.Event()
        forward = ReferenceRuntime.forward

        def gated(runtime: ReferenceRuntime, rows: Sequence[Row]) -> PassResult:
            self.passes.append(list(rows))
            assert self._open.wait(3 * WAIT_S)
            result: PassResult = forward(runtime, rows)
            return result

        monkeypatch.setattr(ReferenceRuntime, "forward", gated)

    def open(self) -> None:
        self._open.set()

    def computed(self, prompt: list[int]) -> int:
        """Return the number of the pass that computed the last token of a prompt."""
        return next(
            number
            for number, rows in enumerate(self.passes)
            for row in rows
            if row.past + len(row.token_ids) == len(prompt)
            and list(row.token_ids) == prompt[row.past :]
        )


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """Return a gate that is shut until a test opens it."""
    gate = Gate(monkeypatch)
    yield gate
    gate.open()


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> list[Task]:
    """Return the tasks that engines were given, in order."""
    tasks: list[Task] = []
    submit = Engine.submit

    def noting(engine: Engine, task: Task) -> None:
        submit(engine, task)
        tasks.append(task)

    monkeypatch.setattr(Engine, "submit", noting)
    return tasks


def in_background(stack: ExitStack, work: Callable[[], object], count: int = 1) -> None:
    """Run something in threads, which have ended when the stack is closed."""

    def run() -> None:
        with suppress(httpx.HTTPError):
            work()

    for _ in range(count):
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        stack.callback(thread.join, WAIT_S)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "prompt"),
    [
        ("chat/completions", SHORT),
        ("prewarm", LONG),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("completions", SHORT),
                ("prewarm", SHORT),
                ("chat/completions", LONG),
                ("completions", LONG),
            )
        ),
    ],
)
def test_two_hundred_requests_of_one_key_cost_another_one_running_pass_and_its_own_prompt(
    start: Callable[..., httpx.Client],
    make_model: Callable[..., Model],
    gate: Gate,
    submitted: list[Task],
    until: Until,
    path: str,
    prompt: str,
) -> None:
    model = make_model(num_blocks=2048)
    other = start(load=lambda _: model, keys=["other", "flood"], limits=LIMITS)
    headers = {"Authorization": "Bearer flood"}
    flood = httpx.Client(
        base_url=other.base_url, headers=headers, timeout=WAIT_S, limits=httpx.Limits()
    )
    numbers, refused = count(), []
    ids = list(prompt.encode())

    def ask() -> None:
        text = f"{next(numbers)} " * 100
        body: Json = {"messages": [{"role": "user", "content": text}]}
        if path == "completions":
            body = {"prompt": text}
        if path != "prewarm":
            body["max_tokens"] = 40
        answer = flood.post(f"/v1/{path}", json=body)
        if answer.status_code == 429:
            refused.append(answer)

    with flood, ExitStack() as stack:
        in_background(stack, ask, 200)
        stack.callback(gate.open)
        until(lambda: len(refused) == 200 - LIMITS.concurrent - LIMITS.queue)
        until(lambda: len(gate.passes) == 1 and len(submitted) == LIMITS.concurrent)
        answers: list[httpx.Response] = []
        body = {"prompt": prompt, "max_tokens": 1}
        in_background(stack, lambda: answers.append(other.post("/v1/completions", json=body)))
        # Its turn, and its place in the engine, come while the pass under way goes on.
        until(lambda: submitted[-1].namespace == namespace_of("other"))
        assert len(gate.passes) == 1
        gate.open()
        until(lambda: bool(answers))
        assert answers[0].status_code == 200, answers[0].text
        assert gate.computed(ids) <= -(-len(ids) // SHARED_CHUNK)
    model.engine.check()


@pytest.fixture
def cancelled(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Return what is set once a task is cancelled."""
    happened = threading.Event()
    cancel = Task.cancel

    def noting(task: Task) -> None:
        cancel(task)
        happened.set()

    monkeypatch.setattr(Task, "cancel", noting)
    return happened


@pytest.mark.few(1)
@pytest.mark.parametrize("public", [False, True])
def test_a_prewarm_that_nobody_waits_for_any_more_is_not_computed(
    start: Callable[..., httpx.Client],
    make_model: Callable[..., Model],
    gate: Gate,
    cancelled: threading.Event,
    post_and_leave: Callable[..., None],
    public: bool,
) -> None:
    model = make_model()
    client = start(load=lambda _: model, limits=Limits(concurrent=1, shutdown_s=5))
    messages = [{"role": "user", "content": "a long text " * 120}]
    body = {"messages": messages, "public": public}
    post_and_leave(client, "/v1/prewarm", body, lambda: len(gate.passes) == 1)
    assert cancelled.wait(WAIT_S)
    gate.open()
    # The turn comes when it has ended.
    assert client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200
    assert len(gate.passes) == 2
    model.engine.check()


@pytest.mark.slow
def test_a_prewarm_that_is_given_up_is_no_failure_in_the_log(
    start: Callable[..., httpx.Client],
    make_model: Callable[..., Model],
    gate: Gate,
    until: Until,
    post_and_leave: Callable[..., None],
) -> None:
    client = start(load=lambda _: make_model(), limits=Limits(concurrent=1, shutdown_s=5))
    messages = [{"role": "user", "content": "a long text " * 120}]
    told = io.StringIO()
    handler = logging.StreamHandler(told)
    with ExitStack() as stack:
        logging.getLogger("asyncio").addHandler(handler)
        stack.callback(logging.getLogger("asyncio").removeHandler, handler)
        body = {"messages": messages}
        post_and_leave(client, "/v1/prewarm", body, lambda: len(gate.passes) == 1)
        until(lambda: disconnected(client, "/v1/prewarm"))
        gate.open()
        # The turn comes when it has ended.
        client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})
        gc.collect()
    assert told.getvalue() == ""


def test_a_prewarm_whose_client_goes_while_it_stands_in_line_is_never_begun(
    start: Callable[..., httpx.Client],
    make_model: Callable[..., Model],
    gate: Gate,
    submitted: list[Task],
    until: Until,
    post_and_leave: Callable[..., None],
) -> None:
    model = make_model()
    client = start(load=lambda _: model, limits=Limits(concurrent=1, shutdown_s=5))
    prewarm = {"messages": [{"role": "user", "content": "text"}]}
    with ExitStack() as stack:
        body = {"prompt": "x", "max_tokens": 1}
        in_background(stack, lambda: client.post("/v1/completions", json=body))
        stack.callback(gate.open)
        until(lambda: len(submitted) == 1)
        waits = "recollect_queue 1.0"
        post_and_leave(client, "/v1/prewarm", prewarm, lambda: waits in client.get("/metrics").text)
        until(lambda: disconnected(client, "/v1/prewarm"))
    assert client.post("/v1/completions", json=body).status_code == 200
    assert len(submitted) == 2


def test_of_several_prompts_none_is_begun_where_one_cannot_be(
    start: Callable[..., httpx.Client], make_model: Callable[..., Model], submitted: list[Task]
) -> None:
    client = start(load=lambda _: make_model())
    body = {"prompt": ["good", "x" * 3000], "max_tokens": 1000}
    assert client.post("/v1/completions", json=body).status_code == 400
    assert submitted == []


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("completions", {"prompt": ["one", "two", "three"]}),
        ("completions", {"prompt": "one", "n": 3}),
        ("chat/completions", {"messages": [{"role": "user", "content": "one"}], "n": 3}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_where_one_reply_cannot_be_begun_those_before_it_end(
    start: Callable[..., httpx.Client],
    make_model: Callable[..., Model],
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    body: Json,
    stream: bool,
) -> None:
    tasks: list[Task] = []
    submit = Engine.submit

    def failing(engine: Engine, task: Task) -> None:
        if len(tasks) == 2:
            tasks.clear()
            raise RuntimeFailure("injected")
        tasks.append(task)
        begun.append(task)
        submit(engine, task)

    begun: list[Task] = []
    monkeypatch.setattr(Engine, "submit", failing)
    client = start(load=lambda _: make_model(), limits=Limits(concurrent=3, shutdown_s=5))
    request = {**body, "max_tokens": 1500, "stream": stream, "ignore_eos": True}
    assert client.post(f"/v1/{path}", json=request).status_code == 500
    assert [task.state for task in begun[:2]] == ["cancelled"] * 2
    assert "recollect_running 0.0" in client.get("/metrics").text


def test_a_client_that_goes_while_its_replies_are_prepared_leaves_none_behind(
    start: Callable[..., httpx.Client],
    make_model: Callable[..., Model],
    monkeypatch: pytest.MonkeyPatch,
    submitted: list[Task],
    until: Until,
    post_and_leave: Callable[..., None],
) -> None:
    """Encoding a long prompt takes its time; what it begins then, nobody would read."""
    new_sequence, ready = Engine.new_sequence, threading.Event()

    def slow(engine: Engine, namespace: str | None = "") -> Any:
        assert ready.wait(WAIT_S)
        return new_sequence(engine, namespace)

    monkeypatch.setattr(Engine, "new_sequence", slow)
    client = start(load=lambda _: make_model())
    body = {"prompt": ["one", "two"], "max_tokens": 1500, "ignore_eos": True}
    begun = "recollect_running 2.0"
    post_and_leave(client, "/v1/completions", body, lambda: begun in client.get("/metrics").text)
    until(lambda: disconnected(client, "/v1/completions"))
    assert begun in client.get("/metrics").text
    ready.set()
    until(lambda: "recollect_running 0.0" in client.get("/metrics").text)
    assert [task.state for task in submitted] == ["cancelled"] * 2


def disconnected(client: httpx.Client, path: str) -> bool:
    """Return whether a server has noticed that the only client of an endpoint went away."""
    return f'recollect_requests_total{{endpoint="{path}"' in client.get("/metrics").text


@pytest.mark.slow
def test_the_time_that_was_saved_says_nothing_of_what_another_key_sent(
    start: Callable[..., httpx.Client], post: Callable[..., Json]
) -> None:
    client = start(keys=["ours", "theirs"])
    ours, theirs = ({"Authorization": f"Bearer {key}"} for key in ("ours", "theirs"))
    long = {"prompt": "a long text " * 100, "max_tokens": 1}

    def saved(headers: dict[str, str]) -> float | None:
        body = {"prompt": "short", "max_tokens": 1}
        answer = post(client, "/v1/completions", body, headers=headers)
        seconds: float | None = answer["usage"]["recollect"]["time_saved_s"]
        return seconds

    post(client, "/v1/completions", long, headers=theirs)
    assert saved(ours) is None
    assert saved(theirs) is not None
    kept = {"input": "short", "max_output_tokens": 1}
    response = post(client, "/v1/responses", kept, headers=ours)
    again = client.get(f"/v1/responses/{response['id']}", headers=ours).json()
    assert again["usage"]["recollect"]["time_saved_s"] is None
