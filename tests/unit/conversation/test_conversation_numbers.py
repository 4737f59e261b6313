"""Messages are named by the order in which they were kept."""

from recollect.conversation.tree import numbered


def test_what_is_kept_is_numbered_in_the_order_of_the_journal() -> None:
    assert numbered([1, 2, 3], {1: 40, 2: 70, 3: 60}, [40, 50, 60, 70]) == {1: 1, 2: 4, 3: 3}


def test_what_is_not_kept_comes_after_all_that_is() -> None:
    assert numbered([1, 2, 3], {1: 40}, [40, 50]) == {1: 1, 2: 3, 3: 4}


def test_what_was_kept_since_the_journal_was_read_counts() -> None:
    assert numbered([1, 2], {1: 40, 2: 60}, [40, 50]) == {1: 1, 2: 3}


def test_a_conversation_that_is_not_kept_has_the_order_of_its_tree() -> None:
    assert numbered([1, 2, 3], {}, []) == {1: 1, 2: 2, 3: 3}
