"""
Real replicas of vLLM: what edits and branches compute, and whether the model of a fleet holds.

    python benchmarks/elsewhere.py MODEL_FOLDER URL URL --held TOKENS [--json RESULT.json]
    python benchmarks/elsewhere.py MODEL_FOLDER URL --traces [--tokens N] [--json RESULT.json]

1. Conversations with edits and branches, through recollect and by a client of texts: a short one, and the
   trace of `traces` in which every other turn is asked again, edited or taken back. Tokens computed are
   vLLM's own counters (prompt tokens less hits of its prefix cache). Replies are drawn at temperature 1.
2. Conversations on both replicas, more than fit, by conversation (through recollect) and in turn (that
   client), beside what `fleet` says of as many, as long and on as much memory, where each conversation is
   on the replica that it was on. TOKENS is what one replica holds.
3. Which families' grammars of calls vLLM takes.

With --traces, all of `traces` run on one replica instead, and the result is written after each of them.

`.ci/vllm` starts the replicas and runs this. Nothing else may use them.
"""

import argparse
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import recollect
from fleet import POLICIES, Fleet, Policy, order_of, simulate
from recollect.conversation.model import Model
from recollect.conversation.tools import Tools
from recollect.conversation.turn import Reply
from recollect.engine.sampling import Generator
from recollect.errors import InvalidParameterError
from recollect.text.tool_formats import FORMATS
from recollect.types import SamplingParams
from resending import TextClient, compare
from traces import TRACES, Trace, text_of

PARAMS: Final = SamplingParams(max_tokens=4, ignore_eos=True)
SAID: Final = SamplingParams(max_tokens=32, temperature=1.0, seed=1)
"""Of replies that are sent again: the temperature that OpenAI's API has where nothing is said."""
FLEET: Final = Fleet(
    conversations=12, replicas=2, turns=3, tokens=200, held=0, unit=32, at_once=12, begun=0
)
_TOOLS: Final = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"text": {"type": "string"}, "count": {"type": "integer"}},
                "required": ["text"],
            },
        },
    }
    for name in ("note", "search")
]


def _edits_and_branches(
    model: Model, dice: random.Random, params: SamplingParams
) -> Iterator[list[Reply]]:
    """A conversation in which something is asked again, edited, and tried in two ways."""
    with model.session(text_of(dice, 40), params=params) as session:
        yield [session.respond(text_of(dice, 10))]
        yield [session.respond(text_of(dice, 20))]
        yield [session.respond(text_of(dice, 20))]
        yield [session.regenerate()]
        node = [one for one in session.path() if one.role == "user"][-1]
        yield [session.edit(node, text_of(dice, 20))]
        for fork in (session.fork(), session.fork()):
            yield [fork.respond(text_of(dice, 10))]


def counted(urls: Sequence[str]) -> tuple[int, int]:
    """Return how many tokens of prompts vLLM was asked for, and how many of them it found, ever."""
    found = {"queries": 0.0, "hits": 0.0}
    for url in urls:
        link = HTTPConnection(urlsplit(url).netloc, timeout=60)
        link.request("GET", "/metrics")
        for line in link.getresponse().read().decode().splitlines():
            for what in found:
                if line.startswith(f"vllm:prefix_cache_{what}_total"):
                    found[what] += float(line.rsplit(" ", 1)[1])
        link.close()
    return int(found["queries"]), int(found["hits"])


def computed(urls: Sequence[str]) -> int:
    """Return how many tokens of prompts vLLM has computed, ever."""
    asked, hits = counted(urls)
    return asked - hits


def hold_fleet(model: Model, client: TextClient, fleet: Fleet) -> dict[str, dict[str, float]]:
    """Hold the conversations of a fleet for real; return each policy's shares, real and simulated."""
    shares = {}
    for name in ("by conversation", "in turn"):
        dice = random.Random(name)  # noqa: S311 - not for secrets
        holder: Any = model if name == "by conversation" else client
        sessions: dict[int, Any] = {}
        lengths: dict[int, int] = {}
        placed: dict[int, int] = {}
        reusable, before = 0, counted(client.urls)[1]
        for conversation in order_of(fleet):
            session = sessions.get(conversation)
            if session is None:
                session = sessions[conversation] = holder.session("", params=PARAMS)
            reusable += lengths.get(conversation, 0) // fleet.unit * fleet.unit
            asked = [one.asked for one in model.replicas()]
            session.respond(_message(model, dice, fleet.tokens))
            model.engine.abort(model.engine.tasks())  # what is read ahead is not in the model
            for number, one in enumerate(model.replicas()):
                if one.asked > asked[number]:
                    placed[conversation] = number
            said: list[Any] = [{"role": one.role, "content": one.content} for one in session.path()]
            text = model.template.render(said, add_generation_prompt=False)
            lengths[conversation] = len(model.tokenizer.encode(text))
        real = (counted(client.urls)[1] - before) / reusable
        policy = POLICIES[name] if name == "in turn" else _placed(placed)
        shares[name] = {"real": real, "simulated": simulate(fleet, policy)["reused_share"]}
        print(f"fleet, {name}: {shares[name]}", flush=True)
    return shares


