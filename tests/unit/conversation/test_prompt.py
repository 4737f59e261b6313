"""A reply enters the prompt as the ids that were generated, or the prompt says that it does not."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recollect.conversation.prompt import PromptEncoder
from recollect.conversation.tree import Node, Tree
from recollect.errors import TemplateError
from recollect.models.byte_tokenizer import ByteTokenizer
from recollect.models.template import ChatTemplate
from recollect.types import Role

LOOP = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ BODY }}<|im_end|>\n{% endfor %}"
OPENING = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def looping(body: str) -> str:
    return LOOP.replace("BODY", body) + OPENING


PLAIN = looping("m.content")
TRIMS = looping("m.content | trim")
TRIMS_REPLIES = looping("(m.content | trim) if m.role == 'assistant' else m.content")
DROPS_REASONING = looping("m.content.split('</think>')[-1]")
UPPER = looping("m.content | upper")
LAST_REPLY_ONLY = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role != 'assistant' or loop.index0 == ns.last %}"
    "[{{ m.role }}]{{ m.content }}\n{% endif %}{% endfor %}" + OPENING
)
SYSTEM_LAST = (
    "{% for m in messages if m.role != 'system' %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% for m in messages if m.role == 'system' %}[system]{{ m.content }}\n{% endfor %}" + OPENING
)
TWICE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}|{{ m.content }}\n{% endfor %}" + OPENING
)
NO_REPLIES = (
    "{% for m in messages if m.role != 'assistant' %}[{{ m.role }}]{{ m.content }}{% endfor %}"
)
BACKWARDS = "{% for m in messages | reverse %}[{{ m.role }}]{{ m.content }}\n{% endfor %}" + OPENING
CONSTANT = "hello"
TEMPLATES = {
    "plain": PLAIN,
    "trims": TRIMS,
    "trims_replies": TRIMS_REPLIES,
    "drops_reasoning": DROPS_REASONING,
    "upper": UPPER,
    "last_reply_only": LAST_REPLY_ONLY,
    "system_last": SYSTEM_LAST,
    "twice": TWICE,
    "no_replies": NO_REPLIES,
    "backwards": BACKWARDS,
    "constant": CONSTANT,
}

Said = tuple[Role, str]


class CountingTokenizer(ByteTokenizer):
    """Remembers what it was asked to encode."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode(self, text: str) -> list[int]:
        self.asked.append(text)
        return super().encode(text)


def conversation(said: Sequence[Said], *, own_ids: bool = True) -> list[Node]:
    """Return a path; replies get ids that no tokenizer would give: their text and an id that says nothing."""
    tree = Tree()
    node = tree.root
    for role, content in said:
        ids = None
        if role == "assistant" and own_ids:
            ids = (256, *ByteTokenizer().encode(content), 256)
        by = None if ids is None else ""
        node = tree.add(node, role, content, token_ids=ids, fingerprint=by)
    return node.path()


def encoder(source: str) -> tuple[PromptEncoder, ChatTemplate, CountingTokenizer]:
    template, tokenizer = ChatTemplate(source), CountingTokenizer()
    return PromptEncoder(template, tokenizer), template, tokenizer


def text_of(ids: Sequence[int]) -> str:
    return ByteTokenizer().decode(ids, skip_special_tokens=False)


def contains(ids: Sequence[int], part: Sequence[int]) -> bool:
    return any(tuple(ids[i : i + len(part)]) == tuple(part) for i in range(len(ids)))


TURNS: list[Said] = [
    ("system", "Be brief."),
    ("user", "Hello"),
    ("assistant", "Hi there"),
    ("user", "How?"),
    ("assistant", "Well"),
]


def test_replies_enter_as_their_own_ids_and_are_never_encoded() -> None:
    prompts, template, tokenizer = encoder(PLAIN)
    path = conversation(TURNS)
    prompt = prompts.encode(path, "Bye")
    assert prompt.rewritten_reply is None
    for node in path:
        if node.token_ids is not None:
            assert contains(prompt.token_ids, node.token_ids)
            assert not any(node.content in text for text in tokenizer.asked)
    shown = [node.message() for node in path]
    text = template.render([*shown, {"role": "user", "content": "Bye"}], add_generation_prompt=True)
    assert (
        text_of(prompt.token_ids)
        .replace("<|im_start|>Hi", "Hi")
        .replace("there<|im_start|>", "there")
        .replace("<|im_start|>Well<|im_start|>", "Well")
        == text
    )


def test_each_turn_extends_the_prompt_before_it_and_encodes_only_what_is_new() -> None:
    prompts, _, tokenizer = encoder(PLAIN)
    first = prompts.encode(conversation(TURNS[:2])).token_ids
    tokenizer.asked.clear()
    path = conversation(TURNS[:3])
    second = prompts.encode(path, "How?").token_ids
    assert path[-1].token_ids is not None
    assert second[: len(first)] == first
    assert tuple(second[len(first) :][: len(path[-1].token_ids)]) == path[-1].token_ids
    assert "".join(tokenizer.asked).count("Hello") == 0
    tokenizer.asked.clear()
    prompts.encode(path, "How?")
    assert tokenizer.asked == []


def test_a_reply_that_came_as_text_is_encoded() -> None:
    prompts, template, _ = encoder(PLAIN)
    path = conversation(TURNS, own_ids=False)
    prompt = prompts.encode(path)
    expected = template.render([node.message() for node in path], add_generation_prompt=True)
    assert text_of(prompt.token_ids) == expected
    assert prompt.rewritten_reply is None


