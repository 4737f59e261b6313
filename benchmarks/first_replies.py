"""
How many first replies to forty ordinary prompts run on, with the settings that a chat begins with.

    python benchmarks/first_replies.py [--model M] [--profile P] [--most 1] [--at-once 6] [--save]

Each prompt of `first_replies.txt` begins a conversation of its own, sampled as the model's makers
recommend, with the limit of a chat at a terminal and the prompt's number as its seed. The texts are in the
result: a reply that passes 1,200 tokens may be a good one, which only its reader can tell.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import recollect
from harness import parser, report, say
from recollect.cli.chat import SOFT_LIMIT

PROMPTS = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").splitlines()
LONG = 1200
"""Tokens that a reply to none of the prompts needs."""


def main() -> int:
    """Ask, and return 1 where more replies are long than may be."""
    options = parser(__doc__.partition("\n\n")[0], profile="fast")
    options.add_argument("--most", type=int, default=1, help="how many replies may be long")
    options.add_argument("--at-once", type=int, default=6)
    args = options.parse_args()
    with (
        recollect.load(args.model, profile=args.profile, kv_disk=0) as model,
        ThreadPoolExecutor(args.at_once) as threads,
    ):
        replies = list(threads.map(partial(ask, model), range(len(PROMPTS))))
        lengths = sorted(reply["tokens"] for reply in replies)
        long = sum(length > LONG for length in lengths)
        result: dict[str, object] = {
            "long_replies": long,
            "ran_away": sum(reply["ran_away"] for reply in replies),
            "median_tokens": lengths[len(lengths) // 2],
            "sampling": dict(model.local.sampling),
            "replies": replies,
        }
        report("first-replies", model, result, save=args.save)
    return int(long > args.most)


def ask(model: recollect.Model, number: int) -> dict[str, Any]:
    """Return the reply to a prompt, and how it ended."""
    how = replace(model.sampling, max_tokens=SOFT_LIMIT, seed=number)
    reply = model.session(params=how).respond(PROMPTS[number])
    say(f"{number:>2} {reply.usage.generated_tokens:>5} {reply.finish_reason}  {PROMPTS[number]}")
    return {
        "prompt": PROMPTS[number],
        "reply": reply.text,
        "tokens": reply.usage.generated_tokens,
        "finish_reason": reply.finish_reason,
        "ran_away": reply.ended == "repetition",
    }


if __name__ == "__main__":
    sys.exit(main())
