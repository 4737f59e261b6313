"""
Check that what an engine elsewhere reuses is right: the same ids with reuse and without.

Random conversations go on, are rewound and forked. Each prompt is answered twice: in a namespace that has
computed its beginning before, and under a salt that is thrown away, which computes all of it. Ids and the
likeliest tokens at each place are compared as far as both replies are the same. Logits do not cross the wire;
log probabilities of 20 tokens do.

Rounding alone is measured without any reuse: the same ids are computed anew twice, once the last of them one
at a time, as a reply is generated, and once all at once, as a prompt. What a cache has of a conversation came
about in the first way and is compared with the second, so rounding there is of that size.
"""

import math
import random
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from recollect.conversation.model import Model
from recollect.engine.reply import GeneratedReply, ReplyGeneration
from recollect.engine.sampling import Generator
from recollect.errors import ConfigError, InvalidParameterError
from recollect.proof.scenarios import RewindResult
from recollect.proof.verify import EXACT_LIMIT, NOISE_ALLOWANCE, NOISE_CAP
from recollect.types import MOST_LOGPROBS, SamplingParams, TokenLogprob

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
    """The same where all was computed anew, and some tokens one at a time or all at once."""
    found_anew: int
    """Tokens of prompts that were to be computed anew and were reused; with any, nothing is proven."""
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
    if no reply has other ids where rounding alone does nothing; if anything was reused at all; and if nothing
    was where all was to be computed anew.

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
    histories: list[_History] = []
    largest = noise = 0.0
    left_out = reused = computed = different = found_anew = 0
    for number in range(operations):
        session, prompt = _next_prompt(model, histories, dice)
        try:
            again = _answer(model, prompt, namespace, session=session)
            fresh = _answer(model, prompt, None)
            reused += again.usage.reused_tokens
            computed += again.usage.computed_tokens
            same, far = _compared(again, fresh)
            found_anew += fresh.usage.reused_tokens
            different += not same
            # Rounding differs between histories, so it is measured on the worst too.
            if number % _NOISE_EVERY == 0 or far > max(largest, EXACT_LIMIT):
                noise = max(noise, rounding(model, prompt))
            largest = max(largest, far)
            said = [*prompt, *(one.token_id for one in again.logprobs or ())]
            histories.append((session, said))
        except InvalidParameterError:
            left_out += 1
        progress(number + 1, largest)
    limit = limit_of(noise)
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
        found_anew=found_anew,
        limit=limit,
        passed=(
            largest <= limit
            and reused > 0
            and not found_anew
            and (not different or noise > EXACT_LIMIT)
        ),
    )


def limit_of(noise: float) -> float:
    """Return how far log probabilities may be apart where rounding alone moves them by *noise*."""
    return max(EXACT_LIMIT, min(NOISE_ALLOWANCE * noise, NOISE_CAP["fast"]))


def rounding(model: Model, prompt: list[int]) -> float:
    """
    Return how far log probabilities are apart that were both computed anew, after passes of other lengths.

    A reply to *prompt* is generated, each token in a pass of its own. Then its first half is read again as a
    part of the prompt, in passes of many tokens, and the second half is compared.

    Raises:
        InvalidParameterError: The engine does not tell how likely some of the tokens are.
        EngineUnavailableError: It does not answer.
    """
    single = _answer(model, prompt, None, 2 * _REPLY_TOKENS).logprobs or ()
    read = [*prompt, *(one.token_id for one in single[:_REPLY_TOKENS])]
    together = _answer(model, read, None).logprobs or ()
    return apart(single[_REPLY_TOKENS:], together)[1]


def rounding_explains(model: Model, result: RewindResult) -> bool:
    """
    Return whether the answers of a rewind test are the same, or part where rounding may decide.

    That is where two tokens, both computed anew, are as likely as each other, as far as rounding goes. Where
    the engine does not tell how likely they are, nothing is explained.

    Raises:
        EngineUnavailableError: It does not answer.
    """
    others = {
        result.after_rewind: result.rewind_differs_at,
        result.fresh: result.fresh_differs_at,
    }
    return all(
        place is None
        or _is_near_tie(
            model,
            [*result.prompt, *result.answer[:place]],
            [answer[place] if place < len(answer) else None for answer in (result.answer, other)],
        )
        for other, place in others.items()
    )


def _is_near_tie(model: Model, prompt: list[int], tokens: Sequence[int | None]) -> bool:
    """Return whether rounding may decide which of some tokens follows a prompt; None is the reply's end."""
    try:
        said = _answer(model, prompt, None, 1).logprobs or ()
        noise = rounding(model, prompt)
    except InvalidParameterError:
        return False
    top = {one.token_id: one.logprob for at in said for one in (*at.top, at)}
    end = max((top[token] for token in model.engine.eos_token_ids & top.keys()), default=-math.inf)
    likely = [end if token is None else top.get(token, -math.inf) for token in tokens]
    return max(likely) - min(likely) <= limit_of(noise)  # where one is not told, it is far away


_History = tuple[str, list[int]]
"""Which conversation it is of, and its tokens."""


def _next_prompt(model: Model, histories: list[_History], dice: random.Random) -> _History:
    """Return a history that goes on, from its end or from anywhere in it, or a new one."""
    said = model.tokenizer.encode_text(
        " ".join(dice.choices(_TEXT.split(), k=dice.randint(12, 40)))
    )
    most = min(_LONGEST_TOKENS, model.context_length // 2)
    while len(histories) > _MOST_HISTORIES:
        del histories[dice.randrange(len(histories))]
    if not histories or dice.random() < 0.15:
        return f"verify {secrets.token_hex(8)}", (said * 6)[: most // 2]
    session, before = dice.choice(histories)
    if dice.random() < 0.4 or len(before) + len(said) > most:
        before = before[: dice.randint(len(before) // 3, min(len(before), most - len(said)))]
    return session, [*before, *said]


def _answer(
    model: Model,
    prompt: list[int],
    namespace: str | None,
    tokens: int = _REPLY_TOKENS,
    session: str = "",
) -> GeneratedReply:
    params = SamplingParams(
        max_tokens=tokens, logprobs=MOST_LOGPROBS, ignore_eos=True, end_repetition=False
    )
    sequence = model.engine.new_sequence(namespace)
    sequence.session = session
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
    return apart(one.logprobs or (), other.logprobs or ())


def apart(one: Sequence[TokenLogprob], other: Sequence[TokenLogprob]) -> tuple[bool, float]:
    """Return whether ids are the same, and how far log probabilities are apart before they part."""
    far = 0.0
    for a, b in zip(one, other, strict=False):
        tops = [{top.token_id: top.logprob for top in side.top} for side in (a, b)]
        far = max(far, _furthest(*tops), _furthest(*reversed(tops)))
        if a.token_id != b.token_id:
            return False, far
    return True, far


def _furthest(told: Mapping[int, float], other: Mapping[int, float]) -> float:
    """
    Return how far the likeliest tokens of one reply are from what another says of them.

    What is not among the other's is at most as likely there as its last one, and at least so far away.
    """
    last = min(other.values(), default=0.0)
    return max(
        (
            abs(logprob - other[token]) if token in other else max(0.0, logprob - last)
            for token, logprob in told.items()
        ),
        default=0.0,
    )
