"""
How much faster replies are that repeat what was said, since they take several tokens from one pass.

    python benchmarks/drafts.py [--model M] [--profile P] [--runtime R] [--rounds 5] [--tokens 192] [--save]
    python benchmarks/drafts.py --rival FILE.gguf [--rival-rounds 1] [--ways WAY ...]

Each case is one or more replies that are generated plainly and with guesses, in turns, with the same seeds.
What was said before is generated once, plainly, and is the same text in all rounds; the guesses know it as
those of a saved conversation that was opened, and nothing of the replies of other rounds. The bound is what
the passes allow: the time of a pass for each token, over the time of the passes with guesses, both measured
here. The first round is discarded.

With `--rival` the same questions go to others that guess: llama-server (from the `xllamacpp` package) with
the same GGUF file and each of its ways to guess from tokens, and `openvino_genai`'s prompt lookup on the
converted model. Each is also measured without guesses. A GGUF file is what `--model` was converted from.
"""

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from time import monotonic, perf_counter, sleep
from typing import Any, Final

import httpx
import openvino_genai as genai
import psutil

import recollect
from harness import Load, parser, report, say
from recollect import config
from recollect.engine.drafts import Drafts
from recollect.models.prepare import prepare
from recollect.runtime.base import PassResult, Row
from recollect.runtime.openvino import SETTINGS
from recollect.types import Grammar, SamplingParams
from server import free_port

MOST_TOKENS: Final = 192
LEAST_SHARE: Final = 0.85
"""Of the bound; promised."""

