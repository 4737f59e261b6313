"""A folder for ONNX Runtime GenAI is read without loading it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from recollect.errors import UnsupportedModelError
from recollect.models.local import LocalModel
from recollect.models.prepare import prepare
from recollect.models.tokenizer import Detokenizer, load_tokenizer

CONFIG = {
    "model": {
        "type": "llama",
        "context_length": 512,
        "eos_token_id": [1, 2],
        "bos_token_id": 0,
        "pad_token_id": 2,
        "vocab_size": 300,
        "decoder": {"filename": "model.onnx"},
    },
    "search": {"do_sample": True, "top_k": 20},
}
SPECIAL = ["<s>", "</s>", "<|im_end|>"]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator(["the harbour and the bay"], trainer)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=10)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "genai_config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (folder / "model.onnx").write_bytes(b"weights")
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


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
    assert model.search_defaults == {"do_sample": True, "top_k": 20}


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
    (moved / "model.onnx").write_bytes(b"other weights")
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
