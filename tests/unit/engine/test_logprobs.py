"""Log probabilities are the model's own, and come in step with the text."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recollect.engine.engine import Engine
from recollect.engine.grammar import Grammars
from recollect.engine.reply import ReplyGeneration
from recollect.engine.sampling import Generator, log_probabilities, most_likely
from recollect.errors import InvalidParameterError
from recollect.runtime.base import Logits
from recollect.text.tokenizer import ByteTokenizer
from recollect.types import Grammar, SamplingParams

TOKENIZER = ByteTokenizer()
TEXT = Grammar.regex("[ab€ü]{20}")
PROMPT = TOKENIZER.encode("Say!")


def replying(
    make_engine: Callable[..., Engine], params: SamplingParams
) -> tuple[Generator, ReplyGeneration]:
    vocab_size = TOKENIZER.vocab_size
    engine = make_engine(
        vocab_size=vocab_size, context_length=200, eos_token_ids=TOKENIZER.eos_token_ids
    )
    grammars = Grammars(TOKENIZER, vocab_size=vocab_size)
    generator = Generator(engine, params, grammars=grammars)
    generator.append_tokens(PROMPT)
    reply = ReplyGeneration(engine, generator, TOKENIZER)
    reply.start()
    return generator, reply


def test_log_probabilities_are_those_of_a_softmax() -> None:
    logits = np.array([1.0, 3.0, -np.inf, 2.0], np.float32)
    weights = np.exp(logits.astype(float))
    assert np.allclose(np.exp(log_probabilities(logits)), weights / weights.sum())


def test_of_equally_likely_tokens_the_lower_id_comes_first() -> None:
    log_probs = np.array([-3.0, -1.0, -2.0, -1.0])
    assert most_likely(log_probs, 3).tolist() == [1, 3, 2]
    assert most_likely(log_probs, 9).tolist() == [1, 3, 2, 0]
    assert most_likely(log_probs, 0).tolist() == []


@pytest.mark.parametrize("wrong", [-1, 21])
def test_more_than_twenty_alternatives_are_refused(wrong: int) -> None:
    with pytest.raises(InvalidParameterError, match="from 0 to 20"):
        SamplingParams(logprobs=wrong)


def test_nobody_who_did_not_ask_is_told(make_engine: Callable[..., Engine]) -> None:
    generator, reply = replying(make_engine, SamplingParams(grammar=TEXT))
    assert "".join(reply)
    assert reply.logprobs is None
    assert generator.likelihood is None


def test_they_are_of_the_models_own_distribution_whatever_changes_it(
    make_engine: Callable[..., Engine], fresh_logits: Callable[..., Logits]
) -> None:
    params = SamplingParams(
        grammar=TEXT, temperature=3, seed=1, logit_bias={97: 5.0}, repetition_penalty=1.3,
        logprobs=4,
    )  # fmt: skip
    generator, reply = replying(make_engine, params)
    assert len("".join(reply)) == 20
    reply.finish()
    told = reply.logprobs
    assert told is not None
    assert [one.token_id for one in told] == reply.token_ids
    history = generator.get_sequence()
    for place, one in enumerate(told, len(PROMPT)):
        expected = log_probabilities(fresh_logits(history[:place], vocab_size=259))
        assert one.logprob == pytest.approx(expected[one.token_id])
        best = np.argsort(-expected, kind="stable")[:4]
        assert [top.token_id for top in one.top] == best.tolist()
        assert [top.logprob for top in one.top] == pytest.approx(expected[best].tolist())
        assert one.token_bytes == bytes([one.token_id])


@given(
    stop=st.lists(st.text("ab€ü", min_size=1, max_size=3), max_size=3),
    leave_after=st.none() | st.integers(0, 12),
    seed=st.integers(0, 50),
)
def test_a_token_is_told_when_its_text_was_given_out_and_never_taken_back(
    make_engine: Callable[..., Engine], stop: list[str], leave_after: int | None, seed: int
) -> None:
    params = SamplingParams(
        grammar=TEXT, temperature=5, seed=seed, stop=tuple(stop), logprobs=0, repetition_penalty=1.1
    )
    _, reply = replying(make_engine, params)
    before: tuple[object, ...] = ()
    for number, _ in enumerate(reply):
        told = reply.logprobs
        assert told is not None
        assert told[: len(before)] == before
        text = b"".join(one.token_bytes for one in told)
        assert text.decode() == reply.text  # bytes as tokens: not one is missing, not one too many
        before = told
        if number == leave_after:
            break
    reply.finish()
    assert reply.logprobs is not None
    assert reply.logprobs[: len(before)] == before
    assert [one.token_id for one in reply.logprobs] == reply.token_ids
