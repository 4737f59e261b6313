"""
With guesses a reply has the tokens that it has without, whatever is guessed and however it is sampled.

On the reference runtime, whose logits are a hash of all that a block table yields, so that KV of a guess
that was wrong, or a guess that nobody chose, gives other tokens from there on.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import Any, Final

import numpy as np
import pytest

from recollect.engine.draft_model import DraftModel
from recollect.engine.drafts import Choose, Drafts, PassTimes
from recollect.engine.engine import Engine
from recollect.engine.grammar import Grammars
from recollect.engine.reply import ReplyGeneration
from recollect.engine.sampling import Generator
from recollect.engine.sequence import Sequence as TokenSequence
from recollect.runtime.base import Pace, PassResult, ReferenceRuntime, Row
from recollect.text.tokenizer import ByteTokenizer
from recollect.types import Grammar, SamplingParams

VOCAB: Final = 259
LENGTH: Final = 120
PROMPT: Final = [5, 6, 7, 8, 9, 5, 6]
USUAL: Final = SamplingParams(max_tokens=LENGTH, ignore_eos=True, end_repetition=False)
KINDS: Final = {
    "greedy": USUAL,
    "sampled": replace(USUAL, temperature=1.0, seed=3),
    "cool": replace(USUAL, temperature=0.2, seed=4),
    "top_k": replace(USUAL, temperature=1.5, top_k=5, seed=5),
    "top_p": replace(USUAL, temperature=1.0, top_p=0.5, seed=6),
    "min_p": replace(USUAL, temperature=1.0, min_p=0.1, seed=7),
    "repetition": replace(USUAL, temperature=0.7, repetition_penalty=1.5, seed=8),
    "presence": replace(USUAL, presence_penalty=1.5, frequency_penalty=0.8),
    "bias": replace(USUAL, temperature=0.9, logit_bias={7: 6.0, 65: 4.0, 66: -100.0}, seed=9),
    "logprobs": replace(USUAL, temperature=0.8, logprobs=3, seed=10),
    "stop": replace(USUAL, temperature=0.8, stop=("Q",), seed=11),
    "end of sequence": replace(USUAL, ignore_eos=False, temperature=1.4, seed=12),
}
FOLLOWED: Final = replace(USUAL, ignore_eos=False, temperature=1.0)
GRAMMARS: Final = {
    "schema": Grammar(
        "json_schema",
        '{"type": "object", "properties": {"the name of it": {"type": "string", "maxLength": 9}, '
        '"how many there are": {"type": "integer"}}, "required": ["the name of it", '
        '"how many there are"], "additionalProperties": false}',
    ),
    "regex": Grammar("regex", "(one|two|three hundred and ){3,9}!"),
}


class Oracle(Drafts):
    """Guesses what the test says: the truth, spoiled in places."""

    def __init__(self, engine: Engine, spoils: Callable[[int], bool], width: int) -> None:
        super().__init__(engine.info)
        self.truth: dict[int, list[int]] = {}
        self._spoils, self._width, self._room = spoils, width, engine.info.context_length

    def follow(
        self, sequence: TokenSequence, forced: Sequence[int], choose: Choose | None = None
    ) -> None:
        """Guess what comes in the reply without guesses."""
        truth, length = self.truth.get(sequence.tokens(0, 1)[0], []), len(sequence)
        comes = truth[length : length + min(self._width, self._room - length)]
        guesses = enumerate(comes, length)
        sequence.draft = [(one + 1) % VOCAB if self._spoils(n) else one for n, one in guesses]


Made = Callable[..., Engine]


@pytest.fixture
def made() -> Iterator[Made]:
    """Return a maker of engines over small blocks."""
    engines: list[Engine] = []

    def make(num_blocks: int = 256, **more: Any) -> Engine:
        runtime = ReferenceRuntime(
            vocab_size=VOCAB,
            context_length=200,
            block_size=4,
            pace=Pace(prefill_chunk=8, shared_chunk=4, most_rows=4, first_token_pause_s=0.0),
        )
        engine = Engine(runtime, num_blocks=num_blocks, eos_token_ids=[0], **more)
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.check()
        engine.close()


@pytest.fixture
def cheap_guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let guesses pay: the time that a hash of each token takes says nothing of a model's."""
    monkeypatch.setattr(PassTimes, "of", lambda _self, width: 1 + width / 50)


TOKENIZER: Final = ByteTokenizer()


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    """Return the grammars of a tokenizer of bytes."""
    return Grammars(TOKENIZER, vocab_size=VOCAB)


def begun(
    engine: Engine, params: SamplingParams, grammars: Grammars | None = None, first: int = 1
) -> ReplyGeneration:
    generator = Generator(engine, params, namespace="", grammars=grammars)
    generator.append_tokens([first, *PROMPT])
    reply = ReplyGeneration(engine, generator, TOKENIZER)
    reply.start()
    return reply


