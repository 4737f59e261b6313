import contextlib
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recollect.errors import UnsupportedModelError
from recollect.models.gguf import glance, read_content, read_header

MakeGguf = Callable[..., Path]


def test_a_header_says_what_was_written(make_gguf: MakeGguf) -> None:
    header = read_header(make_gguf(template="T", context_length=777))
    assert header.architecture == "llama"
    assert header.context_length == 777
    assert header.chat_template == "T"
    assert header.eos_token_ids == {0, 2}
    assert (header.bos_token, header.eos_token) == ("<|im_start|>", "<|im_end|>")


def test_an_ordinary_token_that_reads_like_an_end_is_none(make_gguf: MakeGguf) -> None:
    path = make_gguf()
    tokens = gguf.GGUFReader(path).fields["tokenizer.ggml.tokens"].contents()
    assert tokens[-1] == "</s>"
    assert len(tokens) - 1 not in read_header(path).eos_token_ids


def test_what_its_makers_recommend_is_found(tmp_path: Path) -> None:
    """By the names that the `gguf` package writes, which llama.cpp's converter uses."""
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_context_length(64)
    writer.add_sampling_temp(0.5)
    writer.add_sampling_top_k(20)
    writer.add_sampling_top_p(0.75)
    writer.add_sampling_penalty_repeat(1.125)
    writer.add_tensor("token_embd.weight", np.zeros((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert read_header(tmp_path / "tiny.gguf").sampling == {
        "temperature": 0.5,
        "top_k": 20,
        "top_p": 0.75,
        "repetition_penalty": 1.125,
    }


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("tiny.gguf", None),
        ("Qwen3-0.6B-Q8_0.gguf", "Q8_0"),
        ("model.IQ2_XXS.gguf", "IQ2_XXS"),
        ("a-UD-Q4_K_XL.gguf", "Q4_K_XL"),
        ("qwen2.5-coder-0.5b-instruct-q4_k_m.gguf", "Q4_K_M"),
        ("gpt-oss-20b-mxfp4.gguf", "MXFP4"),
        ("llama-bf16-00001-of-00002.gguf", "BF16"),
        ("Q4_chapters_about_F16s.gguf", None),
    ],
)
def test_where_the_file_names_no_type_its_name_does(
    tmp_path: Path, name: str, kind: str | None
) -> None:
    writer = gguf.GGUFWriter(tmp_path / name, "llama")
    writer.add_context_length(64)
    writer.add_sampling_temp(0.5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    seen = glance(tmp_path / name)
    assert (seen.architecture, seen.quantization, seen.context_length) == ("llama", kind, 64)
    assert seen.sampling == {"temperature": 0.5}


def test_a_glance_reads_more_only_where_the_fields_are_long(tmp_path: Path) -> None:
    for length, is_seen in ((0, True), (100_000, True), (1_000_000, False)):
        path = tmp_path / f"{length}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_string("general.license", "x" * length)
        writer.add_file_type(15)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        seen = glance(path)
        assert (seen.architecture, seen.quantization) == ("llama", "Q4_K_M" if is_seen else None)


def test_a_glance_and_a_whole_reading_agree(make_gguf: MakeGguf) -> None:
    path = make_gguf()
    header, seen = read_header(path), glance(path)
    assert (seen.architecture, seen.context_length, seen.sampling) == (
        header.architecture,
        header.context_length,
        header.sampling,
    )


def test_a_template_can_be_missing(make_gguf: MakeGguf) -> None:
    assert read_header(make_gguf(template=None)).chat_template is None


def test_the_content_agrees_with_the_library_that_reads_all_of_it(make_gguf: MakeGguf) -> None:
    path = make_gguf(tensor_type=gguf.GGMLQuantizationType.Q8_0)
    reader, content = gguf.GGUFReader(path), read_content(path)
    whole = path.read_bytes()
    assert list(content.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        found = content.tensors[tensor.name]
        assert found.kind == tensor.tensor_type
        assert found.shape == tuple(reversed(tensor.shape.tolist()))
        stored = whole[found.start : found.start + found.size_bytes]
        assert stored == tensor.data.tobytes()
    assert content.fields["llama.context_length"] == 512


def test_a_file_without_its_last_byte_is_cut_short(make_gguf: MakeGguf) -> None:
    path = make_gguf()
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(UnsupportedModelError, match="cut short or damaged"):
        read_header(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_anywhere_is_refused(make_gguf: MakeGguf, share: float) -> None:
    path = make_gguf()
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UnsupportedModelError):
        read_header(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(4, 3000), byte=st.integers(0, 255))
def test_a_damaged_header_is_read_or_refused(make_gguf: MakeGguf, place: int, byte: int) -> None:
    path = make_gguf()
    content = bytearray(path.read_bytes())
    content[place] = byte
    path.write_bytes(content)
    with contextlib.suppress(UnsupportedModelError):
        read_header(path)


@pytest.mark.parametrize("content", [b"", b"GGU", b"PK\x03\x04 a zip file", b"<html>"])
def test_another_kind_of_file_is_not_gguf(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(UnsupportedModelError, match="not a GGUF file"):
        read_header(path)


def test_an_old_version_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF" + (1).to_bytes(4, "little") + bytes(16))
    with pytest.raises(UnsupportedModelError, match="version 1"):
        read_header(path)


def test_a_file_that_is_no_language_model_is_refused(make_gguf: MakeGguf, tmp_path: Path) -> None:
    path = tmp_path / "clip.gguf"
    writer = gguf.GGUFWriter(path, "clip")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match="does not hold a language model"):
        read_header(path)


def test_a_file_that_is_not_there_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="cannot be read"):
        read_header(tmp_path / "none.gguf")


def write_by_hand(
    path: Path, fields: list[tuple[str, int, bytes]], tensors: bytes = b"", count: int = 0
) -> Path:
    """Write a header of fields as `(key, type, bytes)`, and descriptions of tensors as they are."""
    content = b"GGUF" + struct.pack("<IQQ", 3, count, len(fields))
    for key, kind, value in fields:
        content += struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value
    path.write_bytes(content + tensors + bytes(64))
    return path


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def tensor(name: str, shape: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


TEXT, ARRAY, NUMBER, REAL, FLAG = 8, 9, 4, 6, 7
LLAMA = [
    ("general.architecture", TEXT, text("llama")),
    ("llama.context_length", NUMBER, struct.pack("<I", 512)),
]


def number(key: str, value: int) -> tuple[str, int, bytes]:
    return key, NUMBER, struct.pack("<I", value)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            [*LLAMA, ("tokenizer.ggml.tokens", ARRAY, struct.pack("<IQ", TEXT, 1) + text("a"))],
            "a vocabulary alone",
        ),
        ([*LLAMA, ("general.type", TEXT, text("adapter"))], "an adapter"),
        ([*LLAMA, ("general.type", TEXT, text("mmproj"))], "that sees"),
    ],
)
def test_what_is_no_whole_model_is_told_by_what_it_is(
    tmp_path: Path, fields: list[tuple[str, int, bytes]], says: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=says):
        read_header(write_by_hand(tmp_path / "f.gguf", fields))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ([*LLAMA, LLAMA[0]], "twice"),
        ([LLAMA[0], number("llama.context_length", 0)], "context_length is 0"),
        ([*LLAMA, number("llama.block_count", 2**32 - 1)], "block_count is 4294967295"),
        ([*LLAMA, ("llama.block_count", FLAG, b"\1")], "block_count is True"),
        ([*LLAMA, ("llama.rope.freq_base", REAL, struct.pack("<f", float("nan")))], "is nan"),
        ([*LLAMA, ("llama.rope.freq_base", REAL, struct.pack("<f", float("inf")))], "is inf"),
        ([*LLAMA, ("llama.rope.freq_base", REAL, struct.pack("<f", -1.0))], "is -1.0"),
        ([*LLAMA, ("llama.a", ARRAY, struct.pack("<IQf", REAL, 1, float("nan")))], "is nan"),
        ([*LLAMA, number("general.alignment", 0)], "alignment is 0"),
        ([*LLAMA, number("general.alignment", 48)], "alignment is 48"),
        ([*LLAMA, ("x", ARRAY, struct.pack("<IQ", TEXT, 2**60))], "more than 4,194,304 values"),
        ([*LLAMA, ("x", ARRAY, struct.pack("<IQ", 0, 2**60))], "more than 4,194,304 values"),
        ([*LLAMA, ("x", ARRAY, struct.pack("<IQ", ARRAY, 2))], "unknown type 9"),
        ([*LLAMA, ("x", TEXT, struct.pack("<Q", 2**63))], "inside its header"),
        ([*LLAMA, ("x", 99, b"")], "unknown type 99"),
    ],
)
def test_numbers_beyond_sense_are_named(
    tmp_path: Path, fields: list[tuple[str, int, bytes]], says: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=says):
        read_header(write_by_hand(tmp_path / "f.gguf", fields))


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ([tensor("a", [4]), tensor("a", [4])], "two tensors 'a'"),
        ([tensor("a", [2**32, 2**32])], "of shape"),
        ([tensor("a", [4, 0])], "of shape"),
        ([tensor("a", [33], kind=8)], "in blocks of 32"),
        ([tensor("a", [4], offset=4)], "no multiple of 32"),
        ([tensor("a", [4], offset=2**40)], "of 1,099,5"),
        ([tensor("a", [1] * 9)], "9 dimensions"),
        ([tensor("a", [4], kind=999)], "unknown type 999"),
    ],
)
def test_tensors_that_no_writer_writes_are_refused(
    tmp_path: Path, tensors: list[bytes], says: str
) -> None:
    path = write_by_hand(tmp_path / "f.gguf", LLAMA, b"".join(tensors), len(tensors))
    with pytest.raises(UnsupportedModelError, match=says):
        read_header(path)


