"""
The numbers by which people name messages: 1 for the first that a conversation has kept, and so on.

Pure: ids in, numbers out. A running chat, a list of what is kept and a chat that goes on later have one
numbering, because it comes from the journal's order alone, also of messages that another process kept.
"""

from collections.abc import Iterable, Mapping


def numbered(
    node_ids: Iterable[int], kept: Mapping[int, int], journal_ids: Iterable[int]
) -> dict[int, int]:
    """
    Return the number of each node of a tree, by its id there.

    Args:
        node_ids: Of the tree, in its order.
        kept: The ids in the journal of those that are kept.
        journal_ids: All that the journal has of the conversation, in any order; others may have been
            kept since, and those of *kept* count in any case.
    """
    order = sorted({*journal_ids, *kept.values()})
    places = {journal_id: number for number, journal_id in enumerate(order, start=1)}
    numbers, last = dict[int, int](), len(order)
    for node_id in node_ids:
        if node_id in kept:
            numbers[node_id] = places[kept[node_id]]
        else:  # it will be kept after all that is
            last += 1
            numbers[node_id] = last
    return numbers
