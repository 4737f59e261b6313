"""
Check that what an engine elsewhere reuses is right: the same ids with reuse and without.

Random conversations go on, are rewound and forked. Each prompt is answered twice: in a namespace that has
computed its beginning before, and under a salt that is thrown away, which computes all of it. Ids and the
likeliest tokens at each place are compared as far as both replies are the same. Rounding alone is measured by
computing some prompts anew twice. Logits do not cross the wire; log probabilities of 20 tokens do.
"""

import random
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Final

from recollect.conversation.model import Model
from recollect.engine.reply import GeneratedReply, ReplyGeneration
from recollect.engine.sampling import Generator
from recollect.errors import ConfigError, InvalidParameterError
from recollect.proof.verify import EXACT_LIMIT, NOISE_ALLOWANCE, NOISE_CAP
from recollect.types import MOST_LOGPROBS, SamplingParams

_REPLY_TOKENS: Final = 12
_LONGEST_TOKENS: Final = 600
_MOST_HISTORIES: Final = 4
_NOISE_EVERY: Final = 5
"""Operations between two measurements of rounding."""
_TEXT: Final = (
    "the river flows north through eleven countries before it reaches the sea and each tree bears fruit "
    "while a list is reversed in place and three bullet points are all that anybody wanted to know"
)


@dataclass(frozen=True, slots=True)
class ElsewhereReport:
    """What comparing an engine's reuse with computing anew has found."""

    model: str
    engine: str
    seed: int
    operations: int
    left_out: int
    """Operations of which the engine did not tell how likely the tokens are."""
    reused_tokens: int
    computed_tokens: int
    """Of the prompts that could reuse something."""
    different_replies: int
    """Replies whose ids were not the same."""
    largest: float
    """Difference of log probabilities, up to where two replies part."""
    noise: float
    """The same between two replies to prompts that were both computed anew."""
    limit: float
    passed: bool

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return asdict(self)


def verify_elsewhere(
    model: Model,
    *,
    operations: int = 40,
    seed: int = 0,
    progress: Callable[[int, float], None] = lambda _done, _largest: None,
) -> ElsewhereReport:
    """
    Hold random conversations on an engine elsewhere, and compare each reply with one computed anew.

    It passes if no difference is beyond the limit, which is twice what rounding alone does, and at most 2;
    if no reply has other ids where rounding alone does nothing; and if anything was reused at all.

    Args:
        model: With an engine elsewhere.
        operations: How many, >= 1.
        seed: The same seed gives the same operations.
        progress: Called after each with (operations done, largest difference so far).

    Raises:
        ConfigError: There is nothing to do.
        EngineUnavailableError: The engine does not answer.
    """
    if operations < 1:
        raise ConfigError(f"{operations} operations prove nothing: give at least 1.")
    dice = random.Random(seed)  # noqa: S311 - not for secrets
    namespace = f"verify {secrets.token_hex(8)}"
    histories: list[list[int]] = []
    largest = noise = 0.0
    left_out = reused = computed = different = 0
    for number in range(operations):
        prompt = _next_prompt(model, histories, dice)
        try:
            again, fresh = _answer(model, prompt, namespace), _answer(model, prompt, None)
            reused += again.usage.reused_tokens
            computed += again.usage.computed_tokens
            same, far = _compared(again, fresh)
            different += not same
            largest = max(largest, far)
            if number % _NOISE_EVERY == 0:
                _, far = _compared(_answer(model, prompt, None), fresh)
                noise = max(noise, far)
            histories.append([*prompt, *(one.token_id for one in again.logprobs or ())])
        except InvalidParameterError:
            left_out += 1
        progress(number + 1, largest)
    limit = max(EXACT_LIMIT, min(NOISE_ALLOWANCE * noise, NOISE_CAP["fast"]))
    return ElsewhereReport(
        model=model.name,
        engine=model.engine.info.name,
        seed=seed,
        operations=operations,
        left_out=left_out,
        reused_tokens=reused,
        computed_tokens=computed,
        different_replies=different,
        largest=largest,
        noise=noise,
        limit=limit,
        passed=largest <= limit and reused > 0 and (not different or noise > EXACT_LIMIT),
    )


def _next_prompt(model: Model, histories: list[list[int]], dice: random.Random) -> list[int]:
    """Return a history that goes on, from its end or from anywhere in it, or a new one."""
    said = model.tokenizer.encode_text(
        " ".join(dice.choices(_TEXT.split(), k=dice.randint(12, 40)))
    )
    most = min(_LONGEST_TOKENS, model.context_length // 2)
    while len(histories) > _MOST_HISTORIES:
        del histories[dice.randrange(len(histories))]
    if not histories or dice.random() < 0.15:
        return (said * 6)[: most // 2]
    before = dice.choice(histories)
    if dice.random() < 0.4 or len(before) + len(said) > most:
        before = before[: dice.randint(len(before) // 3, min(len(before), most - len(said)))]
    return [*before, *said]


def _answer(model: Model, prompt: list[int], namespace: str | None) -> GeneratedReply:
    params = SamplingParams(
        max_tokens=_REPLY_TOKENS, logprobs=MOST_LOGPROBS, ignore_eos=True, end_repetition=False
    )
    sequence = model.engine.new_sequence(namespace)
    sequence.append(prompt)
    generator = Generator(model.engine, params, sequence=sequence)
    stream = ReplyGeneration(model.engine, generator, model.tokenizer)
    with stream:
        stream.start()
        for _ in stream:
            pass
    assert stream.reply is not None, "it was closed"
    return stream.reply


def _compared(one: GeneratedReply, other: GeneratedReply) -> tuple[bool, float]:
    """Return whether ids are the same, and how far log probabilities are apart before they part."""
    far = 0.0
    for a, b in zip(one.logprobs or (), other.logprobs or (), strict=False):
        tops = [{top.token_id: top.logprob for top in side.top} for side in (a, b)]
        far = max([far, *(abs(tops[0][x] - tops[1][x]) for x in tops[0].keys() & tops[1].keys())])
        if a.token_id != b.token_id:
            return False, far
    return True, far
