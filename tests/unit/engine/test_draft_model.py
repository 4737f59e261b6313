"""What a smaller model guesses, what it reads for that, and when it is asked."""

import logging
import random
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import pytest

from recollect.engine.decoder import Task
from recollect.engine.draft_model import (
    MOST_ASKED,
    READ_AT_ONCE,
    Ahead,
    AskedModel,
    DraftModel,
)
from recollect.engine.drafts import Drafts, PassTimes
from recollect.engine.engine import Engine
from recollect.engine.reply import ReplyGeneration
from recollect.engine.sampling import Generator
from recollect.errors import InvalidParameterError, MisuseError, RuntimeFailure
from recollect.runtime.base import Logits, Pace, PassResult, ReferenceRuntime, Row
from recollect.text.tokenizer import ByteTokenizer
from recollect.types import SamplingParams

VOCAB: Final = 259
END: Final = 0


def likeliest(logits: Logits, _: Sequence[int]) -> int:
    return int(logits.argmax())


class Failing(ReferenceRuntime):
    """Fails when it is told to."""

    fails = False

    def forward(self, rows: Sequence[Row]) -> PassResult:
        if self.fails:
            raise RuntimeFailure("The machine is on fire.")
        return super().forward(rows)


Made = Callable[..., DraftModel]


@pytest.fixture
def made() -> Iterator[Made]:
    """Return a maker of smaller models, small blocks and short passes."""
    models: list[DraftModel] = []

    def make(
        *,
        vocab_size: int = VOCAB,
        context_length: int = 4096,
        num_blocks: int = 2000,
        eos: int = END,
    ) -> DraftModel:
        runtime = Failing(
            vocab_size=vocab_size,
            context_length=context_length,
            block_size=4,
            pace=Pace(first_token_pause_s=0.0),
        )
        engine = Engine(runtime, num_blocks=num_blocks, eos_token_ids=[eos])
        models.append(DraftModel(engine, VOCAB))
        return models[-1]

    yield make
    for model in models:
        model.check()
        model.close()


def first(ahead: Ahead, count: int) -> list[int]:
    """Return so many guesses, as far as there are any."""
    found: list[int] = []
    for token, likely in ahead.guesses(likeliest):
        assert 0 < likely <= 1
        found.append(token)
        if len(found) == count:
            break
    return found


def begun(model: DraftModel, history: Sequence[int], namespace: str | None) -> Ahead:
    """Return what follows a history, with what was read of it before."""
    ahead = Ahead(model, array("i", history), namespace)
    ahead.begin()
    return ahead


def fresh(made: Made, history: Sequence[int], count: int) -> list[int]:
    """Return the same from a model that has read nothing before."""
    model = made()
    ahead = Ahead(model, array("i", history), "")
    return first(ahead, count)


@pytest.mark.parametrize("seed", range(4))
def test_guesses_are_those_of_a_model_that_reads_all_anew(made: Made, seed: int) -> None:
    """Whatever was guessed before, right or wrong; nothing that was wrong is left behind."""
    dice = random.Random(seed)  # noqa: S311 - of tests
    model = made()
    history = array("i", dice.choices(range(1, VOCAB), k=dice.randint(1, 30)))
    ahead = Ahead(model, history, "")
    guessed: list[int] = []
    for _ in range(25):
        right = guessed[: dice.randint(0, len(guessed))]
        history.extend([*right, *dice.choices(range(1, VOCAB), k=dice.randint(1, 3))])
        count = dice.randint(1, 5)
        guessed = first(ahead, count)
        assert guessed == fresh(made, history, count)
        model.check()


def test_nothing_is_read_twice(made: Made) -> None:
    """Not in the next reply, nor after an edit; another namespace finds nothing."""
    model = made()
    prompt = [*range(1, 101)]
    engine = model.engine
    one = begun(model, prompt, "a")
    assert one.lacking == 100
    said = first(one, 3)
    one.close()
    assert engine.computed_tokens == 102  # the last guess was not fed
    again = begun(model, prompt, "a")
    assert again.lacking == 0
    assert first(again, 3) == said
    again.close()
    edited = begun(model, [*prompt[:60], 7, 8], "a")
    assert edited.lacking == 2
    before = engine.computed_tokens
    first(edited, 1)
    assert engine.computed_tokens - before == 2
    assert begun(model, prompt, "b").lacking == 100
    assert begun(model, prompt, None).lacking == 100


