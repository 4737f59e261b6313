"""What a real shell completes, with the script that `--install-completion` installs."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from recollect.conversation.model import Model
from recollect.encryption import PASSPHRASE_VARIABLE
from recollect.types import SamplingParams

BASH = shutil.which("bash")
if BASH is None or sys.platform == "win32":
    pytest.skip("there is no bash", allow_module_level=True)

COMPLETE = """
source <(_RECOLLECT_COMPLETE=source_bash recollect)
COMP_WORDS=({words}) COMP_CWORD=$(({count} - 1))
_recollect_completion recollect
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture
def complete(environment: dict[str, str], tmp_path: Path) -> Callable[..., list[str]]:
    """Return what gives the completions of the last of some words."""
    program = tmp_path / "bin" / "recollect"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nfrom recollect.cli.main import run\nrun()\n")
    program.chmod(0o755)
    environment["PATH"] = f"{program.parent}{os.pathsep}{environment['PATH']}"

    def completions(*words: str) -> list[str]:
        typed = " ".join(f"'{word}'" for word in ("recollect", *words))
        done = subprocess.run(  # noqa: S603 - our own command
            [str(BASH), "-c", COMPLETE.format(words=typed, count=len(words) + 1)],
            capture_output=True,
            encoding="utf-8",
            env=environment,
            timeout=60,
            check=True,
        )
        assert done.stderr == ""
        return done.stdout.split()

    return completions


@pytest.fixture
def home(environment: dict[str, str]) -> Path:
    return Path(environment["RECOLLECT_HOME"])


@pytest.fixture
def conversations(make_model: Callable[..., Model]) -> None:
    """Save three conversations in the home of the shell, which is that of the models."""
    model = make_model()
    for name in ("rivers", "rain", "stones"):
        model.session(name=name, params=SamplingParams(max_tokens=2)).respond("hello")


def test_commands_and_options_are_completed(complete: Callable[..., list[str]]) -> None:
    assert complete("do") == ["doctor"]
    assert complete("chat", "--te") == ["--temperature"]
    assert {"--prompts", "--profile"} <= set(complete("chat", "--pr"))
    assert complete("chat", "--profile", "ex") == ["exact"]
    assert complete("conversations", "ren") == ["rename"]


def test_models_are_completed(complete: Callable[..., list[str]], home: Path) -> None:
    assert complete("chat", "--model", "smol") == ["smollm2"]
    assert complete("pull", "smol") == ["smollm2"]
    assert complete("verify", "-m", "refer") == ["reference"]
    assert not home.exists()


def test_models_of_other_programs_are_completed(
    complete: Callable[..., list[str]], environment: dict[str, str], tmp_path: Path
) -> None:
    """Bash splits words at colons, as `COMP_WORDBREAKS` says."""
    manifests = tmp_path / "ollama" / "manifests" / "registry.ollama.ai" / "library"
    digest = "0" * 64
    layers = [{"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}"}]
    for model in ("llama3.2/latest", "llama3.2/1b", "qwen3/latest"):
        (manifests / model).parent.mkdir(parents=True, exist_ok=True)
        (manifests / model).write_text(json.dumps({"layers": layers}))
    (tmp_path / "ollama" / "blobs").mkdir()
    (tmp_path / "ollama" / "blobs" / f"sha256-{digest}").touch()
    environment["OLLAMA_MODELS"] = str(tmp_path / "ollama")
    names = ["ollama:llama3.2", "ollama:llama3.2:1b", "ollama:qwen3"]
    assert complete("chat", "--model", "oll") == names
    assert complete("chat", "--model", "ollama", ":") == ["llama3.2", "llama3.2:1b", "qwen3"]
    assert complete("chat", "--model", "ollama", ":", "q") == ["qwen3"]
    assert complete("chat", "--model", "ollama", ":", "llama3.2", ":") == ["1b"]
    assert complete("verify", "-m", "ollama", ":", "qw") == ["qwen3"]
    assert complete("chat", "--model", "ollama", ":", "qwen3", "--te") == ["--temperature"]


@pytest.mark.usefixtures("conversations")
def test_conversations_are_completed(complete: Callable[..., list[str]]) -> None:
    assert sorted(complete("chat", "--resume", "r")) == ["rain", "rivers"]
    assert sorted(complete("chat", "--resume", "")) == ["rain", "rivers", "stones"]
    assert complete("conversations", "show", "s") == ["stones"]
    assert complete("export", "ri") == ["rivers"]


def test_without_a_journal_none_is_made(complete: Callable[..., list[str]], home: Path) -> None:
    assert complete("chat", "--resume", "") == []
    assert not home.exists()


@pytest.mark.usefixtures("conversations")
def test_an_encrypted_folder_asks_for_nothing(
    complete: Callable[..., list[str]], environment: dict[str, str]
) -> None:
    command = [sys.executable, "-m", "recollect", "encrypt"]
    secret = environment | {PASSPHRASE_VARIABLE: "correct horse"}
    subprocess.run(command, env=secret, check=True, capture_output=True, timeout=60)  # noqa: S603 - ours
    assert complete("chat", "--resume", "") == []
