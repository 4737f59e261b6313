import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from recollect.errors import UnsupportedModelError
from recollect.models.catalog import LocalModel
from recollect.models.openvino_folder import MODEL_FILES, TOKENIZER_FILES, Manifest, open_folder

RUNTIME_INFO = (
    '<net><layers/><rt_info><chat_template value="from runtime info"/>'
    '<eos_token_id value="7"/><bos_token_id value="1"/></rt_info></net>'
)


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """The files of an export, as far as opening reads them."""
    folder = tmp_path / "export"
    folder.mkdir()
    for name in (*MODEL_FILES, *TOKENIZER_FILES):
        (folder / name).write_text(f"<net>content of {name}</net>")
    (folder / "openvino_tokenizer.xml").write_text(RUNTIME_INFO)
    write(folder, "config.json", {"max_position_embeddings": 4096})
    return folder


def write(folder: Path, name: str, content: object) -> None:
    (folder / name).write_text(json.dumps(content))


def opened(folder: Path) -> LocalModel:
    return open_folder(folder, name="it", home=folder.parent / "home")


def test_a_plain_export_is_opened(export: Path) -> None:
    model = opened(export)
    assert model.name == "it"
    assert model.format == "openvino"
    assert model.folder == export
    assert model.context_length == 4096
    assert model.chat_template == "from runtime info"
    assert model.eos_token_ids == {7}
    assert (model.bos_token, model.eos_token) == (None, None)


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({"max_position_embeddings": 10}, 10),
        ({"n_positions": 20}, 20),
        ({"text_config": {"max_position_embeddings": 30}}, 30),
        ({"max_position_embeddings": 10, "text_config": None}, 10),
    ],
)
def test_the_context_length_is_found(export: Path, config: object, length: int) -> None:
    write(export, "config.json", config)
    assert opened(export).context_length == length


@pytest.mark.parametrize("config", [{}, [], {"max_position_embeddings": "x"}])
def test_a_missing_context_length_is_said_with_a_remedy(export: Path, config: object) -> None:
    write(export, "config.json", config)
    with pytest.raises(UnsupportedModelError, match=r"original model's config\.json"):
        opened(export)


@pytest.mark.parametrize("found", [2, [2, 3], [3, 2]])
def test_ends_of_all_files_count(export: Path, found: object) -> None:
    write(export, "generation_config.json", {"eos_token_id": found})
    write(export, "config.json", {"max_position_embeddings": 1, "eos_token_id": 5})
    expected = {5, 7, *(found if isinstance(found, list) else [found])}
    assert opened(export).eos_token_ids == expected


def test_what_its_makers_recommend_is_found(export: Path) -> None:
    assert opened(export).sampling == {}
    said = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 7}
    write(export, "generation_config.json", said)
    assert opened(export).sampling == {"temperature": 0.7, "top_k": 20}


def test_special_tokens_are_found_as_text_or_as_object(export: Path) -> None:
    tokenizer = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>"},
        "added_tokens_decoder": {"9": {"content": "</s>"}, "1": {"content": "<s>"}},
    }
    write(export, "tokenizer_config.json", tokenizer)
    model = opened(export)
    assert (model.bos_token, model.eos_token) == ("<s>", "</s>")
    assert model.eos_token_ids == {7, 9}


def test_special_tokens_are_found_by_id(export: Path) -> None:
    added = {"7": {"content": "<end>"}, "1": {"content": "<begin>"}}
    write(export, "tokenizer_config.json", {"added_tokens_decoder": added})
    model = opened(export)
    assert (model.bos_token, model.eos_token) == ("<begin>", "<end>")


def test_the_nearest_chat_template_wins(export: Path) -> None:
    """The file of its own is newest, then the tokenizer's settings, then what the converter saw."""
    assert opened(export).chat_template == "from runtime info"
    write(export, "chat_template.json", {"chat_template": "legacy"})
    assert opened(export).chat_template == "legacy"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    write(export, "tokenizer_config.json", {"chat_template": named})
    assert opened(export).chat_template == "d"
    write(export, "tokenizer_config.json", {"chat_template": "c"})
    assert opened(export).chat_template == "c"
    (export / "chat_template.jinja").write_text("j")
    assert opened(export).chat_template == "j"


def test_a_model_may_have_no_chat_template(export: Path) -> None:
    (export / "openvino_tokenizer.xml").write_text("<net/>")
    assert opened(export).chat_template is None


@pytest.mark.parametrize("name", [*MODEL_FILES, *TOKENIZER_FILES])
def test_a_missing_file_is_named_with_the_command_that_makes_it(export: Path, name: str) -> None:
    (export / name).unlink()
    with pytest.raises(
        UnsupportedModelError, match=f"holds no {name}: .*optimum-cli export openvino"
    ):
        opened(export)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "openvino_tokenizer.xml"])