def test_counts_beyond_the_file_end_with_it(tmp_path: Path) -> None:
    """The file is sparse and large: what is read is bounded all the same."""
    for counts in ((2**63, 0), (0, 2**63)):
        path = tmp_path / "f.gguf"
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts))
        with path.open("r+b") as file:
            file.truncate(1 << 40)
        with pytest.raises(UnsupportedModelError, match="damaged"):
            read_header(path)


def test_a_vocabulary_has_one_type_for_each_token(tmp_path: Path) -> None:
    tokens = ("tokenizer.ggml.tokens", ARRAY, struct.pack("<IQ", TEXT, 1) + text("a"))
    kinds = ("tokenizer.ggml.token_type", ARRAY, struct.pack("<IQII", NUMBER, 2, 1, 1))
    path = write_by_hand(tmp_path / "f.gguf", [*LLAMA, tokens, kinds], tensor("a", [4]), 1)
    with pytest.raises(UnsupportedModelError, match="not one for each of 1 tokens"):
        read_header(path)


def test_a_file_for_other_processors_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF" + struct.pack(">IQQ", 3, 0, 0))
    with pytest.raises(UnsupportedModelError, match="big-endian"):
        read_header(path)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.gguf")
    with pytest.raises(UnsupportedModelError, match="it is a pipe"):
        read_header(tmp_path / "a.gguf")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_anywhere_in_a_header_is_read_or_refused(
    make_gguf: MakeGguf, data: st.DataObject
) -> None:
    """Runs of bytes are written over: lengths and counts of eight bytes among them."""
    path = make_gguf()
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(8, 9000))
        piece: Any = data.draw(
            st.sampled_from([1, 4, 8]).flatmap(lambda n: st.binary(min_size=n, max_size=n))
        )
        content[place : place + len(piece)] = piece
    path.write_bytes(content)
    with contextlib.suppress(UnsupportedModelError):
        read_header(path)
