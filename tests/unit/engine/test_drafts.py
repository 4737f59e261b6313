"""What is guessed, how many guesses are fed, and what that takes: work and memory."""

import random
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace

import pytest

from recollect.engine.drafts import (
    BYTES_PER_TOKEN,
    COUNTS,
    KEY,
    LONGEST,
    MOST_BYTES,
    MOST_COMPARED,
    MOST_NAMESPACES,
    Drafts,
    PassTimes,
    SuffixIndex,
)
from recollect.engine.engine import Engine
from recollect.engine.sequence import Sequence as TokenSequence
from recollect.runtime.base import ReferenceRuntime, Row


def dice_of(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311 - of tests


def naive(texts: Sequence[Sequence[int]], most: int) -> tuple[int, list[set[int]]]:
    """
    Return the longest end of the last text that came before, and what may follow it.

    By comparing every place of every text with the end.
    """
    end = list(texts[-1])
    best, places = 0, list[tuple[Sequence[int], int]]()
    for text in texts:
        for place in range(KEY, len(text)):
            same = 0
            while (
                same < min(place, len(end), LONGEST)
                and text[place - same - 1] == end[len(end) - same - 1]
            ):
                same += 1
            if same >= KEY and same > best:
                best, places = same, []
            if same >= KEY and same == best:
                places.append((text, place))
    return best, [
        {text[place + n] for text, place in places if place + n < len(text)} for n in range(most)
    ]


@pytest.mark.parametrize("vocabulary", [3, 8, 40])
def test_guesses_are_what_followed_the_longest_end(vocabulary: int) -> None:
    """Against a search of all texts, which are short enough for all places to be compared."""
    dice = dice_of(vocabulary)
    for _ in range(300):
        texts = [dice.choices(range(vocabulary), k=dice.randint(1, 9)) for _ in range(3)]
        index = SuffixIndex()
        for ids in texts:
            text = index.begin()
            for token in ids:
                index.extend(text, [token])
        guess = index.follow(text, 4)
        same, follows = naive(texts, 4)
        assert guess.same == same
        assert bool(guess.token_ids) == bool(follows[0])
        for token, known in zip(guess.token_ids, follows, strict=False):
            assert token in known


def test_all_at_once_is_the_same_as_one_by_one() -> None:
    dice = dice_of(1)
    ids = dice.choices(range(5), k=400)
    one, other = SuffixIndex(), SuffixIndex()
    at_once, by_one = one.begin(), other.begin()
    one.extend(at_once, ids)
    for token in ids:
        other.extend(by_one, [token])
    assert (at_once.ids, at_once.links) == (by_one.ids, by_one.links)
    assert one.follow(at_once, 8) == other.follow(by_one, 8)


def test_what_followed_more_often_is_guessed() -> None:
    index = SuffixIndex()
    for follows in (7, 7, 8):
        index.extend(index.begin(), [1, 2, 3, follows, 9])
    text = index.begin()
    index.extend(text, [1, 2, 3])
    assert index.follow(text, 2).token_ids == [7, 9]


def test_of_equals_the_last_is_guessed() -> None:
    index = SuffixIndex()
    for follows in (7, 8):
        index.extend(index.begin(), [1, 2, 3, follows])
    text = index.begin()
    index.extend(text, [1, 2, 3])
    assert index.follow(text, 1).token_ids == [8]


def test_a_part_goes_on_from_what_came_before_it() -> None:
    """A text that begins like another is added from where it leaves it, and is found beyond that."""
    index = SuffixIndex()
    index.extend(index.begin([4, 5, 6]), [1, 2, 3])
    text = index.begin()
    index.extend(text, [4, 5, 6, 1, 2])
    assert index.follow(text, 1).same == 5


def test_what_was_dropped_is_not_found() -> None:
    index = SuffixIndex()
    first, second = index.begin(), index.begin()
    index.extend(first, [1, 2, 3])
    index.extend(second, [4, 5, 6])
    assert index.drop_oldest()
    index.extend(first, [7])  # its reply goes on
    assert index.tokens == 3
    text = index.begin()
    index.extend(text, [1, 2])
    assert index.follow(text, 1).token_ids == []
    index.extend(text, [4, 5])
    assert index.follow(text, 1).token_ids == [6]
    assert index.drop_oldest()
    assert index.drop_oldest()
    assert not index.drop_oldest()
    assert index.tokens == 0


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["one token", "pairs", "random"])
def test_work_does_not_grow_with_what_is_known(kind: str) -> None:
    """Counted: comparisons of a look-up after 1,000 tokens, and after 40,000."""
    dice = dice_of(3)
    vocabulary = {"one token": 1, "pairs": 2, "random": 500}[kind]
    index = SuffixIndex()
    text = index.begin()
    most = 0
    for step in range(40_000):
        index.extend(text, [dice.randrange(vocabulary)])
        if step % 97 == 0:
            before = index.compared
            index.follow(text, 31)
            most = max(most, index.compared - before)
    assert 0 < most <= MOST_COMPARED * LONGEST


