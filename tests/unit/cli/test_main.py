"""The command line as a whole: options, errors, and what `models` prints."""

import inspect
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from recollect import __version__
from recollect.cli import models
from recollect.cli.display import format_bytes
from recollect.cli.main import (
    COMMANDS,
    EXIT_INTERRUPTED,
    flowing,
    join_at_colons,
    load_command,
    run,
)
from recollect.conversation.loading import load
from recollect.models import onnx_folder
from recollect.models.catalog import CATALOG, DEFAULT_MODEL
from recollect.models.openvino_folder import Manifest


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECOLLECT_HOME", str(tmp_path / "home"))


def status_of(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    """Run the command line in this process and return its exit status."""
    monkeypatch.setattr(sys, "argv", ["recollect", *arguments])
    with pytest.raises(SystemExit) as left:
        run()
    return left.value.code


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"recollect {__version__}\n"


PROBE = """
import sys
from recollect.cli.main import join_at_colons, app
for arguments in {runs!r}:
    try:
        app(arguments)
    except SystemExit as end:
        assert not end.code, arguments
print(sorted({heavy!r} & set(sys.modules)))
"""
RUNTIMES = {"openvino", "openvino_genai", "onnxruntime", "onnxruntime_genai", "torch"}
INTERFACES = {"fastapi", "prompt_toolkit", "recollect.proof", "recollect.cli.options"}


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("runs", "heavy"),
    [
        ([["--help"], ["--version"]], RUNTIMES | INTERFACES),
        pytest.param(
            [["conversations"], ["checkpoints"], ["cache"], ["cache", "stats"], ["models"]],
            RUNTIMES | {"fastapi", "prompt_toolkit", "recollect.proof"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            [[name, "--help"] for name in COMMANDS],
            RUNTIMES | {"fastapi", "prompt_toolkit"},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["help", "lists", "help of commands"],
)
def test_what_needs_no_model_loads_no_runtime(runs: list[list[str]], heavy: set[str]) -> None:
    program = PROBE.format(runs=runs, heavy=heavy)
    done = subprocess.run(  # noqa: S603 - our own program
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_line_of_a_command_is_its_own(name: str) -> None:
    """It is known without importing the command, so it stands in two places."""
    _, line = COMMANDS[name]
    own = load_command(name).help
    assert own is not None
    assert line == " ".join(own.partition("\n\n")[0].split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["chat", "--model", "no such model"],
        ["chat", "--model", "reference", "--top-p", "4"],
        ["chat", "--model", "reference", "--kv-memory", "much"],
        ["chat", "--model", "reference", "--kv-memory", "1"],
        ["chat", "--model", "reference", "--prompts", "no such file"],
        ["pull", "no such model"],
    ],
)
def test_an_error_is_one_line_and_status_2(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(monkeypatch, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("recollect: ")
    assert err.count("\n") == 1


MAY_FETCH = [
    ["chat", "--prompts", os.devnull],
    ["warm", "text"],
    ["verify"],
    ["bench"],
    ["scenarios"],
    ["rewind-test"],
    ["pull", DEFAULT_MODEL],
    ["pull", "org/repo:file.gguf"],
    ["convert", DEFAULT_MODEL, "OUT"],
]


@pytest.mark.few(5)
@pytest.mark.parametrize("by", ["option", "variable"])
@pytest.mark.parametrize("arguments", MAY_FETCH, ids=" ".join)
def test_offline_each_command_refuses_to_fetch(
    arguments: list[str],
    by: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text").write_text("What is to be read once.")
    monkeypatch.setattr(onnx_folder, "LIBRARIES", ())  # what converts need not be there
    if by == "option":
        arguments = [*arguments, "--offline"]
    else:
        monkeypatch.setenv("RECOLLECT_OFFLINE", "1")
    assert status_of(monkeypatch, *arguments) == 2
    err = capsys.readouterr().err
    assert "is not on this disk, and nothing may be fetched" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    "arguments", [["chat", "--nonsense"], ["chat", "--profile", "quick"], ["x"]]
)
def test_a_wrong_option_is_status_2(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(monkeypatch, *arguments) == 2
    assert "Usage: " in capsys.readouterr().err


def test_options_reach_the_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\n")
    status = status_of(
        monkeypatch,
        *("chat", "-m", "reference", "--json", "--prompts", str(prompts)),
        *("-n", "5", "--ignore-eos", "--system", "be brief", "-t", "1", "--seed", "7"),
        *("--stop", "never said", "--stop", "nor this", "--kv-memory", "1MB"),
    )
    assert status == 0
    out = capsys.readouterr().out
    first, second = (json.loads(line) for line in out.splitlines())
    assert first["finish_reason"] == "length"
    assert first["usage"]["generated_tokens"] == 5
    assert first["usage"]["prompt_tokens"] > len("be briefone")
    assert second["usage"]["reused_tokens"] > 0


def test_models_lists_the_catalog(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(monkeypatch, "models", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in listed] == list(CATALOG)
    assert not any(entry["installed"] for entry in listed)


def test_models_for_people_names_each(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(monkeypatch, "models") == 0
    out = capsys.readouterr().out
    assert all(name in out for name in CATALOG)


def test_a_kept_gguf_file_is_listed_and_pruned(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("RECOLLECT_HOME", str(tmp_path))
    folder, kept = tmp_path / "models" / "mine-1", tmp_path / "sources" / "mine-1" / "mine.gguf"
    for file in (folder / "note", kept):
        file.parent.mkdir(parents=True)
        file.write_bytes(bytes(5_000))
    Manifest(
        name="mine",
        source_sha256="",
        architecture="llama",
        context_length=512,
        chat_template=None,
        eos_token_ids=[],
        bos_token=None,
        eos_token=None,
        fingerprint="",
        library_versions={"openvino-genai": version("openvino-genai")},
        file_bytes={},
        format_version=2,
    ).write(folder)
    assert status_of(monkeypatch, "models") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "rounded" in out
    assert "5 kB of it is the GGUF file" in out
    assert status_of(monkeypatch, "models", "--prune", "mine") == 0
    assert capsys.readouterr().out == "Deleted 5 kB of GGUF; mine stays as it is.\n"
    assert not kept.exists()
    assert status_of(monkeypatch, "models", "--prune", "mine") == 0
    assert capsys.readouterr().out.startswith("No GGUF file of mine was kept")
    assert status_of(monkeypatch, "models", "--prune", "other") != 0
    assert "There is no model 'other' on this disk" in capsys.readouterr().err


def test_what_is_here_can_be_pulled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(monkeypatch, "pull", "reference") == 0
    assert capsys.readouterr().out == "reference is ready\n"


def test_a_check_of_what_has_no_file_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(monkeypatch, "pull", "reference", "--check") == 0
    ready, verdict = capsys.readouterr().out.strip().splitlines()[::2]
    assert ready == "reference is ready"
    assert verdict.startswith("Model against its file: NOT COMPARED: ")


def test_the_default_model_is_that_of_the_library() -> None:
    assert inspect.signature(load).parameters["model"].default == DEFAULT_MODEL


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (72, "72 B"),
        (999, "999 B"),
        (1_000, "1 kB"),
        (4_000, "4 kB"),
        (999_600, "1 MB"),
        (999_600_000, "1.0 GB"),
        (98_362_432, "98 MB"),
        (1_117_320_768, "1.1 GB"),
        (10**9, "1.0 GB"),
    ],
)
def test_sizes_have_a_unit_that_fits(size: int, text: str) -> None:
    assert text == format_bytes(size)


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve", "--profile", "tiny"],
        ["chat", "--overflow", "tiny"],
        ["conversations", "export", "name", "--format", "tiny"],
    ],
)
def test_a_choice_that_there_is_not_is_told_without_words_of_python(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert status_of(monkeypatch, *arguments) == 2
    told = capsys.readouterr().err
    assert "'tiny' is not" in told
    assert "Value error" not in told


def test_an_interrupt_while_a_class_is_made_ends_quietly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Imports make classes, and Python before 3.12 tells an interrupt there as another error."""

    class Interrupted:
        def __set_name__(self, owner: type, name: str) -> None:
            raise KeyboardInterrupt

    def installed(*_: object) -> None:
        type("Made", (), {"attribute": Interrupted()})

    monkeypatch.setattr(models, "installed", installed)
    assert status_of(monkeypatch, "models") == EXIT_INTERRUPTED
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One.\n\nTwo goes\non. Three\ntoo.\nFour.", "One.\n\nTwo goes on. Three too.\nFour."),
        ("One.\n\n    two goes\n      on\n    here", "One.\n\ntwo goes\n  on\nhere"),
        ("", ""),
    ],
)
def test_help_is_as_wide_as_the_terminal(text: str, expected: str) -> None:
    assert flowing(text) == expected


@pytest.mark.parametrize(
    ("typed", "current", "joined", "at"),
    [
        ("recollect chat", 1, "recollect chat", 1),
        ("recollect chat", 2, "recollect chat", 2),
        ("r -m ollama : lla", 4, "r -m ollama:lla", 2),
        ("r -m ollama :", 3, "r -m ollama:", 2),
        ("r -m ollama : a : 1b --x", 7, "r -m ollama:a:1b --x", 3),
        ("r -m ollama : a --x", 3, "r -m ollama:a --x", 2),
    ],
)
def test_what_bash_splits_at_colons_is_joined(
    typed: str, current: int, joined: str, at: int
) -> None:
    found = join_at_colons(typed.replace(" ", "\n"), current)
    assert found == (joined.replace(" ", "\n"), at)
