"""
Put the libraries of the page into the package, unchanged, out of what npm installed.

    python tests/browser/vendor.py FOLDER/node_modules

A test compares the files with npm's, so what is in the package is what its makers published.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
VENDOR = HERE.parents[1] / "src" / "recollect" / "web" / "vendor"

LANGUAGES = (
    *("bash", "cpp", "diff", "go", "java", "javascript", "json", "markdown"),
    *("python", "rust", "xml", "yaml"),
)
D3 = ("dispatch", "drag", "hierarchy", "selection", "zoom")
FILES: dict[str, dict[str, str]] = {
    "preact": {"dist/preact.mjs": "preact.mjs", "hooks/dist/hooks.mjs": "preact-hooks.mjs"},
    "@preact/signals": {"dist/signals.mjs": "signals.mjs"},
    "@preact/signals-core": {"dist/signals-core.mjs": "signals-core.mjs"},
    "htm": {"dist/htm.mjs": "htm.mjs"},
    "marked": {"lib/marked.esm.js": "marked.js"},
    "dompurify": {"dist/purify.min.js": "purify.js"},
    "@highlightjs/cdn-assets": {
        "es/core.min.js": "highlight.js",
        **{f"es/languages/{name}.min.js": f"languages/{name}.js" for name in LANGUAGES},
    },
    **{f"d3-{name}": {f"dist/d3-{name}.min.mjs": f"d3-{name}.mjs"} for name in D3},
    "@microsoft/fetch-event-source": {
        "lib/esm/fetch.js": "fetch-event-source/fetch.js",
        "lib/esm/parse.js": "fetch-event-source/parse.js",
    },
}
"""Of each package which files, and what they are called in `vendor`."""


def licence_of(package: str) -> str:
    """Return where the text of a package's licence is in `vendor`."""
    return f"licences/{package.removeprefix('@').replace('/', '-')}.txt"


def copies(modules: Path) -> Iterator[tuple[Path, Path]]:
    """Yield each file of npm's, and where it is in the package."""
    for package, files in FILES.items():
        for source, target in files.items():
            yield modules / package / source, VENDOR / target
        yield modules / package / "LICENSE", VENDOR / licence_of(package)


def table(modules: Path) -> str:
    """Return what `vendor/README.md` says: each package with its version and licence."""
    lines = [
        "# Libraries of the page",
        "",
        "Unchanged files of these packages of npm; `tests/browser/vendor.py` puts them here.",
        "",
        "| package | version | licence | its text |",
        "|---|---|---|---|",
    ]
    for package in FILES:
        about = json.loads((modules / package / "package.json").read_text("utf-8"))
        where = licence_of(package)
        lines.append(
            f"| {package} | {about['version']} | {about['license']} | [{where}]({where}) |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Copy everything out of the folder that the command line names."""
    modules = Path(sys.argv[1])
    for source, target in copies(modules):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    (VENDOR / "README.md").write_text(table(modules), "utf-8")


if __name__ == "__main__":
    main()
