"""
What a small model's guesses could bring to the replies of a larger one on this machine.

    python benchmarks/draft_model.py [--model qwen2.5-coder-1.5b] [--small qwen2.5-coder-0.5b] [--tokens 96]

Nothing is guessed here: the larger model replies greedily, and the small one is asked, in one pass over each
reply, what it would have said at each place. From where both agree, and from the times of passes of both,
follows what guessing k tokens at a time comes to, if all else took no time. The two must have one vocabulary.
"""

from collections.abc import Sequence
from time import perf_counter
from typing import Final

import recollect
from harness import parser, report, say
from recollect import config
from recollect.models.openvino_folder import MODEL_FILES
from recollect.models.prepare import prepare
from recollect.runtime.base import Row
from recollect.runtime.openvino import BLOCK_SIZE, OpenVinoRuntime
from recollect.types import Profile, SamplingParams

QUESTIONS: Final = (
    "Write a Python function that counts how often each word is in a text file.",
    "What is a hash table, how does it work, and what is it good for?",
    "Tell me a story about a lighthouse keeper.",
    "Write a class in Java for a bank account, with tests.",
)
MOST: Final = 7
"""Guesses in a row."""
PAST: Final = 200
"""Tokens before those of a timed pass."""
BLOCKS: Final = range(32)


def main() -> None:
    """Measure both, print what each number of guesses comes to, and the same as JSON."""
    options = parser(__doc__ or "", profile="fast")
    options.add_argument("--small", default="qwen2.5-coder-0.5b")
    options.add_argument("--tokens", type=int, default=96)
    options.add_argument(
        "--passes", type=int, default=12, help="of each width; the shortest counts"
    )
    arguments = options.parse_args()
    small = loaded(arguments.small, arguments.profile)
    small_s = pass_times(small, 1, arguments.passes)[0]
    params = SamplingParams(max_tokens=arguments.tokens)
    with recollect.load(
        arguments.model, profile=arguments.profile, kv_disk=0, draft=False
    ) as large:
        agreed = []
        for question in QUESTIONS:
            session = large.session(params=params)
            session.respond(question)
            agreed.append(agreements(small, *prompt_and_reply(session)))
        small.close()
        runtime = loaded(arguments.model, arguments.profile)
        large_s = pass_times(runtime, 1 + MOST, arguments.passes)
        runtime.close()
        tokens = sum(len(one) for one in agreed)
        times = {}
        for count in range(1, 1 + MOST):
            passes = sum(passes_of(one, count) for one in agreed)
            taken = passes * (count * small_s + large_s[count])
            times[count] = tokens * large_s[0] / taken
            say(
                f"{count} guesses: {passes} passes for {tokens} tokens, {times[count]:.2f} times at most"
            )
        result: dict[str, object] = {
            "small": arguments.small,
            "small_pass_s": small_s,
            "pass_s": large_s,
            "agreed": sum(map(sum, agreed)) / tokens,
            "times_by_guesses": times,
        }
        report("draft-model", large, result, save=arguments.save)


def loaded(name: str, profile: Profile) -> OpenVinoRuntime:
    """Return a model's runtime alone, with room for one sequence."""
    folder = prepare(name, home=config.home()).folder
    assert folder is not None, "a model with weights"
    runtime = OpenVinoRuntime(
        folder / MODEL_FILES[0], profile=profile, context_length=len(BLOCKS) * BLOCK_SIZE
    )
    runtime.allocate(len(BLOCKS))
    runtime.warm_up()
    return runtime


def pass_times(runtime: OpenVinoRuntime, widest: int, count: int) -> list[float]:
    """Return the shortest time of passes over 1, 2, ... tokens."""
    runtime.forward([Row([1] * PAST, 0, BLOCKS)])
    taken: list[list[float]] = [[] for _ in range(widest)]
    for _ in range(1 + count):
        for guesses, times in enumerate(taken):
            begun = perf_counter()
            runtime.forward([Row([1] * (1 + guesses), PAST, BLOCKS, drafted=guesses)])
            times.append(perf_counter() - begun)
    return [min(times[1:]) for times in taken]


def prompt_and_reply(session: recollect.Session) -> tuple[list[int], list[int]]:
    """Return the ids of the last reply, and those before it."""
    whole, reply = session.typed_ids(), list(session.tip.token_ids or ())
    start = next(at for at in range(len(whole)) if whole[at : at + len(reply)] == reply)
    return whole[:start], reply


def agreements(runtime: OpenVinoRuntime, prompt: Sequence[int], reply: Sequence[int]) -> list[bool]:
    """Return for each token of a reply whether the model would have said it there."""
    row = Row([*prompt, *reply][:-1], 0, BLOCKS, drafted=len(reply) - 1)
    logits = runtime.forward([row]).logits
    return [bool(place.argmax() == token) for place, token in zip(logits, reply, strict=True)]


def passes_of(agreed: Sequence[bool], count: int) -> int:
    """Return how many passes a reply takes where so many tokens are guessed before each."""
    passes = at = 0
    while at < len(agreed):
        right = 0
        while right < count and at + right < len(agreed) and agreed[at + right]:
            right += 1
        at += right + 1
        passes += 1
    return passes


if __name__ == "__main__":
    main()