MINUTES: Final = """
Minutes of the garden club, 4 March. Present: Anna Berg, Tom Clark, Rosa Diaz and Ken Ito.
Anna Berg buys forty bags of soil before 12 March and pays with the card of the club.
Tom Clark repairs the fence behind the pond until 20 March; his brother lends him a ladder.
Rosa Diaz asks the school whether its pupils want two of the flower beds, and tells us on 1 April.
Ken Ito writes the letter to the members about the new fees, which are 24 euro a year.
The next meeting is on 8 April at six in the house of Rosa Diaz.
""".strip()
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
GREEDY: Final = SamplingParams()
WARM: Final = replace(GREEDY, temperature=0.7, top_p=0.9, seed=2)


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, and what was asked and answered before it in another branch."""

    text: str
    before: str | None = None
    """The question before it was edited, or the same one; None: nothing."""


HASH_TABLE: Final = "What is a hash table, how does it work, and what is it good for?"


@dataclass(frozen=True, slots=True)
class Case:
    """Replies that repeat something of one kind."""

    questions: tuple[Question, ...]
    least: float
    """Times the speed of plain decoding; promised."""
    params: SamplingParams = GREEDY
    has_rivals: bool = True
    """Whether the others are asked it, too."""


CASES: Final = {
    "edited question": Case(
        (
            Question(
                f"{MINUTES}\n\nWho has to do what, and until when? One line for each person.",
                f"{MINUTES}\n\nWho has to do what, and by when? One line for each person.",
            ),
            Question(
                "Write a Python function that counts how often each word is in a text file.",
                "Write a Python function which counts how often each word is in a text file.",
            ),
            Question(
                "Give me a packing list for a week of hiking in late autumn.",
                "Give me a packing list for a week of hiking in autumn.",
            ),
        ),
        1.3,
    ),
    "regenerated answer": Case((Question(HASH_TABLE, HASH_TABLE),), 1.3),
    "code with a change": Case(
        (
            Question(
                "Rename the method `largest` to `top` in this code and return the whole code:"
                f"\n\n{SORTING}",
            ),
        ),
        2.0,
    ),
    "JSON of a schema": Case(
        (Question("Write an invoice for two chairs that Anna in Paris sold to Bob in Rome."),),
        1.5,
        replace(GREEDY, grammar=INVOICE),
    ),
    "answer with another seed": Case(
        (Question(HASH_TABLE, HASH_TABLE),), 0.99, WARM, has_rivals=False
    ),
    "free text": Case((Question("Tell me a story about a lighthouse keeper."),), 0.99),
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
    options.add_argument("--tokens", type=int, default=MOST_TOKENS, help="of each reply, at most")
    options.add_argument("--rival", type=Path, help="the model's GGUF file, to ask the others")
    options.add_argument("--rival-rounds", type=int, default=1)
    options.add_argument("--ways", nargs="+", default=list(RIVALS), choices=list(RIVALS))
    arguments = options.parse_args()
    rounds, tokens = arguments.rounds, arguments.tokens
    fields: dict[str, object] = {"rounds": rounds, "tokens": tokens}
    load = Load()
    if arguments.rival:
        folder = prepare(arguments.model, home=config.home()).folder
        assert folder is not None, "a model with weights"
        fields["rivals"] = {
            way: asked_of(way, RIVALS[way](arguments.rival, folder), arguments.rival_rounds, tokens)
            for way in arguments.ways
        }
    with recollect.load(
        arguments.model, profile=arguments.profile, runtime=arguments.runtime, kv_disk=0
    ) as model:
        drafts = model.engine.drafts
        if drafts is None:
            say("this runtime takes no guesses")
            return 1
        passes = Passes(model)
        results = {
            name: measured(model, drafts, passes, name, case, rounds, tokens)
            for name, case in CASES.items()
        }
        fields |= {"cases": results, "others_load": load.others()}
        report(f"drafts-{Path(model.name).name}", model, fields, save=arguments.save)
    return 0 if all(one["holds"] for one in results.values()) else 1


def measured(
    model: recollect.Model,
    drafts: Drafts,
    passes: Passes,
    name: str,
    case: Case,
    rounds: int,
    tokens: int,
) -> dict[str, Any]:
    """Return what a case comes to."""
    params = replace(case.params, max_tokens=tokens)
    said = [before(model, question, params) for question in case.questions]
    speeds: dict[str, list[float]] = {"plain": [], "guessed": []}
    by_width = defaultdict[int, list[float]](list)
    widths: list[list[int]] = []
    texts: list[set[str]] = [set() for _ in said]
    counts: list[tuple[int, int, int]] = []
    for number in range(rounds + 1):
        for way in ("plain", "guessed"):
            taken: list[tuple[int, float]] = []
            usages: list[recollect.Usage] = []
            for one, question in enumerate(case.questions):
                # A namespace of its own, so that nothing is known of the rounds before.
                session = model.session(params=params, namespace=f"{name} {number} {way} {one}")
                model.engine.drafts = None
                if question.before == question.text:  # its prompt is there, as it is for a user
                    session.respond(question.text, params=replace(params, max_tokens=1))
                if way == "guessed":
                    model.engine.drafts = drafts
                    drafts.learn(session.namespace, said[one])
                passes.taken.clear()
                again = question.before == question.text
                reply = session.regenerate() if again else session.respond(question.text)
                texts[one].add(reply.text)
                usages.append(reply.usage)
                taken += passes.taken
            if not number:
                continue
            decoded = sum(usage.generated_tokens - 1 for usage in usages)
            seconds = sum(
                (usage.generated_tokens - 1) / (usage.decode_tps or 1) for usage in usages
            )
            speeds[way].append(decoded / seconds)
            for width, took in taken:
                by_width[width].append(took)
            if way == "guessed":
                widths.append([width for width, _ in taken])
                counts.append(
                    (
                        decoded,
                        sum(usage.drafted_tokens for usage in usages),
                        sum(usage.accepted_tokens for usage in usages),
                    )
                )
    cost = {width: median(taken) for width, taken in by_width.items()}
    bound = median(
        decoded * cost[1] / sum(cost[width] for width in fed)
        for (decoded, _, _), fed in zip(counts, widths, strict=True)
    )
    decoded, drafted, accepted = counts[-1]
    plain, guessed = median(speeds["plain"]), median(speeds["guessed"])
    ratio = guessed / plain
    holds = ratio >= case.least and ratio >= LEAST_SHARE * bound
    same = sum(len(each) == 1 for each in texts)
    say(
        f"{name:25} {plain:7.1f} -> {guessed:7.1f} tok/s  {ratio:5.2f} times ({case.least} promised)  "
        f"bound {bound:5.2f}  {accepted}/{drafted} of {decoded}  "
        f"{same} of {len(texts)} replies always the same"
    )
    return {
        "plain_tps": plain,
        "guessed_tps": guessed,
        "ratio": ratio,
        "ratios": [after / one for one, after in zip(*speeds.values(), strict=True)],
        "promised": case.least,
        "bound": bound,
        "share_of_bound": ratio / bound,
        "drafted_tokens": drafted,
        "accepted_tokens": accepted,
        "generated_tokens": decoded,
        "replies": len(texts),
        "replies_always_the_same": same,
        "holds": holds,
    }


def before(
    model: recollect.Model, question: Question, params: SamplingParams
) -> list[Sequence[int]]:
    """Return what was said before a question, as ids: one reply, or none."""
    if question.before is None:
        return []
    drafts, model.engine.drafts = model.engine.drafts, None
    seed = None if params.seed is None else params.seed - 1
    session = model.session(params=replace(params, seed=seed), namespace="before")
    session.respond(question.before)
    model.engine.drafts = drafts
    return [session.tip.token_ids or ()]


Ask = Callable[[str, int, str | None], float]
"""
Asks for a greedy reply of at most so many tokens, of a JSON schema or not; returns its tokens per second.
"""


def asked_of(
    way: str, rival: Callable[[], AbstractContextManager[Ask]], rounds: int, tokens: int
) -> dict[str, float]:
    """Return the speed of each case at a rival, tokens per second; a new process or pipeline each round."""
    found = defaultdict[str, list[float]](list)
    for _ in range(rounds):
        with rival() as ask:
            ask("Hello", 16, None)
            for name, case in CASES.items():
                if not case.has_rivals:
                    continue
                grammar = case.params.grammar
                schema = None if grammar is None else grammar.source
                speeds = []
                for question in case.questions:
                    # Guesses and schemas do not go together everywhere.
                    try:
                        if question.before is not None:
                            ask(question.before, tokens, schema)
                        speeds.append(ask(question.text, tokens, schema))
                    except RuntimeError as cause:
                        say(f"{way} cannot: {name} ({cause})")
                if len(speeds) == len(case.questions):
                    found[name].append(len(speeds) / sum(1 / speed for speed in speeds))
    speeds_by_case = {name: median(speeds) for name, speeds in found.items()}
    say(f"{way:25} " + ", ".join(f"{name} {tps:.1f}" for name, tps in speeds_by_case.items()))
    return speeds_by_case


_LLAMA_SERVER: Final = """
import sys, time, xllamacpp as x
p = x.CommonParams()
p.model.path, p.hostnames, p.port = sys.argv[1], ["127.0.0.1"], int(sys.argv[2])
p.n_ctx, p.n_parallel, p.cpuparams.n_threads = 8192, 1, int(sys.argv[3])
p.speculative.types = [getattr(x.common_speculative_type, "COMMON_SPECULATIVE_TYPE_" + sys.argv[4])]
server = x.Server(p)
while True:
    time.sleep(1)
