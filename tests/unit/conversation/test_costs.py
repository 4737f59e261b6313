"""What going on from a node would cost: as the engine counts it, and found with little work."""

from collections.abc import Callable
from typing import Any

import pytest

from recollect.conversation.costs import Costs, Encodings, GoingOn, Work
from recollect.conversation.model import Model
from recollect.conversation.prompt import PromptEncoder
from recollect.conversation.session import Session
from recollect.conversation.tree import Node, Tree
from recollect.kv.disk import DiskStore
from recollect.kv.record import Names
from recollect.text.template import ChatTemplate
from recollect.types import Role, SamplingParams

SHORT = SamplingParams(max_tokens=12, ignore_eos=True)

REWRITES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content[:3] }}{% else %}{{ m.content }}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A chat template that shows earlier replies otherwise than they were generated."""


def branching(model: Model) -> Session:
    """Return a session in a tree with three branches, one of which ends with an unanswered question."""
    session = model.session("You are careful.", keep=True, params=SHORT)
    for text in ("One", "Two is longer than that", "Three"):
        session.respond(text)
    session.fork(list(session.tree.nodes())[2]).respond("Elsewhere")
    session.fork(session.tree.root).add({"role": "user", "content": "Nothing before"})
    return session


def exact(model: Model, session: Session, node: Node, *, on_disk: bool = False) -> tuple[int, int]:
    """Return what the engine says of a prompt that is encoded as a whole: warm tokens, and all."""
    asked = node.role == "user"
    ids = model.prompts.encode(node.path()).token_ids if asked else session.typed_ids(node)
    return model.engine.warm_tokens(ids, session.namespace, on_disk=on_disk), len(ids)


@pytest.mark.usefixtures("nothing_read_ahead")  # which would go on between the two
def test_costs_are_what_the_engine_says_of_whole_prompts(make_model: Callable[..., Model]) -> None:
    model = make_model()
    session = branching(model)
    session.close()
    costs = model.costs(session)
    assert set(costs) == set(session.tree.nodes())
    told = {node.id: (cost.in_memory, cost.tokens) for node, cost in costs.items()}
    assert told == {node.id: exact(model, session, node) for node in costs}
    assert not any(cost.is_estimated for cost in costs.values())
    unanswered = next(node for node in costs if node.content == "Nothing before")
    assert costs[unanswered].warmth == "none"
    assert costs[session.tip].warmth == "memory"
    assert all(cost.tokens == cost.in_memory + cost.to_compute for cost in costs.values())


@pytest.mark.usefixtures("nothing_read_ahead")  # likewise
def test_what_was_evicted_has_to_be_computed(make_model: Callable[..., Model]) -> None:
    model = make_model()
    session = branching(model)
    session.close()
    before = model.costs(session)[session.tip]
    model.engine.forget()
    after = model.costs(session)[session.tip]
    assert (after.warmth, after.in_memory, after.to_compute) == ("none", 0, before.tokens)
    assert after.seconds is not None
    assert after.seconds > (before.seconds or 0)


@pytest.mark.few(1)
@pytest.mark.usefixtures("nothing_read_ahead")  # which would be in memory again
@pytest.mark.parametrize("whole_blocks_only", [False, True])
def test_what_is_on_disk_is_told_apart(
    make_model: Callable[..., Model],
    open_store: Callable[..., DiskStore],
    whole_blocks_only: bool,
) -> None:
    model = make_model(store=open_store(), whole_blocks_only=whole_blocks_only)
    session = branching(model)
    session.close()
    assert model.engine.tier is not None
    model.engine.tier.flush()
    model.engine.forget()
    costs = model.costs(session)
    told = {node.id: (cost.in_memory + cost.on_disk, cost.tokens) for node, cost in costs.items()}
    assert told == {node.id: exact(model, session, node, on_disk=True) for node in costs}
    assert (costs[session.tip].warmth, costs[session.tip].in_memory) == ("disk", 0)


@pytest.mark.usefixtures("nothing_read_ahead")  # which counts as one
def test_to_look_counts_as_no_use(make_model: Callable[..., Model]) -> None:
    model = make_model()
    session = branching(model)
    session.close()
    used = {cached: cached.last_used for cached in model.engine.cache.blocks()}
    computed, passes = model.engine.computed_tokens, model.engine.forward_passes
    model.costs(session)
    assert {cached: cached.last_used for cached in model.engine.cache.blocks()} == used
    assert (model.engine.computed_tokens, model.engine.forward_passes) == (computed, passes)


def test_another_namespace_has_nothing(make_model: Callable[..., Model]) -> None:
    model = make_model()
    session = branching(model)
    session.close()
    costs = Costs(model, namespace="another").of(list(session.tree.nodes()))
    assert {cost.in_memory for cost in costs.values()} == {0}


def test_public_prefixes_count_as_warm(make_model: Callable[..., Model]) -> None:
    model = make_model()
    model.publish("You are careful. " * 8)
    session = model.session("You are careful. " * 8, namespace="client")
    cost = model.costs(session)[session.tip]
    assert cost.in_memory > 0.8 * cost.tokens
    assert exact(model, session, session.tip) == (cost.in_memory, cost.tokens)


@pytest.mark.slow
def test_where_a_template_rewrites_history_what_is_not_exact_says_so(
    make_model: Callable[..., Model],
) -> None:
    model = make_model(template=REWRITES)
    session = model.session("You are careful.", params=SHORT)
    for number in range(20):
        session.respond(f"Question {number}")
    session.close()
    costs = model.costs(session)
    sure = [node for node, cost in costs.items() if not cost.is_estimated]
    assert session.tip in sure
    assert 0 < len(sure) < len(costs)
    told = {node.id: (costs[node].in_memory, costs[node].tokens) for node in sure}
    assert told == {node.id: exact(model, session, node) for node in sure}


def grow(tree: Tree, model: Model, count: int, branches: int) -> list[Node]:
    """Return the nodes of a tree with that many messages, in branches that fork off a trunk."""
    at, nodes, ends = tree.root, list[Node](), list[Node]()
    for number in range(count):
        if number > count // 4 and len(ends) < branches:
            ends.append(at := nodes[(number * 7) % (count // 4)])
        role: Role = "assistant" if at.role == "user" else "user"
        own = role == "assistant"
        at = tree.add(
            at,
            role,
            f"said {number}",
            token_ids=tuple(f"said {number}".encode()) if own else None,
            fingerprint=model.weights_fingerprint if own else None,
        )
        nodes.append(at)
    return nodes


def work_of(model: Model, count: int, branches: int) -> tuple[Work, dict[Node, GoingOn]]:
    costs = Costs(model)
    found = costs.of(grow(Tree(), model, count, branches))
    return costs.work, found


class Counted:
    """How often something was called."""

    def __init__(self) -> None:
        self.calls = 0

    def of(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that counts its calls."""

        def counted(*args: Any, **options: Any) -> Any:
            self.calls += 1
            return function(*args, **options)

        return counted


