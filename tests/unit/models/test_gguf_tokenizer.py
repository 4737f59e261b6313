from collections.abc import Callable
from pathlib import Path

import gguf
import pytest

from recollect.errors import UnsupportedModelError
from recollect.models.gguf_tokenizer import write_tokenizer
from recollect.models.tokenizer import OpenVinoTokenizer

MakeGguf = Callable[..., Path]

# Pairs that are merged only where no rule splits between them.
MERGES = [
    *("1 2", "3 4", "12 34", "Ġ 1", "Ġ '", "' S", "' s", "! !", "Ġ !", ") ;", "Ċ Ċ", "Ġ Ġ", "ĠĠ Ġ"),
    *("Ċ Ġ", "; Ċ", ". a", "Ġ a", "a b", "Ġa b", "ab 1", "a '", "( a", "Ã ©"),
]
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
AFTER_NUMBERS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# As Hugging Face's tokenizer.json of Qwen2, Llama 3 and SmolLM2 have them.
QWEN_2 = [rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{AFTER_NUMBERS}"]
LLAMA_3 = [rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{AFTER_NUMBERS}"]
GPT_2 = [r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"]
SMOLLM = [r"\p{N}", *GPT_2]
TEXTS = [
    "12345 ab1 1234",
    "a's A'S 'S !! !!!",
    "x  y   z    ",
    "f(a);\n\n  ab\n \n1",
    ".a .ab\t.a é naïve 🎉 日本語",
    "\r\n\r\n1\n",
    "",
]


@pytest.mark.parametrize(
    ("splitter", "rules"),
    [
        ("qwen2", QWEN_2),
        ("llama-bpe", LLAMA_3),
        ("smaug-bpe", LLAMA_3),
        ("dbrx", LLAMA_3),
        ("smollm", SMOLLM),
        ("refact", SMOLLM),
        ("gpt-2", GPT_2),
    ],
)
def test_text_is_split_as_by_hugging_face(
    splitter: str, rules: list[str], make_gguf: MakeGguf, tmp_path: Path
) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    path = make_gguf(splitter=splitter, merges=MERGES, tensors=False)
    folder = tmp_path / "made"
    folder.mkdir()
    write_tokenizer(path, folder)
    ours = OpenVinoTokenizer(folder, frozenset())
    fields = gguf.GGUFReader(path).fields
    vocabulary = {
        token: number for number, token in enumerate(fields["tokenizer.ggml.tokens"].contents())
    }
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    split = tokenizers.pre_tokenizers
    theirs.pre_tokenizer = split.Sequence(
        [
            *(split.Split(tokenizers.Regex(rule), "isolated") for rule in rules),
            split.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text).ids, text
        assert ours.decode(ours.encode(text)) == text


def test_a_rule_that_is_not_known_is_named(make_gguf: MakeGguf, tmp_path: Path) -> None:
    path = make_gguf(splitter="gpt-7", tensors=False)
    with pytest.raises(UnsupportedModelError, match=r"^tiny\.gguf .* in the way 'gpt-7', which"):
        write_tokenizer(path, tmp_path)


@pytest.mark.parametrize("kind", ["llama", "bert", "rwkv"])
def test_a_tokenizer_of_another_kind_is_named(
    kind: str, make_gguf: MakeGguf, tmp_path: Path
) -> None:
    path = make_gguf(tokenizer=kind, tensors=False)
    with pytest.raises(UnsupportedModelError, match=rf"a tokenizer of the kind '{kind}'"):
        write_tokenizer(path, tmp_path)


def test_nothing_is_left_beside_the_tokenizer(make_gguf: MakeGguf, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    folder.mkdir()
    write_tokenizer(make_gguf(splitter="llama-bpe", tensors=False), folder)
    assert {file.name.split(".")[0] for file in folder.iterdir()} == {
        "openvino_tokenizer",
        "openvino_detokenizer",
    }