def _placed(replicas: Mapping[int, int]) -> Policy:
    """Return the policy that has each conversation on the replica that it was on."""
    return lambda conversation, _number, _load: replicas[conversation]


def _message(model: Model, dice: random.Random, tokens: int) -> str:
    """Return a message that makes a turn of about so many tokens."""
    text = text_of(dice, tokens // 2)
    while len(model.tokenizer.encode(text)) < tokens - 20:
        text += " " + text_of(dice, 5)
    return text


def taken_grammars(model: Model) -> dict[str, bool]:
    """Return of which families vLLM takes the grammar of calls, free ones and forced ones."""
    prompt = model.tokenizer.encode("Note that it rains.")
    taken = {}
    for name, form in FORMATS.items():
        taken[name] = True
        for choice in ("auto", "required"):
            tools = Tools.of(_TOOLS, choice)
            grammar = tools.grammar(None, form, model.tokenizer.control_tokens)
            params = SamplingParams(max_tokens=2, grammar=grammar)
            generator = Generator(model.engine, params, grammars=model.grammars)
            generator.append_tokens(prompt)
            assert grammar is not None, "there are tools"
            try:
                while not generator.is_done():
                    generator.generate_next_token()
                reply = generator.get_sequence()[len(prompt) :]
                model.grammars.start(grammar).allowed(reply)  # raises where it does not follow it
            except InvalidParameterError as refusal:
                taken[name] = False
                print(f"{name}, {choice}: {refusal}", flush=True)
            generator.close()
    return taken


def hold_traces(
    model: Model, client: TextClient, params: SamplingParams
) -> Iterator[dict[str, object]]:
    """Hold all traces both ways; yield what they came to, one more each time."""
    traces: list[dict[str, object]] = []
    for trace in TRACES:
        held = compare(model, client, trace, params, lambda: computed(client.urls))
        print(held, flush=True)
        traces.append(asdict(held))
        yield {
            "date": datetime.now(UTC).date().isoformat(),
            "engine": model.engine.info.name,
            "block_tokens": model.engine.info.reuse.unit,
            "reply_tokens": params.max_tokens,
            "traces": traces,
        }


def _written(told: Mapping[str, object], path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(told, indent=2) + "\n", "utf-8")


def main() -> None:
    options = argparse.ArgumentParser(description="Real replicas of vLLM.")
    options.add_argument("model")
    options.add_argument("urls", nargs="+")
    options.add_argument("--name", default="smollm2")
    options.add_argument("--held", type=int)
    options.add_argument("--traces", action="store_true")
    options.add_argument("--tokens", type=int, default=SAID.max_tokens)
    options.add_argument("--json", type=Path)
    chosen = options.parse_args()
    if len(chosen.urls) != (1 if chosen.traces else 2) or (chosen.held is None) != chosen.traces:
        options.error("give one URL and --traces, or two and --held")
    with recollect.load(chosen.model, engine=f"vllm={','.join(chosen.urls)}") as model:
        unit = model.engine.info.reuse.unit
        client = TextClient(chosen.urls, model.tokenizer, model.context_length, chosen.name)
        if chosen.traces:
            for told in hold_traces(model, client, replace(SAID, max_tokens=chosen.tokens)):
                _written(told, chosen.json)
            return
        one = replace(client, urls=chosen.urls[:1])
        traces = []
        for trace in (Trace("edits and branches", _edits_and_branches), TRACES[1]):
            held = compare(model, one, trace, SAID, lambda: computed(chosen.urls))
            print(held, flush=True)
            assert held.front_lost_tokens == 0
            assert held.front_awaited_tokens <= held.alone_computed_tokens
            traces.append(asdict(held))
        fleet = replace(FLEET, held=chosen.held, unit=unit)
        told = {
            "date": datetime.now(UTC).date().isoformat(),
            "engine": model.engine.info.name,
            "traces": traces,
            "grammars_taken": taken_grammars(model),
            "fleet": {**asdict(fleet), "reused_share": hold_fleet(model, client, fleet)},
        }
    print(json.dumps(told, indent=2))
    _written(told, chosen.json)


if __name__ == "__main__":
    main()
