"""A script in the shape of the original's tutorials runs on every kind of model."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "og_tutorial.py"


def load_script() -> Any:
    spec = importlib.util.spec_from_file_location("og_tutorial", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tutorial(library: Any) -> Any:
    made = load_script().Tutorial.__new__(load_script().Tutorial)
    made.og, made.model, made.tokenizer = library.og, library.model, library.tokenizer()
    return made


def test_the_conversation_can_be_rewound(
    tutorial: Any, library: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    tutorial.conversation()
    out = capsys.readouterr().out
    assert out.count("> ") >= 4
    if not library.is_original:  # which resumes with KV that lacks the last token of a cut reply
        assert "the same answer after the rewind: True" in out


def test_the_benchmark_runs_both_cases(tutorial: Any, capsys: pytest.CaptureFixture[str]) -> None:
    tutorial.benchmark((64, 8, 16, 4))
    again, kept = capsys.readouterr().out.splitlines()
    assert again.startswith("second turn, prefilled again: first token")
    assert kept.startswith("second turn, kept: first token")


@pytest.mark.model
def test_it_runs_on_a_gguf_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other formats are those of the libraries above; a file is converted on the way."""
    from recollect import config
    from recollect.models.prepare import original_of

    home = config.home()
    monkeypatch.setenv("RECOLLECT_HOME", str(tmp_path))
    with original_of("smollm2", home=home) as gguf:
        tutorial = load_script().Tutorial(importlib.import_module("recollect.og"), str(gguf))
    tutorial.benchmark((64, 8, 16, 4))
    tutorial.model.close()
    assert "second turn, kept" in capsys.readouterr().out
