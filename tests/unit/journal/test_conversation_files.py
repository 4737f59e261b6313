"""JSON gives back all of a conversation, Markdown is for people, and no file is trusted."""

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recollect.errors import ConversationError, ConversationFileError
from recollect.journal.conversation_files import from_json, to_json, to_markdown
from recollect.journal.records import ROLES, ConversationRecord, NodeRecord
from recollect.types import ToolLinks

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


def node(node_id: int, parent_id: int | None, content: str, *token_ids: int) -> NodeRecord:
    """Return a message of the user's, or a reply where it has token ids."""
    return NodeRecord(
        id=node_id,
        parent_id=parent_id,
        role="assistant" if token_ids else "user",
        content=content,
        token_ids=token_ids or None,
        finish_reason="stop" if token_ids else None,
        usage={"prompt_tokens": 3, "ttft_s": 0.5} if token_ids else None,
        created_at=NOON,
        fingerprint="f00d" if token_ids else None,
    )


def conversation(*nodes: NodeRecord, **tips: int | None) -> ConversationRecord:
    return ConversationRecord(
        name="poem",
        created_at=NOON,
        updated_at=NOON + timedelta(microseconds=1),
        model="smollm2",
        fingerprint="f00d",
        nodes=nodes,
        tips=tips,
    )


BRANCHED = conversation(
    node(1, None, "Write a poem."),
    node(2, 1, "Roses are red.", 5, 6),
    node(4, 2, "Another."),
    node(5, 4, "Violets are blue.", 7),
    node(6, 1, "The *sea*.", 8),
    node(7, 6, "Longer."),
    node(9, 7, "The sea, the sea.", 9),
    main=5,
    sea=9,
    start=None,
)

# --- JSON

texts = st.text(st.characters(codec="utf-8"), max_size=20)
names = st.from_regex(r"[\w.][\w. ]{0,20}[\w.]", fullmatch=True).filter(str.isprintable)
moments = st.datetimes(timezones=st.just(UTC))
usages = st.dictionaries(
    texts, st.none() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts
)
links = st.builds(
    ToolLinks,
    st.lists(texts, max_size=2).map(tuple),
    st.none() | texts,
    st.none() | texts,
    st.none() | texts,
)


@st.composite
def conversations(draw: st.DrawFn) -> ConversationRecord:
    nodes: list[NodeRecord] = []
    for node_id in sorted(draw(st.sets(st.integers(1, 10**6), max_size=8))):
        role = draw(st.sampled_from(ROLES))
        is_reply = role == "assistant"
        tokens = st.none() | st.lists(st.integers(0, 2**31 - 1), max_size=5).map(tuple)
        nodes.append(
            NodeRecord(
                id=node_id,
                parent_id=draw(st.sampled_from([None, *(node.id for node in nodes)])),
                role=role,
                content=draw(texts),
                token_ids=draw(tokens) if is_reply else None,
                finish_reason=draw(st.sampled_from(["stop", "length", "cancelled", None])),
                usage=draw(st.none() | usages),
                created_at=draw(moments),
                fingerprint=draw(st.none() | texts),
                links=draw(st.none() | links),
            )
        )
    places = st.sampled_from([None, *(node.id for node in nodes)])
    return ConversationRecord(
        name=draw(names),
        created_at=draw(moments),
        updated_at=draw(moments),
        model=draw(texts),
        fingerprint=draw(texts),
        nodes=tuple(nodes),
        tips=draw(st.dictionaries(names, places, max_size=3)),
    )


@given(conversations())
def test_what_is_exported_is_imported_as_it_was(original: ConversationRecord) -> None:
    text = to_json(original)
    assert from_json(text) == original
    assert to_json(from_json(text)) == text


def test_a_time_in_another_zone_is_the_same_time() -> None:
    text = to_json(BRANCHED).replace("2026-03-01T12:00:00+00:00", "2026-03-01T14:00:00+02:00")
    assert from_json(text) == BRANCHED


