"""
What eight replies from one place cost together, against one after the other.

    python benchmarks/explore.py [--model smollm2] [--profile fast] [--rounds 5] [--save]

1. Counts, with nothing in memory: the tokens that are computed, and the most blocks in use. The trunk of
   2,000 tokens may be in either once.
2. Time, with the trunk in memory for both: eight branches of 64 tokens in one exploration, against eight
   explorations of one branch in a row. Decode is from a first token to the last; the whole is from
   the call. The prompts are new in each round, so nothing of the replies is reused.
"""

import statistics
import sys
from dataclasses import dataclass
from time import perf_counter

import recollect
from harness import Load, parser, report, say
from recollect.kv.blocks import blocks_for
from recollect.proof.bench import bench_text, cut_to_length
from recollect.types import SamplingParams

TRUNK = 2000
BRANCHES = 8
REPLY = 64
MOST_RATIO = 0.6
"""Of decode together over decode in a row."""


@dataclass
class Timed:
    """Times in seconds, and what was counted at the forward passes."""

    whole_s: float = 0.0
    decode_s: float = 0.0
    computed_tokens: int = 0
    most_blocks: int = 0


def main() -> int:
    """Run, print, and return 1 where something costs more than it may."""
    options = parser(__doc__ or "", profile="fast")
    options.add_argument("--rounds", type=int, default=5, help="of each way, in turns")
    args = options.parse_args()
    load = Load()
    with recollect.load(args.model, profile=args.profile, kv_disk=0) as model:
        text = model.tokenizer.decode(cut_to_length(model, bench_text(), TRUNK))
        params = SamplingParams(max_tokens=REPLY, temperature=0.8, seed=1, ignore_eos=True)
        chat = model.session(text, params=params)
        trunk = len(chat.typed_ids())
        explore(chat, ["Warm up."])
        counts = count(chat, trunk)
        say(f"counted: {counts}")
        times: dict[str, list[Timed]] = {"together": [], "in_a_row": []}
        for number in range(args.rounds):
            asked = prompts(f"{number} together"), prompts(f"{number} in a row")
            ways = [(0, "together"), (1, "in_a_row")]
            for place, way in ways if number % 2 else reversed(ways):
                times[way].append(
                    explore(chat, asked[place])
                    if way == "together"
                    else added([explore(chat, [one]) for one in asked[place]])
                )
        decode = ratio(times, "decode_s")
        whole = ratio(times, "whole_s")
        result: dict[str, object] = {
            "trunk_tokens": trunk,
            "branches": BRANCHES,
            "reply_tokens": REPLY,
            "counts": counts,
            "samples": {way: [vars(one) for one in found] for way, found in times.items()},
            "decode_ratio": decode,
            "whole_ratio": whole,
            "others_load": load.others(),
        }
        report("explore", model, result, save=args.save)
    say(
        f"decode {decode:.2f} of eight in a row (at most {MOST_RATIO}), from call to end {whole:.2f}; "
        f"computed {counts['computed_tokens']} of at most {counts['allowed_tokens']} tokens, "
        f"blocks {counts['most_blocks']} of at most {counts['allowed_blocks']}"
    )
    holds = (
        decode <= MOST_RATIO
        and counts["computed_tokens"] <= counts["allowed_tokens"]
        and counts["most_blocks"] <= counts["allowed_blocks"]
    )
    return 0 if holds else 1


def prompts(name: str) -> list[str]:
    """Return a question for each branch, which no other round asks."""
    return [f"Question {name}, {number}: what does the text say?" for number in range(BRANCHES)]


def count(chat: recollect.Session, trunk: int) -> dict[str, int]:
    """Explore with nothing in memory, and return what was counted beside what may be."""
    engine = chat.model.engine
    engine.forget()
    asked = prompts("counted")
    found = explore(chat, asked)
    ids = [chat.model.prompts.encode(chat.path(), one).token_ids for one in asked]
    own = sum(len(one) - trunk for one in ids)
    size = engine.block_size
    # The block in which the branches part is copied for each.
    per_branch = blocks_for(max(map(len, ids)) - trunk + REPLY, size) + 1
    return {
        "computed_tokens": found.computed_tokens,
        "allowed_tokens": trunk + own + BRANCHES * (REPLY - 1),
        "most_blocks": found.most_blocks,
        "allowed_blocks": blocks_for(trunk, size) + BRANCHES * per_branch,
    }


def explore(chat: recollect.Session, asked: list[str]) -> Timed:
    """Return what one exploration takes."""
    engine, found = chat.model.engine, Timed()
    before, begun, first = engine.computed_tokens, perf_counter(), None
    for _ in (exploration := chat.explore(asked, keep=0)).pieces():
        first = first or perf_counter()
        found.most_blocks = max(found.most_blocks, engine.pool.used_blocks)
    ended = perf_counter()
    assert all(one.is_whole for one in exploration.branches), "none has failed"
    found.whole_s, found.decode_s = ended - begun, ended - (first or begun)
    found.computed_tokens = engine.computed_tokens - before
    return found


def added(each: list[Timed]) -> Timed:
    """Return what several took one after the other."""
    return Timed(
        sum(one.whole_s for one in each),
        sum(one.decode_s for one in each),
        sum(one.computed_tokens for one in each),
        max(one.most_blocks for one in each),
    )


def ratio(times: dict[str, list[Timed]], name: str) -> float:
    """Return the median of one way over that of the other."""
    together, in_a_row = (
        statistics.median(getattr(one, name) for one in times[way])
        for way in ("together", "in_a_row")
    )
    return float(together / in_a_row)


if __name__ == "__main__":
    sys.exit(main())
