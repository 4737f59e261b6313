"""A file carries a conversation and its KV elsewhere, and whatever is wrong with it changes nothing."""

import json
import math
import os
import random
import stat
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from safetensors import safe_open

from recollect.conversation.loading import bring_in, collect, why_not
from recollect.conversation.model import Model
from recollect.encryption import Cipher
from recollect.errors import ContextFullError, ConversationFileError, StoreError
from recollect.journal.portable import FORMAT_VERSION, Branch, PortableFile, head_checksum, write
from recollect.journal.records import StoredConversation
from recollect.kv.disk import DiskStore
from recollect.types import SamplingParams

SHORT = SamplingParams(max_tokens=12, ignore_eos=True)
SIZE = 8

MakeModel = Callable[..., Model]
OpenAt = Callable[[str], DiskStore]


@pytest.fixture
def open_at(tmp_path: Path) -> OpenAt:
    """Return an opener of stores by name, each of another machine."""
    return lambda name: DiskStore(tmp_path / name, budget_bytes=64 << 20)


def exported(model: Model, path: Path, *said: str, tip: str = "main") -> StoredConversation:
    """Have a conversation of these messages, and write it to a file."""
    session = model.session("be brief", name="poem", params=SHORT)
    for text in said:
        session.respond(text)
    stored = model.journal.load("poem")
    write(path, stored, collect(model, model.resume("poem", tip=tip)))
    return stored


@pytest.fixture
def file(make_model: MakeModel, open_at: OpenAt, tmp_path: Path) -> Path:
    """Return a file of three turns with their KV."""
    path = tmp_path / "poem.safetensors"
    model = make_model(store=open_at("there"))
    exported(model, path, "one", "two", "three")
    model.close()
    return path


def test_elsewhere_only_what_is_new_is_computed_and_the_reply_is_the_cold_one(
    make_model: MakeModel, open_at: OpenAt, file: Path
) -> None:
    portable = PortableFile(file)
    here = make_model(store=open_at("here"))
    assert why_not(here, portable) is None
    carried = bring_in(here, portable)
    here.journal.add(portable.conversation, "carried")
    warm = here.resume("carried", params=SHORT).respond("four")
    assert (warm.usage.restored_tokens, warm.usage.reused_tokens) == (carried, carried)
    assert warm.usage.computed_tokens == warm.usage.prompt_tokens - carried
    cold_model = make_model()
    cold = cold_model.resume("poem", params=SHORT).respond("four")
    assert cold.usage.computed_tokens == cold.usage.prompt_tokens
    assert warm.text == cold.text
    assert here.engine.tier is not None
    assert list(here.engine.tier.store.problems()) == []


@pytest.mark.slow
def test_an_encrypted_store_takes_it_under_names_of_its_own(
    make_model: MakeModel, tmp_path: Path, file: Path
) -> None:
    """Names in the file can be computed by anybody; those in the store cannot."""
    portable = PortableFile(file)
    store = DiskStore(tmp_path / "sealed", budget_bytes=64 << 20, sealer=Cipher(bytes(32)))
    here = make_model(store=store)
    carried = bring_in(here, portable)
    here.journal.add(portable.conversation, "carried")
    warm = here.resume("carried", params=SHORT).respond("four")
    assert (warm.usage.restored_tokens, warm.usage.reused_tokens) == (carried, carried)
    assert list(store.problems()) == []


@pytest.mark.slow
def test_all_branches_of_the_text_come_back(
    make_model: MakeModel, open_at: OpenAt, tmp_path: Path
) -> None:
    model = make_model(store=open_at("there"))
    session = model.session(name="poem", params=SHORT)
    session.respond("one")
    session.fork(name="idea").respond("aside")
    session.respond("two")
    stored = model.journal.load("poem")
    write(tmp_path / "f", stored, collect(model, model.resume("poem", tip="idea")))
    portable = PortableFile(tmp_path / "f")
    assert portable.conversation.nodes == stored.nodes
    assert portable.conversation.tips == stored.tips
    assert portable.head is not None
    assert portable.head.tip == "idea"
    assert portable.token_ids == model.resume("poem", tip="idea").typed_ids()


