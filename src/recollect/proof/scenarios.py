"""
The six multi-turn scenarios, each with reuse, with a full prefill every turn, and rewound.

The question is what *reuse* changes, apart from what the *model* gets wrong. So the full prefill
of a turn is over the very token ids that the turn had with reuse, and a difference between the two
replies can only come from KV. Prints nothing.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Final

from recollect.conversation.model import Model
from recollect.conversation.session import Session
from recollect.conversation.turn import Reply
from recollect.engine.reply import ReplyGeneration
from recollect.engine.sampling import Generator
from recollect.proof.grading import Expectation, Fact, grade
from recollect.types import (
    FinishReason,
    Progress,
    SamplingParams,
    Usage,
    common_prefix_length,
    no_progress,
)

MAX_REPLY_TOKENS: Final = 120
"""Long enough to state every expected fact, short enough that it all takes a minute or two."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """A conversation with what the replies are expected to say, by number of the turn from 0."""

    name: str
    prompts: tuple[str, ...]
    expected: dict[int, Expectation]


@dataclass(frozen=True, slots=True)
class GradedReply:
    """A reply in one of the modes."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    facts: tuple[Fact, ...]


@dataclass(frozen=True, slots=True)
class Turn:
    """One prompt and the replies to it."""

    prompt: str
    reuse: GradedReply
    full: GradedReply
    rewound: GradedReply | None
    """The same prompt again after a rewind, for the second turn alone."""

    @property
    def model_wrong(self) -> tuple[str, ...]:
        """Return the facts that are missing with a full prefill too: the model's own mistakes."""
        return tuple(fact.what for fact in self.full.facts if not fact.recalled)

    @property
    def changed_by_reuse(self) -> tuple[str, ...]:
        """Return the modes whose reply is not, token by token, that of the full prefill."""
        modes = {"reuse": self.reuse, "rewound": self.rewound}
        return tuple(
            mode
            for mode, reply in modes.items()
            if reply is not None and reply.token_ids != self.full.token_ids
        )

    def first_difference(self, mode: str) -> int | None:
        """Return the token at which a mode's reply leaves the full prefill's, or None."""
        reply = self.rewound if mode == "rewound" else self.reuse
        if reply is None or reply.token_ids == self.full.token_ids:
            return None
        return common_prefix_length(reply.token_ids, self.full.token_ids)


@dataclass(frozen=True, slots=True)
class ScenarioResult:
    """A scenario that was played in all modes."""

    name: str
    turns: tuple[Turn, ...]


def load_scenarios() -> tuple[Scenario, ...]:
    """Return the scenarios that come with the package."""
    text = resources.files("recollect.proof").joinpath("data/scenarios.json").read_text("utf-8")
    return tuple(
        Scenario(entry["name"], tuple(entry["prompts"]), _expected(entry))
        for entry in json.loads(text)["scenarios"]
    )


def play_all(
    model: Model, scenarios: tuple[Scenario, ...], *, progress: Progress = no_progress
) -> Iterator[ScenarioResult]:
    """Play the scenarios one after the other; yield each result when it is there."""
    for number, scenario in enumerate(scenarios):
        progress(scenario.name, number, len(scenarios))
        yield play(model, scenario)


def play(model: Model, scenario: Scenario) -> ScenarioResult:
    """
    Play a scenario in all modes, greedily.

    Raises:
        ContextFullError: The conversation does not fit the context.
        OutOfBlocksError: Twice the conversation does not fit the KV memory.
    """
    params = SamplingParams(max_tokens=MAX_REPLY_TOKENS)
    with model.session(params=params) as session:
        reused, full = [], []
        for number, prompt in enumerate(scenario.prompts):
            expected = scenario.expected.get(number, Expectation())
            reply = session.respond(prompt)
            reused.append(_graded(reply, expected))
            full.append(_full_prefill(model, _prompt_ids(model, reply), params, expected))
        rewound = _rewound(session, scenario)
    turns = tuple(
        Turn(prompt, reused[number], full[number], rewound if number == 1 else None)
        for number, prompt in enumerate(scenario.prompts)
    )
    return ScenarioResult(scenario.name, turns)


def _expected(entry: dict[str, dict[str, list[str]] | dict[str, int]]) -> dict[int, Expectation]:
    patterns, bullets = entry.get("expect", {}), entry.get("expect_bullets", {})
    wrong = entry.get("wrong", {})
    return {
        int(turn): Expectation(
            tuple(patterns.get(turn, ())),  # type: ignore[arg-type]  # JSON of our own
            tuple(wrong.get(turn, ())),  # type: ignore[arg-type]
            bullets.get(turn),  # type: ignore[arg-type]
        )
        for turn in {**patterns, **bullets}
    }


def _graded(reply: Reply, expected: Expectation) -> GradedReply:
    token_ids = reply.node.token_ids
    assert token_ids is not None, "a generated reply has token ids"
    return GradedReply(
        reply.text, token_ids, reply.finish_reason, reply.usage, grade(reply.text, expected)
    )


def _prompt_ids(model: Model, reply: Reply) -> list[int]:
    """Return the token ids that *reply* answered."""
    return model.prompts.encode(reply.node.path()[:-1]).token_ids


def _full_prefill(
    model: Model, prompt_ids: list[int], params: SamplingParams, expected: Expectation
) -> GradedReply:
    """Answer the same ids in blocks of their own, from the first token on."""
    engine = model.engine
    generator = Generator(engine, params, namespace=None)
    try:
        generator.append_tokens(prompt_ids)
        generation = ReplyGeneration(engine, generator, model.tokenizer)
        generation.start()
        text = "".join(generation)
        reason = generation.finish_reason
        assert reason is not None, "a reply that was read to its end has a reason"
        ids = tuple(generation.token_ids)
        return GradedReply(text, ids, reason, generation.usage(), grade(text, expected))
    finally:
        generator.close()


def _rewound(session: Session, scenario: Scenario) -> GradedReply | None:
    """Go back from the end to after the first turn, and ask the second question again."""
    if len(scenario.prompts) < 2:
        return None
    first_reply = next(node for node in session.path() if node.role == "assistant")
    session.rewind(first_reply)
    again = session.respond(scenario.prompts[1])
    return _graded(again, scenario.expected.get(1, Expectation()))
