from collections.abc import Callable
from pathlib import Path

import gguf
import pytest

from recollect.errors import UnsupportedModelError
from recollect.models.gguf_to_openvino import merges_of, write_tokenizer
from recollect.text.detokenizer import Detokenizer
from recollect.text.file_tokenizers import OpenVinoTokenizer

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


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("splitter", "rules"),
    [
        ("qwen2", QWEN_2),
        ("smollm", SMOLLM),
        pytest.param("llama-bpe", LLAMA_3, marks=pytest.mark.slow),
        pytest.param("smaug-bpe", LLAMA_3, marks=pytest.mark.slow),
        pytest.param("dbrx", LLAMA_3, marks=pytest.mark.slow),
        pytest.param("refact", SMOLLM, marks=pytest.mark.slow),
        pytest.param("gpt-2", GPT_2, marks=pytest.mark.slow),
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


@pytest.mark.parametrize("kind", ["bert", "rwkv"])
def test_a_tokenizer_of_another_kind_is_named(
    kind: str, make_gguf: MakeGguf, tmp_path: Path
) -> None:
    path = make_gguf(tokenizer=kind, tensors=False)
    with pytest.raises(UnsupportedModelError, match=rf"a tokenizer of the kind '{kind}'"):
        write_tokenizer(path, tmp_path)


CORPUS = (
    "The cache of a conversation holds what was read, and reads nothing twice. "
    "A cache that holds nothing reads everything: the conversation is read again, and again.\n"
)
SPACE = "\u2581"


def write_sentencepiece_gguf(path: Path, **fields: object) -> Path:
    """Write the fields of a file with a vocabulary as SentencePiece makes it of the corpus."""
    tokenizers = pytest.importorskip("tokenizers")
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=150, show_progress=False)
    trained.train_from_iterator([CORPUS.replace(" ", SPACE)] * 2, trainer)
    pieces = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)
    merged = [piece for piece in pieces if len(piece) > 1]
    letters = [piece for piece in pieces if len(piece) == 1]
    special, found = ["<unk>", "<s>", "</s>"], ["[INST]"]
    every_byte = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = [*special, *every_byte, *found, *merged, *letters]
    counts = {"special": len(special), "bytes": 256}
    scores = [0.0] * (counts["special"] + counts["bytes"] + len(found))
    scores += [-float(rank) for rank in range(len(merged) + len(letters))]
    kinds = [2, 3, 3, *[6] * 256, 4, *[1] * (len(merged) + len(letters))]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    for name, value in fields.items():
        writer.add_key_value(f"tokenizer.ggml.{name}", value, gguf.GGUFValueType.get_type(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.fixture
def sentencepiece(tmp_path: Path) -> OpenVinoTokenizer:
    (tmp_path / "made").mkdir()
    write_tokenizer(write_sentencepiece_gguf(tmp_path / "sp.gguf"), tmp_path / "made")
    return OpenVinoTokenizer(tmp_path / "made", frozenset([2]))


def test_sentencepiece_merges_as_hugging_face_does(
    sentencepiece: OpenVinoTokenizer, tmp_path: Path
) -> None:
    """The other side is set up as Llama 2's tokenizer.json is."""
    tokenizers = pytest.importorskip("tokenizers")
    fields = {
        name.rpartition(".")[2]: field.contents()
        for name, field in gguf.GGUFReader(tmp_path / "sp.gguf").fields.items()
    }
    tokens = fields["tokens"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = merges_of(tokens, fields["scores"], fields["token_type"])
    theirs = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    theirs.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    theirs.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    theirs.add_special_tokens(["<s>", "</s>", "<unk>"])
    theirs.add_tokens([tokenizers.AddedToken("[INST]", normalized=False)])
    for text in [CORPUS, *TEXTS, "<s>[INST] The cache</s> reads", "  the  cache  ", "again\u200b"]:
        ids = sentencepiece.encode(text)
        assert ids == theirs.encode(text).ids, text
        assert sentencepiece.decode(ids) == theirs.decode(ids), text
    shown = sentencepiece.decode([1, 2], skip_special_tokens=False)
    assert (shown, sentencepiece.decode([1, 2])) == ("<s></s>", "")
    assert sentencepiece.vocabulary.special_token_ids == {0, 1, 2}
    assert sentencepiece.vocabulary.token_bytes[3 + 0xC3] == b"\xc3"


def test_sentencepiece_streams_without_loss(sentencepiece: OpenVinoTokenizer) -> None:
    for text in (CORPUS, "naïve 🎉 日本語", " the  cache"):
        ids = sentencepiece.encode(text)
        detokenizer = Detokenizer(sentencepiece)
        pieces = [*(detokenizer.push(number) for number in ids), detokenizer.finish()]
        assert "".join(pieces) == sentencepiece.decode(ids) == text


def test_merges_are_by_score_then_by_length() -> None:
    tokens, kinds = ["<unk>", "a", "b", "ab", "aba", "ba"], [2, 1, 1, 1, 1, 1]
    scores = [0.0, -9.0, -9.0, -2.0, -3.0, -1.0]
    assert merges_of(tokens, scores, kinds) == [("b", "a"), ("a", "b"), ("ab", "a"), ("a", "ba")]


def test_a_table_that_normalizes_is_refused(tmp_path: Path) -> None:
    path = write_sentencepiece_gguf(tmp_path / "sp.gguf", precompiled_charsmap="x")
    with pytest.raises(UnsupportedModelError, match=r"^sp\.gguf .* with a table that normalizes"):
        write_tokenizer(path, tmp_path)


def test_nothing_is_left_beside_the_tokenizer(make_gguf: MakeGguf, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    folder.mkdir()
    write_tokenizer(make_gguf(splitter="llama-bpe", tensors=False), folder)
    assert {file.name.split(".")[0] for file in folder.iterdir()} == {
        "openvino_tokenizer",
        "openvino_detokenizer",
    }


def test_a_merge_that_makes_no_token_is_damage(make_gguf: MakeGguf, tmp_path: Path) -> None:
    """OpenVINO takes it, and gives no token for any text at all."""
    path = make_gguf()
    damaged = path.read_bytes().replace(b"h e", b"h f", 1)
    path.write_bytes(damaged)
    with pytest.raises(UnsupportedModelError, match=r"merges 'h f', which makes no token"):
        write_tokenizer(path, tmp_path)
