"""The journal, plain and encrypted, against a dictionary, with two connections reopened at any time."""

import shutil
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from recollect.encryption import OVERHEAD_BYTES, Cipher
from recollect.errors import NameTakenError, UnknownConversationError, UnknownNodeError
from recollect.journal.journal import Journal
from recollect.journal.records import Entry, NewNode

NAMES = st.sampled_from(["a", "b", "c", "main", "ü"])
WHICH = st.integers(0, 1)
"""Which of the two connections."""
CONTENTS = st.text(st.characters(codec="utf-8"), max_size=10)
TOKEN_IDS = st.none() | st.lists(st.integers(0, 2**31 - 1), max_size=5).map(tuple)


class Machine(RuleBasedStateMachine):
    """
    Invariants:
        1. What a connection loads is what the dictionary holds, whoever wrote it.
        2. An id is larger than every id before.
    """

    cipher: Cipher | None = None

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.journals: list[Journal] = []
        self.model: dict[int, dict[str, Any]] = {}
        """By conversation: nodes are (id, parent, role, content, token ids)."""
        self.largest_id = 0

    @initialize()
    def open(self) -> None:
        self.journals = [self.opened() for _ in range(2)]

    def opened(self) -> Journal:
        return Journal.open(self.folder / "j.sqlite3", cipher=self.cipher)

    def teardown(self) -> None:
        for journal in self.journals:
            assert journal.check() == []
            journal.close()
        shutil.rmtree(self.folder)

    def pick(self, number: int) -> int:
        return list(self.model)[number % len(self.model)]

    def place(self, conversation: int, number: int) -> int | None:
        places: list[int | None] = [None, *(node[0] for node in self.model[conversation]["nodes"])]
        return places[number % len(places)]

    def taken(self, name: str, but: int | None = None) -> bool:
        return any(kept["name"] == name for key, kept in self.model.items() if key != but)

    @rule(which=WHICH, name=NAMES)
    def create(self, which: int, name: str) -> None:
        try:
            info = self.journals[which].create(name, model="m", fingerprint="f")
        except NameTakenError:
            assert self.taken(name)
            return
        assert not self.taken(name)
        assert info.id not in self.model
        self.model[info.id] = {"name": name, "nodes": [], "tips": {}, "model": ("m", "f")}

    @precondition(lambda self: self.model)
    @rule(
        which=WHICH,
        number=st.integers(0, 99),
        at=st.integers(0, 99),
        said=st.lists(st.tuples(CONTENTS, TOKEN_IDS), max_size=3),
        tip=st.none() | NAMES,
    )
    def append(self, which: int, number: int, at: int, said: list[Any], tip: str | None) -> None:
        conversation = self.pick(number)
        parent = last = self.place(conversation, at)
        nodes = [
            NewNode(role="user" if ids is None else "assistant", content=text, token_ids=ids)
            for text, ids in said
        ]
        new_ids = self.journals[which].append(conversation, parent, nodes, tip=tip)
        assert len(new_ids) == len(said)
        kept = self.model[conversation]
        for node_id, node in zip(new_ids, nodes, strict=True):
            assert node_id > self.largest_id
            self.largest_id = node_id
            kept["nodes"].append((node_id, last, node.role, node.content, node.token_ids))
            last = node_id
        if tip is not None:
            kept["tips"][tip] = last

    @precondition(lambda self: self.model)
    @rule(
        which=WHICH,
        number=st.integers(0, 99),
        at=st.integers(0, 99),
        said=CONTENTS,
        tip=st.none() | NAMES,
        others_write=st.booleans(),
    )
    def ask_in_vain(
        self, which: int, number: int, at: int, said: str, tip: str | None, others_write: bool
    ) -> None:
        conversation = self.pick(number)
        parent, kept = self.place(conversation, at), self.model[conversation]
        asked = NewNode(role="user", content=said)
        entry = Entry(nodes=[asked], parent_id=parent, tip=tip)
        written = self.journals[which].write(conversation, entry)
        (node_id,) = written.ids
        assert node_id > self.largest_id
        assert written.tip_was == (None if tip is None else kept["tips"].get(tip, parent))
        self.largest_id = node_id
        if others_write:
            (other,) = self.journals[1 - which].append(conversation, parent, [asked])
            kept["nodes"] += [(at, parent, "user", said, None) for at in (node_id, other)]
            self.largest_id = other
        came_of_it = self.journals[which].take_back(
            conversation, written.ids, tip=tip, back_to=written.tip_was, began=False
        )
        assert came_of_it == ("stays" if others_write else "gone")
        if tip is not None:
            kept["tips"][tip] = written.tip_was

    @precondition(lambda self: self.model)
    @rule(which=WHICH, number=st.integers(0, 99), at=st.integers(0, 99), tip=NAMES)
    def go_on_where_it_was_seen(self, which: int, number: int, at: int, tip: str) -> None:
        """Somebody else's tip stays where it is."""
        conversation = self.pick(number)
        seen, tips = self.place(conversation, at), self.model[conversation]["tips"]
        before = dict(tips)
        entry = Entry(nodes=(), parent_id=seen, tip=tip, seen=seen, leaves_others=True)
        own = self.journals[which].write(conversation, entry).tip
        assert own is not None
        assert own.startswith(tip)
        assert (own == tip) == (before.get(tip, seen) == seen)
        assert own == tip or own not in before
        tips[own] = seen

    @precondition(lambda self: self.model)
    @rule(which=WHICH, number=st.integers(0, 99), at=st.integers(0, 99), tip=NAMES)
    def set_tip(self, which: int, number: int, at: int, tip: str) -> None:
        conversation = self.pick(number)
        node = self.place(conversation, at)
        self.journals[which].set_tip(conversation, tip, node)
        self.model[conversation]["tips"][tip] = node

    @precondition(lambda self: self.model)
    @rule(which=WHICH, number=st.integers(0, 99), model=NAMES)
    def set_model(self, which: int, number: int, model: str) -> None:
        conversation = self.pick(number)
        self.journals[which].write(conversation, Entry(nodes=(), model=(model, model * 2)))
        self.model[conversation]["model"] = (model, model * 2)

    @precondition(lambda self: self.model)
    @rule(which=WHICH, number=st.integers(0, 99), name=NAMES)
    def rename(self, which: int, number: int, name: str) -> None:
        conversation = self.pick(number)
        try:
            self.journals[which].rename(conversation, name)
        except NameTakenError:
            assert self.taken(name, but=conversation)
            return
        assert not self.taken(name, but=conversation)
        self.model[conversation]["name"] = name

    @rule(which=WHICH, name=NAMES)
    def delete(self, which: int, name: str) -> None:
        try:
            self.journals[which].delete(name)
        except UnknownConversationError:
            assert not self.taken(name)
            return
        assert self.taken(name)
        self.model = {key: kept for key, kept in self.model.items() if kept["name"] != name}

    @precondition(lambda self: self.model)
    @rule(which=WHICH, number=st.integers(0, 99))
    def copy(self, which: int, number: int) -> None:
        kept = self.model[self.pick(number)]
        stored = self.journals[which].load(kept["name"])
        name = f"copy {len(self.model)} {self.largest_id}"
        if self.taken(name):
            return
        info = self.journals[1 - which].add(stored, name)
        added = self.journals[which].load(info.id)
        ids: dict[int | None, int | None] = {None: None}
        nodes = []
        for old, new in zip(kept["nodes"], added.nodes, strict=True):
            assert new.id > self.largest_id
            self.largest_id = ids[old[0]] = new.id
            nodes.append((new.id, ids[old[1]], *old[2:]))
        tips = {tip: ids[at] for tip, at in kept["tips"].items()}
        self.model[info.id] = {**kept, "name": name, "nodes": nodes, "tips": tips}

    @precondition(lambda self: len(self.model) > 1)
    @rule(which=WHICH, number=st.integers(0, 99))
    def append_under_a_node_of_another(self, which: int, number: int) -> None:
        conversation, other = self.pick(number), self.pick(number + 1)
        foreign = self.place(other, number)
        if foreign is None:
            return
        try:
            self.journals[which].append(conversation, foreign, [NewNode(role="user", content="x")])
        except UnknownNodeError:
            return
        raise AssertionError("a parent in another conversation was taken")

    @rule(which=WHICH)
    def reopen(self, which: int) -> None:
        self.journals[which].close()
        self.journals[which] = self.opened()

    @invariant()
    def both_connections_show_the_dictionary(self) -> None:
        for journal in self.journals:
            infos = {info.id: info for info in journal.conversations()}
            assert set(infos) == set(self.model)
            for key, kept in self.model.items():
                stored = journal.load(key)
                assert stored.name == infos[key].name == kept["name"]
                assert (stored.model, stored.fingerprint) == kept["model"]
                assert stored.tips == kept["tips"]
                assert list(infos[key].tips) == sorted(kept["tips"])
                nodes = [
                    (node.id, node.parent_id, node.role, node.content, node.token_ids)
                    for node in stored.nodes
                ]
                assert nodes == kept["nodes"]
                assert infos[key].turns == sum(node[2] == "assistant" for node in nodes)
                size = sum(len(node[3].encode()) + 4 * len(node[4] or ()) for node in nodes)
                assert infos[key].size_bytes == size


class EncryptedMachine(Machine):
    """The same with a key: every text and name in the tables is sealed."""

    cipher = Cipher(bytes(range(32)))

    @rule()
    def look_at_the_tables(self) -> None:
        with closing(sqlite3.connect(self.folder / "j.sqlite3")) as connection:
            kept = connection.execute(
                "SELECT content FROM nodes UNION ALL SELECT name FROM conversations "
                "UNION ALL SELECT name FROM tips UNION ALL SELECT model FROM conversations "
            ).fetchall()
        assert all(isinstance(value, bytes) for (value,) in kept)
        assert all(len(value) >= OVERHEAD_BYTES for (value,) in kept)


TestJournal = Machine.TestCase
TestJournal.settings = settings(stateful_step_count=25)
TestEncryptedJournal = EncryptedMachine.TestCase
TestEncryptedJournal.settings = settings(stateful_step_count=25)
