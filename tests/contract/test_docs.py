"""What docs/runtimes.md shows is true; that its runtime keeps the contract is tested beside this."""

import re
from pathlib import Path

import pytest

from recollect.runtime import base, sequences

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "runtimes.md").read_text("utf-8")
RUNTIME, CONVERSATION = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)


def test_a_runtime_has_60_lines() -> None:
    assert sum(bool(line.strip()) for line in RUNTIME.splitlines()) <= 60


def test_a_conversation_is_held_with_it_and_reuses_what_was_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(RUNTIME + CONVERSATION, {})  # noqa: S102 - our own document
    assert int(capsys.readouterr().out) > 0


def test_the_classes_that_it_names_exist() -> None:
    named = set(re.findall(r"`([A-Z][a-z]+[A-Z]\w+)", DOCUMENT))
    assert named >= {"PagedRuntime", "SequenceRuntime"}
    assert named <= {*vars(base), *vars(sequences)}
