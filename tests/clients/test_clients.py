"""
Clients that people use, unchanged: each gets in, and no token is computed twice.

Each talks for three turns, the first with a call of a tool; before the third the server is
restarted. Then it begins a new conversation. What had to be computed is counted here from the prompts
alone: of each the tokens after the longest beginning that an earlier prompt with its reply has.

Where RECOLLECT_TEST_BODIES names a folder, the bodies of the requests are written there, without ids, paths
and texts of others: what `tests/unit/server/test_recorded_bodies.py` reads in a plain run.
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile
from pathlib import Path
from typing import Any, Final

import pytest

if sys.platform != "linux":
    pytest.skip("needs network namespaces", allow_module_level=True)

pytestmark = [pytest.mark.model, pytest.mark.slow]

PROGRAMS: Final = Path(__file__).parent / "programs"
NOTES: Final = "The Elbe, the Oder and the Weser are rivers.\n"
FIRST: Final = "MARKER-ONE: which rivers are in rivers.txt?"
SECOND: Final = "MARKER-TWO: which of them is the longest?"
THIRD: Final = "MARKER-THREE: and which begins with O? Look again."
OTHER: Final = "MARKER-FOUR: which rivers do the notes name?"
LOST_PER_RESTART: Final = 32
"""Tokens: what is not in a whole block is not on disk."""
AHEAD: Final = 5
"""Tokens between a reply and what is said next, which are computed as soon as the reply has ended."""

Block = Callable[[str, str], str]


def call_of(tool: str, **arguments: Any) -> str:
    """Return a call as the model writes it."""
    return f'<tool_call>\n{{"name": "{tool}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


def script_of(call: str | None) -> dict[str, list[str]]:
    """Return replies with text, calls and whitespace at their ends; None: the client has no tools."""
    replies = {
        "MARKER-ONE": [f"I will look at the notes.\n{call}", "The Elbe, the Oder, the Weser.\n"],
        "MARKER-TWO": ["The Elbe “is” — naïvely 🎉 — the longest. \n\n"],
        "MARKER-THREE": [str(call), "The Oder.  "],
        "MARKER-FOUR": [str(call), "Three rivers.\n\n"],
    }
    return {marker: said[-1:] if call is None else said for marker, said in replies.items()}


@dataclass(frozen=True)
class Needed:
    """What a run had to compute, in tokens."""

    new: list[int]
    """Of each prompt: those that no earlier prompt or reply had; at least the last one."""
    said: int
    """Of all replies."""
    unanswered: int
    """Replies that no later prompt of the run goes on from."""


def common(one: str, other: str) -> int:
    """Return how many characters two texts begin with alike."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def needed(prompts: Sequence[Mapping[str, list[str]]], known: list[str]) -> Needed:
    """
    Return what had to be computed, from the texts alone; extends *known*, which is what was said.

    A token is known if the text up to its end is how something earlier begins.
    """
    new, said, texts = list[int](), 0, list[str]()
    for prompt in prompts:
        tokens = prompt["tokens"]
        text = "".join(tokens)
        had = max((common(text, other) for other in known), default=0)
        new.append(max(1, sum(end > had for end in accumulate(map(len, tokens)))))
        said += len(prompt["reply"])
        texts.append(text + "".join(prompt["reply"]))
        known.append(texts[-1])
    unanswered = sum(
        not any("".join(later["tokens"]).startswith(text) for later in prompts[number + 1 :])
        for number, text in enumerate(texts)
    )
    return Needed(new, said, unanswered)


_IDS: Final = re.compile(
    r"\b(\w+?_)?(?:[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{16,}(?:_\d+)*)\b"
)
_DATES: Final = re.compile(r"\b20\d\d-\d\d-\d\d([T ][\d:.Z]+)?")
_LONGEST_KEPT: Final = 48
_BEGINNINGS: Final = ("x-anthropic-billing-header: ",)
"""What the server goes by."""
_TEXTS_OF_OTHERS: Final = {"description", "title", "instructions", "system"}


