"""Which turns have their KV in memory, found with few measurements."""

from hypothesis import given
from hypothesis import strategies as st

from recollect.cli.display import MOST_MEASUREMENTS, Warmth, warmth
from recollect.cli.state import Chat
from recollect.conversation.tree import Node, Tree

TURN = 10  # tokens of a message and its reply


class Memory:
    """A cache in which each turn has some of its tokens, as a prefix cache can have them."""

    def __init__(self) -> None:
        self.tree = Tree()
        self.warm = {self.tree.root.id: 0}
        self.calls = 0

    def add(self, after: Node, warm_tokens: int) -> Node:
        """Add a turn of which so many tokens are warm, if what is before it is."""
        reply = self.tree.add(self.tree.add(after, "user", "q"), "assistant", "a")
        before, total = self.measure(after)
        self.warm[reply.id] = before + (warm_tokens if before == total else 0)
        return reply

    def measure(self, node: Node) -> tuple[int, int]:
        self.calls += 1
        return self.warm[node.id], TURN * node.turns

    def expected(self) -> dict[int, Warmth]:
        """Return the answer that measuring every reply and what is before it gives."""
        states: dict[int, Warmth] = {}
        for node in self.tree.nodes():
            if node.role == "assistant":
                own = self.warm[node.id] - TURN * (node.turns - 1)
                states[node.id] = "warm" if own >= TURN else "partly" if own > 0 else "cold"
        return states


@given(st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from([0, 4, TURN, TURN, TURN]))))
def test_the_states_are_those_that_measuring_everything_gives(
    turns: list[tuple[int, int]],
) -> None:
    memory = Memory()
    nodes = [memory.tree.root]
    for choice, warm in turns:
        nodes.append(memory.add(nodes[choice % len(nodes)], warm))
    assert memory.expected() == warmth(memory.tree, memory.measure, slack=1)


def test_a_long_warm_conversation_takes_one_measurement_and_a_cold_end_a_few() -> None:
    memory = Memory()
    tip = memory.tree.root
    for _ in range(1000):
        tip = memory.add(tip, TURN)
    memory.calls = 0
    assert set(warmth(memory.tree, memory.measure).values()) == {"warm"}
    assert memory.calls == 1
    for warm in [4] + 50 * [TURN]:
        tip = memory.add(tip, warm)
    memory.calls = 0
    states = list(warmth(memory.tree, memory.measure).values())
    assert [states.count(state) for state in ("warm", "partly", "cold")] == [1000, 1, 50]
    assert memory.calls < 20


def test_a_tree_of_many_branches_takes_no_more_than_a_bound() -> None:
    memory = Memory()
    for _ in range(3000):
        memory.add(memory.tree.root, TURN)
    memory.calls = 0
    states = warmth(memory.tree, memory.measure)
    assert memory.calls == MOST_MEASUREMENTS
    assert memory.tree.node(6000).id in states
    assert memory.tree.node(2).id not in states


def test_what_is_not_in_memory_and_on_disk_is_told_from_what_is_nowhere() -> None:
    memory, disk = Memory(), Memory()
    memory_tip, disk_tip = memory.tree.root, disk.tree.root
    for in_memory, with_disk in ((TURN, TURN), (4, TURN), (0, TURN), (0, 4), (0, 0)):
        memory_tip, disk_tip = memory.add(memory_tip, in_memory), disk.add(disk_tip, with_disk)
    states = warmth(memory.tree, memory.measure, stored=disk.measure, slack=1)
    assert [states[node.id] for node in memory_tip.path() if node.role == "assistant"] == [
        "warm",
        "disk",
        "disk",
        "cold",
        "cold",
    ]


def test_where_all_is_in_memory_nobody_looks_on_disk() -> None:
    memory, disk = Memory(), Memory()
    memory.add(memory.tree.root, TURN)
    warmth(memory.tree, memory.measure, stored=disk.measure, slack=1)
    assert disk.calls == 0


def test_a_conversation_is_warm_after_its_turns_and_not_in_another_process(chat: Chat) -> None:
    chat.say("one")
    chat.say("two")
    session = chat.session
    session.prewarm()
    assert set(warmth(session.tree, session.warm_tokens).values()) == {"warm"}
    elsewhere = Chat(chat.model, chat.console, chat.model.session(namespace="elsewhere"))
    cold = elsewhere.session
    replies = [node for node in session.tree.nodes() if node.role == "assistant"]
    states = warmth(session.tree, cold.warm_tokens)
    assert [states[node.id] for node in replies] == ["cold", "cold"]
