"""Words are found wherever they were said, in any script; what is deleted is found no more."""

import random
import sqlite3
import string
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from recollect.encryption import Cipher
from recollect.errors import InvalidParameterError, StoreUnavailableError
from recollect.journal import schema
from recollect.journal.journal import JOURNAL_NAME, Journal
from recollect.journal.records import Entry, Hit, NewNode
from recollect.journal.search import MOST_CHARACTERS, MOST_WORDS, Query, folded

CIPHER = Cipher(bytes(range(32)))
TEXTS = (
    "Where is the treasure buried? Below the OAK, of course.",
    "我想去北京看长城。然后坐火车去上海。",
    "東京の天気はどうですか。カタカナも。",
    "서울에서 부산까지 기차로 갑니다",
    "Die Straße nach Köln ist gesperrt; STRASSE bleibt.",
    "Привет, МИР! Ещё раз: привет.",
    "ΣΊΣΥΦΟΣ και λίθος",
    'He said "it\'s 100% fine" -- (NEAR OR NOT) * : ^ {col} \\',
    "a\x00b nul, tab\tand\nnewline",
    "\N{PARTY POPPER}\N{PARTY POPPER} emoji \N{PARTY POPPER}",
    "x",
    "",
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / JOURNAL_NAME


@pytest.fixture(params=["plain", "sealed"])
def journal(request: pytest.FixtureRequest, path: Path) -> Iterator[Journal]:
    with Journal.open(path, cipher=CIPHER if request.param == "sealed" else None) as opened:
        yield opened
        assert opened.check() == []


def say(journal: Journal, *texts: str, namespace: str = "") -> int:
    """Keep a conversation with messages one after the other; return its id."""
    made = journal.create(model="smollm2", fingerprint="f00d", namespace=namespace)
    journal.append(
        made.id, None, [NewNode(role="user", content=text) for text in texts], tip="main"
    )
    return made.id


def ids(hits: list[Hit]) -> list[int]:
    return [hit.node_id for hit in hits]


FOUND = [
    ("oak", [0]),
    ("TREASURE oak", [0]),
    ("oak treasure gold", []),
    ("reas", [0]),
    ('"the oak"', [0]),
    ('"oak the"', []),
    ("北京", [1]),
    ("火车去上海", [1]),
    ("京", [1, 2]),
    ("newline", [8]),  # behind a NUL, which ends a text for the index
    ("nul tab", [8]),
    ("天気", [2]),
    ("カタカナも", [2]),
    ("부산까지", [3]),
    ("köln", [4]),
    ("KÖLN straße", [4]),
    ("strasse", [4]),
    ("ПРИВЕТ мир", [5]),
    ("σίσυφος", [6]),
    ("100%", [7]),
    ("it's", [7]),
    ("NEAR", [7]),
    ("\N{PARTY POPPER}\N{PARTY POPPER}", [9]),
    ("x", [10]),
]


def test_words_are_found_in_any_script(journal: Journal) -> None:
    say(journal, *TEXTS)
    for words, expected in FOUND:
        assert sorted(hit.number - 1 for hit in journal.search(words)) == expected, words


TYPED = [
    '"', '""', '" "', "AND", "OR NOT", "NEAR(", "NEAR(a b)", "*", "a*", "^x", "col:x", "{a b}:",
    "-x", "+", "(", ")", "'", "''", "\x00", "\x00\x00\x00\x00", "\ud800abc", "a\\", "%", "_", "--",
    "; DROP TABLE nodes", '"a" "b', "\N{RIGHT-TO-LEFT OVERRIDE}", "\N{COMBINING ACUTE ACCENT}" * 50,
]  # fmt: skip


def test_nothing_that_is_typed_is_an_error_of_syntax(journal: Journal) -> None:
    say(journal, *TEXTS)
    for words in TYPED:
        if not words.replace('"', "").strip():
            with pytest.raises(InvalidParameterError, match="at least one word"):
                journal.search(words)
            continue
        wanted = Query.parse(words).words
        found = journal.search(words)
        assert all(all(word in folded(TEXTS[hit.number - 1]) for word in wanted) for hit in found)


@pytest.mark.few(1)
def test_random_input_finds_what_a_plain_look_finds(journal: Journal) -> None:
    say(journal, *TEXTS)
    chance = random.Random(19)  # noqa: S311
    letters = string.printable + "".join(TEXTS) + '"""   '
    for _ in range(300):
        words = "".join(chance.choices(letters, k=chance.randrange(1, 9)))
        try:
            query = Query.parse(words)
        except InvalidParameterError:
            continue
        expected = [
            number
            for number, text in enumerate(TEXTS)
            if all(word in folded(text) for word in query.words)
        ]
        found = sorted(hit.number - 1 for hit in journal.search(words))
        assert found == expected, words


def test_a_search_has_bounds() -> None:
    Query.parse("a" * MOST_CHARACTERS)
    with pytest.raises(InvalidParameterError, match="shorten it"):
        Query.parse("a" * (MOST_CHARACTERS + 1))
    with pytest.raises(InvalidParameterError, match="leave some out"):
        Query.parse(" ".join(map(str, range(MOST_WORDS + 1))))


@pytest.mark.slow
def test_folding_keeps_each_character_and_agrees_with_the_index() -> None:
    """A letter that the index folds otherwise would hide messages from a search."""
    every = [chr(code) for code in range(1, 0x110000) if not 0xD800 <= code < 0xE000]
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.execute("CREATE VIRTUAL TABLE one USING fts5(x, tokenize = 'trigram')")
        connection.execute("CREATE VIRTUAL TABLE terms USING fts5vocab('one', 'instance')")
        connection.executemany(
            "INSERT INTO one (rowid, x) VALUES (?, ?)", [(ord(one), one * 3) for one in every]
        )
        known = {doc: term for term, doc in connection.execute("SELECT term, doc FROM terms")}
    differing = [
        hex(ord(one))
        for one in every
        if len(folded(one)) != 1
        or (
            Query((folded(one) * 3,)).for_index() is not None
            and known[ord(one)] != known[ord(folded(one))]
        )
    ]
    assert differing == []


def test_folding_does_not_depend_on_what_stands_beside() -> None:
    """A text is folded as fast as its letters allow, and a query by itself: both ways are one."""
    chance = random.Random(7)  # noqa: S311
    codes = (
        "61 5a df 1e9e 130 131 17f 212a c5 3a3 3c2 1c80 432 412 a64a ff21 ff41 10400 6771 10a0 2d00"
    )
    letters = "".join(chr(int(code, 16)) for code in codes.split())
    for _ in range(500):
        one, other = ("".join(chance.choices(letters, k=3)) for _ in range(2))
        assert folded(one + other) == folded(one) + folded(other)


def test_a_hit_says_where_it_is(journal: Journal) -> None:
    first = say(journal, "the first question", "an answer", "another question")
    second = journal.create("other", model="smollm2", fingerprint="f00d")
    (root,) = journal.append(
        second.id, None, [NewNode(role="user", content="question")], tip="main"
    )
    (fork,) = journal.append(
        second.id, root, [NewNode(role="user", content="question two")], tip="a"
    )
    (lost,) = journal.append(second.id, root, [NewNode(role="tool", content="lost question")])
    journal.set_tip(second.id, "checkpoint:b", fork)
    found = journal.search("Question")
    assert [(hit.conversation, hit.branch, hit.number, hit.node_id) for hit in found] == [
        ("other", None, 3, lost),
        ("other", "a", 2, fork),
        ("other", "main", 1, root),
        (journal.info(first).name, "main", 3, root - 1),
        (journal.info(first).name, "main", 1, root - 3),
    ]
    assert [hit.role for hit in found[:2]] == ["tool", "user"]
    assert found[0].label == second.label
    assert journal.numbered_node(second.id, 2) == fork
    assert journal.numbered_node(second.id, 4) is None


def test_a_snippet_is_one_line_around_the_word(journal: Journal) -> None:
    say(journal, f"{'before ' * 50}\n the  Needle\tis here {'after ' * 50}", "needle")
    short, long = (hit.snippet for hit in journal.search("needle"))
    assert short == "needle"
    assert long.startswith("…")
    assert long.endswith("…")
    assert "the Needle is here" in long
    assert len(long) < 150


def test_only_the_namespace_is_searched(journal: Journal) -> None:
    say(journal, "a secret of one", namespace="one")
    mine = say(journal, "a secret of two", namespace="two")
    assert [hit.conversation_id for hit in journal.search("secret", namespace="two")] == [mine]
    assert journal.search("se", namespace="three") == []


def test_what_is_deleted_is_found_no_more_and_not_in_the_file(path: Path) -> None:
    with Journal.open(path) as journal:
        gone = say(journal, "the xylophone of Alexandrine")
        stays = say(journal, "the piano of Alexandrine")
        taken = journal.create("taken", model="smollm2", fingerprint="f00d")
        (node,) = journal.append(taken.id, None, [NewNode(role="user", content="zither")])
        journal.take_back(taken.id, [node], tip=None, back_to=None, began=True)
        journal.delete(gone)
        assert [hit.conversation_id for hit in journal.search("alexandrine")] == [stays]
        assert journal.search("zither") == []
    data = path.read_bytes()
    log = path.with_name(f"{path.name}-wal")
    data += log.read_bytes() if log.exists() else b""
    assert b"xyl" not in data
    assert b"zit" not in data
    assert b"pia" in data


def test_nothing_of_a_plain_index_is_left_after_encrypting(path: Path) -> None:
    with Journal.open(path) as journal:
        say(journal, "the xylophone of Alexandrine")
    assert b"xyl" in path.read_bytes()
    with Journal.open(path, cipher=CIPHER, convert=True) as journal:
        say(journal, "the balalaika of Alexandrine")
        assert len(journal.search("alexandrine")) == 2
        assert journal.check() == []
    log = path.with_name(f"{path.name}-wal")
    data = path.read_bytes() + (log.read_bytes() if log.exists() else b"")
    assert not any(part in data for part in (b"xyl", b"ylo", b"bal", b"exa"))


def test_a_journal_of_before_is_searched_after_the_upgrade(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as earlier:
        earlier.setattr(schema, "MIGRATIONS", schema.MIGRATIONS[:-1])
        earlier.setattr(schema.migrate, "__defaults__", (schema.MIGRATIONS,))
        with Journal.open(path) as journal:
            say(journal, "said long ago")
    with Journal.open(path) as journal:
        say(journal, "said today")
        assert len(journal.search("said")) == 2


def test_without_fts5_messages_are_read_one_by_one(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "can_index", lambda: False)
    with Journal.open(path) as journal:
        say(journal, *TEXTS)
        journal.delete(say(journal, "the oak again"))
        assert [hit.number for hit in journal.search("oak")] == [1]


def test_a_journal_whose_index_this_sqlite_cannot_keep_is_only_read(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Journal.open(path) as journal:
        say(journal, "the oak")
    monkeypatch.setattr(schema, "can_index", lambda: False)
    with Journal.open(path) as journal:
        assert len(journal.search("the oak")) == 1
        with pytest.raises(StoreUnavailableError, match="use a Python that has it"):
            say(journal, "more")


@pytest.mark.slow
def test_pages_of_ten_thousand_messages_have_each_hit_once(path: Path) -> None:
    """And the index is asked: what is read are the hits, and not all messages."""
    with Journal.open(path) as journal:
        chat = journal.create(model="smollm2", fingerprint="f00d").id
        texts = [f"message {number}, a {number % 100} of all" for number in range(10_000)]
        for at in range(0, 10_000, 1_000):
            nodes = [NewNode(role="user", content=text) for text in texts[at : at + 1_000]]
            journal.write(chat, Entry(nodes=nodes))
        assert [hit.snippet for hit in journal.search("9876")] == ["message 9876, a 76 of all"]
        seen: list[int] = []
        while found := journal.search('"a 37 of"', limit=30, after=seen[-1] if seen else None):
            assert len(found) <= 30
            seen += ids(found)
        assert len(seen) == len(set(seen)) == 100
        assert len(journal.search("a", limit=100)) == 100
