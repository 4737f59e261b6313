"""
How much faster replies are that repeat what was said, since they take several tokens from one pass.

    python benchmarks/drafts.py [--model M] [--profile P] [--runtime R] [--rounds 5] [--save]

Each case is a reply that is generated plainly and with guesses, in turns, with the same seeds; what was said
before is known to the guesses, and nothing of the reply itself. The bound is what the passes allow: the time
of a pass for each token, over the time of the passes with guesses, both measured here.
"""

import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from time import perf_counter
from typing import Any, Final

import recollect
from harness import Load, parser, report, say
from recollect.engine.drafts import Drafts
from recollect.runtime.base import PassResult, Row
from recollect.types import Grammar, SamplingParams

MOST_TOKENS: Final = 192
LEAST_SHARE: Final = 0.85
"""Of the bound; promised."""

SORTING: Final = '''
import heapq
from collections.abc import Iterable


class TopItems:
    """Keeps the largest items that were added."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.items: list[int] = []

    def add(self, item: int) -> None:
        if len(self.items) < self.count:
            heapq.heappush(self.items, item)
        elif item > self.items[0]:
            heapq.heapreplace(self.items, item)

    def add_all(self, items: Iterable[int]) -> None:
        for item in items:
            self.add(item)

    def largest(self) -> list[int]:
        return sorted(self.items, reverse=True)
'''.strip()
INVOICE: Final = Grammar(
    "json_schema",
    """{"type": "object", "additionalProperties": false,
    "properties": {
      "document_type": {"const": "invoice according to the rules of the European Union, version 3"},
      "invoice_number": {"type": "string", "maxLength": 12},
      "name_and_address_of_the_seller": {"type": "string", "maxLength": 40},
      "name_and_address_of_the_buyer": {"type": "string", "maxLength": 40},
      "payment_conditions": {"enum": ["payable within thirty days of receipt without any deduction"]},
      "total_amount_including_tax": {"type": "number"},
      "currency_of_all_amounts": {"enum": ["euro"]}},
    "required": ["document_type", "invoice_number", "name_and_address_of_the_seller",
      "name_and_address_of_the_buyer", "payment_conditions", "total_amount_including_tax",
      "currency_of_all_amounts"]}""",
)
GREEDY: Final = SamplingParams(max_tokens=MOST_TOKENS)


@dataclass(frozen=True, slots=True)
class Case:
    """A reply, and what was said before it."""

    question: str
    least: float
    """Times the speed of plain decoding; promised."""
    params: SamplingParams = GREEDY
    before: str | None = None
    """The question before it was edited, or the same one that was answered before; None: nothing."""
    params_before: SamplingParams = GREEDY


WARM: Final = replace(GREEDY, temperature=0.5, top_p=0.9)
CASES: Final = {
    "edited question": Case(
        "What is a hash table, how does it work, and what is it good for?",
        1.3,
        before="What is a hash table, how does it work and what is it used for?",
    ),
    "regenerated answer": Case(
        "What is a hash table, how does it work, and what is it good for?",
        1.3,
        params=replace(WARM, seed=2),
        before="What is a hash table, how does it work, and what is it good for?",
        params_before=replace(WARM, seed=1),
    ),
    "code with a change": Case(
        f"Rename the method `largest` to `top` in this code and return the whole code:\n\n{SORTING}",
        2.0,
    ),
    "JSON of a schema": Case(
        "Write an invoice for two chairs that Anna in Paris sold to Bob in Rome.",
        1.5,
        params=replace(GREEDY, grammar=INVOICE),
    ),
    "free text": Case("Tell me a story about a lighthouse keeper.", 0.99),
}


