"""Append, generate, rewind and fork in any order: never a hole, and always the same tokens."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from recollect.engine.engine import Engine
from recollect.engine.sampling import Bias, Generator
from recollect.errors import (
    ContextFullError,
    InvalidParameterError,
    MisuseError,
    OutOfBlocksError,
    RewindError,
    RuntimeFailure,
    TokenIdError,
)
from recollect.types import SamplingParams

PROMPT = [3, 1, 4, 1, 5, 9]
SAMPLED = SamplingParams(
    temperature=1.3, top_p=0.9, repetition_penalty=1.2, presence_penalty=0.4, seed=11
)


def prompted(engine: Engine, params: SamplingParams | None = None) -> Generator:
    generator = Generator(engine, params)
    generator.append_tokens(PROMPT)
    return generator


def generate(generator: Generator, count: int) -> list[int | None]:
    return [generator.generate_next_token() for _ in range(count)]


def to_the_end(generator: Generator) -> list[int]:
    tokens = []
    while not generator.is_done():
        token = generator.generate_next_token()
        if token is not None:
            tokens.append(token)
    return tokens


def next_logits(generator: Generator, engine: Engine) -> Any:
    probe = generator.sequence.fork()
    engine.compute([probe])
    logits = probe.logits
    probe.release()
    return logits


def test_greedy_tokens_are_the_best_of_a_fresh_prefill_each(
    engine: Engine, fresh_logits: Callable[..., Any]
) -> None:
    generator, ids = prompted(engine), PROMPT[:]
    for _ in range(20):
        best = int(fresh_logits(ids).argmax())
        assert generator.generate_next_token() == best
        ids.append(best)
    assert generator.get_sequence() == ids


@pytest.mark.parametrize("generated", range(6))
@pytest.mark.parametrize("back", range(3))
def test_there_is_no_hole_wherever_a_reply_is_cut(
    engine: Engine, fresh_logits: Callable[..., Any], generated: int, back: int
) -> None:
    """The caller stops after any token, perhaps takes some back, and appends the next prompt."""
    generator = prompted(engine)
    generate(generator, generated)
    generator.rewind_to(len(PROMPT) + max(0, generated - back))
    generator.append_tokens([7, 8])
    engine.check()
    assert np.array_equal(next_logits(generator, engine), fresh_logits(generator.get_sequence()))


def test_an_uncut_reply_costs_one_pass_per_token(engine: Engine) -> None:
    generator = prompted(engine)
    generate(generator, 5)
    assert engine.computed_tokens == len(PROMPT) + 4
    generator.append_tokens([7, 8])
    generator.generate_next_token()
    assert engine.computed_tokens == len(PROMPT) + 4 + 1 + 2


def eos_after(make_engine: Callable[..., Engine], count: int) -> tuple[Engine, int]:
    """Return an engine on which the greedy reply to PROMPT ends after *count* tokens."""
    tokens = generate(prompted(make_engine()), count + 1)
    end = tokens[count]
    assert end is not None
    assert end not in tokens[:count]
    return make_engine(eos_token_ids=[end]), end


@pytest.mark.parametrize("count", [0, 1, 4])
def test_end_of_sequence_ends_the_reply_and_does_not_enter_the_history(
    make_engine: Callable[..., Engine], count: int
) -> None:
    engine, end = eos_after(make_engine, count)
    generator = prompted(engine)
    assert len(to_the_end(generator)) == count
    assert generator.finish_reason == "stop"
    assert end not in generator.get_sequence()[len(PROMPT) :]
    assert len(generator.get_sequence()) == len(PROMPT) + count
    with pytest.raises(MisuseError):
        generator.generate_next_token()


def test_end_of_sequence_can_be_ignored(make_engine: Callable[..., Engine]) -> None:
    engine, end = eos_after(make_engine, 2)
    generator = prompted(engine, SamplingParams(ignore_eos=True, max_tokens=6))
    tokens = to_the_end(generator)
    assert tokens[2] == end
    assert len(tokens) == 6
    assert generator.finish_reason == "length"


def test_after_the_end_a_new_prompt_begins_a_new_reply(make_engine: Callable[..., Engine]) -> None:
    engine, _ = eos_after(make_engine, 2)
    generator = prompted(engine)
    to_the_end(generator)
    generator.append_tokens([7])
    assert (generator.is_done(), generator.reply_start) == (False, len(PROMPT) + 3)
    assert generator.generate_next_token() is not None


@pytest.mark.parametrize("params", [SamplingParams(), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("back_to", range(9))
def test_sampling_anew_after_a_rewind_gives_the_same_tokens(
    engine: Engine, params: SamplingParams, back_to: int
) -> None:
    generator = prompted(engine, params)
    tokens = generate(generator, 8)
    generator.rewind_to(len(PROMPT) + back_to)
    assert generate(generator, 8 - back_to) == tokens[back_to:]


def test_another_seed_gives_other_tokens_and_no_seed_a_new_one_each_time(engine: Engine) -> None:
    hot = {"temperature": 2.0}
    runs = [
        generate(prompted(engine, SamplingParams(**hot, seed=seed)), 8)  # type: ignore[arg-type]
        for seed in (1, 2, 1, None, None)
    ]
    assert runs[0] == runs[2]
    assert runs[0] != runs[1]
    assert runs[3] != runs[4]


def test_a_drawn_seed_can_be_used_again(engine: Engine) -> None:
    first = prompted(engine, SamplingParams(temperature=2.0))
    tokens = generate(first, 8)
    again = prompted(engine, SamplingParams(temperature=2.0, seed=first.seed))
    assert generate(again, 8) == tokens


@pytest.mark.parametrize("params", [SamplingParams(), SAMPLED], ids=["greedy", "sampled"])
def test_a_fork_goes_on_as_the_original_would_and_neither_sees_the_other(
    engine: Engine, params: SamplingParams
) -> None:
    expected = generate(prompted(engine, params), 10)
    original = prompted(engine, params)
    generate(original, 4)
    passes = engine.forward_passes
    fork = original.fork()
    assert engine.forward_passes == passes
    other = original.fork()
    other.append_tokens([30, 31])
    generate(other, 5)
    interleaved = [(original.generate_next_token(), fork.generate_next_token()) for _ in range(6)]
    assert interleaved == [(token, token) for token in expected[4:]]
    engine.check()


def test_biases_are_made_once_for_each_reply(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where forks that take turns have different ones: there can be many."""
    made: list[SamplingParams] = []
    make = Bias.of

    def counted(params: SamplingParams) -> Bias:
        made.append(params)
        return make(params)

    monkeypatch.setattr(Bias, "of", counted)
    one, other = (SamplingParams(logit_bias={token: 100.0}) for token in (7, 8))
    original = prompted(engine, one)
    fork = original.fork()
    fork.set_params(other)
    said = [(original.generate_next_token(), fork.generate_next_token()) for _ in range(6)]
    assert said == [(7, 8)] * 6
    assert [sum(params is which for params in made) for which in (one, other)] == [1, 1]


