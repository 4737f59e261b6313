"""Imports point downward only, and modules stay small."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import recollect

PACKAGE = Path(recollect.__file__).parent

# What each part may import besides itself; the drawing in ARCHITECTURE.md as a table.
BASE = {"types", "errors", "config", "encryption", "files", "_version"}
ALLOWED: dict[str, set[str]] = {
    "types": {"errors"},
    "errors": set(),
    "config": {"types", "errors"},
    "encryption": {"types", "errors", "config", "files"},
    "files": {"types", "errors"},
    "_version": set(),
    "starting": set(),
    "text": BASE,
    "kv": BASE,
    "runtime": BASE,
    "models": BASE | {"text"},
    "journal": BASE | {"kv"},
    "engine": BASE | {"kv", "runtime", "text"},
    "conversation": BASE | {"text", "kv", "runtime", "models", "engine", "journal"},
    "proof": BASE | {"text", "kv", "runtime", "models", "engine", "journal", "conversation"},
    "og": BASE | {"text", "kv", "runtime", "models", "engine", "journal", "conversation"},
    "server": BASE | {"text", "kv", "runtime", "models", "engine", "journal", "conversation"},
    "cli": BASE
    | {"starting", "text", "kv", "runtime", "models", "engine", "journal", "conversation"}
    | {"proof", "server"},
    "__main__": BASE | {"cli"},
}
# The package itself may be imported where a user's view is shown: it stands above `conversation`.
MAY_IMPORT_THE_PACKAGE = {"proof", "cli", "__main__"}

MODULES = sorted(PACKAGE.rglob("*.py"))


def module_id(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


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


def own_imports(path: Path) -> set[str]:
    """Return the parts of recollect that a module imports; "" stands for the package itself."""
    package = ("recollect", *path.relative_to(PACKAGE).parent.parts)
    names = imported(ast.parse(path.read_text("utf-8")), package)
    parts = set()
    for name in names:
        top, _, rest = name.partition(".")
        if top == "recollect":
            part = rest.split(".")[0]
            exists = (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").is_file()
            parts.add(part if part and exists else "")
    return parts


@pytest.mark.parametrize("path", MODULES, ids=module_id)
def test_imports_point_downward_only(path: Path) -> None:
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part == "__init__":
        return  # the package's front: it may name everything below the faces
    allowed = ALLOWED[part] | {part}
    if part in MAY_IMPORT_THE_PACKAGE:
        allowed |= {""}
    assert own_imports(path) - allowed == set()


def test_the_front_of_the_package_does_not_import_its_faces() -> None:
    assert own_imports(PACKAGE / "__init__.py") & {"cli", "og", "proof", "server"} == set()


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


@pytest.mark.parametrize("path", MODULES, ids=module_id)
def test_modules_have_at_most_400_lines_of_code(path: Path) -> None:
    assert lines_of_code(path.read_text("utf-8")) <= 400


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
