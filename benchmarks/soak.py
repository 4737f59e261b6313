"""
A server under clients that edit, cancel and hang up, for as long as one likes.

    python benchmarks/soak.py [--minutes 30] [--clients 8] [--short-chats 0] [--kv-disk-mib 0]
                              [--compare 60] [--model smollm2|reference]

Everything runs in one process, so that the engine's bookkeeping can be checked while it runs. At the
end: no block is leaked (`check()`), memory is flat after the first fifth, and replies of the profile
`exact`, drawn at random from all, equal those of a model that has never seen anything else.

`--short-chats` adds clients whose every request is a new chat on one system prompt, as those of a
service are; what is known of messages must stay within its bounds. With `--kv-disk-mib` KV and the
ids of replies are on disk too, in a folder that goes with the run.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import httpx
import psutil
import uvicorn

import recollect
from harness import say
from recollect.kv.disk import DiskStore
from recollect.server.access import Keyring
from recollect.server.app import create_app
from recollect.server.hub import ModelHub
from recollect.server.settings import Limits, Settings
from recollect.types import Message
from traces import text_of

FLAT_BYTES = 64 << 20
"""Memory may grow by this after the first fifth: texts and token ids of conversations are kept."""


@dataclass
class Soak:
    """What came of it so far."""

    url: str
    ends_at: float
    model: recollect.Model
    requests: int = 0
    short_chats: int = 0
    cancelled: int = 0
    refused: int = 0
    whole: list[tuple[list[int], int, str]] = field(default_factory=list)
    """The token ids of some conversations, how long their replies might be, and those, to be generated
    anew; any is as likely as any other."""
    most: int = 60
    """Of those."""
    replies: int = 0
    """That could be compared."""

    def keep(self, messages: list[Message], limit: int, text: str, dice: random.Random) -> None:
        """Draw without knowing how many there will be: the nth replaces one with odds of most / n."""
        self.replies += 1
        place = len(self.whole) if len(self.whole) < self.most else dice.randrange(self.replies)
        if place < self.most:
            # Now, while it is known which ids earlier replies had.
            path = self.model.session_from(messages).path()
            prompt = self.model.prompts.encode(path).token_ids
            self.whole[place : place + 1] = [(prompt, limit, text)]


async def be_a_client(soak: Soak, number: int) -> None:
    """Talk, change what was said, and leave in the middle, until the time is over."""
    dice = random.Random(number)  # noqa: S311 - not for secrets
    system = text_of(random.Random(number % 3), 60)  # noqa: S311 - shared by some
    messages: list[Message] = [{"role": "system", "content": system}]
    async with httpx.AsyncClient(trust_env=False, timeout=120) as client:
        while monotonic() < soak.ends_at:
            if len(messages) > 20 or dice.random() < 0.1:
                del messages[1:]
            elif dice.random() < 0.3:  # an edit: back to some turn
                del messages[1 + 2 * dice.randrange(len(messages) // 2 + 1) :]
            messages.append({"role": "user", "content": text_of(dice, dice.randint(3, 40))})
            text = await say_it(soak, client, messages, dice)
            if text is None:
                messages.pop()
            else:
                messages.append({"role": "assistant", "content": text})


async def be_a_service(soak: Soak, number: int) -> None:
    """Begin one short chat after the other on the system prompt that all of these have."""
    dice = random.Random(1000 + number)  # noqa: S311 - not for secrets
    system: Message = {"role": "system", "content": text_of(random.Random(7), 60)}  # noqa: S311
    async with httpx.AsyncClient(trust_env=False, timeout=120) as client:
        while monotonic() < soak.ends_at:
            asked: Message = {"role": "user", "content": text_of(dice, dice.randint(3, 12))}
            text = await say_it(soak, client, [system, asked], dice)
            soak.short_chats += 1
            if text is not None and dice.random() < 0.2:
                more: Message = {"role": "user", "content": text_of(dice, 5)}
                said: list[Message] = [system, asked, {"role": "assistant", "content": text}, more]
                await say_it(soak, client, said, dice)


async def say_it(
    soak: Soak, client: httpx.AsyncClient, messages: list[Message], dice: random.Random
) -> str | None:
    """Ask; return the reply, or None where it was left or refused."""
    body: dict[str, Any] = {"messages": messages, "max_tokens": dice.randint(4, 48)}
    soak.requests += 1
    if dice.random() < 0.3:
        body["stream"] = True
        left_after = dice.choice([0, 1, 5, 10**6])
        async with client.stream("POST", f"{soak.url}/v1/chat/completions", json=body) as response:
            text, seen = "", 0
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    seen += 1
                    for choice in json.loads(line[6:])["choices"]:
                        text += choice["delta"].get("content") or ""
                if seen > left_after:
                    soak.cancelled += 1
                    return None
        return text
    try:
        answer = await client.post(
            f"{soak.url}/v1/chat/completions",
            json=body,
            timeout=0.05 if dice.random() < 0.1 else 120,
        )
    except httpx.TimeoutException:
        soak.cancelled += 1
        return None
    if answer.status_code != 200:
        assert answer.status_code in {400, 429}, answer.text
        soak.refused += 1
        return None
    content: str = answer.json()["choices"][0]["message"]["content"]
    soak.keep([*messages], body["max_tokens"], content, dice)
    return content


async def watch(soak: Soak, model: recollect.Model, memory: list[int]) -> None:
    """Check the bookkeeping and note the memory, ten times a run at least."""
    pause = max(1.0, (soak.ends_at - monotonic()) / 50)
    while monotonic() < soak.ends_at:
        await asyncio.sleep(pause)
        await asyncio.to_thread(model.engine.check)
        await asyncio.to_thread(model.known.check)
        model.prompts.remembered.check()
        memory.append(own_memory())
        say(
            f"{soak.requests:7} requests  {memory[-1] >> 20:6} MiB  {soak.cancelled} left early  "
            f"{len(model.known)} messages known in {model.known.held_bytes >> 20} MiB"
        )


def own_memory() -> int:
    """
    Return the bytes that the process itself holds.

    Pages of the KV on disk are mapped, and the system takes them back when it needs them. Linux tells
    them apart ("Anonymous"); elsewhere they count until they are taken back.
    """
    rollup = Path("/proc/self/smaps_rollup")
    if rollup.exists():
        lines = dict(line.split(":", 1) for line in rollup.read_text().splitlines()[1:])
        return int(lines["Anonymous"].split()[0]) << 10
    memory: int = psutil.Process().memory_full_info().uss
    return memory


def equal_anew(args: argparse.Namespace, prompts: Sequence[tuple[list[int], int, str]]) -> int:
    """Return how many replies a fresh model gives to the same token ids as they were given."""
    equal = 0
    with recollect.load(args.model, profile="exact", kv_disk=0) as fresh:
        for ids, limit, text in prompts:
            params = recollect.SamplingParams(max_tokens=limit)
            generator = recollect.Generator(fresh.engine, params, namespace=None)
            generator.append_tokens(ids)
            while not generator.is_done():
                generator.generate_next_token()
            equal += fresh.tokenizer.decode(generator.get_sequence()[len(ids) :]) == text
            generator.close()
    return equal


async def run(args: argparse.Namespace, url: str, model: recollect.Model) -> tuple[Soak, list[int]]:
    soak = Soak(url, monotonic() + args.minutes * 60, model, most=args.compare)
    memory = [own_memory()]
    clients = [be_a_client(soak, number) for number in range(args.clients)]
    services = [be_a_service(soak, number) for number in range(args.short_chats)]
    await asyncio.gather(watch(soak, model, memory), *clients, *services)
    return soak, memory


def main() -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    options.add_argument("--model", default="smollm2")
    options.add_argument("--minutes", type=float, default=30)
    options.add_argument("--clients", type=int, default=8)
    options.add_argument(
        "--short-chats", type=int, default=0, help="clients that begin a new chat each time"
    )
    options.add_argument("--kv-disk-mib", type=int, default=0, help="most MiB of KV on disk")
    options.add_argument("--compare", type=int, default=60, help="replies to be generated anew")
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        disk = args.kv_disk_mib << 20
        store = DiskStore(Path(folder) / "kv", budget_bytes=disk) if disk else None
        model = recollect.load(
            args.model, profile="exact", kv_memory=512 << 20, kv_disk=0, store=store
        )
        hub = ModelHub(lambda _: model, [args.model])
        settings = Settings(home=Path(folder), models=(args.model,), limits=Limits(concurrent=6))
        app = create_app(settings, hub, Keyring())
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            thread.join(0.05)
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        soak, memory = asyncio.run(run(args, url, model))
        deadline = monotonic() + 30
        while app.state.services.admission.running and monotonic() < deadline:
            thread.join(0.1)
        left = app.state.services.admission.running
        model.engine.check()
        tier = model.engine.tier
        written = 0 if tier is None else tier.statistics().written_bytes
        known, known_bytes = len(model.known), model.known.held_bytes
        server.should_exit = True
        thread.join()
    grown = max(memory[len(memory) // 5 :]) - memory[len(memory) // 5]
    equal = equal_anew(args, soak.whole)
    result = {
        "benchmark": "soak",
        "minutes": args.minutes,
        "requests": soak.requests,
        "short_chats": soak.short_chats,
        "left_early": soak.cancelled,
        "refused": soak.refused,
        "replies_left": left,
        "grown_bytes": grown,
        "known_messages": known,
        "known_bytes": known_bytes,
        "written_to_disk_bytes": written,
        "replies": soak.replies,
        "compared": len(soak.whole),
        "equal": equal,
    }
    print(json.dumps(result))
    return int(left > 0 or grown > FLAT_BYTES or equal < len(soak.whole))


if __name__ == "__main__":
    sys.exit(main())
