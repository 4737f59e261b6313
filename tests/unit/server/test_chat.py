"""Chat completions: what comes as text each time is found again, and what it costs is told."""

import itertools
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from recollect.conversation.model import Model
from recollect.conversation.prompt import PromptEncoder
from recollect.conversation.session import Session
from recollect.engine.grammar import Grammars
from recollect.errors import OutOfBlocksError
from recollect.journal.requests import explain
from recollect.kv.disk import DiskStore
from recollect.server.settings import Limits
from recollect.types import SamplingParams

Json = dict[str, Any]
PATH = "/v1/chat/completions"
SYSTEM = ("system", "You are careful. " * 10)


def text_of(answer: Json) -> str:
    content: str = answer["choices"][0]["message"]["content"]
    return content


def cached(answer: Json) -> int:
    tokens: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return tokens


def test_a_reply_is_the_one_that_the_library_gives(
    client: httpx.Client, chat: Callable[..., Json], make_model: Callable[..., Model]
) -> None:
    answer = chat(client, SYSTEM, ("user", "Hello"))
    session = make_model().session_from(
        [{"role": "system", "content": SYSTEM[1]}, {"role": "user", "content": "Hello"}]
    )
    reply = session.respond(None, params=SamplingParams(max_tokens=8))
    assert text_of(answer) == reply.text
    assert answer["choices"][0]["finish_reason"] == reply.finish_reason
    assert answer["usage"]["completion_tokens"] == reply.usage.generated_tokens


def test_a_conversation_that_is_sent_whole_is_computed_once(
    client: httpx.Client, chat: Callable[..., Json]
) -> None:
    first = chat(client, SYSTEM, ("user", "Hello"))
    second = chat(
        client, SYSTEM, ("user", "Hello"), ("assistant", text_of(first)), ("user", "Go on")
    )
    usage = second["usage"]
    assert cached(first) == 0
    assert first["usage"]["recollect"]["tier"] is None
    new = usage["prompt_tokens"] - first["usage"]["prompt_tokens"] - 8
    assert usage["recollect"]["computed_tokens"] <= new + 1
    assert cached(second) == usage["prompt_tokens"] - usage["recollect"]["computed_tokens"]
    assert usage["recollect"]["tier"] == "memory"
    assert usage["recollect"]["reason"] == "new"
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_what_was_changed_is_told(client: httpx.Client, chat: Callable[..., Json]) -> None:
    rest = ("assistant", "Hello."), ("user", "And mine?")
    chat(client, SYSTEM, ("user", "My name is Alex"), *rest)
    own = chat(client, SYSTEM, ("user", "My name is Kim"), *rest)["usage"]["recollect"]
    assert own["reason"] == "message_changed"
    assert "'Alex' became 'Kim'" in own["difference"]


def test_headers_say_the_same(client: httpx.Client) -> None:
    said = [{"role": "system", "content": SYSTEM[1]}, {"role": "user", "content": ""}]
    for content in ("Grüße\nund mehr", "Grüße\nund weniger 🎉"):
        said[1:] = [{"role": "user", "content": content}, {"role": "user", "content": "Ja?"}]
        response = client.post(PATH, json={"messages": said, "max_tokens": 4})
    own = response.json()["usage"]["recollect"]
    assert response.headers["x-recollect-computed-tokens"] == str(own["computed_tokens"])
    assert response.headers["x-recollect-reason"] == own["reason"] == "message_changed"
    assert "became" in response.headers["x-recollect-difference"]


