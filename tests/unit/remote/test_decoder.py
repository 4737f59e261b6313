"""What replies need of whatever chooses their tokens: the same of our engine and of engines elsewhere."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from recollect.conversation.model import Model
from recollect.conversation.turn import Reply
from recollect.engine.sampling import Generator
from recollect.types import SamplingParams

SHORT = SamplingParams(max_tokens=12, ignore_eos=True)
SYSTEM = "Be careful, and say what you are sure of. "


@pytest.fixture(params=["here", "vllm", "two vllms", "llama"])
def model(
    request: pytest.FixtureRequest, load: Callable[..., Model], make_stub: Callable[..., Any]
) -> Model:
    if request.param == "here":
        return load()
    if request.param == "llama":
        return load(f"llama={make_stub('llama', slots=4)[1]}")
    urls = [make_stub()[1] for _ in range(2 if request.param == "two vllms" else 1)]
    return load(f"vllm={','.join(urls)}")


def added_up(reply: Reply) -> int:
    return reply.usage.reused_tokens + reply.usage.computed_tokens


@pytest.mark.few(1)
def test_a_reply_has_as_many_tokens_as_were_asked_for(model: Model) -> None:
    reply = model.session(SYSTEM).respond("hello", params=SHORT)
    assert reply.finish_reason == "length"
    assert len(reply.node.token_ids or ()) == reply.usage.generated_tokens == 12


@pytest.mark.few(1)
def test_the_next_turn_reuses_what_the_last_one_computed(model: Model) -> None:
    session = model.session(SYSTEM * 4)
    first = session.respond("hello", params=SHORT)
    second = session.respond("and then?", params=SHORT)
    assert first.usage.reused_tokens == 0
    assert added_up(second) == second.usage.prompt_tokens
    assert second.usage.reused_tokens >= first.usage.prompt_tokens // 16 * 16
    assert second.usage.reason == "new"


@pytest.mark.few(1)
def test_a_rewound_conversation_answers_as_it_did(model: Model) -> None:
    session = model.session(SYSTEM)
    session.respond("hello", params=SHORT)
    one = session.respond("and then?", params=SHORT)
    session.undo()
    other = session.respond("and then?", params=SHORT)
    assert other.node.token_ids == one.node.token_ids
    assert other.usage.computed_tokens < other.usage.prompt_tokens / 2


@pytest.mark.few(1)
def test_a_fork_goes_on_from_where_it_was_made(model: Model) -> None:
    session = model.session(SYSTEM * 4)
    session.respond("hello", params=SHORT)
    fork = session.fork()
    assert fork.respond("left", params=SHORT).usage.reused_tokens > 0
    assert session.respond("right", params=SHORT).usage.reused_tokens > 0


def test_a_history_that_began_short_is_found_again_where_it_was(model: Model) -> None:
    """One without a conversation: what keeps it at a replica or in a slot must not change as it grows."""
    generator = Generator(model.engine, SHORT)
    generator.append_tokens(model.tokenizer.encode(SYSTEM))
    while not generator.is_done():
        generator.generate_next_token()
    before = model.engine.computed_tokens
    generator.append_tokens(model.tokenizer.encode(SYSTEM))
    while not generator.is_done():
        generator.generate_next_token()
    generator.close()
    fed = model.engine.computed_tokens - before
    assert fed <= len(SYSTEM) + 12 + 16


@pytest.mark.few(1)
def test_another_namespace_reuses_nothing(model: Model) -> None:
    texts = []
    for namespace in ("alice", "bob"):
        reply = model.session(SYSTEM * 4, namespace=namespace).respond("hello", params=SHORT)
        assert reply.usage.reused_tokens == 0
        texts.append(reply.text)
    assert texts[0] == texts[1]


@pytest.mark.few(1)
def test_end_tokens_are_not_in_the_history(model: Model) -> None:
    session = model.session(SYSTEM)
    params = SamplingParams(max_tokens=400, end_repetition=False)
    for _ in range(4):
        reply = session.respond("go on", params=params)
        ids = set(reply.node.token_ids or ())
        assert not ids & model.engine.eos_token_ids
        if reply.finish_reason == "stop":
            return
    pytest.fail("none of the replies came to an end")


@pytest.mark.few(1)
def test_the_same_seed_gives_the_same_reply(model: Model) -> None:
    session = model.session(SYSTEM)
    texts = []
    for seed in (5, 5, 6):
        params = SamplingParams(max_tokens=12, temperature=1.0, seed=seed, ignore_eos=True)
        texts.append(session.respond("hello", params=params).text)
        session.undo()
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.few(1)
def test_a_bias_is_followed(model: Model) -> None:
    params = SamplingParams(max_tokens=5, logit_bias={120: 100.0})
    assert model.session(SYSTEM).respond("hello", params=params).text == "xxxxx"


@pytest.mark.few(1)
def test_a_stop_string_ends_the_reply_before_it(model: Model) -> None:
    session = model.session(SYSTEM * 4)
    whole = session.respond("hello", params=SHORT).text
    session.undo()
    reply = session.respond("hello", params=SamplingParams(max_tokens=12, stop=(whole[4:6],)))
    assert (reply.text, reply.finish_reason, reply.stop_string) == (whole[:4], "stop", whole[4:6])
    assert reply.usage.reused_tokens > 0, "what a reply cost is told wherever it ends"


@pytest.mark.few(1)
def test_how_likely_tokens_were_is_told(model: Model) -> None:
    params = SamplingParams(max_tokens=6, logprobs=3, ignore_eos=True)
    reply = model.session(SYSTEM).respond("hello", params=params)
    assert reply.logprobs is not None
    assert len(reply.logprobs) == 6
    for one in reply.logprobs:
        assert one.top[0].token_id == one.token_id
        assert len(one.top) == 3
        assert all(a.logprob >= b.logprob for a, b in pairwise(one.top))


@pytest.mark.few(1)
def test_a_reply_that_is_left_is_kept_and_goes_on(model: Model) -> None:
    session = model.session(SYSTEM)
    stream = session.stream("hello", params=SamplingParams(max_tokens=300, ignore_eos=True))
    for number, _ in enumerate(stream):
        if number == 3:
            break
    stream.close()
    assert stream.reply is not None
    assert stream.reply.finish_reason == "cancelled"
    assert model.engine.tasks() == [] or all(task.idle for task in model.engine.tasks())
    assert session.respond("and then?", params=SHORT).finish_reason == "length"


@pytest.mark.few(1)
def test_a_generator_can_be_rewound_into_its_reply_and_forked(model: Model) -> None:
    generator = Generator(model.engine, SamplingParams(ignore_eos=True))
    generator.append_tokens(model.tokenizer.encode("once upon a time"))
    tokens = [generator.generate_next_token() for _ in range(6)]
    generator.rewind_to(generator.reply_start + 2)
    fork = generator.fork()
    assert [generator.generate_next_token() for _ in range(4)] == tokens[2:]
    assert [fork.generate_next_token() for _ in range(4)] == tokens[2:]
    generator.rewind_to(generator.reply_start + 2)
    generator.append_tokens([120])
    fork.close()
    other = Generator(model.engine, SamplingParams(ignore_eos=True))
    other.append_tokens([*model.tokenizer.encode("once upon a time"), *map(int, tokens[:2]), 120])  # type: ignore[arg-type] # none has ended
    assert generator.generate_next_token() == other.generate_next_token()
    model.engine.check()
