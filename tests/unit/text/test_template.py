from datetime import UTC, datetime

import pytest

from recollect.errors import TemplateError
from recollect.text.template import ChatTemplate
from recollect.types import Message

HELLO: list[Message] = [{"role": "user", "content": "Hi <b>"}]


def render(source: str, **settings: str) -> str:
    return ChatTemplate(source, **settings).render(HELLO, add_generation_prompt=True)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ messages[0].content }}", "Hi <b>"),
        ("{% if add_generation_prompt %}go{% endif %}", "go"),
        ("{% for m in messages %}\n  {% if true %}\nx\n  {% endif %}\n{% endfor %}", "x\n"),
        ("{% for n in [1, 2, 3] %}{% if n == 2 %}{% break %}{% endif %}{{ n }}{% endfor %}", "1"),
        ("{% for n in [1, 2] %}{% if n == 1 %}{% continue %}{% endif %}{{ n }}{% endfor %}", "2"),
        ("a{% generation %}{{ messages[0].role }}{% endgeneration %}b", "auserb"),
        ("{% for n in [1] %}{% generation %}{{ n }}{% endgeneration %}{% endfor %}", "1"),
        ("{{ {'é': '<a>'} | tojson }}", '{"é": "<a>"}'),
        ("{{ [1] | tojson(indent=1) }}", "[\n 1\n]"),
        ("{{ tools is none }} {{ documents is none }}", "True True"),
        ("{{ bos_token }}|{{ eos_token }}", "|"),
        ("{{ bos_token is defined }}", "False"),
    ],
)
def test_the_usual_conventions_hold(source: str, text: str) -> None:
    assert render(source) == text


def test_special_tokens_are_given_by_name() -> None:
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    assert render("{{ bos_token }}{{ eos_token }}", **tokens) == "<s></s>"


def test_a_template_that_knows_tools_is_given_them() -> None:
    template = ChatTemplate("{{ tools | tojson }} <tool_call>")
    assert template.knows_tools
    text = template.render(HELLO, add_generation_prompt=False, tools=[{"name": "é"}])
    assert text == '[{"name": "é"}] <tool_call>'


@pytest.mark.parametrize(
    "source", ["{{ tools }} in another format", "<tool_call> without them", "{{ messages }}"]
)
def test_a_template_without_tools_or_with_another_format_of_calls_does_not_know_them(
    source: str,
) -> None:
    assert not ChatTemplate(source).knows_tools


SAID = "{% for message in messages %}[{{ message.role }}]{{ message.content }}\n{% endfor %}"


def test_what_a_template_does_not_know_is_spelled_out() -> None:
    messages: list[Message] = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Both?"},
        {"role": "assistant", "content": "<calls>"},
        {"role": "tool", "content": "one", "tool_call_id": "1"},
        {"role": "tool", "content": "two", "tool_call_id": "2"},
        {"role": "user", "content": "Well?"},
    ]
    tools = [{"type": "function", "function": {"name": "f"}}]
    text = ChatTemplate(SAID).render(messages, add_generation_prompt=False, tools=tools)
    assert text.startswith("[system]Be kind.\n\n# Tools\n\nYou may call")
    assert '<tools>\n{"type": "function", "function": {"name": "f"}}\n</tools>' in text
    assert text.endswith(
        "[assistant]<calls>\n[user]<tool_response>\none\n</tool_response>\n"
        "<tool_response>\ntwo\n</tool_response>\n[user]Well?\n"
    )


def test_tools_without_instructions_become_instructions() -> None:
    text = ChatTemplate(SAID).render(HELLO, add_generation_prompt=False, tools=[{"name": "f"}])
    assert text.startswith("[system]# Tools")


def test_the_date_does_not_change_while_the_template_lives() -> None:
    """A prefix that changes at midnight would be read anew in every conversation."""
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", now=datetime(2024, 7, 26, tzinfo=UTC))
    assert template.render(HELLO, add_generation_prompt=False) == "26 Jul 2024"


def test_the_words_of_a_refusal_are_kept() -> None:
    with pytest.raises(TemplateError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' + 1 }}",
        "{{ 1 / 0 }}",
        "{{ missing.part }}",
        "{{ [].pop() }}",
        "{{ none.x.y }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ],
)
def test_a_failing_expression_is_a_template_error(source: str) -> None:
    with pytest.raises(TemplateError, match=r"refuses this conversation: ."):
        render(source)


@pytest.mark.parametrize(
    "source", ["{% if %}", "{{ x", "{% generation %}", "{% unknown %}", "{{ x | nofilter }}"]
)
def test_broken_jinja_is_a_template_error(source: str) -> None:
    with pytest.raises(TemplateError, match="broken"):
        ChatTemplate(source)


@pytest.mark.parametrize("source", [None, ""])
def test_a_missing_template_is_said_to_be_missing(source: str | None) -> None:
    with pytest.raises(TemplateError, match="has no chat template"):
        ChatTemplate(source)


def test_the_messages_stay_as_they_were() -> None:
    messages: list[Message] = [{"role": "user", "content": "x"}]
    with pytest.raises(TemplateError):
        ChatTemplate("{{ messages[0].update({'content': 'y'}) }}").render(
            messages, add_generation_prompt=False
        )
    assert messages == [{"role": "user", "content": "x"}]
