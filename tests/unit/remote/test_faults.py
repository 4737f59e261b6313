"""Engines elsewhere that misbehave: nothing said is lost, nothing is claimed that was not told."""

import shutil
import ssl
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import recollect
from recollect.conversation.model import Model
from recollect.engine.sampling import Generator
from recollect.errors import (
    ConfigError,
    EngineUnavailableError,
    InvalidParameterError,
    MemoryLimitError,
    StoreError,
)
from recollect.proof.scenarios import run_rewind_test
from recollect.remote import wire
from recollect.remote.replicas import Replicas
from recollect.remote.vllm import Vllm
from recollect.types import SamplingParams

SHORT = SamplingParams(max_tokens=12, ignore_eos=True)
MakeStub = Callable[..., tuple[Any, str]]
Load = Callable[..., Model]


@pytest.fixture(params=["vllm", "llama"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def _short_waits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an engine falls silent, have that noticed soon; elsewhere a busy machine takes its time."""
    callspec = getattr(request.node, "callspec", None)
    if callspec is not None and str(callspec.params.get("fault")).startswith("silent"):
        monkeypatch.setattr(wire, "FIRST_S", 1.5)
        monkeypatch.setattr(wire, "NEXT_S", 1.5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        *("refuse", "cut", "cut after 3", "error after 3", "silent", "silent after 3"),
        *("slow", "buffered"),
    ],
)
def test_one_fault_does_not_show_in_the_reply(
    kind: str, fault: str, make_stub: MakeStub, load: Load
) -> None:
    stub, url = make_stub(kind)
    model = load(f"{kind}={url}")
    with model.session(namespace="one") as session:  # at its end nothing is computed ahead any more
        expected = session.respond("hello", params=SHORT)
    stub.faults.append(fault)
    reply = model.session(namespace="two").respond("hello", params=SHORT)
    assert (reply.text, reply.finish_reason) == (expected.text, "length")
    assert model.engine.replicas.all[0].lost == (fault not in ("slow", "buffered"))  # type: ignore[attr-defined]


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("body", "words"),
    [
        (
            {
                "error": {
                    "message": "No room.",
                    "type": "BadRequestError",
                    "param": None,
                    "code": 400,
                }
            },
            "No room",
        ),
        ({"object": "error", "message": "No room", "type": "BadRequestError"}, "No room"),
        ({"detail": "Not Found"}, "Not Found"),
        ({"error": "refused"}, "refused"),
        ("no such path", "no such path"),
    ],
)
def test_of_a_refusal_the_words_are_told_and_what_to_do(
    body: Any, words: str, kind: str, make_stub: MakeStub, load: Load
) -> None:
    """As vLLM writes it now, as it did, as its web framework and llama-server do, and none of these."""
    stub, url = make_stub(kind)
    model = load(f"{kind}={url}")
    stub.refusal = body
    stub.faults.append("bad request")
    with pytest.raises(EngineUnavailableError) as told:
        model.session().respond("hello", params=SHORT)
    assert str(told.value) == (
        f"The engine refused the request with 400: {words}. Restart recollect if the engine has another "
        "model or a shorter context now."
    )


def test_an_engine_that_is_not_ready_is_waited_for(
    kind: str, make_stub: MakeStub, load: Load
) -> None:
    """A llama-server answers 503 while it loads its model."""
    _, url = make_stub(kind, is_loading=True)
    with pytest.raises(EngineUnavailableError, match="wait until it has loaded its model"):
        load(f"{kind}={url}")


def test_requests_that_nobody_reads_are_ended_by_the_next_one(make_stub: MakeStub) -> None:
    replicas = Replicas([Vllm(make_stub()[1], secret=bytes(32))])
    for _ in range(3):
        replica = replicas.begin("one")
        replicas.drop(replica)
    assert replica.running == 1, "the last is ended by the request after it"


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["refuse", "cut", "silent"])
def test_two_faults_before_the_first_token_are_told_and_what_was_said_is_kept(
    kind: str, fault: str, make_stub: MakeStub, load: Load
) -> None:
    stub, url = make_stub(kind)
    model = load(f"{kind}={url}")
    session = model.session(keep=True, name="kept")
    stub.faults += [fault, fault]
    with pytest.raises(EngineUnavailableError, match="Ask again"):
        session.respond("hello", params=SHORT)
    asked = model.resume("kept")
    assert [node.content for node in asked.path()] == ["hello"]
    assert session.respond("hello", params=SHORT).finish_reason == "length"


@pytest.mark.slow
def test_what_was_generated_before_the_engine_was_lost_is_kept(
    make_stub: MakeStub, load: Load
) -> None:
    stub, url = make_stub()
    model = load(f"vllm={url}")
    session = model.session(keep=True, name="kept")
    stub.faults += ["cut after 3"] * 8
    with pytest.raises(EngineUnavailableError):
        session.respond("hello", params=SamplingParams(max_tokens=100, ignore_eos=True))
    said = model.resume("kept").path()[-1]
    assert said.role == "assistant"
    assert said.finish_reason == "cancelled"
    assert len(said.token_ids or ()) == 3 * 4, "it went on three times"


@pytest.mark.slow
def test_a_reply_under_penalties_of_its_own_tokens_does_not_go_on_elsewhere(
    make_stub: MakeStub, load: Load
) -> None:
    stub, url = make_stub()
    model = load(f"vllm={url}")
    stub.faults.append("cut after 3")
    params = SamplingParams(max_tokens=12, presence_penalty=0.5, ignore_eos=True)
    with pytest.raises(EngineUnavailableError):
        model.session().respond("hello", params=params)


@pytest.mark.slow
def test_a_replica_that_dies_costs_its_conversations_one_prompt(
    make_stub: MakeStub, load: Load
) -> None:
    stubs = [make_stub() for _ in range(2)]
    model = load(f"vllm={','.join(url for _, url in stubs)}")
    session = model.session("Be careful. " * 20)
    session.respond("hello", params=SHORT)
    session.close()
    asked = [len(stub.asked) for stub, _ in stubs]
    before = session.respond("more", params=SHORT)
    assert before.usage.reused_tokens > 0
    session.close()  # so that nothing is computed ahead
    (serving,) = (
        stub for (stub, _), count in zip(stubs, asked, strict=True) if len(stub.asked) > count
    )
    serving.faults.extend(["refuse"] * 4)
    after = session.respond("and more", params=SHORT)
    assert after.finish_reason == "length"
    assert after.usage.reason == "moved"
    assert after.usage.lost_tokens > 0
    assert "another replica" in (after.usage.difference or "")


@pytest.mark.slow
def test_reuse_that_is_not_told_is_not_claimed(make_stub: MakeStub, load: Load) -> None:
    stub, url = make_stub()
    model = load(f"vllm={url}")
    session = model.session("Be careful. " * 20)
    session.respond("hello", params=SHORT)
    stub.tells_cached = False
    usage = session.respond("more", params=SHORT).usage
    assert (usage.reused_tokens, usage.computed_tokens) == (0, usage.prompt_tokens)


@pytest.mark.slow
def test_an_engine_stops_when_the_reader_leaves(kind: str, make_stub: MakeStub, load: Load) -> None:
    stub, url = make_stub(kind)
    model = load(f"{kind}={url}")
    stub.faults.append("slow")
    stream = model.session().stream("hello", params=SamplingParams(max_tokens=500, ignore_eos=True))
    next(iter(stream))
    stream.close()
    assert stub.aborted.wait(60), "to its end it would take a hundred seconds"


@pytest.mark.slow
def test_the_conversation_is_named_to_routers_and_the_namespace_is_not(
    make_stub: MakeStub, load: Load
) -> None:
    stub, url = make_stub()
    model = load(f"vllm={url}")
    session = model.session("Be careful.", namespace="alice")
    session.respond("hello", params=SHORT)
    session.respond("more", params=SHORT)
    model.session("Be careful.", namespace="alice").respond("good day", params=SHORT)
    model.session("Be careful.", namespace="bob").respond("hello", params=SHORT)
    said = [
        (headers["x-session-id"], body["cache_salt"])
        for headers, body in zip(stub.headers, stub.asked, strict=True)
        if body["max_tokens"] == 12
    ]
    first, second, third, bobs = said
    assert first == second
    assert first[0] != third[0]
    assert first[1] == third[1] != bobs[1]
    assert "alice" not in str(stub.headers) + str([body["cache_salt"] for body in stub.asked])


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"tells_cached": False}, "--enable-prompt-tokens-details"),
        ({"respects_salt": False}, "another salt"),
        ({"tokenizes": False}, "another tokenizer"),
        ({"version": "0.9.1"}, "update it"),
    ],
)
def test_an_engine_that_cannot_be_used_is_refused_with_what_to_change(
    how: dict[str, Any], told: str, make_stub: MakeStub, load: Load
) -> None:
    _, url = make_stub(**how)
    with pytest.raises(ConfigError, match=told):
        load(f"vllm={url}")


@pytest.mark.slow
def test_another_kind_of_server_is_refused(make_stub: MakeStub, load: Load) -> None:
    with pytest.raises(ConfigError, match="no llama-server"):
        load(f"llama={make_stub('vllm')[1]}")
    with pytest.raises(ConfigError, match="offers no model"):
        load(f"vllm={make_stub('llama')[1]}")


def test_nobody_there_is_told(load: Load) -> None:
    with pytest.raises(EngineUnavailableError, match="No engine answers at"):
        load("vllm=http://127.0.0.1:9")


def test_a_key_is_asked_for_and_sent(
    kind: str, make_stub: MakeStub, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, url = make_stub(kind, key="right")
    monkeypatch.delenv("RECOLLECT_ENGINE_KEY", raising=False)
    with pytest.raises(ConfigError, match="asks for a key: set RECOLLECT_ENGINE_KEY"):
        load(f"{kind}={url}")
    monkeypatch.setenv("RECOLLECT_ENGINE_KEY", "wrong")
    with pytest.raises(ConfigError, match="does not take the key in RECOLLECT_ENGINE_KEY"):
        load(f"{kind}={url}")
    monkeypatch.setenv("RECOLLECT_ENGINE_KEY", "right")
    with load(f"{kind}={url}").session() as session:
        assert session.respond("hello", params=SHORT).text


@pytest.mark.parametrize(
    "said", [{"kv_memory": 1 << 20}, {"kv_disk": 1 << 20}, {"device": "CPU"}, {"runtime": "llama"}]
)
def test_what_is_said_of_computing_here_is_refused(
    said: dict[str, Any], make_stub: MakeStub, tmp_path: Path
) -> None:
    _, url = make_stub()
    with pytest.raises(ConfigError, match=f"{next(iter(said))} cannot go with an engine elsewhere"):
        recollect.load("reference", home=tmp_path, engine=f"vllm={url}", **said)


def test_an_address_that_sends_on_is_refused_with_where_to(
    kind: str, make_stub: MakeStub, load: Load
) -> None:
    _, url = make_stub(kind, redirects_to="https://engine.example")
    with pytest.raises(ConfigError, match=r"sends requests on to https://engine\.example"):
        load(f"{kind}={url}")


@pytest.mark.slow
def test_a_certificate_that_nobody_vouches_for_is_refused(
    kind: str, make_stub: MakeStub, load: Load, tmp_path: Path
) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs openssl, which makes a certificate")
    names = ["-keyout", "key.pem", "-out", "own.pem", "-subj", "/CN=127.0.0.1"]
    subprocess.run(  # noqa: S603 - a fixed command
        [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *names],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "own.pem", tmp_path / "key.pem")
    stub, plain = make_stub(kind)
    stub.stop()
    port = int(plain.rpartition(":")[2])
    with pytest.raises(EngineUnavailableError, match="CERTIFICATE_VERIFY_FAILED"):
        load(f"{kind}={stub.start(port, tls=context)}")


@pytest.mark.few(1)
def test_an_engine_that_dies_between_two_turns_loses_nothing_that_was_said(
    kind: str, make_stub: MakeStub, load: Load
) -> None:
    stub, url = make_stub(kind)
    model = load(f"{kind}={url}")
    session = model.session("Be careful.", keep=True, name="kept")
    first = session.respond("hello", params=SHORT)
    stub.stop()
    with pytest.raises(EngineUnavailableError):
        session.respond("and then?", params=SHORT)
    session.close()
    said = [node.content for node in model.resume("kept").path()]
    assert said == ["Be careful.", "hello", first.text, "and then?"]
    stub.known.clear()
    stub.held.clear()
    stub.start(int(url.rpartition(":")[2]))
    reply = model.resume("kept").respond(None, params=SHORT)
    assert reply.finish_reason == "length"
    assert reply.usage.reused_tokens == 0


@pytest.mark.few(1)
@pytest.mark.parametrize("status", ["bad request", "gone"])
def test_an_engine_that_is_another_one_now_refuses_and_nothing_is_lost(
    kind: str, status: str, make_stub: MakeStub, load: Load
) -> None:
    """Restarted with a shorter context or another model, it answers 400 or 404, with its words."""
    stub, url = make_stub(kind)
    model = load(f"{kind}={url}")
    session = model.session(keep=True, name="kept")
    session.respond("hello", params=SHORT)
    session.close()
    stub.faults.append(status)
    with pytest.raises(EngineUnavailableError, match="The engine refused the request with 4"):
        session.respond("and then?", params=SHORT)
    assert [node.content for node in model.resume("kept").path()][2:] == ["and then?"]
    assert [one.running for one in model.replicas()] == [0]
    assert session.respond("and then?", params=SHORT).finish_reason == "length"


@pytest.mark.slow
def test_half_of_many_readers_leave_and_the_others_are_answered(
    kind: str, make_stub: MakeStub, load: Load
) -> None:
    stub, url = make_stub(kind, slots=64)
    model = load(f"{kind}={url}")
    expected = [
        model.session(namespace="alone").respond(f"hello {number}", params=SHORT).text
        for number in range(3)
    ]

    def read(number: int) -> str | None:
        stream = model.session().stream(f"hello {number % 3}", params=SHORT)
        if number % 2:
            for _ in zip(range(2), stream, strict=False):
                pass
            stream.close()
            return None
        return "".join(stream)

    stub.faults.extend(["slow"] * 10)
    with ThreadPoolExecutor(50) as pool:
        texts = list(pool.map(read, range(50)))
    assert texts[::2] == [expected[number % 3] for number in range(0, 50, 2)]
    model.engine.abort(model.engine.tasks())
    assert [one.running for one in model.replicas()] == [0]
    assert [one.lost for one in model.replicas()] == [0]


@pytest.mark.few(1)
def test_a_reader_that_does_not_wait_for_the_first_token_is_let_go_at_once(
    kind: str, make_stub: MakeStub, load: Load
) -> None:
    stub, url = make_stub(kind)
    model = load(f"{kind}={url}")
    session = model.session(keep=True, name="kept")
    stub.faults.append("silent")
    stream = session.stream("hello", params=SHORT)
    began = time.monotonic()
    stream.close()
    assert time.monotonic() - began < 30, "the engine is silent for a minute"
    assert session.respond("hello", params=SHORT).finish_reason == "length"
    assert next(node.content for node in model.resume("kept").path()) == "hello"


@pytest.mark.parametrize(
    "said", ["", "vllm", "vllm=", "ollama=http://127.0.0.1:1", "vllm=ftp://a", "vllm=http://a:b"]
)
def test_what_names_no_engine_is_refused(said: str, load: Load) -> None:
    with pytest.raises(ConfigError):
        load(said or "=")


def test_each_key_needs_a_slot_of_llama_server(make_stub: MakeStub, load: Load) -> None:
    _, url = make_stub("llama", slots=2)
    model = load(f"llama={url}")
    for namespace in ("alice", "bob"):
        model.session(namespace=namespace).respond("hello", params=SHORT)
    with pytest.raises(MemoryLimitError, match="--parallel"):
        model.session(namespace="carol").respond("hello", params=SHORT)


def test_what_llama_server_means_otherwise_is_refused(make_stub: MakeStub, load: Load) -> None:
    model = load(f"llama={make_stub('llama')[1]}")
    with pytest.raises(InvalidParameterError, match="presence_penalty"):
        model.session().respond("hello", params=SamplingParams(presence_penalty=1.0))


def test_kv_that_is_elsewhere_is_not_pinned_here(make_stub: MakeStub, load: Load) -> None:
    model = load(f"vllm={make_stub()[1]}")
    with pytest.raises(StoreError, match="engine elsewhere"):
        model.warm("text", name="text")
    with pytest.raises(StoreError, match="engine elsewhere"):
        model.publish("text")
    with pytest.raises(StoreError, match="engine elsewhere"):
        model.session("text").pin()


@pytest.mark.few(1)
def test_what_a_generator_was_fed_is_told_with_its_last_token(
    kind: str, make_stub: MakeStub, load: Load
) -> None:
    """Nobody may take for reused what only was not counted yet."""
    model = load(f"{kind}={make_stub(kind)[1]}")
    generator = Generator(model.engine, SHORT)
    generator.append_tokens(model.tokenizer.encode("once upon a time"))
    while generator.generate_next_token() is not None and not generator.is_done():
        pass
    assert generator.sequence.fed_tokens == model.engine.computed_tokens == 16


@pytest.mark.few(1)
def test_a_rewound_conversation_is_proven_elsewhere_too(
    kind: str, make_stub: MakeStub, load: Load
) -> None:
    result = run_rewind_test(load(f"{kind}={make_stub(kind, slots=4)[1]}"))
    assert result.rewind_differs_at is None
    assert result.fresh_differs_at is None
    assert result.again_computed_tokens > 0


def test_end_tokens_that_are_ignored_end_nothing(make_stub: MakeStub, load: Load) -> None:
    model = load(f"vllm={make_stub()[1]}")
    end = min(model.engine.eos_token_ids)
    generator = Generator(
        model.engine, SamplingParams(max_tokens=5, ignore_eos=True, logit_bias={end: 100.0})
    )
    generator.append_tokens([97])
    assert [generator.generate_next_token() for _ in range(5)] == [end] * 5
    assert generator.finish_reason == "length"
