"""
Seeded conversations as people and agents hold them, and a count of what was computed twice.

Nothing here looks at how reuse is done. A request's prompt is compared with everything that
earlier requests of the trace had computed, token by token, in a set that knows no blocks.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from time import perf_counter
from typing import Final

from recollect.conversation.model import Model
from recollect.conversation.session import Session
from recollect.conversation.tree import Node
from recollect.conversation.turn import Reply
from recollect.types import SamplingParams

REPLIES: Final = SamplingParams(max_tokens=24, ignore_eos=True)
_SENTENCE: Final = (
    "the river bends behind an old mill where two children count boats and argue about which "
    "of them is fastest while their uncle repairs a lantern and hums a song nobody else knows"
)


@dataclass(frozen=True, slots=True)
class TraceResult:
    """What a trace came to."""

    name: str
    requests: int
    prompt_tokens: int
    """Of all requests: what is computed where nothing is reused."""
    reused_tokens: int
    """Of those, there when the request came; also what was read ahead, while nobody waited."""
    read_ahead_tokens: int
    """Of those, read ahead."""
    computed_tokens: int
    """Of the prompts, while a request waited for them, counted at the forward pass."""
    recomputed_tokens: int
    """Of those, the ones that an earlier request had computed under the same prefix."""
    generated_tokens: int
    engine_tokens: int
    """All tokens that the engine fed, idle work and decode included."""
    blocks_held: int
    """Blocks in memory at the end."""
    ttft_s: float
    """First-token times, added up."""
    wall_s: float


@dataclass(slots=True)
class _Audit:
    """
    All prefixes that have been computed, as a tree of tokens.

    Requests that run at the same time are added together, after they have ended: what one of them
    found of another's cannot be missed, and what both computed shows as computed twice.
    """

    computed: dict[int, dict] = field(default_factory=dict)  # type: ignore[type-arg] # a tree
    replies: list[Reply] = field(default_factory=list)
    recomputed_tokens: int = 0

    def add(self, model: Model, replies: Sequence[Reply]) -> None:
        """
        Take note of requests that ran at once; those noted before had ended when these began.

        Nobody knows in which order they were computed, so they are counted together: what all of
        them computed, less what none of them could find.
        """
        self.replies += replies
        prompts = [model.prompts.encode(reply.node.path()[:-1]).token_ids for reply in replies]
        new = [self._learn(ids) for ids in prompts]
        # The last token of a prompt is fed, unless the logits after it are known still.
        needed = sum(max(1, count) for count in new)
        computed = sum(
            len(ids) - reply.usage.reused_tokens - reply.usage.read_ahead_tokens
            for ids, reply in zip(prompts, replies, strict=True)
        )
        self.recomputed_tokens += max(0, computed - needed)
        for ids, reply in zip(prompts, replies, strict=True):
            # The last token of a reply has no KV before something follows it.
            self._learn([*ids, *(reply.node.token_ids or ())[:-1]])

    def _learn(self, ids: Sequence[int]) -> int:
        """Take note of tokens that have KV now; return how many of them had none."""
        level, new = self.computed, 0
        for token in ids:
            new += token not in level
            level = level.setdefault(token, {})
        return new


@dataclass(frozen=True, slots=True)
class Trace:
    """A named workload; `run` yields the replies of requests that ran at the same time."""

    name: str
    run: Callable[[Model, random.Random, SamplingParams], Iterator[list[Reply]]]


def run_trace(
    model: Model, trace: Trace, *, seed: int = 0, params: SamplingParams = REPLIES
) -> TraceResult:
    """
    Run a trace and count.

    Args:
        model: Nothing else runs on it meanwhile.
        trace: What to run.
        seed: The same seed gives the same texts.
        params: Of all replies.
    """
    dice = random.Random(f"{trace.name} {seed}")  # noqa: S311 - not for secrets
    audit, fed_before, begun = _Audit(), model.engine.computed_tokens, perf_counter()
    for replies in trace.run(model, dice, params):
        audit.add(model, replies)
    wall_s = perf_counter() - begun
    usages = [reply.usage for reply in audit.replies]
    return TraceResult(
        name=trace.name,
        requests=len(usages),
        prompt_tokens=sum(usage.prompt_tokens for usage in usages),
        reused_tokens=sum(usage.reused_tokens + usage.read_ahead_tokens for usage in usages),
        read_ahead_tokens=sum(usage.read_ahead_tokens for usage in usages),
        computed_tokens=sum(usage.awaited_tokens for usage in usages),
        recomputed_tokens=audit.recomputed_tokens,
        generated_tokens=sum(usage.generated_tokens for usage in usages),
        engine_tokens=model.engine.computed_tokens - fed_before,
        blocks_held=model.engine.pool.used_blocks,
        ttft_s=sum(usage.ttft_s for usage in usages),
        wall_s=wall_s,
    )


def text_of(dice: random.Random, words: int) -> str:
    """Return that many words, different ones for each seed."""
    return " ".join(dice.choices(_SENTENCE.split(), k=words)).capitalize() + "."


def _long_chat(model: Model, dice: random.Random, params: SamplingParams) -> Iterator[list[Reply]]:
    """One conversation of 20 turns."""
    with model.session(text_of(dice, 60), params=params) as session:
        for _ in range(20):
            yield [session.respond(text_of(dice, dice.randint(5, 60)))]


def _regenerate_and_edit(
    model: Model, dice: random.Random, params: SamplingParams
) -> Iterator[list[Reply]]:
    """A conversation in which every other turn is asked again, edited, or taken back."""
    with model.session(text_of(dice, 60), params=params) as session:
        for _ in range(12):
            yield [session.respond(text_of(dice, 30))]
            what = dice.choice(["regenerate", "edit last", "edit earlier", "undo"])
            if what == "regenerate":
                yield [session.regenerate()]
            elif what == "undo":
                session.undo()
            else:
                asked = [node for node in session.path() if node.role == "user"]
                node = asked[-1] if what == "edit last" else dice.choice(asked)
                yield [session.edit(node, _edited(dice, node))]


def _interleaved(
    model: Model, dice: random.Random, params: SamplingParams
) -> Iterator[list[Reply]]:
    """Twelve conversations that take turns in random order."""
    sessions = [model.session(text_of(dice, 20), params=params) for _ in range(12)]
    order = [session for session in sessions for _ in range(4)]
    dice.shuffle(order)
    for session in order:
        yield [session.respond(text_of(dice, dice.randint(5, 40)))]


def _one_system_prompt(
    model: Model, dice: random.Random, params: SamplingParams
) -> Iterator[list[Reply]]:
    """Eight sessions on one system prompt of about 1,500 tokens, all at once."""
    system = text_of(dice, 1200)
    while len(model.tokenizer.encode(system)) < 1500 < model.context_length // 2:
        system += " " + text_of(dice, 20)
    sessions = [model.session(system, params=params) for _ in range(8)]
    for _ in range(2):
        yield _at_once(sessions, [text_of(dice, 20) for _ in sessions])


def _agent(model: Model, dice: random.Random, params: SamplingParams) -> Iterator[list[Reply]]:
    """An agent that works its way to a place and tries 16 ways on from there, at once."""
    with model.session(text_of(dice, 200), params=params) as session:
        for _ in range(3):
            yield [session.respond(text_of(dice, 60))]
        forks = [session.fork() for _ in range(16)]
        for _ in range(2):
            yield _at_once(forks, [text_of(dice, 15) for _ in forks])
        yield [session.respond(text_of(dice, 15))]


TRACES: Final = (
    Trace("long chat", _long_chat),
    Trace("regenerate and edit", _regenerate_and_edit),
    Trace("12 interleaved", _interleaved),
    Trace("8 on one system prompt", _one_system_prompt),
    Trace("agent, 16 forks", _agent),
)


def _at_once(sessions: Sequence[Session], texts: Sequence[str]) -> list[Reply]:
    with ThreadPoolExecutor(len(sessions)) as threads:
        return list(threads.map(lambda session, text: session.respond(text), sessions, texts))


def _edited(dice: random.Random, node: Node) -> str:
    """Return the message with another end, as an edit mostly has it."""
    words = node.content.split()
    keep = dice.randint(0, len(words) - 1)
    return " ".join([*words[:keep], text_of(dice, 8)])