def shape(value: Any, ids: dict[str, int], name: str = "") -> Any:
    """Return a value of the same shape without dates, and without what others wrote; ids are counted."""
    if isinstance(value, dict):
        return {key: shape(one, ids, key) for key, one in value.items()}
    if isinstance(value, list):
        return [shape(one, ids, name) for one in value]
    if not isinstance(value, str):
        return value
    value = _IDS.sub(lambda id_: f"{id_[1] or ''}{ids.setdefault(id_[0], len(ids))}", value)
    value = _DATES.sub("2026-01-01", value)
    is_ours = "MARKER-" in value and len(value) < 2 * _LONGEST_KEPT
    if value and not is_ours and (name in _TEXTS_OF_OTHERS or len(value) > _LONGEST_KEPT):
        kept = next((one for one in _BEGINNINGS if value.startswith(one)), "")
        return f"{kept}{len(value)} characters"
    return value


def write_bodies(world: Any, folder: Path, client: str) -> None:
    """Write the first and the longest body that a client sent to each path."""

    def placed(body: str) -> str:
        """Return a body with the folders of a person in place of this run's."""
        return body.replace(str(world.work), "/home/user").replace(str(world.root), "")

    chosen: list[dict[str, Any]] = []
    ids: dict[str, int] = {}
    sent = [one for run in world.runs for one in run.requests if one["body"]]
    for path in dict.fromkeys(one["path"] for one in sent):
        bodies = [one for one in sent if one["path"] == path]
        longest = max(bodies, key=lambda one: len(one["body"]))
        for one in dict.fromkeys((bodies.index(longest), 0)):
            ignored = bodies[one]["answer_headers"].get("x-recollect-ignored")
            chosen.append(
                {
                    "path": path,
                    "ignored": [] if ignored is None else sorted(ignored.split(", ")),
                    "body": shape(json.loads(placed(bodies[one]["body"])), ids),
                }
            )
    lines = ",\n".join(json.dumps(one, ensure_ascii=False) for one in chosen)
    (folder / f"{client}.json").write_text(f"[\n{lines}\n]\n", "utf-8")


def check(world: Any, client: str, *, reasons: Collection[str] = ("new",)) -> None:
    """
    Check what the runs of the server did against what the prompts say.

    Nothing is lost, so no reply may be told a reason for it; but a new conversation may be told where
    it parts from the first.
    """
    if folder := os.environ.get("RECOLLECT_TEST_BODIES"):
        write_bodies(world, Path(folder), client)
    known: list[str] = []
    total = floor = 0
    for number, run in enumerate(world.runs):
        refused = [
            (request["method"], request["path"], request["status"], request["answer"][:500])
            for request in run.requests
            if request["status"] >= 400
        ]
        assert refused == []
        need, usages = needed(run.prompts, known), run.usages()
        computed = [usage["computed_tokens"] for usage in usages]
        told = [(usage["reason"], usage["difference"]) for usage in usages]
        lost = LOST_PER_RESTART if number else 0
        disk = [usage["restored_tokens"] for usage in usages]
        print(f"{client}, run {number}: computed {computed}, new {need.new}, from disk {disk}")
        assert len(usages) == len(run.prompts)
        assert sum(computed) <= sum(need.new) + lost
        assert sum(computed) == run.prompt_tokens("computed")
        assert sum(disk) == run.prompt_tokens("disk")
        assert run.fed_tokens <= sum(need.new) + need.said + AHEAD * need.unanswered + lost
        total, floor = total + sum(computed), floor + sum(need.new)
        false = [
            (reason, difference)
            for reason, difference in told
            if reason not in reasons
            and not (reason == "message_changed" and "FOUR: which rivers" in difference)
        ]
        assert false == []
    # What is computed ahead is no part of a prompt's cost: the floor would be too high without it.
    prompts = sum(len(run.prompts) for run in world.runs)
    assert floor - AHEAD * prompts <= total <= 1.01 * floor


