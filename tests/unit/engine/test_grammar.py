"""A grammar decides what may follow, end of sequence included, and costs a rewind nothing."""

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recollect.engine import grammar as grammar_module
from recollect.engine.engine import Engine
from recollect.engine.grammar import GrammarNotes, Grammars, GrammarState
from recollect.engine.sampling import Generator
from recollect.errors import ConfigError, InvalidParameterError
from recollect.text.tokenizer import ByteTokenizer, Vocabulary
from recollect.types import Grammar, SamplingParams

TOKENIZER = ByteTokenizer()
VOCAB_SIZE = TOKENIZER.vocab_size
PERSON = Grammar.json_schema(
    {
        "type": "object",
        "properties": {"name": {"enum": ["Ann", "Anton"]}, "age": {"type": "integer"}},
        "required": ["name"],
        "additionalProperties": False,
    }
)
GRAMMARS = [
    PERSON,
    Grammar.json_object(),
    Grammar.regex("(ab|ba)+c?"),
    Grammar.lark('start: "(" start ")" | "x"'),
]


@pytest.fixture
def grammars() -> Grammars:
    return Grammars(TOKENIZER, vocab_size=VOCAB_SIZE)


def after(state: GrammarState, text: str) -> str:
    """Return the letters that may follow, with $ for the end."""
    ids = np.flatnonzero(state.allowed(TOKENIZER.encode(text)))
    return "".join("$" if id_ in TOKENIZER.eos_token_ids else chr(id_) for id_ in ids)


def test_only_what_continues_the_grammar_may_follow(grammars: Grammars) -> None:
    state = grammars.start(Grammar.regex("(ab|ba)+c?"))
    assert after(state, "") == "ab"
    assert after(state, "a") == "b"


def test_the_end_is_allowed_exactly_where_the_grammar_accepts(grammars: Grammars) -> None:
    state = grammars.start(Grammar.regex("(ab|ba)+c?"))
    assert after(state, "ab") == "abc$$"
    assert after(state, "aba") == "b"
    assert after(state, "abc") == "$$"


def test_a_reply_is_finished_where_only_the_end_may_follow(grammars: Grammars) -> None:
    state = grammars.start(Grammar.regex("(ab|ba)+c?"))
    assert [state.is_finished(TOKENIZER.encode(text)) for text in ("", "ab", "abc", "ba")] == [
        False,
        False,
        True,
        False,
    ]


def test_no_mark_of_a_turn_is_part_of_any_text(grammars: Grammars) -> None:
    allowed = grammars.start(Grammar.regex("(?s:.*)")).allowed([])
    assert allowed[:0x80].all()
    assert not allowed[TOKENIZER.encode("<|im_start|>")[0]]


def test_properties_come_in_the_order_of_the_schema(grammars: Grammars) -> None:
    state = grammars.start(PERSON)
    assert after(state, '{"') == "n"
    assert after(state, '{"name": "An') == "nt"
    assert after(state, '{"name": "Ann"') == ",}"


def test_json_is_written_on_one_line_as_python_writes_it(grammars: Grammars) -> None:
    state = grammars.start(Grammar.json_object())
    written = json.dumps({"a": [1, {"b": None}], "c": "d e"})
    for length in range(len(written)):
        assert written[length] in after(state, written[:length])
    assert not set(after(state, "{")) & set(" \n")
    assert after(state, '{"a"') == ":"


def test_a_reply_that_does_not_fit_is_refused_and_the_state_can_go_on(grammars: Grammars) -> None:
    state = grammars.start(Grammar.regex("(ab)+"))
    with pytest.raises(InvalidParameterError, match="Token 2 of the reply"):
        state.allowed(TOKENIZER.encode("abx"))
    assert after(state, "ab") == "a$$"


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        (Grammar.json_schema({"type": "objct"}), "objct"),
        (Grammar.json_schema({"allOf": [{"type": "string"}, {"type": "number"}]}), "incompatible"),
        (Grammar.json_schema({"type": "string", "format": "no-such-format"}), "no-such-format"),
        (Grammar.regex("(a"), "regex"),
        (Grammar.lark("start: nothing"), "nothing"),
    ],
)
def test_what_is_no_grammar_is_refused_with_what_is_wrong_with_it(
    grammars: Grammars, grammar: Grammar, words: str
) -> None:
    with pytest.raises(InvalidParameterError, match=words):
        grammars.start(grammar)


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        {"allOf": [{"$ref": "#"}]},
    ],
)
def test_a_schema_that_is_only_itself_is_refused_before_a_reply_begins(
    grammars: Grammars, schema: dict[str, Any]
) -> None:
    with pytest.raises(InvalidParameterError, match="nothing can begin by it"):
        grammars.start(Grammar.json_schema(schema))
    inside = {"type": "object", "properties": {"a": {"$ref": "#"}}}
    assert grammars.start(Grammar.json_schema(inside)).allowed([]).any()


