"""
What it costs that an encrypted KV store of an earlier version is written anew, once.

Needs no model: `python benchmarks/resealing.py [--blocks N] [--block-bytes N]` makes a store of
format 2 in a temporary folder, and times its first opening and the next.
"""

import argparse
import json
import os
import tempfile
from contextlib import closing
from pathlib import Path
from time import perf_counter

from recollect.encryption import Cipher
from recollect.kv.disk import DiskStore, NewBlock
from recollect.kv.record import Identity, chained_key, namespace_key

_SIZE = 32
_BUDGET_BYTES = 32 << 30
_CIPHER = Cipher(bytes(32))


def _write(folder: Path, blocks: int, block_bytes: int) -> None:
    """Write a chain under names without the secret, as format 2 has them."""
    parent = root = namespace_key("weights", "", _CIPHER.name_secret)
    with closing(DiskStore(folder, budget_bytes=_BUDGET_BYTES, sealer=_CIPHER)) as store:
        for number in range(blocks):
            tokens = (number, *range(_SIZE - 1))
            key = chained_key(parent, tokens)
            block = NewBlock(key, parent, parent == root, tokens, os.urandom(block_bytes))
            store.write(Identity("weights", "runtime", "format"), [block])
            parent = key
        with store.env.writing() as txn:
            txn.put(b"format", (2).to_bytes(8, "little"), db=store.env.tables["info"])


def _open_s(folder: Path, blocks: int) -> float:
    begun = perf_counter()
    with closing(DiskStore(folder, budget_bytes=_BUDGET_BYTES, sealer=_CIPHER)) as store:
        seconds = perf_counter() - begun
        assert store.holdings()[0].blocks == blocks, "blocks were lost"
    return seconds


def main() -> None:
    """Print a line for people, then one JSON line."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--blocks", type=int, default=500)
    options.add_argument("--block-bytes", type=int, default=1 << 20)
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "kv"
        _write(folder, args.blocks, args.block_bytes)
        first_s, next_s = (_open_s(folder, args.blocks) for _ in range(2))
    first_ms = 1000 * first_s / args.blocks
    print(f"{args.blocks} blocks of {args.block_bytes:,} bytes: {first_ms:.2f} ms each, once")
    result = {"blocks": args.blocks, "block_bytes": args.block_bytes}
    print(json.dumps(result | {"first_open_s": first_s, "next_open_s": next_s}))


if __name__ == "__main__":
    main()