@pytest.fixture
def place(world: Any) -> Any:
    """Return a world with notes to look at."""
    (world.work / "rivers.txt").write_text(NOTES, "utf-8")
    return world


def talks(world: Any, *command: str | Path, call: str) -> None:
    """Hold the conversation with a program that reads lines."""
    script = script_of(call)
    world.start(script)
    talk = world.talk(*command)
    try:
        assert talk.say(FIRST).startswith("The Elbe, the Oder, the Weser.")
        assert talk.say(SECOND).startswith("The Elbe “is” — naïvely 🎉 — the longest.")
        world.stop()
        world.start(script)
        assert talk.say(THIRD).startswith("The Oder.")
        talk.say("/new")
        assert talk.say(OTHER).startswith("Three rivers.")
    finally:
        talk.close()
    world.stop()


def says(world: Any, ask: Callable[[str, bool], str], *, call: str | None) -> None:
    """Hold the conversation with a command that is run for each turn."""
    script = script_of(call)
    world.start(script)
    assert "The Elbe, the Oder, the Weser." in ask(FIRST, False)
    assert "naïvely 🎉" in ask(SECOND, True)
    world.stop()
    world.start(script)
    assert "The Oder." in ask(THIRD, True)
    assert "Three rivers." in ask(OTHER, False)
    world.stop()


NOTES_CALL: Final = call_of("read_notes", path="rivers.txt")


@pytest.mark.parametrize("provider", ["openai-compatible", "openai"])
def test_ai_sdk(place: Any, block: Block, provider: str) -> None:
    (place.work / "node_modules").symlink_to(place.programs["node"])
    (place.work / "block.mjs").write_text(block(f"AI SDK, {provider}", "js"), "utf-8")
    shutil.copy(PROGRAMS / "with_ai_sdk.mjs", place.work)
    talks(place, "node", "with_ai_sdk.mjs", call=NOTES_CALL)
    check(place, f"ai-sdk-{provider}")


@pytest.mark.parametrize(
    ("title", "program"),
    [
        ("OpenAI Agents SDK", "with_agents_sdk.py"),
        ("Pydantic AI", "with_pydantic_ai.py"),
        ("LangGraph", "with_langgraph.py"),
    ],
)
def test_python_libraries(place: Any, block: Block, title: str, program: str) -> None:
    (place.work / "block.py").write_text(block(title, "python"), "utf-8")
    shutil.copy(PROGRAMS / program, place.work)
    talks(place, place.programs["python"] / "python", program, call=NOTES_CALL)
    check(place, program.removeprefix("with_").removesuffix(".py").replace("_", "-"))


def test_ollama_in_python(place: Any, block: Block) -> None:
    (place.work / "block.py").write_text(block("Ollama's client for Python", "python"), "utf-8")
    shutil.copy(PROGRAMS / "with_ollama.py", place.work)
    talks(place, place.programs["ollama"] / "python", "with_ollama.py", call=NOTES_CALL)
    check(place, "ollama-python")


def test_ollama_in_javascript(place: Any, block: Block) -> None:
    (place.work / "node_modules").symlink_to(place.programs["node-ollama"])
    (place.work / "block.mjs").write_text(block("Ollama's client for JavaScript", "js"), "utf-8")
    shutil.copy(PROGRAMS / "with_ollama.mjs", place.work)
    talks(place, "node", "with_ollama.mjs", call=NOTES_CALL)
    check(place, "ollama-javascript")


