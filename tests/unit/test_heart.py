"""What `docs/heart.md` quotes stands in the source."""

import re
from pathlib import Path

import pytest

import recollect

SOURCE = Path(recollect.__file__).parent
PAGE = (Path(__file__).parents[2] / "docs" / "heart.md").read_text(encoding="utf-8")
QUOTES = re.findall(r"```python\n# (\S+)\n(.*?)```", PAGE, re.DOTALL)


def plain(text: str) -> str:
    """Return lines without their indentation, which a quote may change."""
    return "\n".join(line.strip() for line in text.strip().splitlines())


@pytest.mark.parametrize(("module", "quote"), QUOTES)
def test_what_the_page_quotes_stands_in_the_source(module: str, quote: str) -> None:
    source = "\n" + plain((SOURCE / module).read_text(encoding="utf-8")) + "\n"
    for part in plain(quote).split("\n...\n"):
        assert f"\n{part}\n" in source


def test_every_quote_names_its_module_and_each_module_is_quoted() -> None:
    assert len(QUOTES) == PAGE.count("```python")
    assert {module for module, _ in QUOTES} == {
        "engine/sequence.py",
        "engine/scheduler.py",
        "engine/engine.py",
        "kv/prefix.py",
    }


def test_what_the_page_names_exists() -> None:
    heart = "".join(
        (SOURCE / name).read_text(encoding="utf-8")
        for name in re.findall(r"^\| `(\S+\.py)` \|", PAGE, re.MULTILINE)
    )
    for name in re.findall(r"`(?:\w+\.)?(\w+)`", PAGE):
        assert re.search(rf"\b{name}\b", heart), name
