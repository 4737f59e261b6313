"""
How long a client with tools waits for the first byte, beside the forward pass of what is new.

    python benchmarks/first_byte.py [--model M] [--profile P] [--tokens 7000] [--rounds 3] [--save]

1. What ten tools add to the first token after a restart: with what is made while nobody waits, and without.
   Each sample is a model loaded anew over the same KV on disk, whose prompt it has but for a new question.
   `prepared` has made its table of tokens and the grammar of the tools, as a server does after loading;
   `at once` is asked before that. Each sample is the first reply of its model.
2. An agent's turns on a prompt of that many tokens with ten tools, sent whole over HTTP, streamed:
   the first after a restart of the server, and the two after it. Each round begins once the first
   passes, which lay out the weights, are done, a second or two after loading. The runtime is wrapped to
   note its passes: `beyond` is the time from the request to the first piece of the reply, less the
   passes that ended before it. The first piece of a call is its name, which takes some tokens.
"""

import http.client
import json
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import uvicorn

import recollect
from batching import TimedRuntime
from harness import Load, parser, report, say
from recollect import config
from recollect.kv.disk import DiskStore
from recollect.models.prepare import prepare
from recollect.proof.bench import bench_text, cut_to_length, summarize
from recollect.runtime.openvino import OpenVinoRuntime
from recollect.server.access import Keyring
from recollect.server.app import create_app
from recollect.server.hub import ModelHub
from recollect.server.settings import Settings
from recollect.types import Message, SamplingParams

FIELDS = {"path": {"type": "string"}, "count": {"type": "integer"}, "mode": {"enum": ["a", "b"]}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": f"tool_{number}",
            "description": "Does what its name says, carefully.",
            "parameters": {"type": "object", "properties": FIELDS, "required": ["path"]},
        },
    }
    for number in range(10)
]
WAYS: list[tuple[str, bool, dict[str, Any]]] = [
    ("prepared, with tools", True, {"tools": TOOLS}),
    ("prepared, without", True, {}),
    ("at once, with tools", False, {"tools": TOOLS}),
]
MOST_ADDED_S = 0.5
"""With what it takes to read the KV of the tools' descriptions from disk."""
MOST_BEYOND_S = 0.5
STORE_BYTES = 4 << 30
RESULT_TOKENS = 200
"""Of what a tool returns in each turn."""
TURNS = ("after a restart", "second", "third")
IDLE_S = 2.0
"""After loading and between turns: what a server does while nobody waits takes less."""


def main() -> int:
    """Measure, and return 1 where a client waits longer than is promised."""
    options = parser(__doc__.partition("\n\n")[0], profile="fast")
    options.add_argument("--tokens", type=int, default=7000, help="of an agent's prompt")
    options.add_argument("--rounds", type=int, default=3)
    args = options.parse_args()
    others = Load()
    with tempfile.TemporaryDirectory() as folder:
        turns = agent_turns(args, Path(folder) / "agent")
        tools = tools_after_restart(args, Path(folder) / "tools")
        result = {"tools": tools, "agent": turns, "others_load": others.others()}
        with load(args, Path(folder) / "tools") as model:
            report("first-byte", model, result, save=args.save)
    beyond = max(turns["turns"][turn]["beyond_s"]["median"] for turn in TURNS)
    return int(tools["added_s"] > MOST_ADDED_S or beyond > MOST_BEYOND_S)


def tools_after_restart(args: Any, folder: Path) -> dict[str, Any]:
    """Return the times to the first token of each way, and what tools add."""
    times: dict[str, list[float]] = {}
    for number in range(args.rounds + 1):  # the first fills the store and is discarded
        for way, is_prepared, offered in WAYS:
            with load(args, folder) as model:
                begun = perf_counter()
                if is_prepared:
                    model.grammars.prepare()
                made_s = perf_counter() - begun
                asked_s = ask(model, f"{way} {number}", **offered)
            if number:
                times.setdefault(way, []).append(asked_s)
                times.setdefault(f"{way}: table and grammar", []).append(made_s)
    summaries = {name: summarize(some) for name, some in times.items()}
    for name, summary in summaries.items():
        say(f"{name}: {summary.median:.3f} s")
    added = summaries["prepared, with tools"].median - summaries["prepared, without"].median
    seconds = {name: asdict(summary) for name, summary in summaries.items()}
    return {"seconds": seconds, "added_s": added}


def load(args: Any, folder: Path) -> recollect.Model:
    """Return the model with the store in a folder."""
    store = DiskStore(folder / "kv", budget_bytes=STORE_BYTES)
    return recollect.load(args.model, profile=args.profile, store=store)


