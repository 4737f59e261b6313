import contextlib
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recollect.errors import UnsupportedModelError
from recollect.models.gguf_file import read_content, read_header

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
    path = make_gguf(tensors=False)
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
