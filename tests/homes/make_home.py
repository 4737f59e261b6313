"""
Make a home that later versions have to open: `python tests/homes/make_home.py NAME`.

It holds conversations with branches, a checkpoint, a warm text, KV, a key of a server and what a
client kept there, plain and encrypted. Beside it goes what was said, as the program that said it
heard it, and not as a reader of the files tells it. A home that is committed is never made again:
what it shows is that *its* version's files are still read.
"""

import json
import os
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

import recollect
from recollect.types import SamplingParams

PASSPHRASE = "correct horse"  # noqa: S105 - of a fixture that everybody may read
SHORT = SamplingParams(max_tokens=12, ignore_eos=True)
SYSTEM = "You are a careful assistant who keeps to what was said before, and says so."

Json = dict[str, Any]


def talk(home: Path) -> list[Json]:
    """Hold conversations in a home through the library; return each branch as it was heard."""
    branches: list[Json] = []

    def note(session: recollect.Session, conversation: str, tip: str) -> None:
        path = [
            {
                "role": node.role,
                "content": node.content,
                "token_ids": None if node.token_ids is None else list(node.token_ids),
            }
            for node in session.path()
        ]
        branches.append({"conversation": conversation, "tip": tip, "path": path})

    with recollect.load("reference", home=home, kv_disk=8 << 20) as model:
        plans = model.session(SYSTEM, name="plans")
        plans.respond("Where shall we go in spring?", params=SHORT)
        plans.respond("And how — by train? 列車で", params=SHORT)
        plans.checkpoint("before the tickets")
        idea = plans.fork(name="idea")
        plans.respond("Buy the tickets.", params=SHORT)
        idea.respond("Let us stay at home instead. \N{HOUSE BUILDING}", params=SHORT)
        other = model.session(name="notes")
        other.respond("Remember: the key is under the mat.", params=SHORT)
        other.undo()
        other.respond("Remember nothing.", params=SHORT)
        model.warm("A text that everybody asks about. " * 4, name="the text")
        note(plans, "plans", "main")
        note(idea, "plans", "idea")
        note(other, "notes", "main")
    return branches


def serve(home: Path, key: str) -> Json:
    """Keep a conversation through a server; return what its client was told."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "recollect", "serve", "--model", "reference"]
    environment = {**os.environ, "RECOLLECT_HOME": str(home), "RECOLLECT_PASSPHRASE": PASSPHRASE}
    if not (home / "encryption.json").exists():
        del environment["RECOLLECT_PASSPHRASE"]
    server = subprocess.Popen([*command, "--port", str(port)], env=environment)  # noqa: S603
    try:
        client = httpx.Client(
            base_url=f"http://127.0.0.1:{port}/v1",
            headers={"Authorization": f"Bearer {key}"},
            trust_env=False,
            timeout=60,
        )
        for _ in range(600):
            try:
                client.get("/models").raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.1)
        conversation = post(client, "/conversations", {"metadata": {"topic": "kept"}})
        said = {"model": "reference", "input": "Keep this.", "max_output_tokens": 16}
        first = post(client, "/responses", {**said, "conversation": conversation["id"]})
        checkpoint = post(
            client, f"/conversations/{conversation['id']}/checkpoint", {"name": "here"}
        )
        second = post(
            client, "/responses", {**said, "input": "And this.", "conversation": conversation["id"]}
        )
        messages = [{"role": "user", "content": "A chat that nobody keeps, but its client."}]
        chat = {"model": "reference", "messages": messages, "max_tokens": 12}
        reply = post(client, "/chat/completions", chat)["choices"][0]["message"]["content"]
        items = client.get(f"/conversations/{conversation['id']}/items?order=asc").json()
        time.sleep(6)  # KV is written while the server rests, after five seconds at the latest
    finally:
        server.terminate()
        server.wait()
    return {
        "key": key,
        "conversation": conversation["id"],
        "responses": [first["id"], second["id"]],
        "checkpoint": checkpoint,
        "texts": [
            first["output"][0]["content"][0]["text"],
            second["output"][0]["content"][0]["text"],
        ],
        "items": [item["id"] for item in items["data"]],
        "chat": [*messages, {"role": "assistant", "content": reply}],
    }


def post(client: httpx.Client, path: str, body: Json) -> Json:
    """Return the answer to a request, which has to be a good one."""
    answer = client.post(path, json=body)
    assert answer.is_success, answer.text
    value: Json = answer.json()
    return value


def make(home: Path) -> Json:
    """Fill a home; return what was said there."""
    branches = talk(home)
    key = subprocess.run(
        [sys.executable, "-m", "recollect", "keys", "add", "a client"],
        env={**os.environ, "RECOLLECT_HOME": str(home)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    return {"version": recollect.__version__, "branches": branches, "server": serve(home, key)}


def main(name: str) -> None:
    """Write `NAME-plain.tar.xz`, `NAME-encrypted.tar.xz` and a JSON file for each."""
    folder = Path(__file__).parent
    with tempfile.TemporaryDirectory() as scratch:
        for kind in ("plain", "encrypted"):
            home = Path(scratch) / kind
            home.mkdir(mode=0o700)
            if kind == "encrypted":
                recollect.encrypt(home, passphrase=PASSPHRASE)
                os.environ["RECOLLECT_PASSPHRASE"] = PASSPHRASE
            said = make(home)
            (folder / f"{name}-{kind}.json").write_text(
                json.dumps(said, ensure_ascii=False) + "\n", encoding="utf-8"
            )
            with tarfile.open(folder / f"{name}-{kind}.tar.xz", "w:xz") as archive:
                for file in sorted(home.iterdir()):
                    archive.add(file, file.name, filter=_anonymous)


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


if __name__ == "__main__":
    main(sys.argv[1])