def test_a_fork_goes_on_with_a_seed_that_was_drawn(engine: Engine) -> None:
    original = prompted(engine, SamplingParams(temperature=2.0))
    generate(original, 2)
    fork = original.fork()
    assert fork.seed == original.seed
    assert generate(fork, 8) == generate(original, 8)


def test_a_fork_has_its_own_reply_starts_parameters_and_end(engine: Engine) -> None:
    original = prompted(engine, SamplingParams(max_tokens=2))
    to_the_end(original)
    fork = original.fork()
    assert fork.finish_reason == "length"
    fork.append_tokens([7])
    fork.set_params(SamplingParams(max_tokens=5))
    assert (original.finish_reason, original.reply_start) == ("length", len(PROMPT))
    assert original.params.max_tokens == 2
    assert len(to_the_end(fork)) == 5


def test_a_fork_outlives_the_original(engine: Engine, fresh_logits: Callable[..., Any]) -> None:
    original = prompted(engine)
    generate(original, 3)
    fork = original.fork()
    original.close()
    generate(fork, 3)
    assert np.array_equal(next_logits(fork, engine), fresh_logits(fork.get_sequence()))


@pytest.mark.parametrize("back_to", range(6))
def test_max_tokens_counts_what_the_reply_has_after_a_rewind(engine: Engine, back_to: int) -> None:
    generator = prompted(engine, SamplingParams(max_tokens=5))
    tokens = to_the_end(generator)
    assert len(tokens) == 5
    generator.rewind_to(len(PROMPT) + back_to)
    assert to_the_end(generator) == tokens[back_to:]
    assert generator.finish_reason == "length"
    assert len(generator.get_sequence()) == len(PROMPT) + 5


def test_fewer_tokens_than_the_reply_has_already_end_it(engine: Engine) -> None:
    generator = prompted(engine)
    generate(generator, 5)
    generator.set_params(SamplingParams(max_tokens=3))
    assert to_the_end(generator) == []
    assert generator.finish_reason == "length"


def test_max_tokens_counts_each_reply_by_itself(engine: Engine) -> None:
    generator = prompted(engine, SamplingParams(max_tokens=3))
    for _ in range(3):
        assert len(to_the_end(generator)) == 3
        generator.append_tokens([7])


def reply_starts() -> list[tuple[int, int]]:
    # prompt [0, 6), reply [6, 9), prompt [9, 11), reply [11, 13)
    return [(13, 11), (12, 11), (11, 11), (10, 10), (9, 6), (8, 6), (6, 6), (5, 5), (1, 1), (0, 0)]


@pytest.mark.parametrize(("length", "expected"), reply_starts())
def test_a_rewind_into_a_reply_goes_on_with_it_and_one_into_a_prompt_begins_a_reply_there(
    engine: Engine, length: int, expected: int
) -> None:
    generator = prompted(engine, SamplingParams(max_tokens=8))
    generate(generator, 3)
    generator.append_tokens([7, 8])
    generate(generator, 2)
    generator.rewind_to(length)
    assert generator.reply_start == expected
    if length:
        assert len(to_the_end(generator)) == 8 - (length - expected)


