"""What renders chat templates elsewhere."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Final

import pytest

RENDERING: Final = """
import json, sys
from transformers.utils.chat_template_utils import render_jinja_template
texts = []
for one in json.load(sys.stdin):
    try:
        shown = render_jinja_template(
            conversations=[one["messages"]], tools=one["tools"], chat_template=one["template"],
            add_generation_prompt=True, bos_token="<s>", eos_token="</s>",
        )[0][0]
    except Exception as refusal:
        shown = None
    texts.append(shown)
json.dump(texts, sys.stdout)
"""
"""What `apply_chat_template` does with messages before it encodes them."""


@pytest.fixture(scope="session")
def rendered_elsewhere() -> Callable[[list[dict[str, Any]]], list[str | None]]:
    """
    Return what renders conversations as Hugging Face's own code does; None: the template refuses one.

    RECOLLECT_TEST_TRANSFORMERS names a Python that has transformers, where this one has not.
    """
    python = os.environ.get("RECOLLECT_TEST_TRANSFORMERS")
    if python is None and find_spec("transformers") is None:
        pytest.skip("needs transformers: RECOLLECT_TEST_TRANSFORMERS names a Python that has it")

    def render(asked: list[dict[str, Any]]) -> list[str | None]:
        done = subprocess.run(  # noqa: S603 - the tests' own program
            [python or sys.executable, "-c", RENDERING],
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            check=True,
        )
        texts: list[str | None] = json.loads(done.stdout)
        return texts

    return render
