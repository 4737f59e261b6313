"""
An agent that goes back to the last good state when a step fails, and tries again.

    python examples/last_good_state.py [--model smollm2]

Each step is checked by a rule. What fails is not left in the conversation to lead the model astray: the
session is rewound to the last good message, which costs nothing, and the step is tried with another seed.
"""

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import recollect
from recollect.types import SamplingParams

SYSTEM = (
    "You help to plan a journey by train. You answer each question with one short sentence, and never "
    "with a list. You stay with what was decided before."
)
MOST_TRIES = 8
CITIES = {"paris", "lyon", "marseille", "nice", "bordeaux", "lille", "toulouse", "nantes"}
MONTHS = "january|february|march|april|may|june|july|august|september|october|november|december"


@dataclass(frozen=True)
class Step:
    """Something to decide, and how to tell that it was decided."""

    question: str
    is_good: Callable[[str], bool]


def is_number(text: str) -> bool:
    """Return whether a text says one number of days that a journey can have."""
    found = re.findall(r"\d+", text)
    return len(found) == 1 and 1 <= int(found[0]) <= 30


STEPS = (
    Step("Name one large city in France to begin in.", lambda said: named(said, CITIES) == 1),
    Step(
        "Name the month of the year in which we go.",
        lambda said: len(set(re.findall(MONTHS, said.lower()))) == 1,
    ),
    Step("How many days does the journey take? Say one number.", is_number),
    Step(
        "What do I take with me against the rain?",
        lambda said: bool(
            re.search(r"\b(umbrella|(rain)?coat|jacket|poncho|hat|hood)\b", said.lower())
        ),
    ),
)


def named(said: str, names: set[str]) -> int:
    """Return how many of some names a text says."""
    return sum(name in said.lower() for name in names)


def main() -> None:
    """Take all steps, and say what going back has saved."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0].strip())
    parser.add_argument("--model", default="smollm2", help="what recollect loads")
    chosen = parser.parse_args()
    params = SamplingParams(max_tokens=40, temperature=0.8)
    prompt = computed = failed = 0
    with recollect.load(chosen.model) as model:
        session = model.session(SYSTEM, params=params)
        for step in STEPS:
            good = session.tip
            for attempt in range(MOST_TRIES):
                reply = session.respond(step.question, params=replace(params, seed=attempt))
                prompt += reply.usage.prompt_tokens
                computed += reply.usage.computed_tokens
                if step.is_good(reply.text):
                    print(f"{step.question}\n  {reply.text.strip()}")
                    break
                failed += 1
                session.rewind(good)
            else:
                print(f"{step.question}\n  (given up after {MOST_TRIES} tries)")
        said = len(session.path()) // 2
    replies = "reply" if failed == 1 else "replies"
    print(
        f"\n{said} steps taken, {failed} {replies} taken back. The prompts had {prompt:,} tokens, of "
        f"which {computed:,} were computed: {1 - computed / prompt:.0%} saved."
    )


if __name__ == "__main__":
    main()