"""


def llama_server(kind: str) -> Callable[[Path, Path], Callable[[], AbstractContextManager[Ask]]]:
    """Return llama-server with one of its ways to guess; its other settings are its defaults."""

    @contextmanager
    def running(file: Path) -> Iterator[Ask]:
        port, threads = free_port(), str(psutil.cpu_count(logical=False) or 1)
        command = [sys.executable, "-c", _LLAMA_SERVER, str(file), str(port), threads, kind]
        with subprocess.Popen(  # noqa: S603 - our own command line
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            try:
                end = monotonic() + 120
                while not is_up(port):
                    assert process.poll() is None, "llama-server ended"
                    assert monotonic() < end, "llama-server does not answer"
                    sleep(0.25)
                yield partial(ask_server, port)
            finally:
                process.kill()

    return lambda file, _: partial(running, file)


def is_up(port: int) -> bool:
    """Return whether a server answers."""
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def ask_server(port: int, text: str, tokens: int, schema: str | None) -> float:
    """Ask llama-server; the speed is its own measurement of decoding."""
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": text}],
        "max_tokens": tokens,
        "temperature": 0,
    }
    if schema is not None:
        form = {"type": "json_schema", "json_schema": {"schema": json.loads(schema)}}
        body["response_format"] = form
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    answer = httpx.post(url, json=body, timeout=600, trust_env=False).raise_for_status()
    return float(answer.json()["timings"]["predicted_per_second"])


def genai_pipeline(
    guesses: int,
) -> Callable[[Path, Path], Callable[[], AbstractContextManager[Ask]]]:
    """Return `openvino_genai`'s pipeline in the profile `fast`, with so many guesses in a row or none."""

    @contextmanager
    def loaded(folder: Path) -> Iterator[Ask]:
        looks_up = {"prompt_lookup": True} if guesses else {}
        pipeline = genai.LLMPipeline(
            str(folder), "CPU", ATTENTION_BACKEND="PA", **looks_up, **SETTINGS["fast"]
        )

        def ask(text: str, tokens: int, schema: str | None) -> float:
            wanted = genai.GenerationConfig()
            if schema is not None:
                wanted.structured_output_config = genai.StructuredOutputConfig(json_schema=schema)
            wanted.max_new_tokens, wanted.do_sample = tokens, False
            if guesses:
                wanted.num_assistant_tokens, wanted.max_ngram_size = guesses, 3
            messages = genai.ChatHistory([{"role": "user", "content": text}])
            metrics = pipeline.generate(messages, wanted).perf_metrics
            times: list[float] = [stamp / 1000 for stamp in metrics.raw_metrics.m_new_token_times]
            count: int = metrics.get_num_generated_tokens()
            return (count - 1) / (times[-1] - times[0])

        yield ask

    return lambda _, folder: partial(loaded, folder)


RIVALS: Final = {
    "llama-server": llama_server("NONE"),
    "llama-server ngram-simple": llama_server("NGRAM_SIMPLE"),
    "llama-server ngram-map-k": llama_server("NGRAM_MAP_K"),
    "llama-server ngram-mod": llama_server("NGRAM_MOD"),
    "llama-server ngram-cache": llama_server("NGRAM_CACHE"),
    "openvino_genai": genai_pipeline(0),
    "openvino_genai lookup 3": genai_pipeline(3),
    "openvino_genai lookup 5": genai_pipeline(5),
}
"""By name, given the GGUF file and the converted model's folder."""


if __name__ == "__main__":
    sys.exit(main())