def test_a_long_prompt_is_read_in_parts(made: Made) -> None:
    model = made()
    prompt = [1 + number % 250 for number in range(1000)]
    ahead = Ahead(model, array("i", prompt), "")
    taken = []
    while ahead.lacking:
        before = model.engine.computed_tokens
        ahead.read()
        taken.append(model.engine.computed_tokens - before)
    assert max(taken) <= READ_AT_ONCE
    assert sum(taken) == 1000


class Counting(array):  # type: ignore[type-arg] # as arrays are at run time
    """A history that counts the tokens that were read from it."""

    read = 0

    def __getitem__(self, place: Any) -> Any:
        found = super().__getitem__(place)
        self.read += len(found) if isinstance(place, slice) else 1
        return found

    def tolist(self) -> list[int]:
        self.read += len(self)
        return super().tolist()


def test_what_a_token_takes_does_not_grow_with_the_history(made: Made) -> None:
    """At ten thousand tokens no more of them is looked at than is new."""
    model = made(context_length=20_000, num_blocks=6000)
    history = Counting("i", [1 + number % 250 for number in range(10_000)])
    ahead = Ahead(model, history, "")
    assert first(ahead, 1)
    history.read = 0
    before = model.engine.computed_tokens
    for token in range(1, 6):
        history.append(token)
        assert first(ahead, 2)
    assert history.read < 50
    assert model.engine.computed_tokens - before == 10


def test_no_guess_is_behind_an_end(made: Made) -> None:
    """A reply that ends needs no pass for what would follow."""
    history = [3, 4, 5]
    told = fresh(made, history, 5)
    model = made(eos=told[3])
    assert first(Ahead(model, array("i", history), ""), 5) == told[:3]


def test_guesses_that_were_wrong_evict_nothing(made: Made) -> None:
    """They are not kept for others: an earlier conversation stays, where there is room for both."""
    model = made(num_blocks=120)
    earlier = [*range(1, 201)]
    one = begun(model, earlier, "")
    first(one, 1)
    one.close()
    history = array("i", [7, 8, 9])
    other = Ahead(model, history, "")
    for number in range(150):
        first(other, 3)
        history.append(10 + number)  # none of them is right
    other.close()
    assert begun(model, earlier, "").lacking <= 1


def test_what_was_read_is_held_until_the_reply_ends(made: Made) -> None:
    """Else it might be evicted meanwhile, and be read again at once."""
    model = made()
    one = begun(model, range(1, 201), "")
    first(one, 1)
    one.close()
    again = begun(model, range(1, 201), "")
    model.engine.forget()
    before = model.engine.computed_tokens
    first(again, 1)
    assert model.engine.computed_tokens - before <= 1


@pytest.mark.parametrize("vocab_size", [VOCAB - 59, VOCAB + 100])
def test_vocabularies_may_be_padded_otherwise(made: Made, vocab_size: int) -> None:
    """Families pad them; what one of both does not have is not guessed, and ends what can be followed."""
    model = made(vocab_size=vocab_size)
    seen: list[Logits] = []

    def choose(logits: Logits, _: Sequence[int]) -> int:
        seen.append(logits)
        return int(logits.argmax())

    ahead = Ahead(model, array("i", [3, 4]), "")
    guesses = [token for (token, _), _ in zip(ahead.guesses(choose), range(5), strict=False)]
    assert all(len(logits) == VOCAB for logits in seen)
    assert guesses
    assert max(guesses) < min(VOCAB, vocab_size)
    if vocab_size < VOCAB:
        strange = Ahead(model, array("i", [3, VOCAB - 1]), "")
        assert not first(strange, 1)
        assert not strange.can_follow
        assert not model.failed
        assert first(Ahead(model, array("i", [3, 5]), ""), 1)


