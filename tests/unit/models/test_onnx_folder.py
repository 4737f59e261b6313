"""A folder for ONNX Runtime GenAI is read without loading it."""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest

from recollect.conversation.formats import load_tokenizer
from recollect.errors import UnsupportedModelError
from recollect.models.catalog import LocalModel
from recollect.models.prepare import prepare
from recollect.text.detokenizer import Detokenizer


@pytest.fixture
def folder(onnx_model_folder: Path) -> Path:
    return onnx_model_folder


@pytest.fixture
def opened(tmp_path: Path) -> Callable[[Path], LocalModel]:
    return lambda folder: prepare(str(folder), home=tmp_path / "home")


def test_it_says_what_the_files_say(folder: Path, opened: Callable[[Path], LocalModel]) -> None:
    model = opened(folder)
    assert model.format == "onnx-genai"
    assert model.architecture == "llama"
    assert model.context_length == 512
    assert model.eos_token_ids == {1, 2}
    assert (model.bos_token, model.eos_token) == ("<s>", "<|im_end|>")
    assert model.chat_template == "{{ messages[0].content }}"
    assert model.search_defaults == {
        "do_sample": True,
        "top_k": 20,
        "past_present_share_buffer": False,
    }


def test_what_its_makers_recommend_is_found(
    folder: Path, opened: Callable[[Path], LocalModel]
) -> None:
    said = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    (folder / "generation_config.json").write_text(json.dumps(said))
    assert opened(folder).sampling == {"temperature": 0.6, "top_p": 0.9}
    (folder / "generation_config.json").unlink()
    assert opened(folder).sampling == {}


def test_its_tokenizer_cuts_nothing_and_adds_nothing(
    folder: Path, opened: Callable[[Path], LocalModel]
) -> None:
    """The file asks for both: a limit of 4 tokens, and padding to 10."""
    tokenizer = load_tokenizer(opened(folder))
    text = "the harbour, naïve 🎉 and the bay<|im_end|>"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert ids[-1] == tokenizer.token_id("<|im_end|>") == 2
    assert tokenizer.encode("") == []
    assert max(ids) < tokenizer.vocab_size
    detokenizer = Detokenizer(tokenizer)
    pieces = [*map(detokenizer.push, ids), detokenizer.finish()]
    assert "".join(pieces) == tokenizer.decode(ids)


def test_half_a_surrogate_pair_is_no_error(
    folder: Path, opened: Callable[[Path], LocalModel]
) -> None:
    tokenizer = load_tokenizer(opened(folder))
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"


def test_the_fingerprint_is_that_of_the_contents(
    folder: Path, opened: Callable[[Path], LocalModel]
) -> None:
    before = opened(folder).fingerprint
    moved = folder.rename(folder.with_name("moved"))
    assert opened(moved).fingerprint == before
    (moved / "README.md").write_text("says nothing of KV")
    assert opened(moved).fingerprint == before
    (moved / "model.onnx.data").write_bytes(b"other weights")
    assert opened(moved).fingerprint != before


@pytest.mark.parametrize(
    ("missing", "remedy"),
    [("tokenizer.json", "fast tokenizer"), ("model.onnx", "get the whole folder")],
)
def test_a_missing_file_is_named_with_a_remedy(
    folder: Path, opened: Callable[[Path], LocalModel], missing: str, remedy: str
) -> None:
    (folder / missing).unlink()
    with pytest.raises(UnsupportedModelError, match=f"{missing}.*{remedy}"):
        opened(folder)


@pytest.mark.parametrize("content", ["{}", "[]", '{"model": {"context_length": 5}}', "no json"])
def test_a_config_of_something_else_is_refused(
    folder: Path, opened: Callable[[Path], LocalModel], content: str
) -> None:
    (folder / "genai_config.json").write_text(content)
    with pytest.raises(UnsupportedModelError):
        opened(folder)


def test_a_damaged_tokenizer_is_refused(folder: Path, opened: Callable[[Path], LocalModel]) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UnsupportedModelError, match="cannot be read"):
        load_tokenizer(opened(folder))


@pytest.mark.parametrize(
    "location", ["../outside.data", "/etc/passwd", "link.data", "pipe", "missing.data", ""]
)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_graph_that_reads_elsewhere_is_refused(
    folder: Path,
    opened: Callable[[Path], LocalModel],
    make_onnx: Callable[..., bytes],
    location: str,
    compiled: bool,
) -> None:
    """Weights in other files, and what a vendor compiled, have to lie in the folder."""
    if compiled and not location:
        return  # what is compiled lies in the graph itself then
    (folder.parent / "outside.data").write_bytes(b"weights")
    (folder / "link.data").symlink_to(folder.parent / "outside.data")
    os.mkfifo(folder / "pipe")
    graph = make_onnx(compiled=location) if compiled else make_onnx(location)
    (folder / "model.onnx").write_bytes(graph)
    with pytest.raises(UnsupportedModelError, match=r"reads .* cannot be taken"):
        opened(folder)


@pytest.mark.slow
def test_a_damaged_graph_is_refused_in_a_sentence(
    folder: Path, opened: Callable[[Path], LocalModel]
) -> None:
    graph = (folder / "model.onnx").read_bytes()
    for length in range(0, len(graph), 97):
        (folder / "model.onnx").write_bytes(graph[:length])
        with pytest.raises(UnsupportedModelError, match="get the whole folder again"):
            opened(folder)


def test_links_within_the_hub_cache_are_followed_and_others_are_not(
    folder: Path, opened: Callable[[Path], LocalModel], tmp_path: Path
) -> None:
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot = blobs.parent / "snapshots" / "abc"
    for made in (blobs, snapshot):
        made.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert opened(snapshot).context_length == 512
    (tmp_path / "secret").write_text("{}")
    (snapshot / "chat_template.jinja").unlink()
    (snapshot / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(UnsupportedModelError, match="link that leads out of the folder"):
        opened(snapshot)


def test_a_folder_that_others_may_write_to_is_remarked_on_once(
    folder: Path, opened: Callable[[Path], LocalModel], caplog: pytest.LogCaptureFixture
) -> None:
    opened(folder)
    assert caplog.messages == []
    folder.chmod(0o777)
    (folder / "model.onnx").chmod(0o666)
    opened(folder)
    assert [
        "can be changed by others (everybody on this machine may write to it)" in message
        for message in caplog.messages
    ] == [True]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[" * 100_000,
        b'{"model": {"type": "BPE", "vocab": {"a": 4000000000}, "merges": []}}',
        b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}',
        b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["b c"]}}',
        b"\xff\xfe",
    ],
)
def test_a_tokenizer_that_makes_no_sense_is_refused(
    folder: Path, opened: Callable[[Path], LocalModel], content: bytes
) -> None:
    model = opened(folder)
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(UnsupportedModelError, match=r"tokenizer\.json cannot be"):
        load_tokenizer(model)


@pytest.mark.slow
def test_damage_in_a_tokenizer_is_read_or_refused(
    folder: Path, opened: Callable[[Path], LocalModel]
) -> None:
    """Numbers, brackets and names are exchanged for others."""
    model = opened(folder)
    original = (folder / "tokenizer.json").read_bytes()
    random = Random(0)  # noqa: S311 - the same damage every time
    for _ in range(150):
        content = bytearray(original)
        for _ in range(random.randint(1, 3)):
            content[random.randrange(len(content))] = random.choice(b'0919{}[]",:-eE\\\x00\xff')
        (folder / "tokenizer.json").write_bytes(content)
        with suppress(UnsupportedModelError):
            load_tokenizer(model).encode("the harbour and the bay")
