"""What the page is made of: types, and libraries as their makers published them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import vendor  # noqa: E402 - a script beside this file

WEB = vendor.VENDOR.parent


def test_libraries_are_what_npm_has(modules: Path) -> None:
    known = {target for _, target in vendor.copies(modules)} | {vendor.VENDOR / "README.md"}
    assert {path for path in vendor.VENDOR.rglob("*") if path.is_file()} == known
    for source, target in vendor.copies(modules):
        assert target.read_bytes() == source.read_bytes(), target.name
    assert (vendor.VENDOR / "README.md").read_text("utf-8") == vendor.table(modules)


def test_types_are_right(modules: Path, tmp_path: Path) -> None:
    (tmp_path / "node_modules").symlink_to(modules)
    (tmp_path / "web").mkdir()
    for path in [*WEB.glob("*.js"), *WEB.glob("*.ts")]:
        shutil.copy(path, tmp_path / "web")
    for name in ("tsconfig.json", "libraries.d.ts"):
        shutil.copy(HERE / name, tmp_path)
    done = subprocess.run(  # noqa: S603 - the compiler that npm installed
        [str(modules / ".bin" / "tsc"), "-p", "."],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
