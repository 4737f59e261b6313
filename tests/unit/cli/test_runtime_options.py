"""What runs a GGUF file: said where it was chosen, and refused where it cannot be."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gguf
import openvino as ov
import psutil
import pytest

from random_model import WITH_EXPERTS, write_random_model
from recollect.cli.options import ModelOptions
from recollect.conversation.formats import RunOptions, load_runtime
from recollect.conversation.loading import which_llama
from recollect.errors import ConfigError, RuntimeFailure, UnsupportedModelError
from recollect.models.prepare import prepare
from recollect.runtime.llama_library import Device, LlamaLibrary
from recollect.runtime.openvino import OpenVinoRuntime


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RECOLLECT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def spoken(tmp_path: Path) -> Path:
    """Return a mixture of experts whose tokens are single letters."""
    letters = tmp_path / "letters.gguf"
    writer = gguf.GGUFWriter(letters, "llama")
    writer.add_context_length(512)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    tokens = [*map(chr, range(33, 127)), "\u0120", "<|end|>"]
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 1) + [3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_chat_template("{% for one in messages %}{{ one.content }}<|end|>{% endfor %}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return write_random_model(tmp_path / "experts.gguf", WITH_EXPERTS, vocabulary_of=letters)


@pytest.mark.slow
def test_llama_runs_what_openvino_does_not_and_one_line_says_so(
    spoken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ModelOptions(kv_disk="0").load(str(spoken)) as model:
        assert model.engine.info.name.startswith("llama.cpp-")
    said = capsys.readouterr().err
    assert said.count("runs on llama.cpp (CPU), because OpenVINO does not read it.") == 1


@pytest.mark.slow
def test_what_was_asked_for_is_not_said(spoken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ModelOptions(kv_disk="0", runtime="llama", kv_type="f32", gpu_layers="0")
    with options.load(str(spoken)) as model:
        assert model.engine.info.kv_format.startswith("f32,")
    assert "runs on" not in capsys.readouterr().err


def test_guesses_are_on_and_can_be_turned_off() -> None:
    with ModelOptions(kv_disk="0").load("reference") as model:
        assert model.engine.drafts is not None
    with ModelOptions(kv_disk="0", no_draft=True).load("reference") as model:
        assert model.engine.drafts is None


def test_a_draft_model_can_be_given() -> None:
    with ModelOptions(kv_disk="0", draft_model="reference").load("reference") as model:
        assert model.draft_model == "reference"


@pytest.mark.slow
def test_a_draft_model_of_another_family_is_refused(spoken: Path) -> None:
    options = ModelOptions(kv_disk="0", draft_model=str(spoken))
    with pytest.raises(UnsupportedModelError, match="a smaller model of the same family"):
        options.load("reference")


@pytest.mark.slow
def test_another_model_is_loaded_without_a_draft_model_that_does_not_fit(
    spoken: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As by `/model` in a chat, and by a server with several."""
    options = ModelOptions(kv_disk="0", draft_model=str(spoken))
    with options.load_another("reference") as model:
        assert model.draft_model is None
    assert "Loaded without a draft model: reference." in caplog.text


def test_layers_that_are_no_number_are_refused(spoken: Path) -> None:
    with pytest.raises(ConfigError, match="give auto, or how many layers"):
        ModelOptions(gpu_layers="-3").load(str(spoken))


def test_what_is_wrong_is_said_before_a_model_is_looked_for(home: Path) -> None:
    """So the server does not start, and the data folder is not encrypted."""
    wrong = (
        ModelOptions(gpu_layers="-3"),
        ModelOptions(tool_format="none"),
        ModelOptions(no_draft=True, draft_model="smollm2"),
    )
    for options in wrong:
        with pytest.raises(ConfigError):
            options.check()
        with pytest.raises(ConfigError):
            options.prepare("smollm2")
    assert not home.exists()


def test_options_of_llama_are_refused_elsewhere() -> None:
    with pytest.raises(ConfigError, match="does not run on llama"):
        ModelOptions(gpu_layers="3").load("reference")


@pytest.mark.slow
def test_a_device_is_refused_where_nothing_can_run_on_it(spoken: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no device 'Metal' here: it has CPU"):
        ModelOptions(device="Metal").load(str(spoken))
    with pytest.raises(ConfigError, match="runs where its folder says"):
        ModelOptions(device="CPU").load("reference")
    with ModelOptions(device="cpu", kv_disk="0").load(str(spoken)) as model:
        assert model.engine.info.device == "CPU"


def test_openvino_computes_where_its_kv_can_be_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_on(device: str) -> None:
        OpenVinoRuntime(tmp_path / "none.xml", profile="fast", context_length=64, device=device)

    with pytest.raises(ConfigError, match="OpenVINO has no device 'NPU' here: it has CPU"):
        run_on("NPU")
    monkeypatch.setattr(ov.Core, "available_devices", ["CPU", "GPU"])
    with pytest.raises(ConfigError, match=r"On GPU OpenVINO does not give KV out.*--runtime llama"):
        run_on("GPU")
    with pytest.raises(RuntimeFailure, match=r"reading none\.xml"):
        run_on("cpu")


def test_no_card_counts_where_the_processor_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Device("CUDA0", "a card", "GPU", 8 << 30, 8 << 30)
    monkeypatch.setattr(LlamaLibrary, "devices", lambda _: [card])
    assert [which_llama(one) for one in (None, "CUDA0", "CPU")] == ["quicker", "quicker", "there"]


@pytest.mark.slow
def test_weights_that_do_not_fit_unpacked_are_refused_with_both_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_random_model(tmp_path / "half.gguf", replace(WITH_EXPERTS, kind="F16"))
    local = prepare(str(file), home=tmp_path / "home", runtime="llama")
    free = SimpleNamespace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    with pytest.raises(
        ConfigError, match=r"take [\d,]{7,} bytes here, and 1,000 are free: take --profile"
    ):
        load_runtime(local, RunOptions(profile="exact", home=tmp_path / "home"))


@pytest.mark.slow
def test_openvino_alone_refuses_what_it_does_not_read(spoken: Path, home: Path) -> None:
    with pytest.raises(UnsupportedModelError):
        ModelOptions(runtime="openvino").load(str(spoken))
    assert prepare(str(spoken), home=home, llama=lambda: "there").format == "gguf"
