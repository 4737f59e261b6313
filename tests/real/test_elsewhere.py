"""A real llama-server behind recollect: ids, reuse, slots, and characters of several tokens."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

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
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
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
            home = tmp_path_factory.mktemp("home")
            with recollect.load(
                given, engine=f"llama=http://127.0.0.1:{port}", home=home
            ) as loaded:
                yield loaded
        finally:
            server.kill()
            server.wait()


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
    assert report.largest < 2.0


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
