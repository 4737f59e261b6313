"""
What a smaller model's guesses bring to replies that repeat nothing, on this machine and with all they cost.

    python benchmarks/draft_model.py [--model qwen2.5-coder-1.5b] [--small qwen2.5-coder-0.5b] [--tokens 128]

Each question is asked in three ways by turns, in fresh namespaces: each token in a pass of its own, with
guesses from what was said, and with those of the smaller model too. Greedily, sampled at 0.7, and as a
question about a text of 1,500 tokens, which the smaller model has to read as well. The times of decoding
have in them what the smaller model takes; the first token is told apart.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Final, Literal

import psutil

import recollect
from harness import Load, parser, report, say
from recollect.types import SamplingParams

QUESTIONS: Final = (
    "Write a Python function that counts how often each word is in a text file.",
    "What is a hash table, how does it work, and what is it good for?",
    "Tell me a story about a lighthouse keeper.",
    "Write a class in Java for a bank account, with tests.",
)
DOCUMENT_TOKENS: Final = 1_500
Way = Literal["plain", "said", "model"]
WAYS: Final[tuple[Way, ...]] = ("plain", "said", "model")


@dataclass(frozen=True)
class Told:
    """A reply and its times."""

    text: str
    first_s: float
    decode_s: float
    tokens: int
    fed: int
    right: int


def main() -> None:
    """Measure all kinds in all ways, print what each brings, and the same as JSON."""
    options = parser(__doc__ or "", profile="fast", runtimes=True)
    options.set_defaults(model="qwen2.5-coder-1.5b")
    options.add_argument("--small", default="qwen2.5-coder-0.5b")
    options.add_argument("--tokens", type=int, default=128)
    options.add_argument("--repeats", type=int, default=3)
    arguments = options.parse_args()
    load, process = Load(), psutil.Process()
    sizes = []
    for small in (None, arguments.small):
        model = recollect.load(
            arguments.model,
            profile=arguments.profile,
            runtime=arguments.runtime,
            kv_disk=0,
            draft_model=small,
        )
        model.engine.wait_until_warm()
        sizes.append(process.memory_info().rss)
        if small is None:
            model.close()
    source = Path(recollect.__file__).read_text(encoding="utf-8")
    ids = model.tokenizer.encode_text(source * 9)[:DOCUMENT_TOKENS]
    document = model.tokenizer.decode(ids) + "\n\n"
    greedy = SamplingParams(max_tokens=arguments.tokens)
    kinds: dict[str, tuple[str, SamplingParams]] = {
        "greedy": ("", greedy),
        "sampled": ("", replace(greedy, temperature=0.7, seed=1)),
        "document": (document, greedy),
    }
    with model:
        result: dict[str, object] = {
            "small": arguments.small,
            "tokens": arguments.tokens,
            "repeats": arguments.repeats,
            "small_memory_bytes": sizes[1] - sizes[0],
        }
        for name, (before, params) in kinds.items():
            result[name] = compare(model, name, before, params, arguments.repeats)
        result["others_cores"] = load.others()
        report(f"draft-model-{arguments.model}", model, result, save=arguments.save)


def compare(
    model: recollect.Model, name: str, before: str, params: SamplingParams, repeats: int
) -> dict[str, Any]:
    """Ask all questions in all ways by turns; return what each way brings."""
    seen: dict[Way, list[list[Told]]] = {way: [[] for _ in QUESTIONS] for way in WAYS}
    for number in range(repeats):
        for place, question in enumerate(QUESTIONS):
            for way in WAYS:
                namespace = f"{name} {number} {place} {way}"
                seen[way][place].append(ask(model, way, namespace, before + question, params))
    speeds = {way: speed(seen[way]) for way in WAYS}
    firsts = {
        way: statistics.median(one.first_s for some in seen[way] for one in some) for way in WAYS
    }
    same = [
        all(one.text == plain[0].text for one in guessed)
        for plain, guessed in zip(seen["plain"], seen["model"], strict=True)
    ]
    guessed = [some[0] for some in seen["model"]]
    told = {
        "tokens_per_second": speeds,
        "first_token_s": firsts,
        "times": speeds["model"] / speeds["plain"],
        "times_of_said": speeds["said"] / speeds["plain"],
        "fed": sum(one.fed for one in guessed),
        "right": sum(one.right for one in guessed),
        "tokens": sum(one.tokens for one in guessed),
        "same_texts": sum(same),
    }
    say(
        f"{name}: {told['times']:.2f} times plain decoding ({speeds['plain']:.1f} tokens per second), "
        f"{told['times_of_said']:.2f} without the smaller model; {told['right']} of {told['fed']} right for "
        f"{told['tokens']} tokens; first token {firsts['model']:.2f} s and {firsts['plain']:.2f}; "
        f"{told['same_texts']} texts of {len(QUESTIONS)} the same"
    )
    return told


def speed(seen: Sequence[Sequence[Told]]) -> float:
    """Return tokens per second of all questions together, each with the median of its times."""
    decode_s = sum(statistics.median(one.decode_s for one in some) for some in seen)
    return sum(some[0].tokens - 1 for some in seen) / decode_s


def ask(
    model: recollect.Model, way: Way, namespace: str, question: str, params: SamplingParams
) -> Told:
    """Have one question answered, in a namespace of its own."""
    drafts = model.engine.drafts
    assert drafts is not None, "the runtime verifies guesses"
    guesser = drafts.guesser
    session = model.session(params=params, namespace=namespace)
    try:
        if way == "plain":
            model.engine.drafts = None
        elif way == "said":
            drafts.guesser = None
        begun = perf_counter()
        with session.stream(question) as reply:
            pieces = iter(reply)
            text = next(pieces)
            first_s = perf_counter() - begun
            text += "".join(pieces)
            decode_s = perf_counter() - begun - first_s
    finally:
        model.engine.drafts, drafts.guesser = drafts, guesser
    assert reply.reply is not None, "it was read to its end"
    usage = reply.reply.usage
    return Told(
        text, first_s, decode_s, usage.generated_tokens, usage.drafted_tokens, usage.accepted_tokens
    )


if __name__ == "__main__":
    main()
