"""
What a grammar costs: to begin, and for each token, beside the choice of a token without one.

    python benchmarks/grammar.py [--model M] [--profile P] [--save]

Replies are fed to the grammars token by token, so no forward pass is in the numbers.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from time import perf_counter, sleep
from typing import Any

import numpy as np

import recollect
from harness import parser, report, say
from recollect.conversation.tools import Tools
from recollect.engine.grammar import GrammarState
from recollect.engine.sampling import choose_token
from recollect.proof.bench import Summary, summarize
from recollect.text.tool_calls import call_text
from recollect.types import Grammar, SamplingParams

REPEATS = 5
MOST_MICROSECONDS = 1000
SETTLING_S = 5
"""Until a thread has joined the pages of the weights, which a model does once after it was loaded."""
PERSON = {"name": "Alex Smith", "age": 31, "tags": ["careful", "works with data", "tall"]}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "find", "parameters": SCHEMA}}
"""Its arguments are what the schema describes."""


def main() -> int:
    """Run, print, and return 1 where a token costs more than it may."""
    arguments = parser(__doc__ or "", profile="fast").parse_args()
    tools = Tools.of([TOOL]).grammar()
    assert tools is not None
    text = "I would have to look that up, which takes a moment. " * 4
    cases = {
        "schema": (Grammar.json_schema(SCHEMA), json.dumps(PERSON)),
        "any object": (Grammar.json_object(), json.dumps(PERSON)),
        "tools, auto": (tools, text + call_text("find", json.dumps(PERSON))),
    }
    with recollect.load(arguments.model, profile=arguments.profile) as model:
        begun = perf_counter()
        model.grammars.start(Grammar.regex("a"))
        table_s = perf_counter() - begun
        sleep(SETTLING_S)
        results = {name: measured(model, *case) for name, case in cases.items()}
        plain = choosing(model)
        fields = {"table_s": table_s, "choose_us": asdict(plain), "grammars": results}
        report("grammar", model, fields, save=arguments.save)
    say(f"table of tokens, once a model: {table_s:.2f} s")
    say(f"choice of a token without a grammar, greedy: {plain.median:.0f} us")
    for name, result in results.items():
        mask = result["mask_us"]
        say(
            f"{name}: begin {result['compile_ms']:.1f} ms; each token {mask['mean']:.0f} us on "
            f"average, {mask['median']:.0f} in the middle, {mask['maximum']:.0f} at most"
        )
    slowest = max(result["mask_us"]["mean"] for result in results.values())
    return 0 if slowest < MOST_MICROSECONDS else 1


def measured(model: recollect.Model, grammar: Grammar, text: str) -> dict[str, Any]:
    """Return what a grammar costs with a text that fits it."""
    ids = model.tokenizer.encode(text)
    begun = perf_counter()
    model.grammars.start(grammar)
    compile_ms = (perf_counter() - begun) * 1e3
    times = [mask_times(model.grammars.start(grammar), ids) for _ in range(REPEATS)]
    return {
        "tokens": len(ids),
        "compile_ms": compile_ms,
        "mask_us": asdict(summarize([time for repeat in times for time in repeat])),
    }


def mask_times(state: GrammarState, ids: list[int]) -> list[float]:
    """Return how long the mask takes after each beginning of a reply, in microseconds."""
    return [timed(partial(state.allowed, ids[:length])) for length in range(len(ids) + 1)]


def choosing(model: recollect.Model) -> Summary:
    """Return what the choice of a token costs without a grammar, in microseconds."""
    logits = np.random.default_rng(1).standard_normal(model.engine.info.vocab_size)
    scores, history = logits.astype(np.float32), np.arange(200)
    params = SamplingParams()
    return summarize(
        [
            timed(lambda: choose_token(scores, params, history=history, reply_start=0, seed=0))
            for _ in range(200)
        ]
    )


def timed(what: Callable[[], object]) -> float:
    """Return how long a call takes, in microseconds."""
    begun = perf_counter()
    what()
    return (perf_counter() - begun) * 1e6


if __name__ == "__main__":
    sys.exit(main())