def test_adding_touches_nothing_that_is_known() -> None:
    """Counted: entries that change with each of 20,000 tokens."""
    index = SuffixIndex()
    text = index.begin()
    dice = dice_of(4)
    for _ in range(20_000):
        length, links = len(text.ids), len(text.links)
        index.extend(text, [dice.randrange(50)])
        assert (len(text.ids), len(text.links)) == (length + 1, links + 1)
    assert index.tokens == 20_000


@pytest.mark.slow
def test_the_memory_of_a_token_is_what_is_counted() -> None:
    dice = dice_of(5)
    ids = [dice.randrange(50_000) for _ in range(50_000)]  # no pair comes twice
    tracemalloc.start()
    index = SuffixIndex()
    index.extend(index.begin(), ids)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0.5 * BYTES_PER_TOKEN < taken / len(ids) < BYTES_PER_TOKEN


def passes(times: PassTimes, taken: dict[int, float], count: int = 6) -> None:
    for _ in range(count):
        for width, seconds in taken.items():
            times.note([Row([1] * width, 9, [0], drafted=width - 1)], seconds)


def test_times_are_those_measured_and_between_them_on_a_line() -> None:
    times = PassTimes()
    passes(times, {1: 0.010, 4: 0.016, 8: 0.030})
    assert times.of(1) == pytest.approx(0.010)
    assert times.of(4) == pytest.approx(0.016)
    assert times.of(2) == pytest.approx(0.012)
    assert times.of(6) == pytest.approx(0.023)
    assert times.of(9) > times.of(8)


def test_the_first_pass_of_a_width_and_passes_with_prompts_are_not_counted() -> None:
    times = PassTimes()
    times.note([Row([1], 9, [0])], 5.0)
    times.note([Row([1], 9, [0])], 0.01)
    times.note([Row([1], 9, [0]), Row([1, 2, 3], 0, [1])], 9.0)
    assert times.of(1) == pytest.approx(0.01)
    assert times.width == 1


def test_a_width_that_was_slow_once_is_tried_again_some_time() -> None:
    times = PassTimes()
    passes(times, {1: 0.01, 8: 1.0})
    assert times.of(8) == pytest.approx(1.0)
    passes(times, {1: 0.01}, count=600)
    assert times.of(8) < 0.02


def test_a_pass_takes_no_longer_than_a_wider_one() -> None:
    """What a width took while the machine did something else does not keep it from being fed."""
    times = PassTimes()
    passes(times, {1: 0.010, 2: 0.137, 4: 0.016})
    assert times.of(2) == times.of(3) == times.of(4) == pytest.approx(0.016)


class Told:
    """A reply whose tokens the test says, and passes whose cost it says."""

    def __init__(self, costs: dict[int, float], prompt: Sequence[int]) -> None:
        runtime = ReferenceRuntime(vocab_size=1000, context_length=4096)
        self.engine = Engine(runtime, num_blocks=200)
        self.drafts = Drafts(runtime.info)
        passes(self.drafts.times, costs)
        passes(self.drafts.times, {1: costs[1]}, 1)
        self.sequence: TokenSequence = self.engine.new_sequence()
        self.sequence.append(prompt)

    def say(self, token: int) -> list[int]:
        """Return what is guessed after another token."""
        self.sequence.append([token])
        self.drafts.follow(self.sequence, [])
        return list(self.sequence.draft)

    def close(self) -> None:
        self.engine.close()


CHEAP = {1: 0.010, 8: 0.011, 32: 0.015}
DEAR = {1: 0.010, 2: 0.020, 4: 0.040, 8: 0.080, 32: 0.320}


