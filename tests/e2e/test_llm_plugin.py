"""`llm` talks to models by the plugin: conversations stay warm, tools are called, schemas hold."""

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llm
import pytest

import recollect
from recollect import config, llm_plugin
from recollect.conversation.model import Model
from recollect.errors import UnknownModelError

ROOT = Path(__file__).parents[2]
SIZE = {
    "type": "object",
    "properties": {"size": {"enum": ["small", "large"]}},
    "required": ["size"],
    "additionalProperties": False,
}
LONG = "My name is Alex, and I live by the sea. " * 4


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[..., llm_plugin.RecollectModel]:
    """Return what lets the plugin use a loaded model, with more said to each of its sessions."""

    def on(model: Model, **more: Any) -> llm_plugin.RecollectModel:
        class Loaded:
            local = model.local

            @staticmethod
            def session_from(messages: Any, **offered: Any) -> Any:
                return model.session_from(messages, **offered, **more)

        monkeypatch.setattr(llm_plugin, "loaded", lambda _: Loaded)
        return llm_plugin.RecollectModel("reference")

    return on


def test_a_conversation_stays_warm(model: Model, on: Callable[..., Any]) -> None:
    chat = on(model).conversation()
    first = chat.prompt(LONG, system="You are careful.", max_tokens=8)
    assert first.text()
    assert first.output_tokens == 8
    second = chat.prompt("And now?", max_tokens=8)
    assert second.text()
    assert second.token_details["computed_tokens"] < 40 < second.token_details["reused_tokens"]


def test_a_schema_holds(model: Model, on: Callable[..., Any]) -> None:
    said = on(model).prompt("A dog", schema=SIZE, max_tokens=60).text()
    assert json.loads(said)["size"] in {"small", "large"}


def test_a_tool_is_called_and_its_result_goes_back(model: Model, on: Callable[..., Any]) -> None:
    asked: list[bool] = []

    def town(small: bool) -> str:
        asked.append(small)
        return "by the sea"

    shape: dict[str, Any] = {"properties": {"small": {"type": "boolean"}}, "required": ["small"]}
    shape |= {"type": "object", "additionalProperties": False}
    tool = llm.Tool("town", "Return where somebody lives.", shape, town)
    chat = on(model, tool_choice="required", parallel_tool_calls=False).conversation()
    response = chat.prompt("Where does Alex live?", tools=[tool], max_tokens=200)
    (call,) = response.tool_calls()
    assert call.name == "town"
    (result,) = response.execute_tool_calls()
    assert (asked, result.output) == ([call.arguments["small"]], "by the sea")
    on(model)
    answer = chat.prompt(tool_results=[result], tools=[tool], max_tokens=8)
    assert answer.text()
    assert answer.token_details["computed_tokens"] < answer.input_tokens / 2


def test_a_call_that_was_cut_is_not_made(model: Model, on: Callable[..., Any]) -> None:
    tool = llm.Tool(name="town", input_schema={"type": "object"}, implementation=lambda: "x")
    response = on(model, tool_choice="required").prompt("Where?", tools=[tool], max_tokens=20)
    assert response.text() == ""
    assert response.output_tokens == 20
    assert response.tool_calls() == []


def test_what_cannot_be_done_is_said_in_a_sentence(
    model: Model, on: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = llm.Attachment(content=b"\x89PNG", type="image/png")
    message = llm.Message(role="user", parts=[llm.parts.AttachmentPart(attachment=image)])
    with pytest.raises(llm.ModelError, match="leave the attachment out"):
        on(model).prompt(messages=[message]).text()

    def fail(name: str) -> Model:
        raise UnknownModelError(f"There is no {name}.")

    monkeypatch.setattr(llm_plugin, "loaded", fail)
    with pytest.raises(llm.ModelError, match="There is no reference"):
        llm_plugin.RecollectModel("reference").prompt("Hello").text()


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., str]:
    """Return what runs `llm`, with this package as if it were installed, and returns what it prints."""
    points = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["entry-points"]
    about = tmp_path / "site" / "recollect_llm-1.dist-info"
    about.mkdir(parents=True)
    lines = ["[llm]", *(f"{name} = {to}" for name, to in points["llm"].items())]
    (about / "entry_points.txt").write_text("\n".join(lines) + "\n", "utf-8")
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: recollect-llm\nVersion: 1\n")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "models").symlink_to(config.home() / "models")
    source = Path(recollect.__file__).parents[1]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(source)]),
        "LLM_USER_PATH": str(tmp_path / "user"),
        "RECOLLECT_HOME": str(tmp_path / "home"),
    }

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "llm", *arguments]
        done = subprocess.run(  # noqa: S603 - our own command
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    return run


@pytest.mark.model
def test_llm_finds_the_model_and_goes_on_where_it_was_in_another_process(
    run: Callable[..., str],
) -> None:
    assert "recollect/smollm2" in run("models", "list")
    run("-m", "recollect/smollm2", "-o", "max_tokens", "12", LONG)
    said = run("-c", "-o", "max_tokens", "12", "-u", "And now?")
    usage = json.loads(said[said.rindex("{") :])
    assert usage["computed_tokens"] < 20 < usage["reused_tokens"]
    said = run("-m", "recollect/smollm2", "--schema", json.dumps(SIZE), "How large is a dog?")
    assert json.loads(said)["size"] in {"small", "large"}