@pytest.mark.slow
def test_the_free_slots_of_the_last_block_hold_nothing_of_another_conversation(
    make_model: MakeModel, open_at: OpenAt, tmp_path: Path
) -> None:
    """The block that a conversation ends in was copied from one that went on with a secret."""
    model = make_model(store=open_at("there"))
    secret = model.session(params=SHORT)
    secret.respond("one. The secret is 1234567")
    exported(model, tmp_path / "f", "one")
    *_, last = PortableFile(tmp_path / "f").blocks()
    slots = last.payload.view(np.int64).reshape(SIZE, 4)
    used = len(last.token_ids)
    assert 0 < used < SIZE
    assert slots[:used, 0].tolist() == last.token_ids
    assert slots[used:, 0].tolist() == [0] * (SIZE - used)


@pytest.mark.few(3)
@pytest.mark.parametrize("whole_blocks_only", [False, True])
def test_where_blocks_are_reused_whole_only_whole_ones_are_carried(
    make_model: MakeModel, open_at: OpenAt, tmp_path: Path, whole_blocks_only: bool
) -> None:
    model = make_model(store=open_at("there"), whole_blocks_only=whole_blocks_only)
    exported(model, tmp_path / "f", "one")
    total = len(model.resume("poem").typed_ids())
    assert total % SIZE, "or this shows nothing"
    lost = total % SIZE if whole_blocks_only else 0
    assert len(PortableFile(tmp_path / "f").token_ids) == total - lost


