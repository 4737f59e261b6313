"""
`--no-save` leaves nothing, looked for in the bytes of real files.

Nothing outside `models/` may be new or changed and hold twelve characters of what was typed, or four
consecutive token ids of it as numbers of 32 or 64 bits. On the reference model a byte is a token id.
"""

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recollect.text.tokenizer import ByteTokenizer

if sys.platform == "win32":
    pytest.skip("there are no pseudo-terminals", allow_module_level=True)

RECOLLECT = [sys.executable, "-m", "recollect"]
REFERENCE = ["--model", "reference", "--ignore-eos", "-n", "40"]
SECRETS = [
    "the quick zebra hides 12 jade onyx boxes",
    "my grandmother's maiden name is Vexworthy-Quill",
]
SYSTEM = "instructions that nobody else may ever read"


@pytest.fixture
def folders(tmp_path: Path, environment: dict[str, str]) -> list[Path]:
    """Return all places that a program could write to; the environment points there."""
    del environment["RECOLLECT_HOME"]  # so that the user's data folder is in use
    names = {
        "HOME": "user",
        "TMPDIR": "temporary",
        "XDG_CACHE_HOME": "cache",
        "XDG_CONFIG_HOME": "config",
        "XDG_DATA_HOME": "data",
        "XDG_STATE_HOME": "state",
    }
    for variable, name in names.items():
        (tmp_path / name).mkdir()
        environment[variable] = str(tmp_path / name)
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    return [tmp_path]


def needles(text: str) -> Iterator[bytes]:
    """Yield all that gives *text* away."""
    data = text.encode()
    yield from (data[start : start + 12] for start in range(len(data) - 11))
    yield from (text[start : start + 12].encode("utf-16-le") for start in range(len(text) - 11))
    ids = ByteTokenizer().encode(text)
    for start in range(len(ids) - 3):
        for width in ("<i4", "<i8", ">i4", ">i8"):
            yield np.array(ids[start : start + 4], width).tobytes()


def snapshot(folders: list[Path]) -> dict[Path, bytes]:
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    return {file: file.read_bytes() for file in files if "models" not in file.parts}


def given_away(folders: list[Path], before: dict[Path, bytes]) -> set[str]:
    """Return the files that are new or changed and hold something of what was typed."""
    wanted = {needle for text in (*SECRETS, SYSTEM) for needle in needles(text)}
    return {
        file.name
        for file, content in snapshot(folders).items()
        if content != before.get(file) and any(needle in content for needle in wanted)
    }


def hold_a_chat(spawn: Callable[..., Any], *arguments: str) -> None:
    """Type the secrets into a chat, slowly enough to be read ahead, and leave it in peace."""
    child = spawn(*REFERENCE, "--system", SYSTEM, *arguments)
    for text in SECRETS:
        child.send(text)
        time.sleep(0.7)  # what is typed is read after half a second
        child.send("\r")
        child.expect(r"tok/s")
        child.expect_exact("you>")
    child.send("/fork other\r")
    child.expect_exact("you (other)>")
    child.send("/save here\r")
    child.expect_exact("you (other)>")
    child.send("/quit\r")
    child.wait()


def pipe(environment: dict[str, str], *arguments: str) -> None:
    subprocess.run(  # noqa: S603 - our own command
        [*RECOLLECT, "chat", *REFERENCE, "--system", SYSTEM, *arguments],
        input="\n".join(SECRETS),
        capture_output=True,
        text=True,
        env=environment,
        check=True,
        timeout=60,
    )


def test_a_chat_leaves_nothing(
    spawn: Callable[..., Any], environment: dict[str, str], folders: list[Path]
) -> None:
    pipe({**environment}, "--name", "before", "--prompts", "/dev/null")  # a home that is there
    before = snapshot(folders)
    hold_a_chat(spawn, "--no-save")
    assert given_away(folders, before) == set()


@pytest.mark.parametrize("arguments", [[], ["--lines"], ["--json"]])
def test_a_pipe_leaves_nothing(
    arguments: list[str], environment: dict[str, str], folders: list[Path]
) -> None:
    pipe(environment, "--no-save", *arguments)
    assert given_away(folders, {}) == set()


def test_a_file_of_prompts_leaves_nothing(
    environment: dict[str, str], folders: list[Path], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(SECRETS))
    before = snapshot(folders)
    pipe(environment, "--no-save", "--prompts", str(prompts))
    assert given_away(folders, before) == set()


def talk_to(url: str) -> None:
    messages = [{"role": "system", "content": SYSTEM}]
    for text in SECRETS:
        messages.append({"role": "user", "content": text})
        body = {"model": "reference", "messages": messages, "max_tokens": 20}
        request = urllib.request.Request(  # noqa: S310 - our own server
            f"{url}/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310 - as above
            messages.append(json.load(answer)["choices"][0]["message"])


def test_a_server_without_a_disk_leaves_nothing_of_what_it_does_not_keep(
    environment: dict[str, str], folders: list[Path]
) -> None:
    with subprocess.Popen(  # noqa: S603 - our own command
        [*RECOLLECT, "serve", "--model", "reference", "--port", "0", "--kv-disk", "0"],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as server:
        try:
            assert server.stderr is not None
            line = next(line for line in server.stderr if "Listening on" in line)
            talk_to(line.split("Listening on ")[1].split()[0])
        finally:
            server.terminate()
    assert given_away(folders, {}) == set()


def test_a_chat_that_is_kept_is_found_by_the_same_search(
    spawn: Callable[..., Any], folders: list[Path]
) -> None:
    hold_a_chat(spawn)
    found = given_away(folders, {})
    assert "history" in found
    assert "data.mdb" in found
    assert any(name.startswith("conversations.sqlite3") for name in found)


def test_a_pipe_without_a_name_keeps_what_its_help_says(
    environment: dict[str, str], folders: list[Path]
) -> None:
    pipe(environment)
    assert given_away(folders, {}) == {"data.mdb"}
    done = subprocess.run(  # noqa: S603 - our own command
        [*RECOLLECT, "chat", "--help"],
        capture_output=True,
        text=True,
        env={**environment, "COLUMNS": "300"},
        check=True,
    )
    said = " ".join(done.stdout.replace("│", " ").split())
    assert (
        "Without --name, a pipe and a QUESTION save no conversation either, but they write the"
        in said
    )
    assert "write the cache" in said


def test_who_asks_for_kv_on_disk_gets_it(environment: dict[str, str], folders: list[Path]) -> None:
    pipe(environment, "--no-save", "--kv-disk", "64MB")
    assert given_away(folders, {}) == {"data.mdb"}