def told(reply: ReplyGeneration) -> tuple[Any, ...]:
    """Return all that a reply says of itself, but for what it has cost."""
    with reply:
        for _ in reply:
            pass
    whole = reply.reply
    assert whole is not None
    return reply.token_ids, whole.text, whole.finish_reason, whole.logprobs, whole.stop_string


def compare(
    made: Made,
    kinds: dict[str, SamplingParams],
    grammars: Grammars | None = None,
    *,
    spoils: Callable[[int], bool] = lambda place: place % 7 == 0,
    width: int = 5,
    num_blocks: int = 256,
) -> tuple[int, int, int]:
    """
    Generate replies of each kind alone and plainly, then all of them at once with guesses.

    Returns:
        Tokens, and how many guesses were fed and accepted.
    """
    plain, drafting = made(), made(num_blocks)
    drafting.drafts = oracle = Oracle(drafting, spoils, width)
    expected = {}
    for number, (kind, params) in enumerate(kinds.items(), start=1):
        reply = begun(plain, params, grammars, number)
        expected[kind] = told(reply)
        oracle.truth[number] = [number, *PROMPT, *expected[kind][0]]
    numbered = enumerate(kinds.items(), start=1)
    replies = {k: begun(drafting, params, grammars, n) for n, (k, params) in numbered}
    tokens = fed = accepted = 0
    for kind, reply in replies.items():
        assert told(reply) == expected[kind], kind
        usage = reply.usage()
        tokens += usage.generated_tokens
        fed += usage.drafted_tokens
        accepted += usage.accepted_tokens
    drafting.check()
    return tokens, fed, accepted


@pytest.mark.few(1)
@pytest.mark.parametrize("width", [1, 4, 9, 31])
def test_ten_thousand_tokens_of_all_kinds_are_the_same(made: Made, width: int) -> None:
    tokens = 0
    for number in range(2):
        kinds = {
            kind: params if params.seed is None else replace(params, seed=params.seed + 97 * number)
            for kind, params in KINDS.items()
        }
        more, fed, accepted = compare(made, kinds, width=width)
        tokens += more
        assert 0 < accepted < fed
    assert tokens > 2 * 10 * LENGTH * 0.8  # times four widths: ten thousand


@pytest.mark.few(1)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_whatever_share_of_guesses_is_wrong(made: Made, share: float) -> None:
    dice = np.random.default_rng(1)
    wrong = dice.random(4096) < share
    _, fed, accepted = compare(made, KINDS, spoils=lambda place: bool(wrong[place]))
    assert fed > 0
    assert accepted == fed if share == 0 else accepted < fed
    assert (accepted == 0) == (share == 1)


def test_where_blocks_are_short_and_replies_are_preempted(made: Made) -> None:
    """A full context is 50 blocks, and four replies run."""
    compare(made, KINDS, num_blocks=54)


def test_with_grammars(made: Made, grammars: Grammars) -> None:
    kinds = {
        f"{name} {seed}": replace(FOLLOWED, seed=seed, grammar=grammar)
        for name, grammar in GRAMMARS.items()
        for seed in range(4)
    }
    compare(made, kinds, grammars)


@pytest.mark.usefixtures("cheap_guesses")
def test_what_a_grammar_forces_is_guessed_and_right(made: Made, grammars: Grammars) -> None:
    """By the drafts themselves: nothing was said before."""
    params = replace(FOLLOWED, seed=2, grammar=GRAMMARS["schema"])
    plain, drafting = made(), made(draft=True)
    expected = told(begun(plain, params, grammars))
    reply = begun(drafting, params, grammars)
    assert told(reply) == expected
    usage = reply.usage()
    assert usage.accepted_tokens == usage.drafted_tokens > 20
    assert drafting.forward_passes < plain.forward_passes - 20


@pytest.mark.usefixtures("cheap_guesses")
def test_a_reply_that_is_generated_again_takes_few_passes(made: Made) -> None:
    """By the drafts themselves, which have seen the first one."""
    params = KINDS["sampled"]
    engine = made(draft=True)
    first = told(begun(engine, params))
    passes = engine.forward_passes
    again = begun(engine, params)
    assert told(again) == first
    assert engine.forward_passes - passes < LENGTH / 3
    assert again.usage().accepted_tokens > LENGTH / 2


class Unlike(ReferenceRuntime):
    """A model that is of one mind with the larger one but at some places."""

    def forward(self, rows: Sequence[Row]) -> PassResult:
        result = super().forward(rows)
        if rows[-1].past % 5 == 0:
            result = replace(result, logits=np.roll(result.logits, 1, axis=1))
        return result


def with_a_small_one(engine: Engine) -> Engine:
    """Let a smaller model guess for an engine, which owns it then."""
    runtime = Unlike(vocab_size=VOCAB, context_length=150, block_size=8)
    small = Engine(runtime, num_blocks=64, eos_token_ids=engine.eos_token_ids)
    assert engine.drafts is not None
    engine.drafts.guesser = DraftModel(small, VOCAB)
    return engine


