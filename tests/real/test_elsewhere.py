"""A real llama-server behind recollect: ids, reuse, slots, characters of several tokens, all commands."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import httpx
import pytest

import recollect
from recollect import config
from recollect.conversation.model import Model
from recollect.errors import InvalidParameterError
from recollect.models.prepare import original_of
from recollect.proof.elsewhere import verify_elsewhere
from recollect.types import Grammar, SamplingParams

pytestmark = pytest.mark.model
pytest.importorskip("xllamacpp", reason="needs recollect-llm[llama]")

SERVER = """
import sys, time, xllamacpp as x
p = x.CommonParams()
p.model.path, p.hostnames, p.port = sys.argv[1], ["127.0.0.1"], int(sys.argv[2])
p.n_ctx, p.n_parallel, p.cpuparams.n_threads = 4096, 2, 1
server = x.Server(p)
while True:
    time.sleep(1)
"""
SHORT = SamplingParams(max_tokens=16)


@pytest.fixture(scope="module")
def llama() -> Iterator[tuple[Path, str]]:
    """Return the model's file, and what `--engine` says of a server of it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with original_of("smollm2", home=config.home()) as file:
        given = Path(file)
        server = subprocess.Popen(  # noqa: S603 - ours
            [sys.executable, "-c", SERVER, str(given), str(port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=dict(os.environ),
        )
        try:
            end = time.monotonic() + 120
            while not _answers(port):
                assert time.monotonic() < end, "llama-server does not answer"
                assert server.poll() is None, "llama-server ended"
                time.sleep(0.2)
            yield given, f"llama=http://127.0.0.1:{port}"
        finally:
            server.kill()
            server.wait()


@pytest.fixture(scope="module")
def model(llama: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    file, engine = llama
    home = tmp_path_factory.mktemp("home")
    with recollect.load(file, engine=engine, home=home) as loaded:
        yield loaded


def _command(llama: tuple[Path, str], home: Path, *said: str) -> "subprocess.Popen[str]":
    """Return a command that runs on the server."""
    name, *arguments = said
    file, engine = llama
    return subprocess.Popen(  # noqa: S603 - our own interpreter and package
        [sys.executable, "-m", "recollect", name, "-m", str(file), "--engine", engine, *arguments],
        env={
            **os.environ,
            "RECOLLECT_HOME": str(home),
            "NO_PROXY": "127.0.0.1",
            "BROWSER": "true",  # a program that does nothing, and says that it could
            "PYTHONUTF8": "1",
        },
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _ended(process: "subprocess.Popen[str]", typed: str = "") -> str:
    """Return what a command printed that ends by itself, with success."""
    told, wrong = process.communicate(typed, timeout=600)
    assert process.returncode == 0, told + wrong
    return told


def _answers(port: int) -> bool:
    link = HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        link.request("GET", "/health")
        return link.getresponse().status == 200
    except OSError:
        return False
    finally:
        link.close()


def test_reuse_is_right(model: Model) -> None:
    """On quantized weights prompts of other lengths round otherwise, which the noise control shows."""
    report = verify_elsewhere(model, operations=8)
    assert report.reused_tokens > 100
    assert report.noise > 0.1
    assert report.passed


def test_turns_are_reused_token_by_token(model: Model) -> None:
    session = model.session("You are a careful assistant. " * 4, namespace="alice")
    first = session.respond("My name is Alex.", params=SHORT)
    session.close()
    second = session.respond("What is my name?", params=SHORT)
    usage = second.usage
    assert usage.reused_tokens + usage.computed_tokens == usage.prompt_tokens
    assert usage.reused_tokens >= first.usage.prompt_tokens + 8
    session.close()


def test_characters_of_several_tokens_come_whole(model: Model) -> None:
    """llama-server streams only the last token of a character that takes several."""
    ids = model.tokenizer.encode("🎉👩")
    assert len(ids) > 3, "each takes several"
    params = SamplingParams(max_tokens=24, logit_bias=dict.fromkeys(ids, 30.0))
    session = model.session(namespace="alice")
    reply = session.respond("Write emojis.", params=params)
    assert len(reply.node.token_ids or ()) == 24
    assert set(reply.node.token_ids or ()) <= set(ids)
    told = SamplingParams(max_tokens=24, logit_bias=params.logit_bias, logprobs=2)
    session.undo()
    with pytest.raises(InvalidParameterError, match="one character"):
        session.respond("Write emojis.", params=told)
    session.close()


def test_a_schema_is_followed(model: Model) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    params = SamplingParams(
        max_tokens=24, grammar=Grammar.json_schema({**schema, "additionalProperties": False})
    )
    with model.session(namespace="alice") as session:
        text = session.respond("Give a number as JSON.", params=params).text
    assert text.lstrip().startswith("{")


def test_verify_tells_what_it_found(llama: tuple[Path, str], tmp_path: Path) -> None:
    told = _ended(_command(llama, tmp_path, "verify", "-n", "6"))
    assert told.splitlines()[-1] == "Reuse: PASS"
    reused = re.search(r"([\d,]+) tokens reused", told)
    assert reused is not None
    assert int(reused[1].replace(",", "")) > 50


def test_a_rewind_costs_nothing_and_the_verdict_is_told(
    llama: tuple[Path, str], tmp_path: Path
) -> None:
    told = _ended(_command(llama, tmp_path, "rewind-test"))
    assert "(0 computed), asked again (1 computed)" in told
    assert told.splitlines()[-1] == "rewind test OK"


def test_scenarios_are_played(llama: tuple[Path, str], tmp_path: Path) -> None:
    path = tmp_path / "scenarios.json"
    told = _ended(_command(llama, tmp_path, "scenarios", "--json", str(path)))
    assert "elsewhere" in told
    summary = json.loads(path.read_text("utf-8"))["summary"]
    assert summary["computed_tokens_with_reuse"] < summary["computed_tokens_full"] / 2


def test_bench_measures_what_reuse_saves(llama: tuple[Path, str], tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    lengths = ("--input", "200", "--output", "4", "--input2", "20", "--output2", "4")
    counts = ("--iterations", "2", "--turns", "0")
    told = _ended(_command(llama, tmp_path, "bench", *lengths, *counts, "--json", str(path)))
    assert "Energy: cannot be read here" in told
    result = json.loads(path.read_text("utf-8"))
    for one in result["iterations"]:
        without, reuse = one["without"]["second"], one["reuse"]["second"]
        assert without["computed_tokens"] == 224
        assert reuse["reused_tokens"] >= 202
    assert result["summary"]["ttft_ratio"] < 0.8


def test_a_chat_is_kept_and_goes_on(llama: tuple[Path, str], tmp_path: Path) -> None:
    how = ("--temperature", "0", "--max-tokens", "12", "--json")
    asked = ("chat", "My name is Alex.", "--name", "kept", *how)
    first = json.loads(_ended(_command(llama, tmp_path, *asked)))
    asked = ("chat", "What is my name?", "--resume", "kept", *how)
    again = json.loads(_ended(_command(llama, tmp_path, *asked)))
    assert first["reply"]
    assert again["usage"]["prompt_tokens"] > first["usage"]["prompt_tokens"] + 12
    # Another process knows nothing of what a slot holds, and trusts none of it.
    assert again["usage"]["reused_tokens"] == 0


@pytest.mark.parametrize("command", ["serve", "web"])
def test_clients_and_the_page_are_served(
    command: str, llama: tuple[Path, str], tmp_path: Path
) -> None:
    process = _command(llama, tmp_path, command, "--port", "0")
    try:
        assert process.stderr is not None
        found = (re.search(r"http://127\.0\.0\.1:\d+", line) for line in process.stderr)
        url = next(one[0] for one in found if one)
        with httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
            if command == "web":
                assert (
                    "text/html"
                    in client.get("/", headers={"Accept": "text/html"}).headers["content-type"]
                )
            said = [{"role": "user", "content": "My name is Alex. Say hello to me."}]
            reused = []
            for _ in range(2):
                body = {"messages": said, "max_tokens": 12, "temperature": 0}
                answer = client.post("/v1/chat/completions", json=body).json()
                reused.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
                said += [answer["choices"][0]["message"], {"role": "user", "content": "And now?"}]
            assert reused[1] > reused[0]
            assert client.get("/health").json()["engines"] == {"up": 1, "all": 1}
    finally:
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 0