def test_as_many_are_fed_as_pay() -> None:
    """The longer the same text goes on, the more; and none where each costs as much as a pass."""
    ids = dice_of(6).sample(range(1000), 300)
    for costs, expected in ((CHEAP, 31), (DEAR, 0)):
        told = Told(costs, ids)
        widest = max(len(told.say(token)) for token in ids[:200])
        assert widest == expected
        told.close()


def test_only_certain_numbers_are_fed() -> None:
    ids = dice_of(7).sample(range(1000), 300)
    told = Told(CHEAP, ids)
    assert {len(told.say(token)) for token in ids[:200]} <= {0, *COUNTS}
    told.close()


def test_where_guesses_are_wrong_none_are_fed_and_after_that_they_are_again() -> None:
    """Whether they are right is learned without feeding them."""
    dice = dice_of(8)
    pairs = [dice.sample(range(1000), 3) for _ in range(200)]
    told = Told({1: 0.010, 2: 0.013, 32: 0.1}, [token for one in pairs for token in one])
    fed = 0
    for first, second, third in pairs[:150]:
        told.say(first)
        fed += bool(told.say(second))
        told.say((third + 1) % 1000)
    assert fed < 15
    again = [bool(told.say(token)) for one in pairs[150:] for token in one]
    assert sum(again[-30:]) > 20
    told.close()


@pytest.mark.parametrize(("replies", "most"), [(1, 3), (2, 1), (3, 0), (4, 0), (5, 31)])
def test_of_what_was_said_as_many_are_fed_as_passes_that_are_alike_take(
    replies: int, most: int
) -> None:
    """All replies together; where there are more replies than such a pass takes, as many as pay."""
    ids = dice_of(15).sample(range(1000), 300)
    runtime = ReferenceRuntime(vocab_size=1000)
    engine, drafts = Engine(runtime, num_blocks=200), Drafts(replace(runtime.info, alike=4))
    passes(drafts.times, {1: 0.010, 32: 0.010, 160: 0.011})
    passes(drafts.times, {replies: 0.010}, 1)
    drafts.learn("", [ids])
    sequences = [engine.new_sequence() for _ in range(replies)]
    for sequence in sequences:
        sequence.append([0])
        drafts.follow(sequence, [])
    widest = 0
    for token in ids[:100]:
        for sequence in sequences:
            sequence.append([token])
            drafts.follow(sequence, [])
            widest = max(widest, len(sequence.draft))
    assert widest == most
    engine.close()


def test_replies_that_have_ended_do_not_count() -> None:
    """However they ended: of four that are followed, three are stopped."""
    ids = dice_of(16).sample(range(1000), 60)
    runtime = ReferenceRuntime(vocab_size=1000)
    engine, drafts = Engine(runtime, num_blocks=200), Drafts(replace(runtime.info, alike=4))
    passes(drafts.times, {1: 0.010, 32: 0.010})
    passes(drafts.times, {1: 0.010}, 1)
    drafts.learn("", [ids])
    *stopped, sequence = [engine.new_sequence() for _ in range(4)]
    for one in (*stopped, sequence):
        one.append(ids[:20])
        drafts.follow(one, [])
    assert not sequence.draft
    for one in stopped:
        drafts.end(one)
    widest = 0
    for token in ids[20:]:
        sequence.append([token])
        drafts.follow(sequence, [])
        widest = max(widest, len(sequence.draft))
    assert widest == 3
    engine.close()


def test_what_is_copied_from_a_prompt_is_fed_in_wider_passes_too() -> None:
    """Once so much of it was that it is no chance."""
    ids = dice_of(16).sample(range(1000), 300)
    runtime = ReferenceRuntime(vocab_size=1000)
    engine, drafts = Engine(runtime, num_blocks=200), Drafts(replace(runtime.info, alike=4))
    passes(drafts.times, {1: 0.010, 32: 0.011})
    passes(drafts.times, {1: 0.010}, 1)
    drafts.learn("", [ids])  # and a reply has said it
    sequence = engine.new_sequence()
    sequence.append(ids)
    fed = []
    for token in ids[:100]:
        sequence.append([token])
        drafts.follow(sequence, [])
        fed.append(len(sequence.draft))
    assert max(fed[:15]) == 3
    assert max(fed) == 31
    engine.close()