def ask(model: recollect.Model, text: str, **offered: Any) -> float:
    """Return how long the first token of a reply takes, its prompt known but for the question."""
    said: list[Message] = [
        {"role": "system", "content": "You are careful."},
        {"role": "user", "content": text},
    ]
    session = model.session_from(said, **offered)
    return session.respond(None, params=SamplingParams(max_tokens=4)).usage.ttft_s


def agent_turns(args: Any, folder: Path) -> dict[str, Any]:
    """Return what the turns of an agent took, each kind by itself."""
    found: dict[str, list[dict[str, float]]] = {turn: [] for turn in TURNS}
    with serving(args, folder) as (url, runtime, model):
        messages = beginning(url, runtime, model, args.tokens)
        cold = say_it(url, runtime, messages)
        say(f"cold: {cold['prompt_tokens']} tokens in {cold['wait_s']:.1f} s")
    for number in range(args.rounds):
        said = list(messages)
        with serving(args, folder) as (url, runtime, model):
            for turn in TURNS:
                # Each round has results of its own, so that none is known from the round before.
                result = cut_to_length(model, f"{number} {turn}: {bench_text()}", RESULT_TOKENS)
                said.append({"role": "user", "content": model.tokenizer.decode(result)})
                sleep(IDLE_S)
                sample = say_it(url, runtime, said)
                reply = sample.pop("message")
                said.append(reply)
                found[turn].append(sample)
                say(f"{turn}: " + ", ".join(f"{name} {sample[name]:.4g}" for name in sample))
    names = found[TURNS[0]][0]
    return {
        "cold_s": cold["wait_s"],
        "prompt_tokens": cold["prompt_tokens"],
        "turns": {
            turn: {name: asdict(summarize([one[name] for one in some])) for name in names}
            for turn, some in found.items()
        },
    }


def beginning(
    url: str, runtime: TimedRuntime, model: recollect.Model, tokens: int
) -> list[Message]:
    """Return an agent's first messages: with its tools they take that many tokens, to a few."""

    def messages(length: int) -> list[Message]:
        rules = model.tokenizer.decode(cut_to_length(model, bench_text(), length))
        return [{"role": "system", "content": rules}, {"role": "user", "content": "Look at a.txt."}]

    short = say_it(url, runtime, messages(100))
    return messages(tokens - int(short["prompt_tokens"]) + 100)


@contextmanager
def serving(args: Any, folder: Path) -> Iterator[tuple[str, TimedRuntime, recollect.Model]]:
    """Run a server on a model that was loaded anew over a folder."""
    local = prepare(args.model, home=config.home())
    assert local.folder is not None, "the reference model has no forward pass to time"
    runtime = TimedRuntime(
        OpenVinoRuntime(
            local.folder / "openvino_model.xml",
            profile=args.profile,
            context_length=local.context_length,
        )
    )
    store = DiskStore(folder / "kv", budget_bytes=STORE_BYTES)
    model = recollect.Model(local, runtime, profile=args.profile, home=folder, store=store)
    hub = ModelHub(lambda _: model, [args.model])
    app = create_app(Settings(home=folder, models=(args.model,)), hub, Keyring())
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        sleep(0.05)
    # The first passes of a process lay out the weights, which belongs to loading the model.
    model.engine.wait_until_warm()
    try:
        yield f"127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", runtime, model
    finally:
        server.should_exit = True
        thread.join()


def say_it(address: str, runtime: TimedRuntime, messages: list[Message]) -> dict[str, Any]:
    """Send a conversation; return times in seconds, counts, and the reply as the next turn sends it."""
    body = {"messages": messages, "tools": TOOLS, "max_tokens": 24, "temperature": 0}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    connection = http.client.HTTPConnection(address, timeout=1200)
    begun = perf_counter()
    connection.request(
        "POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"}
    )
    first, text, usage = None, "", None
    response = connection.getresponse()
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            delta = choice["delta"]
            if first is None and (delta.get("content") or delta.get("tool_calls")):
                first = perf_counter()
            text += delta.get("content") or ""
    connection.close()
    assert first is not None, response.status
    assert usage is not None
    fed = sum(
        done.duration for done in runtime.passes if done.begun >= begun and done.ended <= first
    )
    return {
        "wait_s": first - begun,
        "passes_s": fed,
        "beyond_s": first - begun - fed,
        "prompt_tokens": usage["prompt_tokens"],
        "computed_tokens": usage["recollect"]["computed_tokens"],
        "restored_tokens": usage["recollect"]["restored_tokens"],
        "message": {"role": "assistant", "content": text},
    }


if __name__ == "__main__":
    sys.exit(main())
