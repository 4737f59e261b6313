"""Real chat templates, fetched once and kept for later runs, and what renders them elsewhere."""

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import platformdirs
import pytest

PACKAGE: Final = "llama-cpp-python==0.3.36"
FOLDER: Final = "/vendor/llama.cpp/models/templates/"
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
def sources() -> dict[str, str]:
    """
    Return the templates that llama.cpp keeps, by name.

    They are in its Python package's source, which takes a minute or two to fetch.
    """
    cache = platformdirs.user_cache_path("recollect") / "tests"
    folder = cache / f"templates-{PACKAGE.rpartition('=')[2]}"
    if not (folder / "whole").exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as fetched:
            command = [sys.executable, "-m", "pip", "download", PACKAGE, "--no-deps"]
            kept = ["--no-binary", ":all:", "--quiet", "--dest", fetched]
            subprocess.run([*command, *kept], check=True)  # noqa: S603 - pip
            (archive,) = Path(fetched).glob("*.tar.gz")
            with tarfile.open(archive) as package:
                for member in package:
                    if FOLDER in f"/{member.name}" and member.name.endswith(".jinja"):
                        file = package.extractfile(member)
                        assert file is not None
                        (folder / Path(member.name).name).write_bytes(file.read())
        (folder / "whole").touch()
    return {file.stem: file.read_text("utf-8") for file in sorted(folder.glob("*.jinja"))}


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