def test_a_history_beyond_its_context_is_not_followed(made: Made) -> None:
    model = made(context_length=16)
    ahead = Ahead(model, array("i", range(1, 30)), "")
    assert not first(ahead, 1)
    assert not ahead.can_follow
    assert not model.failed


def test_at_the_end_of_its_context_it_guesses_what_fits(made: Made) -> None:
    model = made(context_length=16)
    ahead = Ahead(model, array("i", range(1, 15)), "")
    assert len(first(ahead, 9)) == 3  # the last one needs no place
    assert not ahead.can_follow


def test_where_its_blocks_are_short_a_reply_goes_on_without(made: Made) -> None:
    model = made(num_blocks=3)
    ahead = Ahead(model, array("i", range(1, 30)), "")
    assert not first(ahead, 1)
    assert not ahead.can_follow
    assert not model.failed


def test_what_nothing_can_be_chosen_from_is_no_failure(made: Made) -> None:
    model = made()
    ahead = Ahead(model, array("i", [1, 2]), "")

    def refuse(_: Logits, __: Sequence[int]) -> int:
        raise InvalidParameterError("The grammar allows nothing here.")

    assert not list(ahead.guesses(refuse))
    assert ahead.can_follow
    assert not model.failed


def test_a_runtime_that_fails_is_told_once_and_not_asked_again(
    made: Made, caplog: pytest.LogCaptureFixture
) -> None:
    model = made()
    runtime = model.engine.runtime
    assert isinstance(runtime, Failing)
    ahead = Ahead(model, array("i", [1, 2]), "")
    runtime.fails = True
    with caplog.at_level(logging.WARNING):
        assert not first(ahead, 1)
        assert not first(Ahead(model, array("i", [1, 3]), ""), 1)
    assert model.failed
    assert caplog.text.count("The draft model has failed") == 1
    assert not Ahead(model, array("i", [1, 4]), "").can_follow
    runtime.fails = False