def test_prompts_that_follow_each_other_are_one(engine: Engine) -> None:
    generator = prompted(engine)
    generator.append_tokens([7])
    assert generator.reply_start == len(PROMPT) + 1
    generator.rewind_to(len(PROMPT))
    assert generator.reply_start == len(PROMPT)


def test_penalties_go_back_with_a_rewind(engine: Engine) -> None:
    params = SamplingParams(frequency_penalty=3.0, repetition_penalty=1.5)
    generator = prompted(engine, params)
    tokens = generate(generator, 12)
    generator.rewind_to(len(PROMPT) + 2)
    generate(generator, 3)
    generator.rewind_to(len(PROMPT))
    assert generate(generator, 12) == tokens


def test_the_context_ends_a_reply_without_an_error(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(context_length=10)
    generator = prompted(engine)
    assert len(to_the_end(generator)) == 4
    assert generator.finish_reason == "length"
    assert len(generator.get_sequence()) == 10
    with pytest.raises(ContextFullError):
        generator.append_tokens([1])
    generator.rewind_to(8)
    assert len(to_the_end(generator)) == 2


def test_out_of_blocks_leaves_the_history_as_it_was_and_freeing_some_lets_it_go_on(
    make_engine: Callable[..., Engine],
) -> None:
    """Also where a copy would be spared only by taking the tail of the prompt from the cache."""
    expected = generate(prompted(make_engine()), 8)
    engine = make_engine(num_blocks=3)
    hoard = engine.new_sequence()
    hoard.append([1])
    engine.compute([hoard])
    generator = prompted(engine)
    tokens = generate(generator, 3)
    with pytest.raises(OutOfBlocksError):
        generator.generate_next_token()
    assert generator.get_sequence() == [*PROMPT, *[token for token in tokens if token is not None]]
    assert generator.finish_reason is None
    engine.check()
    hoard.release()
    assert tokens + generate(generator, 3) == expected[:6]


@pytest.mark.parametrize("failing_pass", range(5))
def test_a_failing_runtime_leaves_the_history_and_the_next_try_gives_the_same(
    make_engine: Callable[..., Engine], faults: Any, failing_pass: int
) -> None:
    expected = generate(prompted(make_engine()), 8)
    generator = prompted(make_engine())
    tokens = generate(generator, 1)
    faults.forward_in = failing_pass
    tokens += generate(generator, failing_pass)
    with pytest.raises(RuntimeFailure):
        generator.generate_next_token()
    tokens += generate(generator, 8 - len(tokens))
    assert tokens == expected


@pytest.mark.parametrize(
    ("ids", "error"), [([], TokenIdError), ([50], TokenIdError), ([1] * 200, ContextFullError)]
)
def test_an_append_that_is_refused_changes_nothing(
    engine: Engine, ids: list[int], error: type[Exception]
) -> None:
    generator = prompted(engine, SamplingParams(max_tokens=2))
    to_the_end(generator)
    before = generator.get_sequence()
    with pytest.raises(error):
        generator.append_tokens(ids)
    assert generator.get_sequence() == before
    assert (generator.finish_reason, generator.reply_start) == ("length", len(PROMPT))


def test_a_rewind_that_is_refused_changes_nothing(engine: Engine) -> None:
    generator = prompted(engine, SamplingParams(max_tokens=2))
    to_the_end(generator)
    for length in (-1, 9):
        with pytest.raises(RewindError):
            generator.rewind_to(length)
    assert (len(generator.get_sequence()), generator.finish_reason) == (8, "length")


@pytest.mark.parametrize("token", [-1, 50])
def test_a_bias_on_a_token_that_does_not_exist_is_refused_and_changes_nothing(
    engine: Engine, token: int
) -> None:
    generator = prompted(engine, SAMPLED)
    with pytest.raises(InvalidParameterError, match=f"token {token}"):
        generator.set_params(SamplingParams(logit_bias={token: 1.0}))
    assert (generator.params, generator.seed) == (SAMPLED, 11)


def test_biases_are_gone_through_once_and_not_for_each_token(engine: Engine) -> None:
    looked = []

    class Counting(dict[int, float]):
        def __iter__(self) -> Iterator[int]:
            looked.append(len(self))
            return super().__iter__()

    generator = prompted(engine, SamplingParams(logit_bias=Counting({7: 100.0})))
    before = len(looked)
    assert generate(generator, 5) == [7] * 5
    assert generate(generator.fork(), 5) == [7] * 5
    assert len(looked) == before


def test_generating_from_nothing_is_misuse(engine: Engine) -> None:
    with pytest.raises(MisuseError):
        Generator(engine).generate_next_token()


def test_a_closed_generator_is_of_no_use(engine: Engine) -> None:
    generator = prompted(engine)
    generate(generator, 2)
    generator.close()
    generator.close()
    assert engine.pool.used_blocks == engine.cache.evictable_blocks == 2
    with pytest.raises(MisuseError):
        generator.generate_next_token()
    with pytest.raises(MisuseError):
        generator.append_tokens([1])
    assert engine.pool.used_blocks == engine.cache.evictable_blocks == 2