def test_only_what_has_to_do_with_tools_needs_a_reader_that_knows_them() -> None:
    with_tools = replace(BRANCHED.nodes[-1], links=ToolLinks(call_ids=("call_1",)))
    conversation = replace(BRANCHED, nodes=(*BRANCHED.nodes[:-1], with_tools))
    assert json.loads(to_json(BRANCHED))["version"] == 1
    assert json.loads(to_json(conversation))["version"] == 2
    assert from_json(to_json(conversation)) == conversation


def test_the_file_names_what_it_is_and_has_a_node_a_line() -> None:
    text = to_json(BRANCHED)
    fields = json.loads(text)
    assert (fields["format"], fields["version"]) == ("recollect-conversation", 1)
    assert sum('"content"' in line for line in text.splitlines()) == len(BRANCHED.nodes)


def change(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    """Return what sets a field of an exported file; `nodes.1.role` is that of the second node."""

    def apply(fields: dict[str, Any]) -> None:
        *outer, last = path.split(".")
        place: Any = fields
        for key in outer:
            place = place[int(key) if isinstance(place, list) else key]
        place[int(last) if isinstance(place, list) else last] = value

    return apply


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        ("format", "other", "no conversation"),
        ("version", 3, "version 3"),
        ("version", 0, "version 0"),
        ("version", True, "version True"),
        ("name", "a\nb", "cannot be the name of a conversation"),
        ("name", None, "'name' of the file is not text"),
        ("model", 3, "'model' of the file is not text"),
        ("created_at", "yesterday", "no time"),
        ("created_at", "2026-03-01T12:00:00", "offset from UTC"),
        ("created_at", "0001-01-01T00:00:00+10:00", "no time"),
        ("nodes", {}, "not a list"),
        ("nodes.0", 5, "node 1 of 7 is no object"),
        ("nodes.1.id", 1, "has the id 1, which another one has"),
        ("nodes.1.id", 0, "not a whole number"),
        ("nodes.1.id", True, "not a whole number"),
        ("nodes.1.id", [2], "not a whole number"),
        ("nodes.1.parent", 77, "parent 77 of node 2 of 7 is missing"),
        ("nodes.1.parent", "1", "not a whole number"),
        ("nodes.0.parent", 2, "part of a circle"),
        ("nodes.0.parent", 1, "part of a circle"),
        ("nodes.0.id", 3, "is missing"),
        ("nodes.1.role", "robot", "role 'robot'"),
        ("nodes.1.role", None, "'role' of node 2 of 7 is not text"),
        ("nodes.1.content", None, "'content' of node 2 of 7 is not text"),
        ("nodes.1.content", "\ud83c", "half a character"),
        ("nodes.1.fingerprint", 5, "'fingerprint' of node 2 of 7 is not text"),
        ("nodes.1.token_ids", [5, -1], "token id"),
        ("nodes.1.token_ids", [5, 2**31], "token id"),
        ("nodes.1.token_ids", [5, True], "token id"),
        ("nodes.1.token_ids", [5, 1.0], "token id"),
        ("nodes.1.token_ids", "5", "not a list"),
        ("nodes.0.token_ids", [5], "no reply"),
        ("nodes.1.finish_reason", "bored", "finish reason 'bored'"),
        ("nodes.1.usage", [], "not an object"),
        ("nodes.1.links", [], "not an object"),
        ("nodes.1.links", {"call_ids": [5]}, "is not text"),
        ("nodes.1.links", {"name": "\ud83c"}, "half a character"),
        ("nodes.1.usage", {"a": [[[[[[[[[]]]]]]]]]}, "nested"),
        ("nodes.1.usage", {"a": ["\ud800"]}, "half a character"),
        ("tips", [], "not an object"),
        ("tips.main", 77, "stands at a node that is missing"),
        ("tips.main", "5", "stands at a node that is missing"),
        ("tips.a\nb", 5, "cannot be the name of a branch"),
    ],
)
def test_a_file_that_is_not_sound_is_refused(path: str, value: object, problem: str) -> None:
    fields = json.loads(to_json(BRANCHED))
    change(path, value)(fields)
    with pytest.raises(ConversationFileError) as caught:
        from_json(json.dumps(fields))
    assert problem in str(caught.value)


