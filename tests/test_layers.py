"""Imports point downward only and never in a circle; modules are few, small, and there for a reason."""

import ast
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

import recollect

pytestmark = pytest.mark.xdist_group("layers")  # one worker parses the modules, and not each
PACKAGE = Path(recollect.__file__).parent
TESTS = Path(__file__).parent

# What each part may import besides itself; the drawing in ARCHITECTURE.md as a table.
BASE = {"types", "errors", "config", "encryption", "files"}
ALLOWED: dict[str, set[str]] = {
    "types": {"errors"},
    "errors": set(),
    "config": {"types", "errors"},
    "encryption": {"types", "errors", "config", "files"},
    "files": {"types", "errors"},
    "starting": set(),
    "text": BASE,
    "kv": BASE,
    "runtime": BASE,
    "models": BASE | {"text"},
    "journal": BASE | {"kv"},
    "engine": BASE | {"kv", "runtime", "text"},
    "remote": BASE | {"text", "kv", "runtime", "models", "engine"},
    "conversation": BASE | {"text", "kv", "runtime", "models", "engine", "journal", "remote"},
    "proof": BASE
    | {"text", "kv", "runtime", "models", "engine", "journal", "remote", "conversation"},
    "og": BASE | {"text", "kv", "runtime", "models", "engine", "journal", "conversation"},
    "llm_plugin": BASE | {"text", "models", "conversation"},
    "server": BASE
    | {"text", "kv", "runtime", "models", "engine", "journal", "remote", "conversation"},
    "cli": BASE
    | {"starting", "text", "kv", "runtime", "models", "engine", "journal", "remote", "conversation"}
    | {"proof", "server"},
    "__main__": BASE | {"cli"},
}
# The package itself may be imported where a user's view is shown: it stands above `conversation`.
MAY_IMPORT_THE_PACKAGE = {"proof", "cli", "server", "__main__"}

MODULES = sorted(PACKAGE.rglob("*.py"))
SINCE = (
    "reading GGUF for the proof",
    "explain",
    "the parts of requests",
    "what is said without a terminal",
    "what /set changes",
    "the clipboard",
    "doctor",
    "downloads",
    "the list of models",
    "models that other programs keep",
    "reasoning in replies",
    "what is told of replies",
    "which blocks Markdown has",
    "what Markdown looks like",
    "how each family of models writes calls",
    "finding those calls",
    "the parts of calls",
    "how templates take calls",
    "the grammar of calls",
    "replies with calls in prompts",
    "rows of Markdown that are drawn again",
    "the library of llama.cpp",
    "the arrangement of its states",
    "a model of llama.cpp",
    "the runtime of llama.cpp",
    "Ollama's API",
    "the audit of the heart",
    "replies that repeat themselves",
    "a reply on the terminal",
    "the tokenizer of llama.cpp",
    "the table of formats",
    "the page",
    "opening the page in a browser",
    "searches in all conversations",
    "searches over HTTP, and lists of what a conversation has",
    "the commands for checkpoints",
    "chats of clients that are kept",
    "a plugin for llm",
    "replies on an event loop",
    "what is tried beside each other, and what came of it",
    "replies that are tried beside each other",
    "what has changed in the journal",
    "events",
    "the last of them",
    "events on their way to clients",
    "the endpoints that only watch",
    "conversations as they were read",
    "what going on would cost",
    "those over HTTP",
    "the contract of decoders",
    "the part of engines elsewhere",
    "requests to them",
    "vLLM",
    "llama-server",
    "their replicas",
    "the engine that they are together",
    "trying them out",
    "tokenizers without weights",
    "proving reuse elsewhere",
    "marks of reasoning, found from a template",
    "what is said of that",
    "what the prefix cache took up and evicted, in numbers",
    "guesses of what a reply says next",
    "the logits after prompts that were read lately",
    "how many threads of llama.cpp compute, and how they wait",
    "text from ids as they come",
    "a smaller model that guesses",
    "what a memory budget holds, with that model's KV",
)
"""What a module was added for each, since there were 105."""
MOST_MODULES = 105 + len(SINCE)
MOST_LINES = 400
FEW_LINES = 60
HEART = {"engine.sequence", "engine.scheduler", "engine.engine", "kv.blocks", "kv.prefix"}
MOST_HEART_LINES = 1000  # can be read in one evening; docs/heart.md walks through it
SHARED_FILE_NAMES = {"__init__.py", "base.py"}
REASON = "On its own because"  # how the sentence begins that says why a small module is one


