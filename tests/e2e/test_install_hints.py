"""
Every hint of how to install something works: it names this distribution, and extras that it has.

On PyPI `recollect` is somebody else's library, so that a hint with that name installs strangers' code.
The fast part compares words with pyproject.toml; the slow one builds the wheel, installs it into a
fresh environment with its own dependencies alone, and follows the hints that commands print there.
"""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, distribution
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
NAME = "recollect-llm"
EXTRAS = set(PROJECT["optional-dependencies"])

_WORD = r"""["']?(?:-*\w[\w.-]*|\.)(?:\[[\w,-]*\])?["']?"""
HINT = re.compile(rf"pip install((?: +{_WORD})+)")
OURS = re.compile(r"\brecollect(?:-llm)?\[([^\]{}'\"]*)\]")


def texts() -> Iterator[tuple[str, str]]:
    """Yield what people are told: documents as they are, and the strings of programs."""
    documents = [
        ROOT / "README.md",
        ROOT / "ARCHITECTURE.md",
        *sorted((ROOT / "docs").glob("*.md")),
    ]
    for path in documents:
        yield str(path.relative_to(ROOT)), path.read_text("utf-8")
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield str(path.relative_to(ROOT)), node.value
            elif isinstance(node, ast.JoinedStr):
                parts = [str(getattr(part, "value", "…")) for part in node.values]
                yield str(path.relative_to(ROOT)), "".join(parts)


def hints() -> Iterator[tuple[str, str]]:
    """Yield each requirement that somebody is told to install, and where."""
    for where, text in texts():
        for found in HINT.findall(text):
            for word in found.split():
                if not (requirement := word.strip("\"'")).startswith("-"):
                    yield where, requirement


def known_names() -> set[str]:
    """Return the distributions that this one knows: itself and what it depends on."""
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    # llama.cpp's binding, which people build for their graphics card, is no dependency of ours.
    return {
        NAME,
        "llama-cpp-python",
        *(canonicalize_name(Requirement(one).name) for one in chain(*groups)),
    }


def test_the_distribution_is_not_the_name_of_somebody_elses() -> None:
    assert PROJECT["name"] == NAME


def test_hints_are_found() -> None:
    found = {requirement for _, requirement in hints()}
    assert {"recollect-llm[server]", "recollect-llm[grammar]", "recollect-llm[plot]"} <= found


def test_every_hint_names_this_distribution_and_an_extra_that_it_has() -> None:
    wrong = []
    for where, requirement in hints():
        parsed = Requirement(re.sub(r"^\.", NAME, requirement))  # from the folder of the sources
        if canonicalize_name(parsed.name) not in known_names():
            wrong.append((where, requirement, "is no distribution of ours"))
        if parsed.extras - EXTRAS:
            wrong.append((where, requirement, "has no such extra"))
    assert wrong == []


def test_every_mention_of_an_extra_is_of_this_distribution() -> None:
    for where, text in texts():
        for found in OURS.finditer(text):
            assert found[0].startswith(f"{NAME}["), (where, found[0])
            assert set(found[1].split(",")) <= EXTRAS, (where, found[0])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", str(ROOT)]
    subprocess.run([*command, "--wheel-dir", str(folder)], check=True)  # noqa: S603 - our own
    (built,) = folder.glob("*.whl")
    return built


