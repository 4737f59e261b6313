"""Where the exports are: made once, in an environment of their own, and kept for later runs."""

import hashlib
import os
import subprocess
import sys
import venv
from functools import partial
from pathlib import Path

import platformdirs
import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def exports_folder() -> Path:
    """
    Return the folder with one export for each kind of model, named by what makes them.

    Outside of CI nothing is installed: `python -m pytest -m model tests/exports` with
    RECOLLECT_MAKE_EXPORTS=1 makes them, which takes some minutes and 2 GB.
    """
    parts = [(HERE / name).read_bytes() for name in ("make_exports.py", "requirements.txt")]
    digest = hashlib.sha256(b"".join(parts)).hexdigest()[:12]
    cache = platformdirs.user_cache_path("recollect") / "tests"
    folder = cache / f"exports-{digest}"
    if not (folder / "whole").exists():
        if "CI" not in os.environ and "RECOLLECT_MAKE_EXPORTS" not in os.environ:
            pytest.skip("needs exported models: set RECOLLECT_MAKE_EXPORTS=1 to make them")
        _make(folder, cache / f"exporter-{digest}")
        (folder / "whole").touch()
    return folder


def _make(folder: Path, environment: Path) -> None:
    python = environment / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    if not python.exists():
        venv.create(environment, with_pip=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "--requirement"]
    run = partial(subprocess.run, check=True)
    run([*install, str(HERE / "requirements.txt")])
    # It comes along, and a build for other versions of torch cannot even be imported.
    run([str(python), "-m", "pip", "uninstall", "-qy", "torchvision"])
    folder.mkdir(parents=True, exist_ok=True)
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    run(
        [str(python), str(HERE / "make_exports.py"), str(folder)],
        env={**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"},
    )