@pytest.fixture
def runaways(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have each reply repeat one byte for ever, as only some of the APIs can be asked to."""
    usual = SamplingParams.__post_init__

    def repeating(params: SamplingParams) -> None:
        object.__setattr__(params, "logit_bias", {ord("a"): 100.0})
        usual(params)

    monkeypatch.setattr(SamplingParams, "__post_init__", repeating)


@pytest.mark.few(1)
@pytest.mark.usefixtures("runaways")
@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}]}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "Hello"}]}),
        ("/v1/responses", {"input": "Hello"}),
        ("/v1/completions", {"prompt": "Hello"}),
    ],
)
def test_a_reply_that_repeated_itself_is_told(
    client: httpx.Client, post: Callable[..., Json], path: str, said: Json
) -> None:
    limit = "max_output_tokens" if path.endswith("responses") else "max_tokens"
    whole = post(client, path, {**said, limit: 1600})
    assert whole["usage"]["recollect"]["ended"] == "repetition"
    assert post(client, path, {**said, limit: 8})["usage"]["recollect"]["ended"] is None
    more = {"stream_options": {"include_usage": True}} if path.endswith("completions") else {}
    body = {**said, limit: 1600, "stream": True, **more}
    with client.stream("POST", path, json=body) as response:
        text = response.read().decode()
    assert '"ended":"repetition"' in text.replace(": ", ":")
    for reason in ("length", "max_tokens", "incomplete"):
        if f'"{reason}"' in text:
            return
    raise AssertionError("it does not say that the reply was cut")


@pytest.mark.slow
@pytest.mark.usefixtures("runaways")
def test_a_stored_response_says_so_too(client: httpx.Client, post: Callable[..., Json]) -> None:
    for limit, ended in ((1600, "repetition"), (8, None)):
        said = {"input": "Hello", "max_output_tokens": limit}
        told = post(client, "/v1/responses", said)
        stored = client.get(f"/v1/responses/{told['id']}").json()
        assert stored["usage"]["recollect"]["ended"] == ended
        assert stored["usage"]["recollect"]["sampling"] == told["usage"]["recollect"]["sampling"]


MAKERS = {"temperature": 0.7, "top_k": 20, "repetition_penalty": 1.1}


EACH_API = pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}]}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "Hello"}]}),
        ("/v1/responses", {"input": "Hello"}),
        ("/v1/completions", {"prompt": "Hello"}),
    ],
)


@pytest.mark.few(1)
@EACH_API
def test_a_model_is_sampled_as_its_makers_recommend(
    start: Callable[..., httpx.Client],
    make_model: Callable[..., Model],
    post: Callable[..., Json],
    path: str,
    said: Json,
) -> None:
    client = start(load=lambda _: make_model(sampling=MAKERS))
    limit = "max_output_tokens" if path.endswith("responses") else "max_tokens"

    def sampling(**fields: Any) -> Json | None:
        answer = post(client, path, {**said, limit: 6, **fields})
        told: Json | None = answer["usage"]["recollect"]["sampling"]
        return told

    used = sampling()
    assert used is not None
    seed = used.pop("seed")
    assert used == MAKERS
    assert 0 <= seed < 2**53, "exact in every reader of JSON"
    warm = sampling(temperature=0.5)
    assert warm is not None
    assert warm["temperature"] == 0.5
    assert warm["top_k"] == 20
    assert sampling(temperature=0) is None
    assert sampling(seed=seed) == {**MAKERS, "seed": seed}


def said_in(answer: Json) -> Json:
    """Return what a reply says, without ids, times and costs."""
    if "output" in answer:
        return {"said": answer["output"][0]["content"]}
    return {"said": answer.get("content") or answer["choices"]}


@pytest.mark.few(1)
@EACH_API
@pytest.mark.parametrize("seed", [None, 5, -1, 2**63 - 1, -(2**63)])
def test_what_usage_says_of_the_sampling_gives_the_reply_again(
    client: httpx.Client, post: Callable[..., Json], path: str, said: Json, seed: int | None
) -> None:
    limit = "max_output_tokens" if path.endswith("responses") else "max_tokens"
    asked = {**said, limit: 12, "temperature": 1.0, "top_p": 0.95}
    first = post(client, path, asked if seed is None else {**asked, "seed": seed})
    told = first["usage"]["recollect"]["sampling"]
    assert set(told) == {"temperature", "top_p", "seed"}
    assert seed in (None, told["seed"])
    assert said_in(post(client, path, {**said, limit: 12, **told})) == said_in(first)
    other = {**said, limit: 12, **told, "seed": 12345}
    assert said_in(post(client, path, other)) != said_in(first)


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}]}),
        ("/v1/completions", {"prompt": "Hello"}),
    ],
)
@pytest.mark.parametrize("seed", [None, -2, 2**63 - 2])
def test_each_of_several_choices_has_a_seed_that_gives_it_again(
    client: httpx.Client, post: Callable[..., Json], path: str, said: Json, seed: int | None
) -> None:
    asked = {**said, "max_tokens": 12, "temperature": 1.0}
    several = post(client, path, {**asked, "n": 3} | ({} if seed is None else {"seed": seed}))
    told = several["usage"]["recollect"]["sampling"]
    assert (len(told["seeds"]), "seed" in told) == (3, False)
    for choice, one in zip(several["choices"], told["seeds"], strict=True):
        (again,) = post(client, path, {**asked, "seed": one})["choices"]
        assert {**again, "index": 0} == {**choice, "index": 0}


def test_penalties_of_a_greedy_reply_are_told(
    client: httpx.Client, chat: Callable[..., Json]
) -> None:
    told = chat(client, ("user", "Hello"), temperature=0, repetition_penalty=1.3, top_p=0.5)
    assert told["usage"]["recollect"]["sampling"] == {"repetition_penalty": 1.3}


def test_the_operator_says_how_requests_are_sampled_that_do_not(
    start: Callable[..., httpx.Client],
    make_model: Callable[..., Model],
    chat: Callable[..., Json],
) -> None:
    client = start(load=lambda _: make_model(sampling=MAKERS), temperature=0.0)
    assert chat(client, ("user", "Hello"))["usage"]["recollect"]["sampling"] is None
    told = chat(client, ("user", "Hello"), temperature=0.9)["usage"]["recollect"]["sampling"]
    assert told["temperature"] == 0.9


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}]}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "Hello"}]}),
        ("/v1/responses", {"input": "Hello"}),
        ("/v1/completions", {"prompt": ["Hello", "Goodbye"], "n": 2}),
    ],
)
def test_headers_of_a_stream_say_what_its_prompt_cost(
    client: httpx.Client, post: Callable[..., Json], path: str, said: Json
) -> None:
    limit = "max_output_tokens" if path.endswith("responses") else "max_tokens"
    computed = []
    for _ in range(2):
        with client.stream("POST", path, json={**said, limit: 4, "stream": True}) as response:
            response.read()
        computed.append(int(response.headers["x-recollect-computed-tokens"]))
    whole = post(client, path, {**said, limit: 4})["usage"]["recollect"]["computed_tokens"]
    assert computed[1] == whole < computed[0]


def test_a_stream_says_what_the_whole_reply_says(
    client: httpx.Client, chat: Callable[..., Json], events: Callable[..., list[Any]]
) -> None:
    body = {
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 12,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    found = [event for event in events(client, PATH, body) if not str(event).startswith(":")]
    whole = chat(client, ("user", "Hello"), max_tokens=12)
    *chunks, last, done = found
    assert done == "data: [DONE]"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(pieces) == text_of(whole)
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + [whole["choices"][0]["finish_reason"]]
    assert chunks[-1]["recollect"]["computed_tokens"] == last["usage"]["prompt_tokens"]
    assert last["choices"] == []
    assert last["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert len({event["id"] for event in found[:-1]}) == 1


def test_without_include_usage_a_stream_has_no_usage(
    client: httpx.Client, events: Callable[..., list[Any]]
) -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "stream": True}
    assert not any("usage" in event for event in events(client, PATH, body)[:-1])


def test_several_choices_differ_and_share_their_prompt(
    client: httpx.Client, chat: Callable[..., Json]
) -> None:
    answer = chat(client, SYSTEM, ("user", "Hello"), n=3, temperature=1, seed=7)
    again = chat(client, SYSTEM, ("user", "Hello"), n=3, temperature=1, seed=7)
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts == [choice["message"]["content"] for choice in again["choices"]]
    assert answer["usage"]["completion_tokens"] >= 3
    assert cached(answer) == 0
    assert cached(again) > 0


def test_a_stop_string_ends_a_reply(client: httpx.Client, chat: Callable[..., Json]) -> None:
    whole = text_of(chat(client, ("user", "Hello"), max_tokens=24))
    stop = whole[3:5]
    for given in (stop, [stop, "never said"]):
        answer = chat(client, ("user", "Hello"), max_tokens=24, stop=given)
        assert text_of(answer) == whole.split(stop)[0]
        assert answer["choices"][0]["finish_reason"] == "stop"


def test_a_banned_token_is_not_said(client: httpx.Client, chat: Callable[..., Json]) -> None:
    plain = text_of(chat(client, ("user", "Hello"), max_tokens=1))
    token = str(plain.encode()[0])
    assert text_of(chat(client, ("user", "Hello"), max_tokens=1, logit_bias={token: -100})) != plain


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
def test_a_reply_is_as_long_as_it_may_be(
    client: httpx.Client, post: Callable[..., Json], limit: str
) -> None:
    body = {"messages": [{"role": "user", "content": "a"}], limit: 3, "ignore_eos": True}
    answer = post(client, PATH, body)
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["choices"][0]["finish_reason"] == "length"


def test_parts_and_developers_are_understood(
    client: httpx.Client, post: Callable[..., Json], chat: Callable[..., Json]
) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    messages = [{"role": "developer", "content": SYSTEM[1]}, {"role": "user", "content": parts}]
    answer = post(client, PATH, {"messages": messages, "max_tokens": 8, "user": "somebody"})
    assert text_of(answer) == text_of(chat(client, SYSTEM, ("user", "Hello")))


@pytest.mark.few(4)
@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": [{"role": "system", "content": "a"}]}, "invalid_messages", None),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None, None),
        ({"temperature": 3}, "invalid_value", "temperature"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"functions": [{"name": "f"}]}, "unsupported_parameter", "functions"),
        ({"temprature": 1}, "unknown_parameter", "temprature"),
        ({"logit_bias": {"x": 1}}, "invalid_value", None),
        ({"logit_bias": {"99999": 1}}, "invalid_value", None),
        ({"stream_options": {"include_usage": True}}, "unsupported_parameter", "stream_options"),
        ({"n": 99}, "invalid_value", "n"),
        ({"model": "gpt-unknown"}, "model_not_found", None),
    ],
)
def test_what_cannot_be_done_is_refused_in_words(
    client: httpx.Client, fields: Json, code: str | None, param: str | None
) -> None:
    body = {"messages": [{"role": "user", "content": "Hello"}], **fields}
    response = client.post(PATH, json=body)
    error = response.json()["error"]
    assert response.status_code == (404 if code == "model_not_found" else 400)
    assert error["type"] == "invalid_request_error"
    assert code in {None, error["code"]}
    assert param in {None, error["param"]}
    assert error["message"].endswith(".")


def test_a_prompt_over_the_context_is_refused_with_both_numbers(client: httpx.Client) -> None:
    said = [{"role": "user", "content": "x" * 3000}]
    for stream in (False, True):
        response = client.post(PATH, json={"messages": said, "stream": stream})
        error = response.json()["error"]
        assert response.status_code == 400
        assert error["code"] == "context_length_exceeded"
        assert "2048" in error["message"]
        assert "3,0" in error["message"]


def test_another_name_for_the_model_is_understood(
    start: Callable[..., httpx.Client], chat: Callable[..., Json]
) -> None:
    client = start(aliases={"gpt-4o": "reference"})
    assert chat(client, ("user", "a"), model="gpt-4o")["model"] == "reference"


class Slow:
    """A model whose forward passes wait until they are let go."""

    def __init__(self, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model = model
        self.passes = 0
        self.go = threading.Event()
        runtime = model.engine.runtime
        forward = runtime.forward

        def slow(rows: Any) -> Any:
            self.passes += 1
            assert self.go.wait(60)
            time.sleep(0.005)
            return forward(rows)

        monkeypatch.setattr(runtime, "forward", slow)


@pytest.fixture
def slow(make_model: Callable[..., Model], monkeypatch: pytest.MonkeyPatch) -> Slow:
    return Slow(make_model(), monkeypatch)


@pytest.mark.slow
def test_while_a_prompt_is_read_the_client_hears_of_it(
    start: Callable[..., httpx.Client], slow: Slow
) -> None:
    client = start(load=lambda _: slow.model)
    body = {"messages": [{"role": "user", "content": "a" * 500}], "max_tokens": 2, "stream": True}
    with client.stream("POST", PATH, json=body) as response:
        lines = response.iter_lines()
        comment = next(line for line in lines if line)
        assert comment.startswith(": prefill 0/5")
        slow.go.set()
        assert "data: [DONE]" in list(lines)


@pytest.mark.few(1)
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_reply_at_once(
    start: Callable[..., httpx.Client],
    slow: Slow,
    stream: bool,
    chat: Callable[..., Json],
    until: Callable[..., None],
    post_and_leave: Callable[..., None],
) -> None:
    client = start(load=lambda _: slow.model)
    body = {
        "messages": [{"role": "user", "content": "a"}],
        "max_tokens": 1500,
        "ignore_eos": True,
        "stream": stream,
    }
    engine = slow.model.engine
    slow.go.set()
    if stream:
        with client.stream("POST", PATH, json=body) as response:
            assert next(response.iter_lines()).startswith("data: ")
    else:
        post_and_leave(client, PATH, body, lambda: slow.passes > 10)
    until(lambda: not engine.tasks())
    assert slow.passes < 1000
    engine.check()
    assert chat(client, ("user", "a"))["usage"]["prompt_tokens"] > 0


def test_who_waits_too_long_in_line_is_told_to_come_back(
    start: Callable[..., httpx.Client], slow: Slow, until: Callable[..., None]
) -> None:
    client = start(load=lambda _: slow.model, limits=Limits(concurrent=1, queue=1))
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
    answers: list[int] = []

    def ask() -> None:
        answers.append(httpx.post(f"{client.base_url}{PATH}", json=body, timeout=60).status_code)

    running, waiting = threading.Thread(target=ask), threading.Thread(target=ask)
    running.start()
    until(lambda: slow.passes > 0)
    waiting.start()
    until(lambda: "recollect_queue 1.0" in client.get("/metrics").text)
    refused = client.post(PATH, json=body)
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["code"] == "queue_full"
    slow.go.set()
    running.join()
    waiting.join()
    assert answers == [200, 200]


def test_a_failing_forward_pass_is_an_error_and_the_next_request_works(
    start: Callable[..., httpx.Client], make_model: Callable[..., Model], faults: Any
) -> None:
    model = make_model()
    client = start(load=lambda _: model)
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
    faults.forward_in = 0
    failed = client.post(PATH, json=body)
    # Each sequence of a failed pass is tried by itself once more, so one fault may be survived.
    assert failed.status_code in {200, 500}
    assert client.post(PATH, json=body).status_code == 200
    assert "injected" not in failed.text


@pytest.mark.slow
def test_a_conversation_that_is_sent_whole_is_warm_after_a_restart(
    start: Callable[..., httpx.Client],
    servers: ExitStack,
    make_model: Callable[..., Model],
    open_store: Callable[[], DiskStore],
    chat: Callable[..., Json],
) -> None:
    def start_it() -> httpx.Client:
        return start(load=lambda _: make_model(store=open_store()))

    said = [SYSTEM]
    client = start_it()
    for text in ("Hello", "And then?", "Who was it?"):
        said.append(("user", text))
        said.append(("assistant", text_of(chat(client, *said, max_tokens=16, ignore_eos=True))))
    servers.close()
    usage = chat(start_it(), *said, ("user", "Go on"))["usage"]
    own = usage["recollect"]
    assert own["tier"] == "disk"
    assert own["reason"] == "new"
    # The new message and what the template puts around it, and the rest of a block of 8.
    assert own["computed_tokens"] < 64 < usage["prompt_tokens"] // 3


@pytest.mark.slow
def test_a_choice_that_cannot_begin_leaves_no_other_running(
    start: Callable[..., httpx.Client],
    make_model: Callable[..., Model],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, calls, real = make_model(), itertools.count(1), Session.stream

    def stream(self: Session, *args: Any, **options: Any) -> Any:
        if next(calls) == 3:
            raise OutOfBlocksError(needed=1, free=0, total=1)
        return real(self, *args, **options)

    monkeypatch.setattr(Session, "stream", stream)
    client = start(load=lambda _: model)
    body = {"messages": [{"role": "user", "content": "Hello"}], "ignore_eos": True}
    assert client.post(PATH, json={**body, "n": 3}).status_code == 503
    assert [task for task in model.engine.tasks() if not task.idle] == []
    assert client.post(PATH, json={**body, "max_tokens": 2}).status_code == 200


@pytest.mark.slow
def test_the_first_token_counts_all_of_a_wait(
    start: Callable[..., httpx.Client],
    make_model: Callable[..., Model],
    monkeypatch: pytest.MonkeyPatch,
    post: Callable[..., Json],
) -> None:
    """Loading, templates and grammars too."""
    late = threading.Event()  # never set

    def load(_: str) -> Model:
        late.wait(0.2)
        return make_model()

    def wait(name: str, owner: type) -> None:
        works = getattr(owner, name)

        def slow(*given: Any, **options: Any) -> Any:
            late.wait(0.1)
            return works(*given, **options)

        monkeypatch.setattr(owner, name, slow)

    wait("encode", PromptEncoder)
    wait("start", Grammars)
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    client = start(load=load)
    fields = {"response_format": {"type": "json_object"}}
    ttft = post(client, PATH, {**body, **fields})["usage"]["recollect"]["ttft_s"]
    assert ttft >= 0.2, "a template and a grammar"
    again = post(client, PATH, body)["usage"]["recollect"]["ttft_s"]
    assert again >= 0.1


def test_requests_are_explained(
    client: httpx.Client,
    post: Callable[..., Json],
    until: Callable[[Callable[[], bool]], None],
    tmp_path: Path,
) -> None:
    rules = "\n".join(f"Rule {number}: be careful." for number in range(20))
    for day in ("Monday", "Tuesday", "Friday"):
        said = [
            {"role": "system", "content": f"You help.\nIt is {day}.\n{rules}"},
            {"role": "user", "content": f"{day}, hello"},
        ]
        body = {"messages": said, "max_tokens": 4}
        post(client, PATH, body, headers={"User-Agent": "opencode/1.18 ai-sdk/5"})

    until(lambda: sum(one.requests for one in explain(home=tmp_path / "home")) == 3)
    (one,) = explain(home=tmp_path / "home")
    (finding,) = one.findings
    assert (one.client, one.requests, finding.times) == ("opencode", 3, 2)
    assert finding.place == "Line 2 of the instructions is a date or a time"
    assert finding.example is not None
    assert finding.example.startswith("'Tuesday.")
    assert finding.computed_tokens > 2 * len(rules)