class Fresh:
    """An environment with the wheel, and of other packages only those that it asks for."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        venv.create(folder, with_pip=True, symlinks=True)
        self.wheel = wheel
        self.folder = folder
        self.python = folder / "bin" / "python"
        (self.site,) = folder.glob("lib/python*/site-packages")
        self.require(self.pip("install", "--quiet", "--no-deps", str(wheel)))
        self.add(None)

    def run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {
            "RECOLLECT_HOME": str(self.folder / "home"),
            "RECOLLECT_PASSPHRASE": "secret",
            "RECOLLECT_OFFLINE": "1",
        }
        return subprocess.run(  # noqa: S603 - our own command
            [str(self.python), *arguments],
            capture_output=True,
            text=True,
            cwd=self.folder,
            env=environment,
            timeout=120,
            check=False,
        )

    def pip(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return self.run("-m", "pip", "--disable-pip-version-check", *arguments)

    @staticmethod
    def require(done: "subprocess.CompletedProcess[str]") -> None:
        assert done.returncode == 0, done.stderr

    def add(self, extra: str | None) -> None:
        """
        Install what the wheel asks for, of the packages that the tests run with.

        By links, because downloading OpenVINO anew for each run would take minutes.
        """
        for name in needed(Requirement(NAME if extra is None else f"{NAME}[{extra}]"), self.site):
            for top in {file.parts[0] for file in distribution(name).files or ()} - {"..", "/"}:
                source = Path(str(distribution(name).locate_file(top)))
                if source.exists() and not (self.site / top).exists():
                    (self.site / top).symlink_to(source)


def needed(root: Requirement, site: Path) -> set[str]:
    """Return the distributions that a requirement brings, itself apart."""
    metadata = next(site.glob("recollect_llm-*.dist-info")) / "METADATA"
    own = re.findall(r"^Requires-Dist: (.*)$", metadata.read_text("utf-8"), re.MULTILINE)
    found: set[str] = set()
    waiting, seen = [root], set[str]()
    while waiting:
        requirement = waiting.pop()
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        if canonicalize_name(requirement.name) == NAME:
            children: Iterable[str] = own
        else:
            found.add(requirement.name)
            children = distribution(requirement.name).requires or ()
        for child in map(Requirement, children):
            extras = requirement.extras or {""}
            if child.marker is None or any(child.marker.evaluate({"extra": e}) for e in extras):
                waiting.append(child)
    return found


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Fresh:
    return Fresh(tmp_path_factory.mktemp("fresh") / "venv", wheel)


GRAMMAR = (
    "import recollect as r; p = r.SamplingParams(grammar=r.Grammar.json_object(), max_tokens=3);"
    "m = r.load('reference'); m.session().respond('x', params=p); m.close()"
)
# What needs the extra; the last ones are asked for what only the libraries of the extra can tell.
ASKS = {
    "server": ("-m", "recollect", "serve", "--model", "reference", "--port", "0", "--alias", "a=b"),
    "encrypt": ("-m", "recollect", "encrypt"),
    "grammar": ("-c", GRAMMAR),
    "plot": ("-m", "recollect", "bench", "--model", "reference", "--plot", "nowhere/x.png"),
    "genai": ("-m", "recollect", "chat", "--model", "onnx", "--prompts", os.devnull),
    "convert": ("-m", "recollect", "convert", "reference", "out"),
}  # fmt: skip


@pytest.mark.slow
def test_the_wheel_is_what_the_hints_name(wheel: Path, fresh: Fresh) -> None:
    metadata = next(fresh.site.glob("recollect_llm-*.dist-info")) / "METADATA"
    text = metadata.read_text("utf-8")
    assert re.findall(r"^Name: (.*)$", text, re.MULTILINE) == [NAME]
    assert set(re.findall(r"^Provides-Extra: (.*)$", text, re.MULTILINE)) == EXTRAS
    assert fresh.run("-m", "recollect", "--version").returncode == 0
    ours = {word for _, word in hints() if word.startswith("recollect")}
    index = ("--no-index", "--find-links", str(wheel.parent))
    done = fresh.pip("install", "--dry-run", "--no-deps", "--force-reinstall", *index, *ours)
    fresh.require(done)
    assert "does not provide the extra" not in done.stderr
    assert f"Would install {NAME}" in done.stdout


@pytest.mark.slow
def test_the_wheel_has_every_file_of_the_page(wheel: Path) -> None:
    """Licences of the libraries and the types among them, byte by byte."""
    source = ROOT / "src"
    here = {
        path.relative_to(source).as_posix(): path.read_bytes()
        for path in (source / "recollect" / "web").rglob("*")
        if path.is_file()
    }
    with zipfile.ZipFile(wheel) as files:
        names = {name for name in files.namelist() if name.startswith("recollect/web/")}
        assert {name: files.read(name) for name in names} == here
    assert "recollect/web/index.html" in here
    assert "recollect/web/vendor/licences/marked.txt" in here


@pytest.mark.slow
def test_where_an_extra_is_missing_the_hint_is_the_one_that_works(fresh: Fresh) -> None:
    write_onnx_folder(fresh.folder / "onnx")
    for extra, command in ASKS.items():
        complaint = fresh.run(*command).stderr
        (hint,) = set(OURS.findall(complaint)) or {f"no hint: {complaint}"}
        assert extra in hint.split(",")
        try:
            for one in hint.split(","):
                fresh.add(one)
        except PackageNotFoundError as missing:
            if extra == "convert" and "CI" not in os.environ:
                continue  # torch is larger than everything else
            pytest.fail(f"the tests run without {missing}, which {extra} brings")
        after = fresh.run(*command)
        assert "pip install" not in after.stderr, extra
        assert "ModuleNotFoundError" not in after.stderr, extra


def write_onnx_folder(folder: Path) -> None:
    """Write what looks like a model for ONNX Runtime GenAI up to where the library reads it."""
    folder.mkdir()
    model = {
        "type": "llama",
        "context_length": 64,
        "eos_token_id": 1,
        "vocab_size": 3,
        "decoder": {
            "filename": "model.onnx",
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "num_hidden_layers": 1,
            "head_size": 8,
            "hidden_size": 8,
        },
    }
    vocabulary = {"a": 0, "b": 1, "c": 2}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "a"},
    }
    (folder / "genai_config.json").write_text(json.dumps({"model": model}))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (folder / "model.onnx").write_bytes(b"\x08\x08")  # the version of a graph without nodes