def test_what_is_wrong_with_a_grammar_is_found_out_once(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = Grammar.lark("start: missing")
    told = []
    for _ in range(3):
        with pytest.raises(InvalidParameterError) as error:
            grammars.start(wrong)
        told.append((str(error.value), grammars.made))
    assert told == told[:1] * 3
    monkeypatch.setattr(grammars.refused, "most_bytes", 4_000)
    before = grammars.made
    for number in range(40):
        with pytest.raises(InvalidParameterError):
            grammars.start(Grammar.lark(f"start: missing{number}"))
    grammars.refused.check()
    assert 0 < len(grammars.refused) < 40
    assert grammars.made == before + 40
    with pytest.raises(InvalidParameterError, match="missing"):
        grammars.start(wrong)
    assert grammars.made == before + 41, "it was forgotten"


def test_a_grammar_that_ends_up_nowhere_is_the_callers_mistake(grammars: Grammars) -> None:
    nowhere = {
        "$defs": {"a": {"$ref": "#/$defs/a"}},
        "type": "array",
        "items": {"$ref": "#/$defs/a"},
    }
    state = grammars.start(Grammar.json_schema({**nowhere, "minItems": 1}))
    with pytest.raises(InvalidParameterError, match="simplify it"):
        state.allowed(list(b"["))


@pytest.mark.slow
def test_a_schema_with_too_many_choices_at_one_place_is_not_the_replys_fault(
    grammars: Grammars,
) -> None:
    many = {f"p{n}": {"type": "string"} for n in range(1500)}
    state = grammars.start(Grammar.json_schema({"type": "object", "properties": many}))
    assert state.allowed([])[ord("{")]
    with pytest.raises(InvalidParameterError, match=r"cannot be followed here .*: simplify it"):
        state.allowed([ord("{")])


def test_a_reason_is_told_to_its_end(grammars: Grammars) -> None:
    with pytest.raises(InvalidParameterError, match="unclosed group"):
        grammars.start(Grammar.regex("(a"))
    with pytest.raises(InvalidParameterError, match="unclosed group"):
        grammars.start(Grammar.json_schema({"type": "string", "pattern": "(a"}))


def test_a_schema_that_is_too_deep_is_refused(grammars: Grammars) -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(200):
        schema = {"type": "object", "properties": {"a": schema}}
    with pytest.raises(InvalidParameterError, match="recursion"):
        grammars.start(Grammar.json_schema(schema))


def _chained(count: int) -> dict[str, Any]:
    names = [f"a{n}" for n in range(count)]
    links = {
        name: {"type": "object", "properties": {"x": {"$ref": f"#/$defs/{after}"}}}
        for name, after in itertools.pairwise(names)
    }
    return {"$defs": {**links, names[-1]: {"type": "string"}}, "$ref": "#/$defs/a0"}


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"type": "object", "required": [f"p{n}" for n in range(40_000)]}, "names and values"),
        ({"enum": [{"a": n} for n in range(80_000)]}, "names and values"),
        ({"const": "x" * 8_000_000}, "characters"),
        ({"type": "string", "pattern": "a?b" * 1_000_000}, "characters"),
        (_chained(400), "levels"),
        ({"anyOf": [{"$ref": f"#{'/' * n}"} for n in range(400)] + [_chained(300)]}, "levels"),
    ],
)
def test_a_schema_that_would_take_the_stack_or_minutes_is_refused(
    grammars: Grammars, schema: dict[str, Any], why: str
) -> None:
    """The library crashes the process over some of these, so it must not be asked."""
    with pytest.raises(InvalidParameterError, match=f"more than .* {why}"):
        grammars.start(Grammar.json_schema(schema))


def test_a_schema_with_many_parts_and_references_is_taken(grammars: Grammars) -> None:
    """As large as those that people write: 150 models, each of which holds the next."""
    grammars.start(Grammar.json_schema(_chained(150)))
    wide = {f"p{n}": {"type": "string"} for n in range(500)}
    grammars.start(Grammar.json_schema({"type": "object", "properties": wide}))


def test_a_schema_that_is_no_json_is_refused() -> None:
    with pytest.raises(InvalidParameterError, match="no JSON value"):
        Grammar.json_schema({"const": object()})


