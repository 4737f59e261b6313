"""What is unpacked is what was packed, or it is refused with a reason."""

import pytest

from recollect.errors import StoreCorruptError
from recollect.kv.record import (
    Entry,
    Identity,
    Refused,
    entry_head,
    pack_block,
    pack_entry,
    touched,
    unpack_block,
    unpack_entry,
)

KEY, OTHER_KEY = b"k" * 32, b"o" * 32
IDENTITY = Identity("weights", "runtime-1-exact", "f32").digest()
PAYLOAD = bytes(range(256)) * 3
ENTRY = Entry(KEY, b"p" * 32, IDENTITY, (5, 0, 49151), 1234.5, 4096)


class XorSealer:
    """Not a cipher: tells whether everything goes through it, with its context."""

    name_secret = b"s" * 32

    def seal(self, plain: bytes | memoryview, *, context: bytes) -> bytes:
        return context + bytes(byte ^ 0x55 for byte in bytes(plain))

    def open(self, sealed: bytes | memoryview, *, context: bytes) -> bytes:
        sealed = bytes(sealed)
        if not sealed.startswith(context):
            raise StoreCorruptError("moved")
        return bytes(byte ^ 0x55 for byte in sealed[len(context) :])


def test_a_block_comes_back() -> None:
    stored = pack_block(KEY, IDENTITY, 7, PAYLOAD, None)
    assert bytes(unpack_block(KEY, IDENTITY, 7, memoryview(stored), None)) == PAYLOAD


def test_an_entry_comes_back() -> None:
    assert unpack_entry(KEY, pack_entry(ENTRY, None), None) == ENTRY


def test_sealed_values_come_back_and_show_nothing() -> None:
    sealer = XorSealer()
    block = pack_block(KEY, IDENTITY, 7, PAYLOAD, sealer)
    assert PAYLOAD[:50] not in bytes(block)
    assert bytes(unpack_block(KEY, IDENTITY, 7, memoryview(block), sealer)) == PAYLOAD
    entry = pack_entry(ENTRY, sealer)
    assert unpack_entry(KEY, entry, sealer) == ENTRY
    plain_block = pack_block(KEY, IDENTITY, 7, PAYLOAD, None)
    for read in (
        lambda: unpack_block(KEY, IDENTITY, 7, memoryview(block), None),
        lambda: unpack_entry(KEY, entry, None),
        # Whoever can write the files can put plain bytes there, with a checksum that is right.
        lambda: unpack_block(KEY, IDENTITY, 7, memoryview(plain_block), sealer),
        lambda: unpack_entry(KEY, pack_entry(ENTRY, None), sealer),
    ):
        with pytest.raises(Refused, match="sealed"):
            read()


@pytest.mark.parametrize(
    ("key", "identity", "tokens", "reason"),
    [
        (OTHER_KEY, IDENTITY, 7, "checksum"),
        (KEY, Identity("weights", "runtime-1-exact", "f16").digest(), 7, "identity"),
        (KEY, Identity("weights", "runtime-2-exact", "f32").digest(), 7, "identity"),
        (KEY, Identity("others", "runtime-1-exact", "f32").digest(), 7, "identity"),
        (KEY, IDENTITY, 8, "identity"),
    ],
)
def test_a_block_of_something_else_is_refused(
    key: bytes, identity: bytes, tokens: int, reason: str
) -> None:
    stored = pack_block(KEY, IDENTITY, 7, PAYLOAD, None)
    with pytest.raises(Refused, match=reason):
        unpack_block(key, identity, tokens, memoryview(stored), None)


def test_every_flipped_bit_of_a_block_is_seen() -> None:
    stored = pack_block(KEY, IDENTITY, 7, PAYLOAD, None)
    assert len(stored) * 8 < 7000, "all of them, not a sample"
    for bit in range(len(stored) * 8):
        stored[bit // 8] ^= 1 << bit % 8
        with pytest.raises(Refused):
            unpack_block(KEY, IDENTITY, 7, memoryview(stored), None)
        stored[bit // 8] ^= 1 << bit % 8


def test_every_flipped_bit_of_an_entry_is_seen() -> None:
    stored = bytearray(pack_entry(ENTRY, None))
    for bit in range(len(stored) * 8):
        stored[bit // 8] ^= 1 << bit % 8
        with pytest.raises(Refused):
            unpack_entry(KEY, stored, None)
        stored[bit // 8] ^= 1 << bit % 8


def test_every_truncation_is_seen() -> None:
    block, entry = pack_block(KEY, IDENTITY, 7, PAYLOAD, None), pack_entry(ENTRY, None)
    for length in [*range(80), *range(80, len(block), 17)]:
        with pytest.raises(Refused):
            unpack_block(KEY, IDENTITY, 7, memoryview(block)[:length], None)
    for length in range(len(entry)):
        with pytest.raises(Refused):
            unpack_entry(KEY, entry[:length], None)


def test_a_touched_entry_has_another_time_and_nothing_else() -> None:
    entry = unpack_entry(KEY, touched(KEY, pack_entry(ENTRY, None), 99.0), None)
    assert entry == Entry(KEY, ENTRY.parent, IDENTITY, ENTRY.token_ids, 99.0, ENTRY.stored_bytes)


def test_the_head_is_read_without_the_tokens() -> None:
    head = entry_head(KEY, pack_entry(ENTRY, None))
    assert head == (ENTRY.last_used, ENTRY.stored_bytes, ENTRY.parent, IDENTITY, False, 3, b"")


def test_each_part_of_an_identity_counts() -> None:
    names = [("a", "b", "c"), ("a", "b", "d"), ("a", "d", "c"), ("d", "b", "c"), ("ab", "", "c")]
    assert len({Identity(*name).digest() for name in names}) == len(names)