def test_llm(place: Any, block: Block) -> None:
    user = {"LLM_USER_PATH": str(place.user / "llm"), **exports(block("llm", "sh"))}
    (place.user / "llm").mkdir()
    (place.user / "llm" / "extra-openai-models.yaml").write_text(block("llm", "yaml"), "utf-8")
    (place.work / "tools.py").write_text(
        "def read_notes(path: str) -> str:\n"
        '    "Read a file."\n'
        "    return open(path, encoding='utf-8').read()\n"
    )

    def ask(text: str, goes_on: bool) -> str:
        tool = ("--functions", "tools.py")
        again = ("-c",) if goes_on else ("-m", "recollect", "-s", "You look things up in notes.")
        return str(
            place.call(place.programs["python"] / "llm", *again, *tool, text, environment=user)
        )

    says(place, ask, call=NOTES_CALL)
    check(place, "llm")


def native(world: Any, package: str) -> Path:
    """Return the package with the program for this machine, which npm chose."""
    return Path(sorted(world.programs["node"].glob(f"{package}-linux-*"))[0])


def exports(text: str) -> dict[str, str]:
    """Return the variables that a block of shell sets."""
    pairs = (line.removeprefix("export ").split("=", 1) for line in text.splitlines() if line)
    return dict(pairs)


def test_opencode(place: Any, block: Block) -> None:
    (place.work / "opencode.json").write_text(block("opencode", "json"), "utf-8")
    program = native(place, "opencode") / "bin" / "opencode"
    environment = {"OPENCODE_DISABLE_MODELS_FETCH": "1", "OPENCODE_DISABLE_AUTOUPDATE": "1"}

    def ask(text: str, goes_on: bool) -> str:
        again = ("-c",) if goes_on else ()
        return str(place.call(program, "run", *again, text, environment=environment))

    says(place, ask, call=call_of("read", filePath=str(place.work / "rivers.txt")))
    check(place, "opencode")


def test_qwen_code(place: Any, block: Block) -> None:
    (place.user / ".qwen").mkdir()
    (place.user / ".qwen" / "settings.json").write_text(block("Qwen Code", "json"), "utf-8")
    program = place.programs["node"] / ".bin" / "qwen"
    environment = exports(block("Qwen Code", "sh"))

    def ask(text: str, goes_on: bool) -> str:
        again = ("-c",) if goes_on else ()
        return str(place.call(program, *again, "-p", text, environment=environment))

    says(place, ask, call=call_of("read_file", file_path=str(place.work / "rivers.txt")))
    check(place, "qwen-code")


def test_aider(place: Any, block: Block) -> None:
    (place.work / "recollect.json").write_text(block("Aider", "json"), "utf-8")
    environment = exports(block("Aider", "sh"))
    program = place.programs["aider"] / "aider"

    def ask(text: str, goes_on: bool) -> str:
        again = ("--restore-chat-history",) if goes_on else ()
        usual = ("--no-git", "--yes-always", "--no-pretty", "--read", "rivers.txt")
        return str(place.call(program, *usual, *again, "--message", text, environment=environment))

    says(place, ask, call=None)
    # The client puts what was said before the files, which are read again there.
    check(place, "aider", reasons=("new", "message_changed"))


def test_claude_code(place: Any, block: Block) -> None:
    environment = exports(block("Claude Code", "sh"))
    program = native(place, "@anthropic-ai/claude-code") / "claude"

    def ask(text: str, goes_on: bool) -> str:
        again = ("-c",) if goes_on else ()
        return str(place.call(program, *again, "-p", text, environment=environment))

    says(place, ask, call=call_of("Read", file_path=str(place.work / "rivers.txt")))
    check(place, "claude-code")


def test_codex(place: Any, block: Block) -> None:
    (place.user / ".codex").mkdir()
    (place.user / ".codex" / "config.toml").write_text(block("Codex", "toml"), "utf-8")
    program = place.programs["node"] / ".bin" / "codex"

    def ask(text: str, goes_on: bool) -> str:
        again = ("resume", "--last") if goes_on else ()
        return str(place.call(program, "exec", "--skip-git-repo-check", *again, text))

    says(place, ask, call=call_of("exec_command", cmd="cat rivers.txt"))
    check(place, "codex")