def test_without_llguidance_the_error_says_what_to_install(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConfigError, match=r"recollect-llm\[grammar\]"):
        grammars.start(PERSON)


def test_a_grammar_needs_something_to_follow_it_with(engine: Engine) -> None:
    with pytest.raises(ConfigError, match=r"grammars=model\.grammars"):
        Generator(engine, SamplingParams(grammar=PERSON))


def test_a_grammar_and_no_end_of_sequence_exclude_each_other() -> None:
    with pytest.raises(InvalidParameterError, match="ignore_eos"):
        SamplingParams(grammar=PERSON, ignore_eos=True)


# --- in a generator


def made(
    make_engine: Callable[..., Engine], grammars: Grammars, params: SamplingParams
) -> Generator:
    engine = make_engine(
        vocab_size=VOCAB_SIZE, context_length=1024, num_blocks=600,
        eos_token_ids=TOKENIZER.eos_token_ids,
    )  # fmt: skip
    generator = Generator(engine, params, grammars=grammars)
    generator.append_tokens(TOKENIZER.encode("Who?"))
    return generator


def to_end(generator: Generator) -> str:
    while not generator.is_done():
        generator.generate_next_token()
    return TOKENIZER.decode(generator.get_sequence()[generator.reply_start :])


@pytest.mark.parametrize("seed", range(8))
def test_every_reply_fits_the_schema_however_wild_the_logits(
    make_engine: Callable[..., Engine], grammars: Grammars, seed: int
) -> None:
    params = SamplingParams(grammar=PERSON, temperature=5, seed=seed, max_tokens=300)
    generator = made(make_engine, grammars, params)
    reply = json.loads(to_end(generator))
    assert reply["name"] in {"Ann", "Anton"}
    assert generator.finish_reason == "stop"


def test_a_reply_ends_without_a_pass_where_nothing_may_follow(
    make_engine: Callable[..., Engine], grammars: Grammars
) -> None:
    engines: list[Engine] = []

    def make(**options: Any) -> Engine:
        engines.append(make_engine(**options))
        return engines[-1]

    generator = made(make, grammars, SamplingParams(grammar=Grammar.regex("abc")))
    assert to_end(generator) == "abc"
    assert engines[0].forward_passes == 3


def test_a_ban_on_all_that_is_allowed_is_the_callers_mistake(
    make_engine: Callable[..., Engine], grammars: Grammars
) -> None:
    banned = SamplingParams(grammar=Grammar.regex("a"), logit_bias={ord("a"): -np.inf})
    with pytest.raises(InvalidParameterError, match="logit_bias"):
        made(make_engine, grammars, banned).generate_next_token()


def test_a_mask_that_leaves_little_leaves_chance_no_way_out(
    make_engine: Callable[..., Engine], grammars: Grammars
) -> None:
    wild = SamplingParams(
        grammar=Grammar.regex("[xy]{200}"), temperature=50, top_k=40, top_p=0.99, seed=3,
        repetition_penalty=1.5, presence_penalty=1.0,
    )  # fmt: skip
    reply = to_end(made(make_engine, grammars, wild))
    assert set(reply) == {"x", "y"}
    assert len(reply) == 200


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("generate"), st.integers(1, 9)),
        st.tuples(st.just("rewind"), st.integers(0, 30)),
        st.tuples(st.just("fork"), st.integers(0, 3)),
        st.tuples(st.just("seed"), st.integers(0, 9)),
        st.tuples(st.just("ask"), st.integers(0, 9)),
    ),
    max_size=15,
)


@given(grammar=st.sampled_from(GRAMMARS), operations=OPERATIONS)
def test_the_state_is_that_of_a_matcher_fed_from_scratch_whatever_came_before(
    make_engine: Callable[..., Engine], grammar: Grammar, operations: list[tuple[str, int]]
) -> None:
    grammars = Grammars(TOKENIZER, vocab_size=VOCAB_SIZE)
    params = SamplingParams(grammar=grammar, temperature=3, seed=0)
    generators = [made(make_engine, grammars, params)]
    for name, number in operations:
        generator = generators[number % len(generators)]
        length = len(generator.get_sequence())
        if name == "generate":
            for _ in range(number):
                if not generator.is_done():
                    generator.generate_next_token()
        elif name == "rewind":
            generator.rewind_to(max(4, length - number))
        elif name == "fork":
            generators.append(generator.fork())
        elif name == "seed":
            generator.set_params(SamplingParams(grammar=grammar, temperature=3, seed=number))
        elif length < 900:
            generator.append_tokens(TOKENIZER.encode("and"))
        for one in generators:
            reply = one.get_sequence()[one.reply_start :]
            fresh = grammars.start(grammar)
            assert one._grammar is not None
            assert np.array_equal(one._grammar.allowed(reply), fresh.allowed(reply))
            assert one._grammar.is_finished(reply) == fresh.is_finished(reply)