def test_what_is_forced_is_fed_first() -> None:
    told = Told(CHEAP, [1, 2, 3])
    told.sequence.append([1, 2])
    told.drafts.follow(told.sequence, [9, 8, 7])
    assert list(told.sequence.draft) == [9, 8, 7]
    told.close()


def test_nobody_is_told_what_another_namespace_has_said() -> None:
    ids = dice_of(9).sample(range(1000), 100)
    runtime = ReferenceRuntime(vocab_size=1000)
    engine, drafts = Engine(runtime, num_blocks=200), Drafts(runtime.info)
    guessed = {}
    for namespace in ("a", "b", "a", None, None):
        sequence = engine.new_sequence(namespace)
        sequence.append(ids[:50] if namespace in guessed else ids)
        drafts.follow(sequence, [])
        guessed[namespace] = list(sequence.draft)
        if namespace == "a" and len(sequence) == 50:
            assert guessed["a"] == ids[50 : 50 + len(guessed["a"])] != []
    assert guessed["b"] == guessed[None] == []
    engine.close()


def test_texts_of_other_branches_are_learned_before_the_next_reply() -> None:
    ids = dice_of(10).sample(range(1000), 60)
    runtime = ReferenceRuntime(vocab_size=1000)
    engine, drafts = Engine(runtime, num_blocks=200), Drafts(runtime.info)
    drafts.learn("", [ids[20:], ids[:40]])
    sequence = engine.new_sequence()
    sequence.append(ids[:20])
    drafts.follow(sequence, [])
    assert list(sequence.draft) == ids[20 : 20 + len(sequence.draft)] != []
    engine.close()


def test_a_conversation_that_is_opened_again_is_learned_once() -> None:
    ids = dice_of(13).sample(range(1000), 500)
    runtime = ReferenceRuntime(vocab_size=1000)
    engine, drafts = Engine(runtime, num_blocks=200), Drafts(runtime.info)
    taken = []
    for _ in range(3):
        drafts.learn("", [ids, ids[::-1]])
        sequence = engine.new_sequence()
        sequence.append(ids[:20])
        drafts.follow(sequence, [])
        drafts.end(sequence)
        taken.append(drafts.bytes)
    assert taken[0] > 1000 * BYTES_PER_TOKEN
    assert taken[2] < taken[0] + 100 * BYTES_PER_TOKEN
    engine.close()


def test_so_many_namespaces_are_known_and_those_used_last() -> None:
    ids = dice_of(14).sample(range(1000), 60)
    runtime = ReferenceRuntime(vocab_size=1000)
    engine, drafts = Engine(runtime, num_blocks=200), Drafts(runtime.info)

    def guessed(namespace: str, length: int) -> bool:
        sequence = engine.new_sequence(namespace)
        sequence.append(ids[:length])
        drafts.follow(sequence, [])
        return bool(sequence.draft)

    for number in range(MOST_NAMESPACES + 8):
        guessed(str(number), 60)
    assert drafts.bytes < (MOST_NAMESPACES + 1) * (60 * BYTES_PER_TOKEN + 8000)
    assert guessed(str(MOST_NAMESPACES + 7), 30)
    assert not guessed("0", 30)
    engine.close()


def test_a_history_that_goes_on_is_added_once() -> None:
    ids = dice_of(11).sample(range(1000), 900)
    runtime = ReferenceRuntime(vocab_size=1000)
    engine, drafts = Engine(runtime, num_blocks=200), Drafts(runtime.info)
    for length in range(50, 900, 50):
        sequence = engine.new_sequence()
        sequence.append(ids[:length])
        drafts.follow(sequence, [])
        drafts.end(sequence)
    assert drafts.bytes < 1.5 * 900 * BYTES_PER_TOKEN + 100_000
    engine.close()


def test_memory_is_bounded_whoever_says_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recollect.engine.drafts.MOST_BYTES", 400_000)
    dice = dice_of(12)
    runtime = ReferenceRuntime(vocab_size=1000)
    engine, drafts = Engine(runtime, num_blocks=200), Drafts(runtime.info)
    for number in range(200):
        sequence = engine.new_sequence(f"key {number % 150}")
        sequence.append(dice.choices(range(1000), k=dice.randint(1, 400)))
        drafts.follow(sequence, [])
        drafts.end(sequence)
        assert drafts.bytes <= 400_000
        sequence.release()
    assert MOST_BYTES > 400_000
    engine.close()