def test_without_kv_the_text_is_there(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    model.session(name="poem", params=SHORT).respond("one")
    stored = model.journal.load("poem")
    write(tmp_path / "f", stored, None)
    portable = PortableFile(tmp_path / "f")
    assert portable.conversation.nodes == stored.nodes
    assert why_not(model, portable) == "the file has none"


def test_a_model_without_kv_on_disk_collects_none(model: Model) -> None:
    session = model.session(name="poem", params=SHORT)
    session.respond("one")
    with pytest.raises(StoreError, match="--kv-disk"):
        collect(model, session)


def test_a_conversation_that_is_too_long_is_said_to_be(
    make_model: MakeModel, open_at: OpenAt
) -> None:
    make_model().session(name="poem", params=SHORT).respond("long " * 40)
    small = make_model(store=open_at("there"), context_length=64)
    with pytest.raises(ContextFullError):
        collect(small, small.resume("poem"))


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"identity": {"fingerprint": "another"}}, "it is of another model than reference"),
        ({"identity": {"runtime": "other-2"}}, "other-2 computed it, and here is reference-1"),
        ({"identity": {"kv_format": "u8"}}, "it is in another precision than here"),
        ({"block_size": 9}, "its blocks have another size than here"),
    ],
)
def test_kv_that_cannot_be_used_here_is_told_from_what_can(
    make_model: MakeModel,
    open_at: OpenAt,
    tmp_path: Path,
    changed: dict[str, Any],
    reason: str,
) -> None:
    model = make_model(store=open_at("there"))
    session = model.session(name="poem", params=SHORT)
    session.respond("one")
    branch = collect(model, session)
    assert branch is not None
    identity = replace(branch.head.identity, **changed.pop("identity", {}))
    head = replace(branch.head, identity=identity, **changed)
    blocks = branch.blocks[: -(-len(branch.token_ids) // head.block_size)]
    write(tmp_path / "f", model.journal.load("poem"), Branch(head, branch.token_ids, blocks))
    assert why_not(model, PortableFile(tmp_path / "f")) == reason


@pytest.mark.slow
def test_tokens_outside_the_vocabulary_are_refused(
    make_model: MakeModel, open_at: OpenAt, tmp_path: Path
) -> None:
    model = make_model(store=open_at("there"))
    session = model.session(name="poem", params=SHORT)
    session.respond("one")
    branch = collect(model, session)
    assert branch is not None
    branch.token_ids[3] = 10**6
    write(tmp_path / "f", model.journal.load("poem"), branch)
    reason = why_not(model, PortableFile(tmp_path / "f"))
    assert reason == "it has tokens that the model does not know"


@pytest.mark.slow
def test_a_store_without_room_for_all_of_it_is_said_to_be(
    make_model: MakeModel, tmp_path: Path, open_at: OpenAt
) -> None:
    path = tmp_path / "f"
    exported(make_model(store=open_at("there"), context_length=8192), path, "long " * 600)
    small = DiskStore(tmp_path / "small", budget_bytes=1 << 20)
    here = make_model(store=small, context_length=8192)
    with pytest.raises(StoreError, match="--kv-disk"):
        bring_in(here, PortableFile(path))


def test_a_file_is_never_replaced_and_nothing_is_left_of_one_that_failed(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    model.session(name="poem", params=SHORT).respond("one")
    stored = model.journal.load("poem")
    (tmp_path / "f").write_text("mine")
    with pytest.raises(ConversationFileError, match="exists already"):
        write(tmp_path / "f", stored, None)
    assert (tmp_path / "f").read_text() == "mine"
    with pytest.raises(ConversationFileError, match="cannot be written"):
        write(tmp_path / "nowhere" / "f", stored, None)

    def fail(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", fail)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConversationFileError, match="disk has room"):
        write(tmp_path / "folder" / "f", stored, None)
    assert list((tmp_path / "folder").iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such bits")
def test_only_its_owner_can_read_it(file: Path) -> None:
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def refused(path: Path) -> str:
    """Return what is said of a file that is refused: one sentence, which names it."""
    with pytest.raises(ConversationFileError) as caught:
        PortableFile(path)
    said = str(caught.value)
    assert "\n" not in said
    assert said.endswith(".")
    return said


@pytest.mark.slow
def test_any_bit_that_is_flipped_is_noticed(file: Path, tmp_path: Path) -> None:
    content, chance = file.read_bytes(), random.Random(4)  # noqa: S311 - of a test
    for place in {0, 7, 8, len(content) - 1, *chance.sample(range(len(content)), 300)}:
        damaged = bytearray(content)
        damaged[place] ^= 1 << chance.randrange(8)
        (tmp_path / "damaged").write_bytes(damaged)
        refused(tmp_path / "damaged")


@pytest.mark.slow
def test_a_file_that_was_cut_short_or_has_more_is_refused(file: Path, tmp_path: Path) -> None:
    content, chance = file.read_bytes(), random.Random(4)  # noqa: S311 - of a test
    for length in [0, 1, 7, 8, 9, *chance.sample(range(len(content)), 60)]:
        (tmp_path / "damaged").write_bytes(content[:length])
        refused(tmp_path / "damaged")
    (tmp_path / "damaged").write_bytes(content + b"x")
    refused(tmp_path / "damaged")


def rewritten(
    file: Path, to: Path, change: Callable[[dict[str, Any], dict[str, str]], None]
) -> None:
    """Write a file again with other tensors or metadata, its head's checksum made right."""
    tensors = safetensors.numpy.load_file(file)
    with safe_open(file, framework="np") as opened:
        metadata = dict(opened.metadata())
    metadata.pop("checksum")
    change(tensors, metadata)
    text = tensors.get("conversation", np.zeros(0, np.uint8)).tobytes()
    metadata.setdefault("checksum", head_checksum(metadata, text))
    safetensors.numpy.save_file(tensors, to, metadata)


def swap_blocks(tensors: dict[str, Any], _: dict[str, str]) -> None:
    tensors["kv"][[0, 1]] = tensors["kv"][[1, 0]]


def swap_blocks_and_checksums(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    swap_blocks(tensors, metadata)
    tensors["kv_checksums"][[0, 1]] = tensors["kv_checksums"][[1, 0]]


def other_token(tensors: dict[str, Any], _: dict[str, str]) -> None:
    tensors["token_ids"][2] += 1


def negative_token(tensors: dict[str, Any], _: dict[str, str]) -> None:
    tensors["token_ids"][2] = -1


def other_dtype(tensors: dict[str, Any], _: dict[str, str]) -> None:
    tensors["kv"] = tensors["kv"].view(np.int8)


def wide_tokens(tensors: dict[str, Any], _: dict[str, str]) -> None:
    tensors["token_ids"] = tensors["token_ids"].astype(np.int64)


def flat_kv(tensors: dict[str, Any], _: dict[str, str]) -> None:
    tensors["kv"] = tensors["kv"].reshape(-1)


def fewer_blocks(tensors: dict[str, Any], _: dict[str, str]) -> None:
    tensors["kv"] = tensors["kv"][:-1].copy()


def fewer_checksums(tensors: dict[str, Any], _: dict[str, str]) -> None:
    tensors["kv_checksums"] = tensors["kv_checksums"][:-1].copy()


def short_checksums(tensors: dict[str, Any], _: dict[str, str]) -> None:
    tensors["kv_checksums"] = tensors["kv_checksums"][:, :8].copy()


def no_tokens(tensors: dict[str, Any], _: dict[str, str]) -> None:
    tensors["token_ids"] = tensors["token_ids"][:0].copy()


def no_bytes(tensors: dict[str, Any], _: dict[str, str]) -> None:
    tensors["kv"] = tensors["kv"][:, :0].copy()


def a_part_too_many(tensors: dict[str, Any], _: dict[str, str]) -> None:
    tensors["more"] = np.zeros(3, np.uint8)


def no_text(tensors: dict[str, Any], _: dict[str, str]) -> None:
    del tensors["conversation"]


def no_json(tensors: dict[str, Any], _: dict[str, str]) -> None:
    tensors["conversation"] = np.frombuffer(b"{[", np.uint8)


def deep_json(tensors: dict[str, Any], _: dict[str, str]) -> None:
    tensors["conversation"] = np.frombuffer(b"[" * 10**5, np.uint8)


def another_format(_: dict[str, Any], metadata: dict[str, str]) -> None:
    metadata["format"] = "pt"


def a_newer_version(_: dict[str, Any], metadata: dict[str, str]) -> None:
    metadata["version"] = str(FORMAT_VERSION + 1)


def no_branch(_: dict[str, Any], metadata: dict[str, str]) -> None:
    del metadata["branch"]


def hostile_branch(text: str) -> Callable[[dict[str, Any], dict[str, str]], None]:
    def change(_: dict[str, Any], metadata: dict[str, str]) -> None:
        metadata["branch"] = text

    return change


def branch_with(**fields: object) -> Callable[[dict[str, Any], dict[str, str]], None]:
    def change(_: dict[str, Any], metadata: dict[str, str]) -> None:
        metadata["branch"] = json.dumps(json.loads(metadata["branch"]) | fields)

    return change


def identity_with(**fields: object) -> Callable[[dict[str, Any], dict[str, str]], None]:
    def change(_: dict[str, Any], metadata: dict[str, str]) -> None:
        branch = json.loads(metadata["branch"])
        branch["identity"] |= fields
        metadata["branch"] = json.dumps(branch)

    return change


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (swap_blocks, "block 1 of its KV"),
        (swap_blocks_and_checksums, "block 1 of its KV"),
        (other_token, "block 1 of its KV"),
        (negative_token, "token id that is none"),
        (other_dtype, "'kv' is I8"),
        (wide_tokens, "'token_ids' is I64"),
        (flat_kv, "'kv' is U8 of shape"),
        (fewer_blocks, "are not those of"),
        (fewer_checksums, "one checksum for each block"),
        (short_checksums, "one checksum for each block"),
        (no_tokens, "are not those of 0 tokens"),
        (no_bytes, "of 0 bytes"),
        (a_part_too_many, "other parts"),
        (no_text, "other parts"),
        (no_branch, "other parts"),
        (no_json, "no JSON"),
        (deep_json, "JSON"),
        (another_format, "no conversation in it"),
        (a_newer_version, "update recollect"),
        (hostile_branch("[" * 10**5), "what its KV is of"),
        (hostile_branch("7"), "what its KV is of"),
        (branch_with(identity=7), "what its KV is of"),
        (branch_with(identity={"path": "x"}), "what its KV is of"),
        (branch_with(block_size="many"), "what its KV is of"),
        (branch_with(block_size=0), "blocks have 0 tokens"),
        (branch_with(block_size=10**12), "blocks have"),
        (branch_with(profile="huge"), "what its KV is of"),
        (branch_with(block_size=float("inf")), "what its KV is of"),
        (branch_with(block_size=float("nan")), "what its KV is of"),
        (branch_with(block_size="8"), "what its KV is of"),
        (branch_with(block_size=True), "what its KV is of"),
        (branch_with(tip="\ud800"), "what its KV is of"),
        (branch_with(tip=7), "what its KV is of"),
        (identity_with(runtime="\ud800"), "what its KV is of"),
        (identity_with(fingerprint=None), "what its KV is of"),
    ],
)
def test_what_somebody_wrote_by_hand_is_refused_with_a_reason(
    file: Path, tmp_path: Path, change: Callable[..., None], says: str
) -> None:
    rewritten(file, tmp_path / "by hand", change)
    assert says in refused(tmp_path / "by hand")


@pytest.mark.parametrize("size", [2, 10**6, 2**40, 2**63, 2**64 - 1])
def test_a_header_that_claims_to_be_huge_takes_no_memory(tmp_path: Path, size: int) -> None:
    (tmp_path / "f").write_bytes(struct.pack("<Q", size) + b'{"a":1}')
    refused(tmp_path / "f")


@pytest.mark.parametrize(
    "entry",
    [
        '{"dtype":"U8","shape":[9223372036854775807,9223372036854775807],"data_offsets":[0,1]}',
        '{"dtype":"U8","shape":[1],"data_offsets":[0,18446744073709551615]}',
        '{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}',
        '{"dtype":"U9","shape":[1],"data_offsets":[0,1]}',
    ],
)
def test_a_header_that_lies_about_its_tensors_is_refused(tmp_path: Path, entry: str) -> None:
    header = f'{{"conversation":{entry}}}'.encode()
    (tmp_path / "f").write_bytes(struct.pack("<Q", len(header)) + header + b"x")
    refused(tmp_path / "f")


def test_what_is_no_such_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello " * 100)
    refused(tmp_path / "text")
    refused(tmp_path / "nowhere")
    assert "a folder" in refused(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has neither")
def test_what_has_no_end_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "a pipe" in refused(tmp_path / "pipe")
    assert "a device" in refused(Path("/dev/zero"))


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("name", "dtype", "shape"),
    [
        ("conversation", "U8", [1 << 33]),
        ("token_ids", "I32", [1 << 31]),
        ("kv", "U8", [1, 1 << 34]),
    ],
)
def test_a_part_that_claims_more_than_any_has_is_not_read(
    file: Path, tmp_path: Path, name: str, dtype: str, shape: list[int]
) -> None:
    """The file is sparse: it has the size that it claims, and takes no room on the disk."""
    with safe_open(file, framework="np") as opened:
        metadata = opened.metadata()
    kinds = {"token_ids": ("I32", [1]), "kv": ("U8", [1, 1]), "kv_checksums": ("U8", [1, 16])}
    parts = {"conversation": ("U8", [1])} | kinds | {name: (dtype, shape)}
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for part, (kind, sizes) in parts.items():
        start, end = end, end + math.prod(sizes) * (4 if kind == "I32" else 1)
        header[part] = {"dtype": kind, "shape": sizes, "data_offsets": [start, end]}
    content = json.dumps(header).encode()
    with (tmp_path / "sparse").open("wb") as sparse:
        sparse.write(struct.pack("<Q", len(content)) + content)
        sparse.truncate(8 + len(content) + end)
    assert "of at most" in refused(tmp_path / "sparse")