@pytest.mark.usefixtures("cheap_guesses")
def test_with_a_smaller_model_all_kinds_are_the_same(
    made: Made, grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose guesses are right and wrong, and which gives up at the end of its context."""
    monkeypatch.setattr(DraftModel, "pass_s", 0.02)
    kinds = dict(KINDS)
    for name, grammar in GRAMMARS.items():
        kinds[name] = replace(FOLLOWED, seed=3, grammar=grammar)
    plain, guessed = made(), with_a_small_one(made(draft=True))
    fed = accepted = 0
    for number, (kind, params) in enumerate(kinds.items(), start=1):
        reply = begun(guessed, params, grammars, number)
        assert told(reply) == told(begun(plain, params, grammars, number)), kind
        fed += reply.usage().drafted_tokens
        accepted += reply.usage().accepted_tokens
        guessed.check()
    assert 200 < accepted < fed


@pytest.mark.usefixtures("cheap_guesses")
def test_a_reply_beside_others_is_guessed_too(made: Made) -> None:
    params = [replace(KINDS["sampled"], seed=seed) for seed in range(4)]
    engine = made(draft=True)
    first = [told(begun(engine, one)) for one in params]
    again = [begun(engine, one) for one in params]
    assert [told(one) for one in again] == first
    assert sum(one.usage().accepted_tokens for one in again) > LENGTH


@pytest.mark.usefixtures("cheap_guesses")
def test_a_reply_that_is_stopped_can_be_gone_on_from(made: Made) -> None:
    """What was guessed and not given out leaves nothing behind."""
    params, number = KINDS["sampled"], count(1)
    engine = made(draft=True)
    expected = told(begun(engine, params))[0]
    for _ in range(8):
        reply = begun(engine, params)
        pieces = iter(reply)
        for _ in range(3 * next(number)):
            next(pieces)
        reply.finish()
        engine.check()
        kept = reply.token_ids
        assert kept == expected[: len(kept)]
        reply.close()
    assert told(begun(engine, params))[0] == expected


def _note_guesses(patch: pytest.MonkeyPatch) -> dict[TokenSequence, list[tuple[int, Any]]]:
    """Return by sequence the guesses of the last pass that are to be judged, with the logits after each."""
    noted: dict[TokenSequence, list[tuple[int, Any]]] = {}
    written = TokenSequence.written

    def note(self: TokenSequence, fed: Any, logits: Any) -> None:
        guesses = [] if logits is None else list(self.draft[: fed.drafted])
        noted[self] = [(one, logits[n].copy()) for n, one in enumerate(guesses, start=1)]
        written(self, fed, logits)

    patch.setattr(TokenSequence, "written", note)
    return noted


def _keep_a_guess_that_nobody_chose(patch: pytest.MonkeyPatch) -> None:
    noted, append = _note_guesses(patch), TokenSequence.append

    def careless(self: TokenSequence, ids: Sequence[int]) -> None:
        append(self, [noted[self].pop(0)[0]] if noted.get(self) else ids)

    patch.setattr(TokenSequence, "append", careless)


def _keep_the_kv_of_a_guess_that_was_wrong(patch: pytest.MonkeyPatch) -> None:
    """It counts as that of the token that was chosen, where a block has room for it."""
    noted, append = _note_guesses(patch), TokenSequence.append

    def careless(self: TokenSequence, ids: Sequence[int]) -> None:
        guess, logits = noted[self].pop(0) if noted.get(self) else (None, None)
        append(self, ids)
        if guess is not None and [guess] != list(ids) and self.computed % 4 in (1, 2):
            self.computed, self.logits = self.computed + 1, logits

    patch.setattr(TokenSequence, "append", careless)


def _give_logits_of_another_place(patch: pytest.MonkeyPatch) -> None:
    """As a runtime does that counts places wrongly."""
    forward = ReferenceRuntime.forward

    def shifted(self: ReferenceRuntime, rows: Sequence[Any]) -> Any:
        result = forward(self, rows)
        if any(row.drafted for row in rows):
            result = replace(result, logits=np.roll(result.logits, 1, axis=0))
        return result

    patch.setattr(ReferenceRuntime, "forward", shifted)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "plant",
    [
        _keep_a_guess_that_nobody_chose,
        _keep_the_kv_of_a_guess_that_was_wrong,
        _give_logits_of_another_place,
    ],
)
def test_a_planted_fault_is_found(
    made: Made, monkeypatch: pytest.MonkeyPatch, plant: Callable[[pytest.MonkeyPatch], None]
) -> None:
    kinds = {kind: KINDS[kind] for kind in ("greedy", "sampled", "repetition")}
    compare(made, kinds)
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        compare(made, kinds)