@pytest.fixture
def renderings(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """Return how often a chat template renders."""
    counted = Counted()
    monkeypatch.setattr(ChatTemplate, "render", counted.of(ChatTemplate.render))
    return counted


@pytest.fixture
def hashes(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """Return how often the name of a prefix is made out of that before."""
    counted = Counted()
    monkeypatch.setattr(Names, "after", counted.of(Names.after))
    return counted


@pytest.mark.slow
@pytest.mark.parametrize("branches", [0, 400])
def test_a_large_tree_costs_a_few_renderings_and_each_token_once(
    make_model: Callable[..., Model], renderings: Counted, hashes: Counted, branches: int
) -> None:
    """Not a rendering or a path for each node: with five times the nodes, five times the work."""
    model = make_model(context_length=8192)
    renderings.calls = 0
    small, _ = work_of(model, 2_000, branches)
    rendered = renderings.calls
    assert rendered <= 48  # most of them for the one path that is compared
    large, found = work_of(model, 10_000, branches)
    assert len(found) == 10_000
    assert renderings.calls <= 2 * rendered
    assert hashes.calls <= 2 * len(found)
    assert small.rendered == large.rendered <= 8
    # What a node adds, what follows it, and once more where a path is compared.
    own = sum(len(node.content) + 30 for node in found)
    longest = max(cost.tokens for cost in found.values())
    assert large.encoded < 4 * own + 2 * longest
    assert large.encoded < 6 * small.encoded
    assert large.blocks <= len(found) * 4


def test_a_page_costs_its_own_nodes_and_those_before_them(
    make_model: Callable[..., Model],
) -> None:
    model = make_model()
    nodes = grow(Tree(), model, 2_000, 400)
    costs = Costs(model)
    costs.of(nodes[:50])
    assert costs.work.encoded < 20_000


@pytest.mark.slow
def test_what_is_known_of_a_tree_is_encoded_once(
    make_model: Callable[..., Model], renderings: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page far down encodes what is new on it, and says what it says without anything known."""
    model = make_model(context_length=8192)
    nodes = grow(Tree(), model, 4_000, 0)
    known = Encodings(model, ())
    Costs(model, known=known).of(nodes)
    encoded = Counted()
    monkeypatch.setattr(PromptEncoder, "ids", encoded.of(PromptEncoder.ids))
    renderings.calls = 0
    page = nodes[3_000:3_100]
    found = Costs(model, known=known).of(page)
    assert encoded.calls <= 3 * len(page)  # what stands at each node, and what follows it
    assert renderings.calls == 0
    assert found == Costs(model).of(page)


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_read_ahead")  # which would go on between the two
def test_what_is_known_of_a_tree_says_nothing_of_where_kv_is(
    make_model: Callable[..., Model],
) -> None:
    model = make_model()
    session = branching(model)
    session.close()
    nodes = list(session.tree.nodes())
    known = Encodings(model, ())
    before = Costs(model, known=known).of(nodes)
    model.engine.forget()
    after = Costs(model, known=known).of(nodes)
    assert before != after == Costs(model).of(nodes)
    assert known.fits(model, ())
    assert not known.fits(make_model(), ())