@pytest.mark.parametrize(
    ("name", "replies", "rewritten"),
    [
        ("plain", ["one", "two"], None),
        ("trims", ["one", "two"], None),
        ("trims", [" one", "two"], 0),
        ("trims", ["one", "two "], 1),
        ("trims_replies", ["one\n", "two"], 0),
        ("trims_replies", ["one", "two\n"], 1),
        ("drops_reasoning", ["one", "two"], None),
        ("drops_reasoning", ["<think>hm</think>one", "two"], 0),
        ("drops_reasoning", ["one", "<think>hm</think>two"], 1),
        ("upper", ["ONE", "two"], 0),  # what changes letters changes the marks: on the safe side
        ("last_reply_only", ["one", "two"], 0),
        ("last_reply_only", ["one"], None),
        ("system_last", ["one", "two"], None),
        ("no_replies", ["one"], 0),
        ("backwards", ["one", "two"], 0),
        ("constant", ["one"], 0),
    ],
)
def test_drift_is_reported_at_the_first_reply_that_is_shown_otherwise(
    name: str, replies: list[str], rewritten: int | None
) -> None:
    prompts, template, _ = encoder(TEMPLATES[name])
    said: list[Said] = [("system", "Be brief.")]
    for reply in replies:
        said += [("user", "Hello"), ("assistant", reply)]
    path = conversation(said)
    prompt = prompts.encode(path, "Bye")
    assert prompt.rewritten_reply == rewritten
    kept = [node for node in path if node.role == "assistant"][:rewritten]
    for node in kept:
        assert node.token_ids is not None
        assert contains(prompt.token_ids, node.token_ids)
    text = template.render(
        [*[node.message() for node in path], {"role": "user", "content": "Bye"}],
        add_generation_prompt=True,
    )
    marks = 2 * len(kept)
    assert text_of(prompt.token_ids).count("<|im_start|>") == text.count("<|im_start|>") + marks


CONTENT = st.text("ab \n<>é/", max_size=8)


@pytest.mark.parametrize("name", TEMPLATES)
@given(replies=st.lists(CONTENT, max_size=4), said=CONTENT)
def test_whatever_the_template_does_the_ids_say_what_it_says(
    name: str, replies: list[str], said: str
) -> None:
    """With replies whose ids are those of their text, the prompt reads as the template's text."""
    prompts, template, _ = encoder(TEMPLATES[name])
    turns: list[Said] = [("system", "S")]
    for reply in replies:
        turns += [("user", "u"), ("assistant", reply)]
    tree = Tree()
    node = tree.root
    for role, content in turns:
        ids = tuple(ByteTokenizer().encode(content)) if role == "assistant" else None
        by = None if ids is None else ""
        node = tree.add(node, role, content, token_ids=ids, fingerprint=by)
    text = template.render(
        [*[node.message() for node in node.path()], {"role": "user", "content": said}],
        add_generation_prompt=True,
    )
    assert text_of(prompts.encode(node.path(), said).token_ids) == text


def test_two_prompts_part_exactly_where_the_conversations_do() -> None:
    prompts, _, _ = encoder(PLAIN)
    path = conversation(TURNS)
    a, b = (prompts.encode(path, said).token_ids for said in ("Bye now", "Bye then"))
    shared = next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    assert text_of(a[:shared]).endswith("Bye ")


def test_typed_text_is_the_beginning_of_the_same_message_when_it_is_said() -> None:
    prompts, _, _ = encoder(PLAIN)
    path = conversation(TURNS)
    said = prompts.encode(path, "How are you?").token_ids
    for typed in ("", "H", "How are", "How are you?"):
        ids = prompts.encode_typed(path, typed).token_ids
        assert said[: len(ids)] == ids
        assert text_of(ids).endswith("user\n" + typed)


@pytest.mark.parametrize("name", TEMPLATES)
def test_typed_text_can_be_encoded_with_any_template(name: str) -> None:
    prompts, _, _ = encoder(TEMPLATES[name])
    assert prompts.encode_typed(conversation(TURNS), "abc").token_ids


def test_a_refusal_of_the_template_is_passed_on() -> None:
    prompts, _, _ = encoder("{{ raise_exception('roles must alternate') }}")
    for encode in (prompts.encode, prompts.encode_typed):
        with pytest.raises(TemplateError, match="roles must alternate"):
            encode(conversation(TURNS), "x")


def test_messages_that_hold_braces_or_template_code_are_text() -> None:
    prompts, _, _ = encoder(PLAIN)
    ids = prompts.encode(conversation([("user", "{{ 7 * 7 }}{% endfor %}")])).token_ids
    assert "{{ 7 * 7 }}{% endfor %}" in text_of(ids)


def test_empty_replies_keep_their_place() -> None:
    prompts, _, _ = encoder(PLAIN)
    path = conversation([("user", "a"), ("assistant", ""), ("user", "b"), ("assistant", "x")])
    prompt = prompts.encode(path, "c")
    assert prompt.rewritten_reply is None
    assert contains(prompt.token_ids, (256, 256))


def test_replies_of_another_model_are_encoded_anew_and_counted() -> None:
    prompts, template, _ = encoder(PLAIN)
    tree = Tree()
    node = tree.root
    for role, content in TURNS:
        ids = (256, 1, 256) if role == "assistant" else None
        by = None if ids is None else "another"
        node = tree.add(node, role, content, token_ids=ids, fingerprint=by)
    prompt = prompts.encode(node.path())
    expected = template.render([one.message() for one in node.path()], add_generation_prompt=True)
    assert text_of(prompt.token_ids) == expected
    assert (prompt.reencoded_replies, prompt.generated_length) == (2, 0)


def test_the_generated_length_ends_with_the_last_reply_of_this_model() -> None:
    prompts, _, _ = encoder(PLAIN)
    prompt = prompts.encode(conversation(TURNS[:3]), "How?")
    generated = prompt.token_ids[: prompt.generated_length]
    assert text_of(generated).endswith("Hi there<|im_start|>")
