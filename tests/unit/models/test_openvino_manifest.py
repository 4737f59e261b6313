import json
from dataclasses import asdict
from pathlib import Path

import pytest

from recollect.models.openvino_folder import MANIFEST_NAME, Manifest

MANIFEST = Manifest(
    name="tiny",
    source_sha256="ab" * 32,
    architecture="llama",
    context_length=512,
    chat_template="é{{ x }}",
    eos_token_ids=[2],
    bos_token=None,
    eos_token="</s>",
    fingerprint="cd" * 32,
    library_versions={"openvino-genai": "2026.4.1"},
    file_bytes={"openvino_model.bin": 3},
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    MANIFEST.write(tmp_path)
    assert Manifest.read(tmp_path) == MANIFEST


@pytest.mark.parametrize("field", asdict(MANIFEST))
def test_a_field_that_is_missing_or_wrong_makes_it_unreadable(tmp_path: Path, field: str) -> None:
    fields = asdict(MANIFEST)
    fields[field] = [["wrong"]]
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(fields))
    assert Manifest.read(tmp_path) is None
    del fields[field]
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(fields))
    is_optional = field in ("window", "sampling")  # what was converted before has none
    assert (Manifest.read(tmp_path) is not None) == is_optional


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"format_version": 1, "x": 1}'])
def test_what_is_no_manifest_is_not_read(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST_NAME).write_bytes(content)
    assert Manifest.read(tmp_path) is None


def test_a_manifest_of_an_earlier_version_with_the_size_of_its_source_is_read(
    tmp_path: Path,
) -> None:
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(asdict(MANIFEST) | {"source_bytes": 10}))
    assert Manifest.read(tmp_path) == MANIFEST


def test_an_older_format_is_not_read(tmp_path: Path) -> None:
    fields = asdict(MANIFEST) | {"format_version": 0}
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(fields))
    assert Manifest.read(tmp_path) is None


def test_a_folder_without_one_has_none(tmp_path: Path) -> None:
    assert Manifest.read(tmp_path) is None
