"""
What ten tools add to the first token after a restart: with what is made while nobody waits, and without.

    python benchmarks/first_byte.py [--model M] [--profile P] [--rounds 3] [--save]

Each sample is a model loaded anew over the same KV on disk, whose prompt it has but for a new question.
`prepared` has made its table of tokens and the grammar of the tools, as a server does after loading;
`at once` is asked before that. Each sample is the first reply of its process's model.
"""

import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import recollect
from harness import parser, report, say
from recollect.kv.disk import DiskStore
from recollect.proof.bench import summarize
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


def main() -> int:
    """Measure, and return 1 where tools add more than is promised."""
    options = parser(__doc__.partition("\n\n")[0], profile="fast")
    options.add_argument("--rounds", type=int, default=3)
    args = options.parse_args()
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds + 1):  # the first fills the store and is discarded
            for way, is_prepared, offered in WAYS:
                with load(args, Path(folder)) as model:
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
        result: dict[str, Any] = {name: asdict(summary) for name, summary in summaries.items()}
        with load(args, Path(folder)) as model:
            report("first-byte", model, {"seconds": result, "added_s": added}, save=args.save)
    return int(added > MOST_ADDED_S)


def load(args: Any, folder: Path) -> recollect.Model:
    """Return the model with the store in a folder."""
    store = DiskStore(folder / "kv", budget_bytes=2 << 30)
    return recollect.load(args.model, profile=args.profile, store=store)


def ask(model: recollect.Model, text: str, **offered: Any) -> float:
    """Return how long the first token of a reply takes, its prompt known but for the question."""
    said: list[Message] = [
        {"role": "system", "content": "You are careful."},
        {"role": "user", "content": text},
    ]
    session = model.session_from(said, **offered)
    return session.respond(None, params=SamplingParams(max_tokens=4)).usage.ttft_s


if __name__ == "__main__":
    sys.exit(main())
