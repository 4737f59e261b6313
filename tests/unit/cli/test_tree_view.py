"""The drawing of a conversation."""

from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from recollect.cli.display import draw_tree
from recollect.conversation.tree import Node, Tree


def add_turn(tree: Tree, after: Node, said: str, reply: str) -> Node:
    return tree.add(tree.add(after, "user", said), "assistant", reply)


def drawn(tree: Tree, sessions: dict[str, Node], width: int = 60) -> list[str]:
    return [line.plain for line in draw_tree(tree, sessions, "main", width)]


def test_a_conversation_without_branches_is_a_column() -> None:
    tree = Tree()
    tip = add_turn(tree, add_turn(tree, tree.root, "one", "uno"), "two", "due")
    expected = ["0 start", "1 one → uno  #2", "2 two → due  #4  ← main (here)"]
    assert expected == drawn(tree, {"main": tip})


def test_branches_hang_where_they_part() -> None:
    tree = Tree()
    first = add_turn(tree, tree.root, "one", "uno")
    left = add_turn(tree, first, "left", "sinistra")
    deeper = add_turn(tree, left, "on", "avanti")
    right = add_turn(tree, first, "right", "destra")
    expected = [
        "0 start",
        "1 one → uno  #2",
        "├ 2 left → sinistra  #4",
        "│ 3 on → avanti  #6  ← idea",
        "└ 2 right → destra  #8  ← main (here)",
    ]
    assert expected == drawn(tree, {"main": right, "idea": deeper})


def test_a_second_reply_to_one_message_is_a_branch() -> None:
    tree = Tree()
    asked = tree.add(tree.root, "user", "one")
    tree.add(asked, "assistant", "uno")
    second = tree.add(asked, "assistant", "eins")
    expected = ["0 start", "├ 1 one → uno  #2", "└ 1 one → eins  #3  ← main (here)"]
    assert expected == drawn(tree, {"main": second})


def test_instructions_are_shown_at_the_start() -> None:
    tree = Tree()
    tip = tree.add(tree.root, "system", "be brief")
    assert drawn(tree, {"main": tip}) == ["0 start (be brief)  ← main (here)"]


def test_newlines_and_long_texts_stay_on_one_line() -> None:
    tree = Tree()
    tip = add_turn(tree, tree.root, "a\nb " * 50, "c\nd " * 50)
    line = drawn(tree, {"main": tip})[1]
    assert "\n" not in line
    assert len(line) <= 60


def test_what_a_model_wrote_does_not_reach_the_terminal_as_a_command() -> None:
    tree = Tree()
    tip = add_turn(tree, tree.root, "one", "a\x1b]0;title\x07\x9b1m")
    assert drawn(tree, {"main": tip})[1] == "1 one → a]0;title1m  #2  ← main (here)"


def test_wide_characters_leave_room_for_the_marks() -> None:
    tree = Tree()
    tip = add_turn(tree, tree.root, "漢字" * 50, "漢字" * 50)
    line = drawn(tree, {"main": tip})[1]
    assert cell_len(line) <= 60
    assert line.endswith("← main (here)")


def test_hundreds_of_nested_branches_can_be_drawn() -> None:
    tree, tip = Tree(), None
    for number in range(600):
        tip = add_turn(tree, tip or tree.root, f"question {number}", "answer")
        add_turn(tree, tip, "aside", "answer")
    assert tip is not None
    lines = drawn(tree, {"main": tip})
    assert len(lines) == 1201
    assert max(map(len, lines)) <= 80


@given(st.lists(st.integers(0, 10**6), max_size=30), st.integers(40, 120))
def test_each_reply_is_drawn_once_whatever_the_shape(choices: list[int], width: int) -> None:
    tree = Tree()
    tips = [tree.root]
    for choice in choices:
        tips.append(add_turn(tree, tips[choice % len(tips)], "question", "answer"))
    lines = drawn(tree, {"main": tips[-1]}, width)
    shown = [int(line.split("#")[1].split()[0]) for line in lines[1:]]
    assert sorted(tip.id for tip in tips[1:]) == sorted(shown)