@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\x00"])
def test_a_damaged_file_is_named(export: Path, name: str, content: bytes) -> None:
    (export / name).write_bytes(content)
    with pytest.raises(UnsupportedModelError, match=name):
        opened(export)


@pytest.mark.parametrize("name", [*MODEL_FILES, *TOKENIZER_FILES, "chat_template.jinja"])
def test_the_fingerprint_follows_every_file_that_matters(export: Path, name: str) -> None:
    before = opened(export).fingerprint
    assert opened(export).fingerprint == before
    file = export / name
    file.write_text((file.read_text() if file.exists() else "") + " ")
    assert opened(export).fingerprint != before


@pytest.mark.skipif(sys.platform == "win32", reason="links and pipes of POSIX")
@pytest.mark.parametrize(
    "name", [*MODEL_FILES, *TOKENIZER_FILES, "config.json", "tokenizer_config.json",
             "generation_config.json", "chat_template.jinja", "chat_template.json"]
)  # fmt: skip
def test_a_file_that_leads_out_of_the_folder_or_has_no_end_is_refused(
    export: Path, name: str
) -> None:
    outside = export.parent / "outside"
    outside.write_text('<net a="{}"/>')
    file = export / name
    file.unlink(missing_ok=True)
    file.symlink_to(outside)
    with pytest.raises(UnsupportedModelError, match=f"{name} .*leads out of the folder"):
        opened(export)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(UnsupportedModelError, match=f"{name} .*it is a pipe"):
        opened(export)


@pytest.mark.parametrize("name", ["openvino_tokenizer.xml", "openvino_tokenizer.bin"])
def test_a_tokenizer_beyond_any_size_is_not_read(export: Path, name: str) -> None:
    with (export / name).open("r+b") as file:
        file.truncate(1 << 33)
    with pytest.raises(UnsupportedModelError, match="8,589,934,592 bytes"):
        opened(export)


@pytest.mark.parametrize("content", [b"", b"\x08\x07\x12\x04", b"{}", b"GGUF"])
def test_a_graph_of_another_format_is_refused(export: Path, content: bytes) -> None:
    """OpenVINO goes by the content, and some formats name files elsewhere."""
    (export / "openvino_model.xml").write_bytes(content)
    with pytest.raises(UnsupportedModelError, match="not a graph of OpenVINO"):
        opened(export)


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"a":' * 100_000, '{"max_position_embeddings": ' + "9" * 5000 + "}"]
)
def test_json_that_is_too_deep_or_too_long_is_refused(export: Path, content: str) -> None:
    (export / "config.json").write_text(content)
    with pytest.raises(UnsupportedModelError, match=r"config\.json is not valid JSON"):
        opened(export)


@pytest.mark.parametrize("found", [-1, True, 2**31, "9" * 5000, [None, "x", -5], 1.5])
def test_what_is_no_token_id_is_no_end(export: Path, found: object) -> None:
    write(export, "generation_config.json", {"eos_token_id": found})
    assert opened(export).eos_token_ids == {7}


@pytest.mark.parametrize("length", [0, -5, True, 2**31, 1e30, "4096"])
def test_a_context_that_no_model_has_is_not_believed(export: Path, length: object) -> None:
    write(export, "config.json", {"max_position_embeddings": length})
    with pytest.raises(UnsupportedModelError, match="does not say how long"):
        opened(export)


@pytest.mark.skipif(sys.platform == "win32", reason="modes of POSIX")
def test_a_folder_that_others_may_write_to_is_remarked_on(
    export: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened(export)
    assert caplog.messages == []
    (export / "openvino_model.bin").chmod(0o666)
    opened(export)
    (message,) = caplog.messages
    assert "openvino_model.bin can be changed by others (everybody" in message


def test_a_folder_from_elsewhere_is_not_taken_for_the_model_that_it_says_it_is(
    export: Path, tmp_path: Path
) -> None:
    """KV is shared under a fingerprint, so a claimed one would have KV taken for another model's."""
    fingerprints = set()
    for claimed in ("a" * 64, "b" * 64):
        Manifest(
            name="tiny",
            source_sha256="c" * 64,
            architecture="llama",
            context_length=512,
            chat_template=None,
            eos_token_ids=[2],
            bos_token=None,
            eos_token=None,
            fingerprint=claimed,
            library_versions={},
            file_bytes={},
        ).write(export)
        fingerprints.add(opened(export).fingerprint)
    assert len(fingerprints) == 1
    assert "b" * 64 not in fingerprints
    own = tmp_path / "home" / "models" / "tiny"
    shutil.copytree(export, own)
    assert open_folder(own, name="it", home=tmp_path / "home").fingerprint == "b" * 64
