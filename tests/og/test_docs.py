"""What docs/og.md shows is true."""

import re
from pathlib import Path

import pytest

from recollect import og

DOC = (Path(__file__).parents[2] / "docs" / "og.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_script_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """On the model without weights; the answers are nonsense, and there are two."""
    (code,) = re.findall(r"```python\n(.*?)```", DOC, re.DOTALL)
    variables: dict[str, object] = {}
    exec(code.replace('"smollm2"', '"reference"'), variables)  # noqa: S102 - our own document
    assert capsys.readouterr().out
    generator = variables["generator"]
    assert isinstance(generator, og.Generator)
    assert generator.token_count() == variables["start"]
    assert isinstance(variables["model"], og.Model)
    variables["model"].close()


def test_what_the_module_exports_is_what_it_says() -> None:
    for name in og.__all__:
        assert getattr(og, name).__doc__, name


@pytest.mark.parametrize("name", ["og.md", "ryzen-ai.md"])
def test_the_files_that_it_links_to_exist(name: str) -> None:
    folder = Path(__file__).parents[2] / "docs"
    for link in re.findall(r"\]\(([^)#:]+)\)", (folder / name).read_text(encoding="utf-8")):
        assert (folder / link).exists(), link