def test_a_parent_with_a_larger_id_is_refused() -> None:
    swapped = conversation(node(2, None, "a"), node(1, 2, "b", 5))
    with pytest.raises(ConversationFileError, match="smaller id than its parent"):
        from_json(to_json(swapped))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[" * 100_000, "null", "[]", "{}", '"recollect-conversation"', "1e999", "NaN"],
    ids=lambda text: text[:5] or "empty",
)
def test_what_is_no_such_file_at_all_is_refused_with_a_remedy(text: str) -> None:
    with pytest.raises(ConversationFileError, match="export the conversation again"):
        from_json(text)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_numbers_that_could_not_be_written_again_are_refused(number: str) -> None:
    text = to_json(BRANCHED).replace('"ttft_s": 0.5', f'"ttft_s": {number}')
    with pytest.raises(ConversationFileError, match="no finite number"):
        from_json(text)


@given(st.recursive(st.none() | st.booleans() | st.integers() | texts, st.lists))
def test_no_value_in_any_place_of_the_file_is_a_bug(value: object) -> None:
    for path in ("name", "nodes", "tips", "created_at", "nodes.1", "nodes.1.id", "nodes.1.parent"):
        fields = json.loads(to_json(BRANCHED))
        change(path, value)(fields)
        try:
            imported = from_json(json.dumps(fields))
        except ConversationFileError:
            continue
        assert from_json(to_json(imported)) == imported


# --- Markdown


def test_markdown_shows_the_path_of_the_main_tip_and_lists_the_others() -> None:
    assert to_markdown(BRANCHED).split("\n\n")[2:] == [
        "## You",
        "Write a poem.",
        "## Assistant",
        "Roses are red.",
        "## You",
        "Another.",
        "## Assistant",
        "Violets are blue.",
        "---",
        "## Other branches",
        "- `sea`: 2 turns after “Write a poem.”: “The \\*sea\\*.”\n",
    ]


def test_markdown_shows_the_path_of_any_tip() -> None:
    text = to_markdown(BRANCHED, tip="sea")
    assert "## Assistant\n\nThe sea, the sea.\n" in text
    assert "- `main`: 2 turns after “Write a poem.”: “Roses are red.”" in text


def test_markdown_at_the_start_lists_every_branch() -> None:
    text = to_markdown(BRANCHED, tip="start")
    assert "## You" not in text
    assert "- `main`: 2 turns at the start: “Write a poem.”" in text


def test_markdown_without_a_main_tip_shows_the_newest_node() -> None:
    assert "The sea, the sea." in to_markdown(replace(BRANCHED, tips={}))


def test_markdown_says_where_a_reply_was_cut() -> None:
    cut = replace(node(2, 1, "Roses", 5), finish_reason="length")
    text = to_markdown(conversation(node(1, None, "Write."), cut, main=2))
    assert text.endswith("## Assistant\n\nRoses\n\n*(cut at the token limit)*\n")


def test_reasoning_is_quoted_before_the_reply_and_kept_in_the_file() -> None:
    said = replace(node(2, 1, "It is 1."), links=ToolLinks(reasoning="Hmm.\nOne?"))
    said = replace(said, role="assistant")
    whole = conversation(node(1, None, "One?"), said, main=2)
    assert "> Hmm.\n> One?\n\nIt is 1.\n" in to_markdown(whole)
    assert from_json(to_json(whole)) == whole


def test_markdown_shortens_what_stands_for_a_branch() -> None:
    long = conversation(node(1, None, "word " * 100), node(2, None, "b"), main=2)
    assert to_markdown(long).endswith("- 0 turns at the start: “" + "word " * 11 + "word…”\n")


def test_an_unknown_tip_is_an_error_that_names_the_known_ones() -> None:
    with pytest.raises(ConversationError, match="main, sea, start"):
        to_markdown(BRANCHED, tip="lake")


def test_a_conversation_in_which_nothing_was_said_can_be_exported() -> None:
    assert to_markdown(conversation()).startswith("# poem\n\n*smollm2, begun 2026-03-01")
    assert from_json(to_json(conversation())) == conversation()
