"""
What the documents show is true: links lead somewhere, commands and options exist, code runs or parses.

What a document shows of a running client, of the heart and of a runtime is tested beside these:
`RUN_ELSEWHERE` says where.
"""

import json
import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.core import TyperGroup

import recollect
from recollect.cli.commands import ALIASES, COMMANDS
from recollect.cli.display import format_bytes
from recollect.cli.main import COMMANDS as SUBCOMMANDS
from recollect.cli.main import app
from recollect.models.catalog import CATALOG, DEFAULT_MODEL

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CHANGELOG.md", "LOG.md")),
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
NAMES = [str(path.relative_to(ROOT)) for path in PAGES]
CURRENT = [name for name in NAMES if name not in {"CHANGELOG.md", "LOG.md"}]
"""Without those that tell what was."""
ABOUT_CHATS = ("chat", "concepts", "og")
"""Pages in which what begins with a slash is a command of the chat, and no address of the server."""
RUN_ELSEWHERE = {
    "docs/clients.md": "tests/clients/test_clients.py",
    "docs/heart.md": "tests/unit/test_heart.py",
    "docs/og.md": "tests/og/test_docs.py",
    "docs/openai-api.md": "tests/unit/server/test_documents.py",
    "docs/runtimes.md": "tests/contract/test_docs.py",
}
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def text_of(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def blocks(name: str, language: str) -> list[str]:
    return [block for kind, block in _FENCE.findall(text_of(name)) if kind == language]


def prose(name: str) -> str:
    """Return a document without its blocks."""
    return _FENCE.sub("", text_of(name))


# Links


def anchors(path: Path) -> set[str]:
    """Return where links into a page can lead: its headings, as the hosts of repositories write them."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.+)$", _FENCE.sub("", path.read_text("utf-8")), re.MULTILINE):
        plain = re.sub(r"\[([^]]+)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found[anchor] = found.get(anchor, -1) + 1
    return {
        anchor if not number else f"{anchor}-{number}"
        for anchor, last in found.items()
        for number in range(last + 1)
    }


def links(name: str) -> list[str]:
    found = re.findall(r"\]\(([^)\s]+)\)", prose(name))
    return [link for link in found if not re.match(r"[a-z]+://", link)]


@pytest.mark.parametrize("name", NAMES)
def test_every_link_leads_to_a_file_and_a_heading(name: str) -> None:
    for link in links(name):
        file, _, anchor = link.partition("#")
        target = ((ROOT / name).parent / file).resolve() if file else ROOT / name
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(target), link


def test_the_index_leads_to_every_page_and_the_readme_to_the_index() -> None:
    index = ROOT / "docs" / "README.md"
    led = {(index.parent / link.partition("#")[0]).resolve() for link in links("docs/README.md")}
    assert {path for path in PAGES if path != index} <= led | {ROOT / "README.md"}
    assert "docs/README.md" in links("README.md")


@pytest.mark.parametrize("name", CURRENT)
def test_files_of_the_project_that_are_named_exist(name: str) -> None:
    named = re.findall(r"`((?:tests|benchmarks|examples|docs|src)/[\w./-]+)`", text_of(name))
    for file in named:
        assert (ROOT / file).exists(), file
    for file in re.findall(r"`(test_\w+\.py)", prose(name)):
        assert list((ROOT / "tests").rglob(file)), file
    for script in re.findall(r"python (benchmarks/\w+\.py)", text_of(name)):
        assert (ROOT / script).exists(), script


# Commands


def parts(line: str) -> list[list[str]]:
    """Return the programs that a shell's line calls, each with its arguments."""
    shell = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    shell.whitespace_split = True
    calls: list[list[str]] = [[]]
    for word in shell:
        if set(word) <= set("|&;"):
            calls.append([])
        elif calls[-1] or "=" not in word:  # not a variable before the program
            calls[-1].append(word)
    return calls


def shell_lines(name: str) -> list[str]:
    """Return what a document shows as typed into a shell."""
    shown = "".join(blocks(name, "console")).replace("\\\n", " ")
    return [line.removeprefix("$ ") for line in shown.splitlines() if line.startswith("$ ")]


def commands() -> Iterator[tuple[str, list[str]]]:
    for name in CURRENT:
        for line in shell_lines(name):
            for call in parts(line):
                if call[:1] == ["recollect"]:
                    yield name, call[1:]


def find(arguments: list[str]) -> tuple[Any, list[str]]:
    """Return the command of the real command line that some words call, and the words that are left."""
    command: Any = typer.main.get_command(app)
    context = command.context_class(command, info_name="recollect")
    while isinstance(command, TyperGroup) and arguments and not arguments[0].startswith("-"):
        _, command, arguments = command.resolve_command(context, arguments)
    return command, arguments


def options(command: Any) -> set[str]:
    return {
        name
        for parameter in command.params
        for name in (*parameter.opts, *parameter.secondary_opts)
    } | {"--help"}


@pytest.mark.parametrize(("name", "arguments"), [*commands()], ids=lambda each: str(each)[:60])
def test_the_command_line_takes_what_a_document_shows(
    name: str, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RECOLLECT_HOME", str(tmp_path / "home"))
    for word in arguments:  # files that are to be read
        if re.fullmatch(r"\w[\w.-]*\.(?:txt|json|safetensors)|LICENSE", word):
            (tmp_path / word).write_text("x")
    command, rest = find(arguments)
    if set(rest) <= {"--version", "--install-completion"}:  # they act when they are parsed
        assert set(rest) <= options(command) or not rest
    else:
        command.make_context(command.name, rest)


def test_what_no_command_takes_is_found() -> None:
    command, rest = find(["cache", "evict", "--all"])
    with pytest.raises(Exception, match="No such option"):
        command.make_context("evict", rest)


@pytest.mark.parametrize("name", CURRENT)
def test_commands_and_options_in_sentences_exist(name: str) -> None:
    for mention in re.findall(r"`recollect ([a-z][^`\n]*)`", prose(name)):
        words = [word for word in re.split(r"[\s\[\]]+", mention) if word]
        if name == "docs/store-format.md" and words[0] in {"block", "branch", "reply"}:
            continue  # what hashes are personalized with
        command, rest = find(words)
        for word in rest:
            if word.startswith("-"):
                assert word.split("=")[0] in options(command), mention


def test_what_the_readme_tells_a_newcomer_is_run_in_a_fresh_environment() -> None:
    steps = text_of(".ci/run")
    for line in shell_lines("README.md"):
        for call in parts(line):
            words = call[:2] if call[:1] == ["recollect"] else call
            if call[:4] == ["python", "-m", "pip", "install"]:
                words = call[4:]  # quietly there
            elif call[:1] == ["cat"] or "pytest" in call:
                continue  # read with other limits; with other options
            assert " ".join(words) in steps.replace('"', ""), line


ALL_OPTIONS = set().union(*(options(find([name])[0]) for name in SUBCOMMANDS)) | {
    "--version",
    "--install-completion",
    "--force",
}
FOREIGN_OPTIONS = {
    "docs/clients.md": {"--map-tokens"},  # Aider's
    "docs/benchmarks.md": {"--rival"},  # of benchmarks
    "docs/drafts.md": {"--rival"},
    "docs/platforms.md": {"--platform", "--dry-run"},  # pip's
    "docs/scale.md": {
        *("--parallel", "--no-cache-prompt"),  # llama-server's
        *(
            "--enable-prompt-tokens-details",
            "--enable-prefix-caching",
            "--scheduling-policy",
            "--structured-outputs-config",
        ),  # vLLM's
        *("--policy", "--kv-transfer-config"),  # its router's, and its tiers'
    },
}


@pytest.mark.parametrize("name", [name for name in CURRENT if name != "benchmarks/README.md"])
def test_options_that_are_named_alone_exist(name: str) -> None:
    known = ALL_OPTIONS | FOREIGN_OPTIONS.get(name, set())
    for command in ("keys", "cache", "conversations", "checkpoints"):
        group, _ = find([command])
        known |= set().union(*(options(each) for each in group.commands.values()))
    for mention in re.findall(r"`(--[a-z][a-z-]+)", prose(name)):
        assert mention in known, mention


def test_the_options_of_every_command_that_loads_a_model_are_listed() -> None:
    takers = [options(find([name])[0]) for name in ("chat", "serve", "warm", "verify", "bench")]
    shared = {name for name in set.intersection(*takers) if name.startswith("--")}
    table = text_of("docs/chat.md").partition("## Options of every command")[2]
    assert set(re.findall(r"^\| `(--[a-z-]+)", table, re.MULTILINE)) == shared - {"--help"}


def test_options_of_benchmarks_exist() -> None:
    for mention in re.findall(
        r"`python (benchmarks/\w+\.py)([^`]*)`", text_of("benchmarks/README.md")
    ):
        source = text_of(mention[0]) + text_of("benchmarks/harness.py")
        for option in re.findall(r"--[a-z-]+", mention[1]):
            assert f'"{option}"' in source, mention


@pytest.mark.parametrize("name", ["README.md", *(f"docs/{page}.md" for page in ABOUT_CHATS)])
def test_commands_of_the_chat_exist(name: str) -> None:
    found = re.findall(r"`/([a-z]+)(?: [A-Za-z#\[][^`]*)?`", prose(name))
    assert found
    assert set(found) <= {*COMMANDS, *ALIASES}


@pytest.mark.parametrize("name", CURRENT)
def test_variables_of_the_environment_exist(name: str) -> None:
    source = "".join(path.read_text("utf-8") for path in (ROOT / "src").rglob("*.py"))
    for variable in re.findall(r"\bRECOLLECT_[A-Z_]+\b", text_of(name)):
        assert variable in source, variable


def test_every_model_of_the_catalog_has_its_row() -> None:
    for name in CATALOG:
        assert f"| `{name}`" in text_of("docs/models.md")


def test_what_the_readme_says_of_models_is_in_the_catalog() -> None:
    page = text_of("README.md")
    default, better = CATALOG[DEFAULT_MODEL], CATALOG["qwen2.5-coder-1.5b"]
    name = default.parts[0].member.rpartition("/")[2].rpartition(".Q")[0]
    assert f"the default model ({name}, {format_bytes(default.bytes)})" in page
    assert f"`recollect chat --model {better.name}` fetches {format_bytes(better.bytes)}" in page


def test_the_readme_is_read_in_a_minute_or_two() -> None:
    assert len(text_of("README.md").splitlines()) <= 130


# Code


def check_python(block: str) -> None:
    compile(block, "block", "exec")


def check_json(block: str) -> None:
    """Accept one value, the members of an object, or an object in each line."""
    try:
        json.loads(block if block.startswith("{") else f"{{{block}}}")
    except json.JSONDecodeError:
        for line in block.splitlines():
            json.loads(line)


def check_shell(block: str) -> None:
    subprocess.run(["/bin/sh", "-n"], input=block, text=True, check=True)


def checked_elsewhere(block: str) -> None:
    """Accept what tests/clients runs (js), and what is tested line by line above (console)."""


CHECKS: dict[str, Callable[[str], object]] = {
    "python": check_python,
    "json": check_json,
    "toml": tomllib.loads,
    "yaml": yaml.safe_load,
    "sh": check_shell,
    "js": checked_elsewhere,
    "console": checked_elsewhere,
}


@pytest.mark.parametrize("name", NAMES)
def test_every_block_is_of_a_known_language_and_parses(name: str) -> None:
    for language, block in _FENCE.findall(text_of(name)):
        if language and not (name == "docs/heart.md" and language == "python"):  # quotes, indented
            CHECKS[language](block)


def test_every_page_with_python_is_run_somewhere() -> None:
    here = {name for name, _ in PROGRAMS}
    for name in CURRENT:
        if blocks(name, "python"):
            assert name in here or (ROOT / RUN_ELSEWHERE[name]).exists(), name


PROGRAMS = [
    (name, number)
    for name in CURRENT
    if name not in RUN_ELSEWHERE
    for number in range(len(blocks(name, "python")))
]


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[[str], list[str]]]:
    """Return what runs Python on the model without weights, and returns the lines that it prints."""
    load = recollect.load
    models = []
    monkeypatch.setenv("RECOLLECT_HOME", str(tmp_path / "home"))

    def load_reference(model: str = "", **options: Any) -> recollect.Model:
        del model
        models.append(load("reference", **options))
        return models[-1]

    def run_code(code: str) -> list[str]:
        exec(code, {})  # noqa: S102 - our own documents
        return capsys.readouterr().out.splitlines()

    monkeypatch.setattr(recollect, "load", load_reference)
    yield run_code
    for model in models:
        model.close()


@pytest.mark.few(1)
@pytest.mark.parametrize(("name", "number"), PROGRAMS)
def test_python_runs(
    name: str, number: int, run: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = blocks(name, "python")[number]
    if "unlock" in code:
        recollect.encrypt(passphrase="…")
    run(code)


@pytest.mark.slow
def test_the_ten_lines_reuse_what_the_branches_share(run: Callable[[str], list[str]]) -> None:
    (code,) = blocks("README.md", "python")
    assert len(code.splitlines()) <= 10
    *_, reused = run(code)
    assert int(reused) > 50


@pytest.mark.slow
def test_json_and_tools_keep_to_their_schemas(run: Callable[[str], list[str]]) -> None:
    (code,) = [code for code in blocks("docs/python.md", "python") if "json_schema" in code]
    answer, _, logprob = run(code)[0].rpartition(" ")
    assert isinstance(json.loads(answer)["name"], str)
    assert float(logprob) < 0


def test_what_the_library_is_said_to_have_is_there() -> None:
    page = text_of("docs/python.md")
    table = page[page.index("| to | call |") : page.index("`usage` says")]
    for method in re.findall(r"`(\w+)\(", table):
        assert callable(getattr(recollect.Session, method)), method


def test_the_servers_first_words_are_those_that_are_shown() -> None:
    shown = {
        line
        for name in CURRENT
        for block in blocks(name, "console")
        for line in block.splitlines()
        if line.startswith("Listening on")
    }
    assert shown == {"Listening on http://127.0.0.1:8765/v1 (no API key); Ctrl-C stops."}