class Passes:
    """Times the passes of a runtime in which a reply goes on and no prompt is read."""

    def __init__(self, model: recollect.Model) -> None:
        self._forward = model.engine.runtime.forward
        self.taken: list[tuple[int, float]] = []
        """Tokens and seconds of each."""
        model.engine.runtime.forward = self.forward  # type: ignore[method-assign] # times a pass

    def forward(self, rows: Sequence[Row]) -> PassResult:
        """Run a pass."""
        begun = perf_counter()
        result = self._forward(rows)
        if all(len(row.token_ids) - row.drafted == 1 for row in rows):
            self.taken.append((sum(len(row.token_ids) for row in rows), perf_counter() - begun))
        return result


def main() -> int:
    """Run, print, and return 1 where a reply is slower than is promised."""
    options = parser(__doc__ or "", profile="fast", runtimes=True)
    options.add_argument("--rounds", type=int, default=5)
    arguments = options.parse_args()
    with recollect.load(
        arguments.model, profile=arguments.profile, runtime=arguments.runtime, kv_disk=0
    ) as model:
        drafts = model.engine.drafts
        if drafts is None:
            say("this runtime takes no guesses")
            return 1
        passes, load = Passes(model), Load()
        results = {
            name: measured(model, drafts, passes, name, case, arguments.rounds)
            for name, case in CASES.items()
        }
        fields: dict[str, object] = {"cases": results, "others_load": load.others()}
        report("drafts", model, fields, save=arguments.save)
    return 0 if all(one["holds"] for one in results.values()) else 1


def measured(
    model: recollect.Model, drafts: Drafts, passes: Passes, name: str, case: Case, rounds: int
) -> dict[str, Any]:
    """Return what a case comes to; the first round is discarded."""
    said: list[Sequence[int]] = []
    if case.before is not None:
        model.engine.drafts = None
        session = model.session(params=case.params_before)
        session.respond(case.before)
        said = [session.tip.token_ids or ()]
    speeds: dict[str, list[float]] = {"plain": [], "guessed": []}
    by_width = defaultdict[int, list[float]](list)
    rounds_of_passes, texts, usage = list[tuple[int, list[int]]](), set[str](), None
    for number in range(rounds + 1):
        for way in ("plain", "guessed"):
            model.engine.drafts = None if way == "plain" else drafts
            namespace = f"{name} {number} {way}"  # so that nothing is known of the rounds before
            drafts.learn(namespace, said if way == "guessed" else [])
            session = model.session(params=case.params, namespace=namespace)
            passes.taken.clear()
            reply = session.respond(case.question)
            texts.add(reply.text)
            if not number:
                continue
            speeds[way].append(reply.usage.decode_tps or 0.0)
            for width, seconds in passes.taken:
                by_width[width].append(seconds)
            if way == "guessed":
                usage = reply.usage
                widths = [width for width, _ in passes.taken]
                rounds_of_passes.append((usage.generated_tokens - 1, widths))
    assert usage is not None, "there was a round"
    cost = {width: median(taken) for width, taken in by_width.items()}
    bound = median(
        tokens * cost[1] / sum(cost[width] for width in widths)
        for tokens, widths in rounds_of_passes
    )
    plain, guessed = median(speeds["plain"]), median(speeds["guessed"])
    ratio = guessed / plain
    holds = ratio >= case.least and ratio >= LEAST_SHARE * bound
    say(
        f"{name:20} {plain:7.1f} -> {guessed:7.1f} tok/s  {ratio:5.2f} times ({case.least} promised)  "
        f"bound {bound:5.2f}  {usage.accepted_tokens}/{usage.drafted_tokens} of "
        f"{usage.generated_tokens}  {'same text' if len(texts) == 1 else f'{len(texts)} texts'}"
    )
    return {
        "plain_tps": plain,
        "guessed_tps": guessed,
        "ratio": ratio,
        "promised": case.least,
        "bound": bound,
        "share_of_bound": ratio / bound,
        "drafted_tokens": usage.drafted_tokens,
        "accepted_tokens": usage.accepted_tokens,
        "generated_tokens": usage.generated_tokens,
        "texts": len(texts),
        "holds": holds,
    }


if __name__ == "__main__":
    sys.exit(main())
