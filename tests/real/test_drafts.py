"""With a real model in the profile `exact`, replies with guesses are those without."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

import recollect
from recollect import config
from recollect.engine.draft_model import DraftModel
from recollect.engine.drafts import Drafts, PassTimes
from recollect.types import Grammar, RuntimeChoice, SamplingParams

pytestmark = [pytest.mark.model, pytest.mark.slow]

GREEDY = SamplingParams(max_tokens=48, ignore_eos=True)
SCHEMA = Grammar(
    "json_schema",
    '{"type": "object", "properties": {"name_of_the_town": {"type": "string", "maxLength": 20}, '
    '"number_of_people_in_it": {"type": "integer"}}, "required": ["name_of_the_town", '
    '"number_of_people_in_it"], "additionalProperties": false}',
)
KINDS = {
    "greedy": GREEDY,
    "sampled": replace(GREEDY, temperature=0.7, seed=1),
    "top_p": replace(GREEDY, temperature=1.0, top_p=0.8, seed=2),
    "penalties": replace(GREEDY, repetition_penalty=1.1, presence_penalty=0.3),
    "logprobs": replace(GREEDY, temperature=0.5, logprobs=2, seed=3),
    "schema": replace(GREEDY, ignore_eos=False, grammar=SCHEMA),
}
QUESTION = "What is a hash table, and what is it good for?"
EDITED = "What is a hash table, and what is it used for?"


@pytest.fixture(scope="module", params=["openvino", "llama"])
def model(request: pytest.FixtureRequest) -> Iterator[recollect.Model]:
    with recollect.load(
        "smollm2", profile="exact", runtime=request.param, home=config.home(), kv_disk=0
    ) as loaded:
        yield loaded


@pytest.fixture
def drafts(model: recollect.Model, monkeypatch: pytest.MonkeyPatch) -> Iterator[Drafts]:
    found = model.engine.drafts
    assert found is not None
    monkeypatch.setattr(
        PassTimes, "of", lambda _self, width: 1 + width / 50
    )  # so that they are fed
    yield found
    model.engine.drafts = found


def logprobs(reply: recollect.Reply) -> list[float]:
    return [one.logprob for one in reply.logprobs or ()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("question", [QUESTION, EDITED])
def test_replies_are_the_same(
    model: recollect.Model, drafts: Drafts, kind: str, question: str
) -> None:
    """The reply to a question, and to one that was edited, where the first reply is known."""
    params, namespace = KINDS[kind], f"{kind} {question}"
    model.engine.drafts = None
    plain = model.session(params=params, namespace="plain").respond(question)
    earlier = model.session(params=params, namespace="plain")
    earlier.respond(QUESTION)
    model.engine.drafts = drafts
    drafts.learn(namespace, [earlier.tip.token_ids or ()])
    guessed = model.session(params=params, namespace=namespace).respond(question)
    assert guessed.text == plain.text
    assert guessed.finish_reason == plain.finish_reason
    assert logprobs(guessed) == pytest.approx(logprobs(plain), abs=1e-3)
    usage = guessed.usage
    assert usage.accepted_tokens <= usage.drafted_tokens
    assert usage.accepted_tokens > 0 or question == EDITED
    model.engine.check()


def test_replies_beside_each_other_are_the_same(model: recollect.Model, drafts: Drafts) -> None:
    """Four at once, with the guesses of each in one pass."""
    params = [replace(KINDS["sampled"], seed=seed) for seed in range(4)]
    model.engine.drafts = None
    plain = [model.session(params=one, namespace="alone").respond(QUESTION).text for one in params]
    model.engine.drafts = drafts
    session = model.session(namespace="beside")
    for _ in range(2):  # the second time what was said the first time is known
        tried = session.explore([QUESTION] * 4, params=params, keep=0)
        tried.read()
        texts = {branch.index: branch.text for branch in tried.branches}
        assert [texts[index] for index in range(4)] == plain


@pytest.fixture(scope="module")
def drafting(model: recollect.Model) -> Iterator[recollect.Model]:
    """Return the model in `exact` beside itself in `fast`, on the same runtime."""
    runtime: RuntimeChoice = "llama" if model.engine.info.name.startswith("llama") else "openvino"
    with recollect.load(
        "smollm2", profile="exact", runtime=runtime, kv_disk=0, draft_model="smollm2"
    ) as loaded:
        yield loaded
        loaded.engine.check()


@pytest.mark.usefixtures("drafts")
@pytest.mark.parametrize("kind", ["sampled", "penalties", "schema"])
def test_what_a_draft_model_guesses_changes_nothing(
    model: recollect.Model, drafting: recollect.Model, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Its numbers are rounded, and nearly all that it guesses is right, sampled or not."""
    monkeypatch.setattr(DraftModel, "pass_s", 0.1)
    plain = model.session(params=KINDS[kind], namespace="plain").respond(QUESTION)
    guessed = drafting.session(params=KINDS[kind], namespace=kind).respond(QUESTION)
    assert guessed.text == plain.text
    assert guessed.finish_reason == plain.finish_reason
    assert logprobs(guessed) == pytest.approx(logprobs(plain), abs=1e-3)
    assert guessed.usage.accepted_tokens > 20


@pytest.fixture(scope="module")
def fast() -> Iterator[recollect.Model]:
    with recollect.load("smollm2", profile="fast", runtime="openvino", kv_disk=0) as loaded:
        if not loaded.engine.info.alike:
            pytest.skip("this machine computes in f32")
        yield loaded


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_in_fast_a_reply_that_was_given_is_given_again(
    fast: recollect.Model, temperature: float
) -> None:
    """In every token, though numbers are rounded to bf16 and most passes verify guesses."""
    params = SamplingParams(max_tokens=160, ignore_eos=True, temperature=temperature, seed=1)
    drafts, fast.engine.drafts = fast.engine.drafts, None
    plain = fast.session(params=params, namespace="plain")
    plain.respond(QUESTION)
    assert drafts is not None
    fast.engine.drafts = drafts
    drafts.learn("guessed", [plain.tip.token_ids or ()])
    guessed = fast.session(params=params, namespace="guessed")
    usage = guessed.respond(QUESTION).usage
    assert guessed.tip.token_ids == plain.tip.token_ids
    assert usage.accepted_tokens > 80


def test_a_greedy_answer_that_is_generated_again_is_the_same() -> None:
    """In `fast` too, where the last token of the question, fed again alone, would be rounded otherwise."""
    params = replace(GREEDY, max_tokens=96)
    with recollect.load("smollm2", home=config.home(), kv_disk=0, draft=False) as model:
        session = model.session(params=params)
        first = session.respond(QUESTION)
        again = session.regenerate()
        assert again.text == first.text
        assert again.usage.computed_tokens == 0
        other = model.session(params=params).respond(QUESTION)
        assert other.text == first.text
        assert other.usage.computed_tokens == 0
