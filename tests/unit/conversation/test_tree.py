"""A tree of messages only grows, and knows its own nodes from all others."""

import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from recollect.conversation.tree import Node, Tree, to_node
from recollect.errors import InvalidParameterError, UnknownNodeError


@pytest.fixture
def switching_often() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def test_a_new_tree_has_a_root_and_no_messages() -> None:
    tree = Tree()
    assert (len(tree), list(tree.nodes()), tree.root.path()) == (0, [], [])
    assert tree.root.role is None
    tree.check()


def test_messages_hang_under_their_parents_in_order() -> None:
    tree = Tree()
    hello = tree.add(tree.root, "user", "Hello")
    first = tree.add(hello, "assistant", "Hi", token_ids=(1, 2), fingerprint="m")
    second = tree.add(hello, "assistant", "Hey", token_ids=(3,), fingerprint="m")
    assert hello.children == [first, second]
    assert second.path() == [hello, second]
    assert list(tree.nodes()) == [hello, first, second]
    assert second.message() == {"role": "assistant", "content": "Hey"}
    assert (hello.turns, second.turns, len(tree)) == (0, 1, 3)
    tree.check()


def test_nodes_are_found_by_id_and_unknown_ids_are_refused() -> None:
    tree = Tree()
    node = tree.add(tree.root, "user", "Hello")
    assert tree.node(node.id) is node
    assert tree.node(0) is tree.root
    for unknown in (-1, 2, 99):
        with pytest.raises(UnknownNodeError):
            tree.node(unknown)


def test_a_node_of_another_tree_is_refused_even_with_a_known_id() -> None:
    tree, other = Tree(), Tree()
    tree.add(tree.root, "user", "same")
    stranger = other.add(other.root, "user", "same")
    for use in (lambda: tree.require(stranger), lambda: tree.add(stranger, "user", "x")):
        with pytest.raises(UnknownNodeError):
            use()
    assert len(tree) == 1
    tree.check()


def test_nodes_that_say_the_same_are_still_different() -> None:
    tree = Tree()
    first, second = (tree.add(tree.root, "user", "same") for _ in range(2))
    assert first != second
    assert len({first, second}) == 2


def test_a_node_cannot_be_changed() -> None:
    node = Tree().root
    with pytest.raises(AttributeError):
        node.content = "other"  # type: ignore[misc]


def test_a_very_deep_tree_can_be_walked_and_checked() -> None:
    tree, node = Tree(), Tree().root
    node = tree.root
    for number in range(5000):
        node = tree.add(node, "user", str(number))
    assert len(node.path()) == 5000
    assert repr(node) == "Node(5000, user, '4999')"
    tree.check()


@pytest.mark.usefixtures("switching_often")
def test_forks_in_several_threads_can_add_to_one_tree() -> None:
    tree = Tree()

    def add() -> None:
        node = tree.root
        for number in range(300):
            node = tree.add(node, "user", str(number))
            assert sum(1 for _ in tree.nodes()) >= number

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(tree) == 1200
    tree.check()


def test_check_finds_a_child_under_the_wrong_parent() -> None:
    tree = Tree()
    first, second = (tree.add(tree.root, "user", "x") for _ in range(2))
    first.children.append(Node(9, second, "user", "lost"))
    with pytest.raises(AssertionError, match="not its parent"):
        tree.check()


def test_check_finds_a_node_that_is_not_reached() -> None:
    tree = Tree()
    tree.add(tree.root, "user", "x")
    tree.root.children.clear()
    with pytest.raises(AssertionError, match="cannot be reached"):
        tree.check()


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "robot", "content": "x"}, "has the role 'robot'"),
        ("x", "has the role None"),
        ({"role": "user"}, "has no content"),
        ({"role": "user", "content": 1}, "content of type int"),
        ({"role": "assistant", "content": "x", "reasoning_content": 1}, "reasoning_content"),
        ({"role": "assistant", "tool_calls": [{"id": 1}]}, "lacks 'function'"),
        (
            {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f"}}]},
            "lacks 'arguments'",
        ),
        (
            {
                "role": "assistant",
                "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": {}}}],
            },
            "arguments of type dict",
        ),
        (
            {
                "role": "assistant",
                "tool_calls": [{"id": 1, "function": {"name": "f", "arguments": "{}"}}],
            },
            "has the id 1",
        ),
    ],
)
def test_a_message_that_is_none_is_refused_as_a_part_of_the_messages(
    message: Any, words: str
) -> None:
    with pytest.raises(InvalidParameterError, match=words) as refused:
        to_node(message)
    assert refused.value.param == "messages"
