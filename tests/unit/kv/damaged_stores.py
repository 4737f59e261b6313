"""
Open many damaged stores and do with each whatever is done with stores; as a process of its own.

Called with a folder that has a sound store in `sound`, and the first and the last number of the
damages to do. Ends with status 0 where each was read, refused or put aside; a damage that LMDB
stumbles over ends it with a signal.
"""

import logging
import random
import shutil
import sys
from pathlib import Path

from recollect.errors import StoreError
from recollect.kv.disk import DiskStore, NewBlock
from recollect.kv.record import Identity, StoredReply, chained_key, namespace_key

IDENTITY = Identity("weights", "runtime", "f32")
ROOT = namespace_key("weights", "")
PAGE = 4096


def chain(*blocks: tuple[int, ...]) -> list[NewBlock]:
    made: list[NewBlock] = []
    parent = ROOT
    for tokens in blocks:
        key = chained_key(parent, tokens)
        payload = (bytes(tokens) * 5000)[:5000]
        made.append(NewBlock(key, parent, parent == ROOT, tokens, payload))
        parent = key
    return made


def chat(number: int) -> list[NewBlock]:
    return chain((1, 2, 3, 4), (number, 2, 3, 4), (5, 6, 7, 8))


def make_sound(folder: Path) -> None:
    """Have a store with trees of two levels, values with pages of their own, and free pages."""
    store = DiskStore(folder, budget_bytes=8 << 20)
    for first in range(0, 40, 10):  # in several transactions, so that pages are given up
        numbers = range(first, first + 10)
        store.write(IDENTITY, [block for number in numbers for block in chat(number)])
    store.remove([chat(number)[-1].key for number in range(5)])
    said = {bytes([n]) * 32: StoredReply("x" * n * 50, (1, 2, 3)) for n in range(60)}
    store.remember(said)
    store.close()


def damaged(sound: bytes, number: int) -> bytes:
    """Return a file with some damage: flipped bits, bytes in a page's head, other pages, an early end."""
    chosen, content = random.Random(number), bytearray(sound)  # noqa: S311 - no secret
    page = chosen.randrange(len(content) // PAGE) * PAGE
    match number % 5:
        case 0:
            for _ in range(chosen.randrange(1, 20)):
                content[chosen.randrange(len(content))] ^= 1 << chosen.randrange(8)
        case 1:
            for _ in range(chosen.randrange(1, 4)):
                content[page + chosen.randrange(64)] = chosen.randrange(256)
        case 2:
            size = chosen.choice([16, 512, PAGE])
            content[page : page + size] = chosen.randbytes(size)
        case 3:
            other = chosen.randrange(len(content) // PAGE) * PAGE
            content[page : page + PAGE] = content[other : other + PAGE]
        case 4:
            del content[chosen.randrange(len(content)) :]
    return bytes(content)


def use(folder: Path) -> None:
    """Read, check, write, remove, evict and clear."""
    store = DiskStore(folder, budget_bytes=8 << 20)
    try:
        for number in range(0, 40, 5):
            ids = [token for block in chat(number) for token in block.token_ids]
            found = store.find(ROOT, ids, block_size=4, inside_block=True)
            store.read(IDENTITY, found.entries, lambda _, payload: None)
        list(store.problems())
        store.holdings()
        store.write(IDENTITY, [block for number in range(100, 110) for block in chat(number)])
        store.remove(store.take_refused())
        store.evict(200_000)
        store.recall(bytes([7]) * 32)
        store.remember({bytes(32): StoredReply("y", (1,))})
        store.clear(pinned=True)
    finally:
        store.close()


def main() -> None:
    folder, first, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    logging.disable(logging.CRITICAL)
    sound = (folder / "sound" / "data.mdb").read_bytes()
    for number in range(first, last):
        print(number, flush=True)
        home = folder / str(number)
        (home / "kv").mkdir(parents=True)
        (home / "kv" / "data.mdb").write_bytes(damaged(sound, number))
        for _ in range(2):  # what the first start leaves behind, the next one has to cope with
            try:
                use(home / "kv")
            except StoreError:
                continue
        use(home / "kv")  # by now it was put aside, or is sound
        shutil.rmtree(home)


if __name__ == "__main__":
    main()