def name_of(path: Path) -> str:
    """Return what a module is called: `recollect.kv.blocks`, or `recollect.kv` for its front."""
    parts = ("recollect", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST, package: tuple[str, ...]) -> Iterator[str]:
    """Yield the full names that a module imports, wherever in it and under whatever condition."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            # `from recollect import config` imports the module recollect.config.
            yield from (f"{module}.{alias.name}" for alias in node.names)


@cache
def source_of(path: Path) -> str:
    """Return the text of a module of ours."""
    return path.read_text("utf-8")


@cache
def tree_of(path: Path) -> ast.Module:
    """Return a module of ours as it was parsed once."""
    return ast.parse(source_of(path))


@cache
def imports_of(path: Path) -> frozenset[str]:
    """Return the full names that a module of ours imports."""
    package = ("recollect", *path.relative_to(PACKAGE).parent.parts)
    return frozenset(imported(tree_of(path), package))


def own_imports(path: Path) -> set[str]:
    """Return the parts of recollect that a module imports; "" stands for the package itself."""
    parts = set()
    for name in imports_of(path):
        top, _, rest = name.partition(".")
        if top == "recollect":
            part = rest.split(".")[0]
            exists = (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").is_file()
            parts.add(part if part and exists else "")
    return parts


def forbidden_imports(path: Path) -> set[str]:
    """Return the parts of recollect that a module imports and may not."""
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part == "__init__":
        return set()  # the package's front: it may name everything below the faces
    allowed = ALLOWED[part] | {part}
    if part in MAY_IMPORT_THE_PACKAGE:
        allowed |= {""}
    return own_imports(path) - allowed


@cache
def import_graph() -> dict[str, set[str]]:
    """Return for every module of ours which others of ours it imports."""
    paths = {name_of(path): path for path in MODULES}

    def module(name: str) -> str:
        """Return the module that a full name is, or is in."""
        while name and name not in paths:
            name = name.rpartition(".")[0]
        return name

    return {
        name: {module(other) for other in imports_of(path)} - {name, ""}
        for name, path in paths.items()
    }


def circles(graph: Mapping[str, set[str]]) -> set[frozenset[str]]:
    """Return the groups of modules in which each one leads to each other one."""

    def led_to(start: str) -> set[str]:
        reached, ahead = set[str](), [start]
        while ahead:
            new = graph[ahead.pop()] - reached
            reached |= new
            ahead += new
        return reached

    reached = {name: led_to(name) for name in graph}
    return {
        frozenset(other for other in reached[name] if name in reached[other])
        for name in graph
        if name in reached[name]
    }


def test_imports_point_downward_only() -> None:
    found = {name_of(path): forbidden for path in MODULES if (forbidden := forbidden_imports(path))}
    assert found == {}


def test_no_imports_go_in_a_circle() -> None:
    """Not for types alone either: what knows of each other cannot be read one after the other."""
    assert circles(import_graph()) == set()


def test_the_front_of_the_package_does_not_import_its_faces() -> None:
    assert (
        own_imports(PACKAGE / "__init__.py") & {"cli", "llm_plugin", "og", "proof", "server"}
        == set()
    )


@cache
def private_names() -> frozenset[str]:
    """Return the names with one underscore that modules, classes and objects of ours have."""
    names: set[str] = set()
    for node in (node for path in MODULES for node in ast.walk(tree_of(path))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.id if isinstance(node, ast.Name) else node.attr)
    return frozenset(name for name in names if name.startswith("_") and not name.endswith("__"))


PATCHERS = {"setattr", "delattr", "getattr", "hasattr", "object", "patch"}


def private_uses(tree: ast.AST) -> Iterator[str]:
    """
    Yield the private names of ours that a test reads, imports, or names to what patches.

    What an object of the test calls its own, `self._name`, is its own business.
    """
    for node in ast.walk(tree):
        used: list[str] = []
        if isinstance(node, ast.Attribute):
            is_own = isinstance(node.value, ast.Name) and node.value.id in {"self", "cls"}
            used = [] if is_own else [node.attr]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("recollect"):
            used = [alias.name for alias in node.names]
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func
            called = called.id if isinstance(called, ast.Name) else called
            if called in PATCHERS:
                texts = [one.value for one in node.args if isinstance(one, ast.Constant)]
                used = [name for text in texts if isinstance(text, str) for name in text.split(".")]
        yield from (name for name in used if name in private_names())


PRIVATE_USES: dict[str, set[str]] = {
    # The state of a grammar shows in a reply only where chance takes it to the token that is wrong.
    "unit/engine/test_grammar.py": {"_grammar"},
}
"""By file the private names that a test may use, with the reason."""


def test_tests_look_at_what_is_public() -> None:
    """So that a module can be rewritten inside, and its tests still say whether it is right."""
    found = {
        path.relative_to(TESTS).as_posix(): uses
        for path in sorted(TESTS.rglob("*.py"))
        if (uses := set(private_uses(ast.parse(path.read_text("utf-8")))))
    }
    assert found == PRIVATE_USES


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("monkeypatch.setattr(Engine, '_run', None)", ["_run"]),
        ("monkeypatch.setattr('recollect.engine.engine.Engine._run', None)", ["_run"]),
        ("from recollect.engine.engine import _run", ["_run"]),
        ("engine._run()", ["_run"]),
        ("self.engine._run()", ["_run"]),
        ("self._run()", []),
        ("os._exit(1)", []),
        ("engine.run()", []),
    ],
)
def test_the_check_sees_every_use_of_a_private_name(source: str, expected: list[str]) -> None:
    assert list(private_uses(ast.parse(source))) == expected


@cache
def lines_of_code(source: str) -> int:
    """Return how many lines of a module are neither blank nor part of a docstring."""
    explained: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        # Any string that stands alone: docstrings, and those below an attribute.
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            explained.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(source.splitlines(), start=1)
    return sum(bool(line.strip()) and number not in explained for number, line in lines)


def test_the_page_names_modules_that_exist() -> None:
    """ARCHITECTURE.md is read by those who look for the place of a change."""
    page = (Path(__file__).parents[1] / "ARCHITECTURE.md").read_text("utf-8")
    parts = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    named = {name for name in re.findall(r"`(\w+/\w+)`", page) if name.split("/")[0] in parts}
    there = {path.relative_to(PACKAGE).with_suffix("").as_posix() for path in MODULES}
    assert named - there == set()
    inner = {name for name in there if "/" in name and not name.endswith("__init__")}
    # Commands are found by their own names.
    assert {name for name in inner - named if name.split("/")[0] != "cli"} == set()


def test_there_are_few_modules() -> None:
    assert len(MODULES) <= MOST_MODULES


def test_modules_are_small() -> None:
    lengths = {name_of(path): lines_of_code(source_of(path)) for path in MODULES}
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES} == {}


def test_the_heart_can_be_read_in_one_evening() -> None:
    lengths = {name_of(path): lines_of_code(source_of(path)) for path in MODULES}
    heart = {name: lengths[f"recollect.{name}"] for name in HEART}
    assert sum(heart.values()) < MOST_HEART_LINES, heart


def test_no_two_modules_have_the_same_file_name() -> None:
    """A file is found by its name, in a traceback as in an editor."""
    names = Counter(path.name for path in MODULES if path.name not in SHARED_FILE_NAMES)
    assert {name for name, times in names.items() if times > 1} == set()


def test_small_modules_of_one_importer_say_why_they_are_on_their_own() -> None:
    importers = Counter(other for others in import_graph().values() for other in others)
    unexplained = [
        name_of(path)
        for path in MODULES
        if not path.stem.startswith("__")  # the fronts of packages, and what `python -m` runs
        if importers[name_of(path)] <= 1
        if lines_of_code(source_of(path)) < FEW_LINES
        if REASON not in (ast.get_docstring(tree_of(path)) or "")
    ]
    assert unexplained == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("", 0),
        ('"""One."""\n\nx = 1\n', 1),
        ('def f():\n    """\n    Two.\n    """\n    return 1\n', 2),
        ('class A:\n    x: int\n    """What x is."""\n', 2),
        ('x = """\ntext\n"""\n# a comment is read like code\n', 4),
    ],
)
def test_docstrings_and_blank_lines_are_not_counted(source: str, expected: int) -> None:
    assert lines_of_code(source) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import recollect.engine.engine", {"recollect.engine.engine"}),
        ("from recollect import config", {"recollect.config"}),
        ("from ..kv import blocks", {"recollect.kv.blocks"}),
        ("if TYPE_CHECKING:\n    from recollect.cli import main", {"recollect.cli.main"}),
        ("def f():\n    from recollect.cli.main import run", {"recollect.cli.main.run"}),
    ],
)
def test_the_check_sees_every_kind_of_import(source: str, expected: set[str]) -> None:
    assert set(imported(ast.parse(source), ("recollect", "runtime"))) == expected


@pytest.mark.parametrize(
    ("graph", "expected"),
    [
        ({"a": {"b"}, "b": set()}, set()),
        ({"a": {"b"}, "b": {"a"}, "c": {"a"}}, {frozenset("ab")}),
        (
            {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"e"}, "e": {"d"}},
            {frozenset("abc"), frozenset("de")},
        ),
    ],
)
def test_circles_are_found(graph: dict[str, set[str]], expected: set[frozenset[str]]) -> None:
    assert circles(graph) == expected
