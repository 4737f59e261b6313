"""
A small tree search: a model proposes moves, a verifier keeps the best, and the search goes on from those.

    python examples/tree_search.py [--model smollm2] [--start 2] [--target 23] [--width 3]

The puzzle: get from one number to another by moves that add 3 or double. The moves of a level are generated
in one batch, and what leads to them is read once. A grammar keeps the model to the moves, which needs the
extra `recollect-llm[grammar]`.
"""

import argparse
import re
from collections.abc import Sequence

import recollect
from recollect.types import Grammar, SamplingParams

MOVES = {"add 3": lambda number: number + 3, "double": lambda number: number * 2}
RULES = (
    "We play with numbers. From the number that we have, there are two moves: 'add 3' adds 3 to it, "
    "and 'double' multiplies it by 2. We want to reach {target} in as few moves as we can, and never to "
    "go beyond it. I say which number we have, and you say the next move, and nothing else."
)
DEPTH = 8
TRIES = 4


def numbers(start: int, moves: Sequence[str]) -> list[int]:
    """Return the numbers that moves lead through, the first one included."""
    found = [start]
    for move in moves:
        found.append(MOVES[move](found[-1]))
    return found


def moves_of(branch: recollect.Branch | None) -> list[str]:
    """Return the moves on the way to a branch."""
    if branch is None:
        return []
    said = [str(one["content"]) for one in branch.transcript() if one["role"] == "assistant"]
    return [match[0] for one in said if (match := re.search("add 3|double", one))]


def main() -> None:
    """Search, show the way that was found, and say what sharing has saved."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0].strip())
    parser.add_argument("--model", default="smollm2", help="what recollect loads")
    parser.add_argument("--start", type=int, default=2)
    parser.add_argument("--target", type=int, default=23)
    parser.add_argument("--width", type=int, default=3, help="branches that go on from each level")
    chosen = parser.parse_args()
    params = SamplingParams(
        max_tokens=8, temperature=1.0, seed=1, grammar=Grammar.regex("add 3|double")
    )

    def ask(branch: recollect.Branch | None) -> list[str]:
        at = numbers(chosen.start, moves_of(branch))[-1]
        return [] if at >= chosen.target else [f"We have {at}. Which move?"] * TRIES

    def score(branch: recollect.Branch) -> float:
        """Verify: the nearer to the target the better, and beyond it is no way."""
        at = numbers(chosen.start, moves_of(branch))[-1]
        # Two branches at one number are no better than one: what varies is kept by a hair.
        return at - chosen.target - branch.index * 1e-6 if at <= chosen.target else -1e9

    with recollect.load(chosen.model) as model:
        session = model.session(RULES.format(target=chosen.target), params=params)
        found = session.explore(ask, depth=DEPTH, keep=chosen.width, score=score).read()
        way = numbers(chosen.start, moves_of(found.best))
        steps = ", ".join(moves_of(found.best))
        usage = found.usage
    print(" -> ".join(map(str, way)), f"({steps})")
    print("Solved." if way[-1] == chosen.target else "Not solved: try --width 6, or another model.")
    print(
        f"{len(found.branches)} moves tried. Their prompts had {usage.prompt_tokens:,} tokens, of which "
        f"{usage.computed_tokens:,} were computed: {1 - usage.computed_tokens / usage.prompt_tokens:.0%} "
        "saved."
    )


if __name__ == "__main__":
    main()
