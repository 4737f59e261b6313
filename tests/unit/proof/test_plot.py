"""The plot is refused before the work where it cannot be drawn, and drawn where it can."""

from importlib import util
from pathlib import Path

import pytest

from recollect.conversation.model import Model
from recollect.errors import ConfigError, MissingPackageError
from recollect.proof import report
from recollect.proof.bench import BenchConfig, run_growth, summarize_growth
from recollect.proof.report import machine_card


def test_a_missing_matplotlib_is_said_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(report, "find_spec", lambda _name: None)
    with pytest.raises(MissingPackageError, match=r"pip install 'recollect-llm\[plot\]'"):
        report.require_plot(tmp_path / "curve.png")


@pytest.mark.skipif(util.find_spec("matplotlib") is None, reason="the extra `plot`")
class TestWithMatplotlib:
    def test_an_unknown_format_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"end it in \.png"):
            report.require_plot(tmp_path / "curve.txt")

    def test_a_missing_folder_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no folder"):
            report.require_plot(tmp_path / "nowhere" / "curve.png")

    @pytest.mark.slow
    def test_the_growth_curve_is_a_picture(self, model: Model, tmp_path: Path) -> None:
        config = BenchConfig(
            input_tokens=9, output_tokens=1, input2_tokens=9, output2_tokens=4, growth_turns=3
        )
        turns = summarize_growth(run_growth(model, config, "some text"))
        path = tmp_path / "curve.png"
        report.require_plot(path)
        report.draw_growth(turns, machine_card(model), path)
        assert path.read_bytes().startswith(b"\x89PNG")
