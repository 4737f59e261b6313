"""Grammars that an engine elsewhere follows: where they begin, and in which dialect they are told."""

from collections.abc import Callable
from typing import Any

import pytest

from recollect.conversation.model import Model
from recollect.engine.sampling import Generator
from recollect.errors import InvalidParameterError
from recollect.text.reasoning import Begun, ReasoningWatch
from recollect.text.reasoning_marks import ReasoningMarks
from recollect.types import Grammar, SamplingParams

MARKS = ReasoningMarks("~", "#", space="")
BOOLEAN = Grammar.json_schema({"type": "boolean"})
MakeStub = Callable[..., tuple[Any, str]]
Load = Callable[..., Model]


@pytest.fixture(params=["vllm", "llama"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def said(stub: Any, model: Model, *, grammar: Grammar = BOOLEAN) -> str:
    """Return a reply that may think before it keeps to a grammar, and forget earlier requests."""
    watch = ReasoningWatch(model.tokenizer, Begun(MARKS), leads=True)
    params = SamplingParams(max_tokens=20, grammar=grammar)
    generator = Generator(model.engine, params, grammars=model.grammars, reasoning=watch)
    generator.append_tokens(model.tokenizer.encode("is it so?"))
    stub.asked.clear()
    ids = []
    while not generator.is_done():
        if (token := generator.generate_next_token()) is not None:
            ids.append(token)
    return model.tokenizer.decode(ids)


def bound(stub: Any) -> list[bool]:
    """Return which of the requests had a grammar."""
    return ["structured_outputs" in body or "json_schema" in body for body in stub.asked]


@pytest.mark.few(1)
def test_a_model_may_think_before_it_keeps_to_a_grammar(
    kind: str, make_stub: MakeStub, load: Load
) -> None:
    stub, url = make_stub(kind)
    model = load(f"{kind}={url}")
    stub.says += ["~", "ab#cd", "true"]
    assert said(stub, model) == "~ab#true"
    assert bound(stub) == [False, False, True]
    first = stub.asked[0]
    if kind == "vllm":
        assert sorted(first["allowed_token_ids"]) == sorted(map(ord, "tf~"))
    else:
        assert sorted(token for token, bias in first["logit_bias"]) == sorted(map(ord, "tf~"))


@pytest.mark.few(1)
def test_no_reply_ends_while_it_thinks_before_a_grammar(
    kind: str, make_stub: MakeStub, load: Load
) -> None:
    """A model that ends its turn in the middle of its thoughts would give no JSON at all."""
    stub, url = make_stub(kind)
    model = load(f"{kind}={url}")
    stub.says += ["~", "ab", "true"]  # each ends
    text = said(stub, model)
    assert text.startswith("~ab")
    assert len(text) == 20, "its thoughts go on to the end of their room"
    assert bound(stub) == [False, False]


@pytest.mark.few(1)
@pytest.mark.parametrize("engine", ["here", "vllm", "llama"])
def test_end_tokens_are_banned_wherever_the_thoughts_are_computed(
    engine: str, make_stub: MakeStub, load: Load
) -> None:
    model = load(None if engine == "here" else f"{engine}={make_stub(engine)[1]}")
    end = min(model.engine.eos_token_ids)
    watch = ReasoningWatch(model.tokenizer, Begun(MARKS, is_inside=True), leads=True)
    params = SamplingParams(max_tokens=20, grammar=BOOLEAN, logit_bias={end: 100.0})
    generator = Generator(model.engine, params, grammars=model.grammars, reasoning=watch)
    generator.append_tokens(model.tokenizer.encode("is it so?"))
    reply = [generator.generate_next_token() for _ in range(20)]
    assert None not in reply
    assert end not in reply
    assert generator.finish_reason == "length"


@pytest.mark.few(1)
def test_a_model_that_does_not_think_is_held_from_its_first_token_on(
    kind: str, make_stub: MakeStub, load: Load
) -> None:
    stub, url = make_stub(kind)
    model = load(f"{kind}={url}")
    stub.says += ["t", "true"]
    assert said(stub, model) == "true"
    assert bound(stub) == [False, True]


def test_free_text_is_not_told_token_by_token(
    make_stub: MakeStub, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recollect.remote.remote_engine.MOST_ALLOWED", 50)
    stub, url = make_stub()
    model = load(f"vllm={url}")
    stub.says += ["~", "ab#cd", "yes"]
    assert said(stub, model, grammar=Grammar.regex("(?s:.*)")) == "~ab#yes"
    assert "allowed_token_ids" not in stub.asked[0]


@pytest.mark.slow
def test_a_grammar_is_told_in_the_dialect_that_it_is_written_in(
    make_stub: MakeStub, load: Load
) -> None:
    """Without its name vLLM asks xgrammar first, which takes some of them for something else."""
    stub, url = make_stub()
    model = load(f"vllm={url}")
    for source in ('start: "yes"', '%llguidance {}\nstart: "yes"'):
        params = SamplingParams(max_tokens=4, grammar=Grammar.lark(source))
        model.session().respond("is it so?", params=params)
        told = [one["structured_outputs"] for one in stub.asked if "structured_outputs" in one]
        assert told[-1] == {"grammar": '%llguidance {}\nstart: "yes"'}


@pytest.mark.slow
def test_a_grammar_that_is_refused_is_the_fault_of_whoever_sent_it(
    make_stub: MakeStub, load: Load
) -> None:
    stub, url = make_stub()
    model = load(f"vllm={url}")
    stub.faults.append("bad request")
    with pytest.raises(InvalidParameterError, match="backend=guidance"):
        model.session().respond("is it so?", params=SamplingParams(grammar=BOOLEAN))


@pytest.mark.slow
def test_a_generator_that_is_dropped_runs_no_more(
    kind: str, make_stub: MakeStub, load: Load
) -> None:
    stub, url = make_stub(kind)
    model = load(f"{kind}={url}")
    stub.faults.append("slow")
    generator = Generator(model.engine, SamplingParams(max_tokens=500, ignore_eos=True))
    generator.append_tokens(model.tokenizer.encode("once"))
    generator.generate_next_token()
    assert [one.running for one in model.replicas()] == [1]
    del generator
    assert stub.aborted.wait(60), "to its end it would take a hundred seconds"
    assert [one.running for one in model.replicas()] == [0]