@pytest.mark.parametrize("error", [MisuseError, MemoryError, ValueError])
def test_whatever_is_raised_ends_guessing_alone(
    made: Made, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a smaller engine that was closed before the larger one, at the interpreter's end."""
    model = made()

    def broken(*_: object, **__: object) -> None:
        raise error

    for method in ("compute", "warm_tokens"):
        with monkeypatch.context() as patch:
            patch.setattr(Engine, method, broken)
            ahead = begun(model, [1, 2, 3], "")
            assert not first(ahead, 3)
            ahead.read()
            ahead.close()
        assert not ahead.can_follow
    assert model.failed == (error is not MisuseError)


class Timed(PassTimes):
    """Passes whose cost the test says, per token beyond the first."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self._slope = slope

    def of(self, width: int) -> float:
        return 1 + self._slope * (width - 1)


class Told:
    """A reply whose tokens the test says, beside a smaller model whose passes cost what it says."""

    def __init__(
        self,
        model: DraftModel,
        monkeypatch: pytest.MonkeyPatch,
        *,
        slope: float = 0.02,
        pass_s: float = 0.2,
        reading_s: float = 0.01,
        prompt: Sequence[int] = (1, 2, 3),
    ) -> None:
        monkeypatch.setattr(DraftModel, "pass_s", pass_s)
        monkeypatch.setattr(DraftModel, "reading_s", lambda _self, tokens: tokens * reading_s)
        self.model, self.times = model, Timed(slope)
        self.history = array("i", prompt)
        self.ahead = Ahead(model, self.history, "")
        self.asked = AskedModel(self.ahead)

    def guess(self, most: int = 31) -> list[int]:
        return self.asked.guess(most, 1.03, self.times, likeliest)

    def say(self, ids: Sequence[int]) -> None:
        self.history.extend(ids)
        self.asked.grow(ids)


def test_nobody_waits_for_a_first_token(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told(made(), monkeypatch)
    assert not told.guess()
    assert told.model.engine.computed_tokens == 0
    told.say([4])
    assert told.guess()


def test_as_many_as_pay_are_fed(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that are right, up to the most; fewer where each costs more, none where it costs a pass."""
    widest = {}
    for slope, pass_s in ((0.0, 0.01), (0.05, 0.2), (1.0, 0.2), (0.05, 1.0)):
        told, widest[slope, pass_s] = Told(made(), monkeypatch, slope=slope, pass_s=pass_s), 0
        told.say([4])
        for _ in range(40):
            guesses = told.guess()
            widest[slope, pass_s] = max(widest[slope, pass_s], len(guesses))
            told.say([*guesses, *first(told.ahead, 1)])  # all are right
    assert widest[0.0, 0.01] == MOST_ASKED
    assert 1 < widest[0.05, 0.2] <= MOST_ASKED
    assert widest[1.0, 0.2] <= 1
    assert widest[0.05, 1.0] <= 1


def test_no_more_than_fit_a_pass_that_is_alike(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told(made(), monkeypatch, slope=0.0, pass_s=0.01)
    told.say([4])
    assert len(told.guess(3)) == 3
    assert not told.guess(0)


def test_where_guesses_are_wrong_few_are_made(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """And once they are right they are made again."""
    told = Told(made(), monkeypatch)
    told.say([4])
    made_of = []
    for _ in range(400):
        guesses = told.guess()
        made_of.append(len(guesses))
        expected = first(Ahead(told.model, told.history, ""), 1)
        told.say([1 + (expected[0] if expected else 0) % 250])
    assert sum(made_of[80:]) <= 320 / 32 + 1
    again = 0
    for _ in range(400):
        guesses = told.guess()
        again += len(guesses)
        expected = first(Ahead(told.model, told.history, ""), 1 + len(guesses))
        told.say(expected or [9])
    assert again > 400


def test_a_model_that_guesses_nothing_is_found_out(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that always says the end, where the larger one goes on."""
    model = made()
    told = Told(model, monkeypatch)

    def the_end(_: Logits, __: Sequence[int]) -> int:
        return END

    for number in range(400):
        told.say([1 + number % 250])
        assert not told.asked.guess(31, 1.03, told.times, the_end)
    assert model.engine.forward_passes < 60


def test_nobody_waits_for_more_than_a_pass(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before each it is asked whether somebody does."""
    told = Told(made(), monkeypatch, slope=0.0, pass_s=0.01)
    told.say([4])
    assert len(told.guess()) > 1
    told.say([5])
    passes = told.model.engine.forward_passes
    assert len(told.asked.guess(31, 1.03, told.times, likeliest, lambda: False)) == 1
    assert told.model.engine.forward_passes - passes == 1


@pytest.mark.parametrize(("last", "begins"), [([], 0), ([200] * 9, 0), ([10] * 20, 48)])
def test_a_long_prompt_is_read_where_the_last_replies_would_have_paid_for_it(
    made: Made, monkeypatch: pytest.MonkeyPatch, last: list[int], begins: int
) -> None:
    """A thousand tokens take 15 passes, and guesses save about a third of one with each token."""
    prompt = [1 + n % 250 for n in range(1000)]
    told = Told(made(), monkeypatch, prompt=prompt, reading_s=0.015)
    for length in last:
        told.model.ended(length)
    read_at = [0]
    for number in range(90):
        told.say([1 + number])
        told.guess()
        read_at.append(told.model.engine.computed_tokens)
    begun = next(number for number, count in enumerate(read_at[1:]) if count)
    assert begun == pytest.approx(begins, abs=4)
    assert np.diff(read_at).max() <= READ_AT_ONCE + MOST_ASKED
    assert read_at[-1] >= 1000


def test_one_slow_pass_says_nothing_of_reading(made: Made) -> None:
    """The first of a size prepares kernels: by it a document of the next question was never read."""
    model = made()
    assert model.reading_s(1000) == 0
    model.took(35, 0.5)
    model.took(READ_AT_ONCE, 2.0)
    assert model.reading_s(1000) == 0
    model.took(READ_AT_ONCE, 0.256)
    model.took(READ_AT_ONCE, 0.512)
    assert model.reading_s(1000) == pytest.approx(2.0)


def reply_of(engine: Engine, params: SamplingParams, prompt: Sequence[int]) -> ReplyGeneration:
    generator = Generator(engine, params, namespace="")
    generator.append_tokens(prompt)
    reply = ReplyGeneration(engine, generator, ByteTokenizer())
    reply.start()
    return reply


def larger(**more: Any) -> Engine:
    runtime = ReferenceRuntime(
        vocab_size=VOCAB, block_size=4, pace=Pace(prefill_chunk=8, first_token_pause_s=0.0)
    )
    return Engine(runtime, num_blocks=800, eos_token_ids=[END], **more)


LONG: Final = SamplingParams(max_tokens=60, ignore_eos=True, end_repetition=False)


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let guesses pay: the time that a hash takes says nothing of a model's."""
    monkeypatch.setattr(PassTimes, "of", lambda _self, width: 1 + width / 50)
    monkeypatch.setattr(DraftModel, "pass_s", 0.1)


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_reply_has_fewer_passes_and_the_same_tokens(made: Made, temperature: float) -> None:
    """Sampled too: the same random numbers draw the same from the same logits."""
    params = replace(LONG, temperature=temperature, seed=5)
    plain, guessed = larger(), larger(draft=True)
    assert guessed.drafts is not None
    guessed.drafts.guesser = made()
    told = []
    for engine in (plain, guessed):
        with reply_of(engine, params, [1, 2, 3]) as reply:
            told.append("".join(reply))
    assert told[0] == told[1]
    assert guessed.forward_passes < plain.forward_passes / 2
    assert reply.usage().accepted_tokens > 40
    guessed.check()
    for engine in (plain, guessed):
        engine.close()
        engine.close()


@pytest.mark.usefixtures("cheap")
def test_it_is_not_asked_while_others_wait(made: Made) -> None:
    """Whatever they wait for; a task that runs when there is nothing else to do does not count."""
    engine, model = larger(draft=True), made()
    assert engine.drafts is not None
    engine.drafts.guesser = model
    tasks = list[Task]()
    engine.drafts.tasks = lambda: tasks
    asked = list[bool]()
    for others in ([], [True], [False], [True, False]):
        tasks[:] = [Task(engine.new_sequence(), lambda: False, idle=idle) for idle in others]
        passes = model.engine.forward_passes
        with reply_of(engine, LONG, [1 + len(asked), 2, 3]) as reply:
            for _ in reply:
                pass
        asked.append(model.engine.forward_passes > passes)
    assert asked == [True, True, False, False]
    engine.close()


@pytest.mark.usefixtures("cheap")
def test_a_reply_goes_on_where_the_smaller_model_fails(made: Made) -> None:
    engine, model = larger(draft=True), made()
    assert engine.drafts is not None
    engine.drafts.guesser = model
    assert isinstance(model.engine.runtime, Failing)
    model.engine.runtime.fails = True
    with reply_of(engine, LONG, [1, 2, 3]) as reply:
        for _ in reply:
            pass
    assert reply.reply is not None
    assert reply.reply.finish_reason == "length"
    assert model.failed
    model.engine.runtime.fails = False
    engine.close()


@pytest.mark.usefixtures("cheap")
def test_the_end_of_a_reply_gives_its_blocks_back(made: Made) -> None:
    """Stopped, too; what was read stays findable."""
    engine, model = larger(draft=True), made()
    assert engine.drafts is not None
    engine.drafts.guesser = model
    for number in range(12):
        with reply_of(engine, LONG, [1 + number, 2, 3]) as reply:
            for count, _ in enumerate(reply):
                if count > 10 and number % 2:
                    reply.stop()
    del reply
    engine.check()
    model.check()
    assert not [one for one in model.engine.memory.sequences if one.computed and not one.closed]
    engine.close()


def test_the_drafts_of_an_engine_own_it(made: Made) -> None:
    engine, model = larger(draft=True), made()
    assert isinstance(engine.drafts, Drafts)
    engine.drafts.guesser = model
    engine.close()
    with pytest.raises(MisuseError, match="closed"):
        model.engine.start()