def test_sampling_anew_at_the_same_place_gives_the_same_reply(
    make_engine: Callable[..., Engine], grammars: Grammars
) -> None:
    params = SamplingParams(grammar=PERSON, temperature=2, seed=5, max_tokens=300)
    generator = made(make_engine, grammars, params)
    reply = to_end(generator)
    generator.rewind_to(generator.reply_start + len(reply) // 2)
    assert to_end(generator) == reply


@pytest.mark.slow
def test_large_grammars_are_kept_by_their_bytes(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_module, "MOST_COMPILED_BYTES", 2 << 20)
    for number in range(30):
        fields = {f"field_{number}_{field}": {"type": "string"} for field in range(100)}
        grammars.start(Grammar.json_schema({"type": "object", "properties": fields}))
        assert 0 < grammars.held_bytes <= 2 << 20
    grammars.start(Grammar.regex("a" * 20_000))  # too large to be kept, and used all the same
    assert grammars.held_bytes == 0


class Counted(ByteTokenizer):
    """Counts how often its bytes were found out."""

    asked = 0

    @property
    def vocabulary(self) -> Vocabulary:
        self.asked += 1
        return super().vocabulary


class Notes(GrammarNotes):
    def __init__(self, text: str | None = None) -> None:
        self.text = text

    def read(self) -> str | None:
        return self.text

    def write(self, text: str) -> None:
        self.text = text


def test_what_was_used_last_is_compiled_before_it_is_asked_for() -> None:
    notes = Notes()
    first = Grammars(TOKENIZER, vocab_size=VOCAB_SIZE, notes=notes)
    for grammar in (*GRAMMARS, GRAMMARS[0]):
        first.start(grammar)
    assert first.made == 1 + len(GRAMMARS)
    second = Grammars(TOKENIZER, vocab_size=VOCAB_SIZE, notes=notes)
    second.prepare_later()
    second.join()
    assert second.made == 1 + len(GRAMMARS)
    for grammar in GRAMMARS:
        state, same = second.start(grammar), first.start(grammar)
        assert np.array_equal(state.allowed([]), same.allowed([]))
    assert second.made == 1 + len(GRAMMARS), "nothing was made while somebody waited"
    second.close()


def test_few_grammars_are_noted_and_no_long_ones() -> None:
    notes = Notes()
    grammars = Grammars(TOKENIZER, vocab_size=VOCAB_SIZE, notes=notes)
    for number in range(40):
        grammars.start(Grammar.regex(f"a{number}"))
    assert notes.text is not None
    assert json.loads(notes.text) == [["regex", f"a{number}"] for number in range(24, 40)]


@pytest.mark.parametrize("text", ["", "{}", "[1]", '[["regex"]]', '[["regex", "("]]', "null"])
def test_a_note_that_is_none_is_left_out(text: str) -> None:
    grammars = Grammars(TOKENIZER, vocab_size=VOCAB_SIZE, notes=Notes(text))
    grammars.prepare()
    assert grammars.made == 1 + len(grammars.refused)


def test_the_bytes_of_tokens_are_found_out_once_for_each_model(tmp_path: Path) -> None:
    def prepared(fingerprint: str) -> tuple[int, GrammarState]:
        tokenizer = Counted()
        grammars = Grammars(
            tokenizer, vocab_size=VOCAB_SIZE, home=tmp_path, fingerprint=fingerprint
        )
        grammars.prepare()
        return tokenizer.asked, grammars.start(PERSON)

    (asked, state), (again, same), (other, _) = map(prepared, "aab")
    assert (asked, again, other) == (1, 0, 1)
    assert np.array_equal(state.allowed([]), same.allowed([]))
    file = tmp_path / "vocabularies" / "a.bin"
    whole = file.read_bytes()
    for damaged in (b"", whole[:40], whole[:-1], whole[:60] + b"x" + whole[61:]):
        file.write_bytes(damaged)
        assert prepared("a")[0] == 1
        assert file.read_bytes() == whole
    for number in range(30):
        prepared(f"{number}")
    assert len(list(file.parent.iterdir())) == 16


def test_bytes_that_cannot_be_kept_are_found_out_again(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("no folder")
    grammars = Grammars(TOKENIZER, vocab_size=VOCAB_SIZE, home=tmp_path / "home", fingerprint="a")
    assert after(grammars.start(Grammar.regex("ab")), "") == "a"
