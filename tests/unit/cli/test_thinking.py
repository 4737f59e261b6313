"""What a model thinks is dim in a terminal, folded where that is wanted, and no part of piped output."""

import io
import json
import re
import sys
from collections.abc import Callable

import pytest
from rich.console import Console

from recollect.cli.batch import answer_all
from recollect.cli.commands import run_command
from recollect.cli.state import Chat
from recollect.conversation.model import Model
from recollect.errors import InvalidParameterError
from recollect.types import Grammar, SamplingParams

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SAYS = SamplingParams(
    max_tokens=200, grammar=Grammar.regex(re.escape("<think>\nHmm, one?\n</think>\n\nIt is one."))
)


@pytest.fixture
def model(make_model: Callable[..., Model]) -> Model:
    return make_model(template=TEMPLATE)


def chat_in(model: Model, *, terminal: bool) -> tuple[Chat, io.StringIO]:
    screen = io.StringIO()
    console = Console(
        file=screen,
        width=60,
        force_terminal=terminal,
        color_system="standard" if terminal else None,
    )
    return Chat(model, console, model.session(params=SAYS)), screen


def test_it_is_dim_and_before_the_answer(model: Model) -> None:
    chat, screen = chat_in(model, terminal=True)
    chat.say("One?")
    shown = screen.getvalue()
    assert re.search(r"\x1b\[2mHmm, one\?\n\x1b\[0m\nIt is one\.\n", shown)
    assert "<think>" not in shown
    assert "thought" in shown.rpartition("It is one.")[2]


def test_it_is_folded_where_that_is_wanted(model: Model) -> None:
    chat, screen = chat_in(model, terminal=False)
    run_command(chat, "/thinking off")
    assert "What the model thinks is not shown, only that it does." in screen.getvalue()
    chat.say("One?")
    shown = screen.getvalue()
    assert "Hmm" not in shown
    assert "thinking …\n\nIt is one.\n" in shown
    run_command(chat, "/thinking on")
    run_command(chat, "/thinking")
    chat.say("Again?")
    assert "Hmm, one?\n\nIt is one.\n" in screen.getvalue().removeprefix(shown)
    with pytest.raises(InvalidParameterError, match="on or off"):
        run_command(chat, "/thinking maybe")


def test_piped_output_has_the_answer_alone(
    model: Model, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = model.session(params=SAYS)
    answer_all(session, ["One?"], as_json=False)
    assert capsys.readouterr().out == "It is one.\n"
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    answer_all(session, ["Two?"], as_json=True)
    told = json.loads(out.getvalue())
    assert (told["reply"], told["reasoning"]) == ("It is one.", "Hmm, one?")
