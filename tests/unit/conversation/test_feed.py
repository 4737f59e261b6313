"""Events in a program: who is called with what, and what a slow or a failing reader costs."""

import gc
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from recollect.conversation import event_log, feed
from recollect.conversation.event_log import LOST, TAKEN_BYTES, Event, EventLog, Watch
from recollect.conversation.feed import Feed
from recollect.conversation.model import Model
from recollect.encryption import Cipher
from recollect.engine.engine import Engine
from recollect.journal.journal import JOURNAL_NAME, Journal
from recollect.journal.records import Entry, NewNode
from recollect.types import SamplingParams

SHORT = SamplingParams(max_tokens=12, ignore_eos=True)


class Heard:
    """What a hook was called with."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.threads: set[str] = set()
        self._came = threading.Condition()

    def __call__(self, event: Event) -> None:
        with self._came:
            self.events.append(event)
            self.threads.add(threading.current_thread().name)
            self._came.notify_all()

    def until(self, kind: str, count: int = 1) -> list[Event]:
        """Return the events of a kind as soon as there are so many."""

        def found() -> list[Event]:
            return [event for event in self.events if event.kind == kind]

        with self._came:
            assert self._came.wait_for(lambda: len(found()) >= count, timeout=60), [
                event.kind for event in self.events
            ]
            return found()


@pytest.mark.slow
def test_a_hook_is_called_with_what_happens_on_the_feeds_thread(
    make_model: Callable[..., Model],
) -> None:
    model, heard = make_model(), Heard()
    stop = model.on_event(heard)
    session = model.session(name="notes", params=SHORT)
    reply = session.respond("Hello")
    (completed,) = heard.until("reply.completed")
    assert completed.data["usage"] == reply.usage.to_dict()
    created = heard.until("message.created", 2)
    assert completed.data["item"] == created[1].data["item"]
    assert [event.data["content"] for event in created] == ["Hello", reply.said]
    assert heard.threads == {"recollect-events"}
    others = Heard()
    model.on_event(others)
    stop()
    session.respond("And then?")
    others.until("reply.completed")
    assert "And then?" not in [event.data.get("content") for event in heard.events]
    assert len(heard.until("reply.completed")) == 1


def test_what_is_not_saved_is_told_without_a_conversation(make_model: Callable[..., Model]) -> None:
    model, heard = make_model(), Heard()
    model.on_event(heard)
    reply = model.session(params=SHORT).respond("Hello")
    (completed,) = heard.until("reply.completed")
    assert (completed.conversation, completed.data["item"]) == (None, None)
    assert "".join(event.data["text"] for event in heard.until("reply.delta")) == reply.text


def test_a_hook_that_fails_harms_nothing(
    make_model: Callable[..., Model], caplog: pytest.LogCaptureFixture
) -> None:
    model, heard = make_model(), Heard()

    def fail(event: Event) -> None:
        raise ValueError(event.kind)

    model.on_event(fail)
    model.on_event(heard)
    assert model.session(params=SHORT).respond("Hello").usage.generated_tokens == 12
    heard.until("reply.completed")
    assert "has failed" in caplog.text


def test_a_reply_that_is_left_is_told_to_be_over(make_model: Callable[..., Model]) -> None:
    model, heard = make_model(), Heard()
    model.on_event(heard)
    for piece in model.session(params=SamplingParams(max_tokens=200, ignore_eos=True)).stream("Hi"):
        assert piece
        break
    (completed,) = heard.until("reply.completed")
    assert completed.data["finish_reason"] == "cancelled"


@pytest.mark.slow
def test_an_encrypted_home_tells_names_and_texts_to_those_with_the_key(tmp_path: Path) -> None:
    cipher, heard = Cipher(bytes(32)), Heard()
    watched = Feed(tmp_path, cipher)
    with Journal.open(tmp_path / JOURNAL_NAME, cipher=cipher) as journal:
        watched.on_event(heard)
        entry = Entry(nodes=[NewNode(role="user", content="secret words")], tip="hidden branch")
        written = journal.begin("secret name", entry, model="m", fingerprint="f")
        heard.until("branch.moved")
        journal.delete(written.conversation_id)
        heard.until("conversation.deleted")
    watched.close()
    (created,) = heard.until("message.created")
    assert (created.data["content"], created.data["branch"]) == ("secret words", "hidden branch")
    for file in tmp_path.iterdir():
        assert b"hidden" not in file.read_bytes()


def test_what_another_program_imports_is_in_memory_a_part_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from recollect.journal.changes import MOST_READ, Change, Changes
    from recollect.journal.journal import JOURNAL_NAME, Journal
    from recollect.journal.records import Entry, NewNode

    read, alive = Journal.changes, list[int]()

    def counted(journal: Journal, *arguments: Any) -> Changes:
        alive.append(sum(isinstance(one, Change) for one in gc.get_objects()))
        return read(journal, *arguments)

    monkeypatch.setattr(Journal, "changes", counted)
    watched, heard = Feed(tmp_path, None), Heard()
    with Journal.open(tmp_path / JOURNAL_NAME) as journal:
        watched.on_event(heard)
        nodes = [NewNode(role="user", content=f"{number}") for number in range(4 * MOST_READ)]
        journal.begin("large", Entry(nodes=nodes, tip="main"), model="m", fingerprint="f")
        told = heard.until("message.created", 4 * MOST_READ)
    watched.close()
    assert [event.data["content"] for event in told] == [node.content for node in nodes]
    assert max(alive) <= MOST_READ


def test_a_log_is_bounded_in_count_and_in_bytes_and_tells_what_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(event_log, "MOST_EVENTS", 10)
    monkeypatch.setattr(event_log, "MOST_BYTES", 1000)
    log = EventLog(first_id=100)
    for number in range(25):
        log.add("one", None, {"number": number})
    assert [event.id for event in log.after(114) or []] == list(range(115, 125))
    assert log.after(113) is None
    assert log.after(124) == []
    assert log.after(125) is None
    log.add("one", None, {"text": "x" * 900})
    assert len(log) == 1
    assert log.after(125) == []
    assert log.lost().id == 125


def test_a_reader_takes_few_bytes_at_once_and_all_in_the_end() -> None:
    log = EventLog(first_id=1)
    watch = Watch(log, "", after=0, wake=lambda _: None, leave=lambda _: None)
    sizes = [*[30_000] * 10, 100_000, *[100] * 1000]
    for size in sizes:
        log.add("one", None, {"text": "x" * size})
    taken = []
    while events := watch.take():
        assert len(events) == 1 or sum(len(event.text) for event in events) <= TAKEN_BYTES
        taken.append(events)
    assert [event.id for events in taken for event in events] == list(range(1, len(sizes) + 1))
    assert len(taken) < 10
    log.forget()
    assert [event.kind for event in watch.take()] == [LOST]
    assert watch.take() == []


def test_a_hook_is_called_with_all_of_a_burst(tmp_path: Path) -> None:
    watched, heard = Feed(tmp_path, None), Heard()
    watched.on_event(heard)
    for number in range(10):
        watched.tell("", "job.started", {"job": number, "text": "x" * 30_000})
    told = heard.until("job.started", 10)
    assert [event.data["job"] for event in told] == list(range(10))
    watched.close()


def test_a_hook_that_ends_itself_is_not_called_again(tmp_path: Path) -> None:
    watched, heard, others = Feed(tmp_path, None), Heard(), Heard()

    def once(event: Event) -> None:
        heard(event)
        stop()

    stop = watched.on_event(once)
    watched.on_event(others)
    for number in range(10):
        watched.tell("", "job.started", {"job": number})
    others.until("job.started", 10)
    watched.close()
    assert [event.data["job"] for event in heard.events] == [0]


@pytest.mark.slow
def test_a_reader_that_is_slow_holds_nothing_and_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_log, "MOST_EVENTS", 10)
    watched, heard = Feed(tmp_path, None), Heard()
    slow = watched.watch()
    watched.on_event(heard)
    for number in range(50):
        watched.tell("", "job.started", {"job": number})
        if not number % 5:
            heard.until("job.started", number + 1)
    heard.until("job.started", 50)
    assert [event.kind for event in slow.take()] == [LOST]
    assert slow.take() == []
    watched.tell("", "job.ended", {"job": 1})
    heard.until("job.ended")
    assert [event.kind for event in slow.take()] == ["job.ended"]
    watched.close()


@pytest.mark.slow
def test_where_more_is_told_than_can_be_taken_readers_are_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "MOST_TOLD", 5)
    monkeypatch.setattr(feed, "PAUSE_S", 0.5)
    watched, heard = Feed(tmp_path, None), Heard()
    watched.on_event(heard)
    for number in range(100):
        watched.tell("", "job.started", {"job": number})
    heard.until(LOST)
    assert len(heard.events) < 100
    watched.close()


@pytest.mark.parametrize("others", [0, 1])
def test_what_happens_while_a_hook_is_added_is_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: int
) -> None:
    """The feed's thread may have told it before whoever adds the hook goes on."""
    watched, heard, earlier, watch = Feed(tmp_path, None), Heard(), Heard(), Feed.watch
    for _ in range(others):
        watched.on_event(earlier)

    def slow(self: Feed, *arguments: Any, **options: Any) -> Watch:
        found, next_id = watch(self, *arguments, **options), event_id(self)
        self.tell("", "job.started", {"job": 1})
        while event_id(self) == next_id:
            time.sleep(0.001)
        time.sleep(0.01)
        return found

    def event_id(feed: Feed) -> int:
        reader = watch(feed)
        reader.close()
        return reader.last_id

    monkeypatch.setattr(Feed, "watch", slow)
    watched.on_event(heard)
    heard.until("job.started")
    watched.close()


def test_a_hook_that_is_ended_while_it_is_called_is_called_no_more(tmp_path: Path) -> None:
    watched, heard, stops = Feed(tmp_path, None), Heard(), list[Callable[[], None]]()

    def once(event: Event) -> None:
        stops[0]()
        heard(event)

    stops.append(watched.on_event(once))
    last = Heard()
    watched.on_event(last)
    for number in range(5):
        watched.tell("", "job.started", {"job": number})
    last.until("job.started", 5)
    assert len(heard.events) == 1
    watched.close()


def test_what_happens_in_a_namespace_while_another_is_read_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change that comes after its first reader is told to it, whichever changes are being read."""
    watched, late, changes = Feed(tmp_path, None), Heard(), Journal.changes

    def begin(namespace: str) -> None:
        entry = Entry(nodes=[NewNode(role="user", content="Hello")], tip="main")
        journal.begin(None, entry, model="m", fingerprint="f", namespace=namespace)

    def slow(self: Journal, since: int, namespaces: Collection[str]) -> Any:
        if not is_late:
            is_late.append(True)
            watched.on_event(late, namespace="late")
            begin("late")
        return changes(self, since, namespaces)

    with Journal.open(tmp_path / JOURNAL_NAME) as journal:
        watched.on_event(Heard())
        is_late = list[bool]()
        monkeypatch.setattr(Journal, "changes", slow)
        begin("")
        assert [one.data["content"] for one in late.until("message.created")] == ["Hello"]
    watched.close()


def test_an_engine_that_comes_while_a_namespace_is_forgotten_harms_nothing(
    make_engine: Callable[..., Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "LINGER_S", 0.0)
    watched, heard, engines = Feed(tmp_path, None), Heard(), [make_engine() for _ in range(2)]

    class Name(str):
        """Another engine comes in the moment in which the feed's thread looks one up."""

        __slots__ = ()

        def __hash__(self) -> int:
            if left and len(engines) == 2:
                watched.attach("another", engines.pop())
            return super().__hash__()

    left = list[bool]()
    watched.attach(Name("one"), engines[0])
    watched.on_event(heard)
    leave = watched.on_event(Heard(), namespace="other")
    left.append(True)
    leave()
    while watched.is_watched("other"):
        time.sleep(0.001)
    watched.tell("", "job.started", {"job": 1})
    heard.until("job.started")
    watched.close()


def test_nothing_is_kept_where_nobody_watches(
    make_model: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "LINGER_S", 0.0)
    model, heard = make_model(), Heard()
    before = set(threading.enumerate())
    stop = model.on_event(heard)
    assert model.feed.is_watched("")
    assert not model.feed.is_watched("another")
    (thread,) = {one for one in threading.enumerate() if one.name == "recollect-events"} - before
    stop()
    thread.join(60)
    assert not thread.is_alive()
    assert not model.feed.is_watched("")
    model.session(params=SHORT).respond("Hello")
    assert heard.events == []


@pytest.mark.slow
def test_to_watch_makes_no_journal(tmp_path: Path) -> None:
    watched = Feed(tmp_path, None)
    watched.on_event(lambda _: None)
    time.sleep(0.2)
    watched.close()
    assert list(tmp_path.iterdir()) == []


class Calls:
    """Which functions of ours the engine's thread calls, and how often."""

    def __init__(self) -> None:
        self.counted: dict[str, int] = {}

    def note(self, frame: FrameType, event: str, _: object) -> None:
        """Be the profile function of a thread."""
        if threading.current_thread().name != "recollect":
            sys.setprofile(None)
        elif event == "call":
            name = f"{Path(frame.f_code.co_filename).parent.name}: {frame.f_code.co_qualname}"
            self.counted[name] = self.counted.get(name, 0) + 1


@pytest.fixture
def calls() -> Iterator[Calls]:
    """Return what the engine's threads call that begin from now on."""
    before, found = threading.getprofile(), Calls()
    threading.setprofile(found.note)
    yield found
    threading.setprofile(before)


@pytest.mark.slow
def test_fifty_watchers_cost_the_engines_thread_nothing(
    make_model: Callable[..., Model], calls: Calls
) -> None:
    """Counted: it calls the same functions as often for the same reply, whether anybody watches or not."""
    model = make_model()
    params = SamplingParams(max_tokens=100, ignore_eos=True, temperature=0)

    def counted(namespace: str) -> dict[str, int]:
        session = model.session(params=params, namespace=namespace, keep=True)
        calls.counted.clear()
        stream = session.stream("Hello")
        text = "".join(stream)
        assert text
        # The engine's thread goes on with what it does while nobody waits.
        found = calls.counted.copy()
        return {name: count for name, count in found.items() if "generate" in name}

    def everything(namespace: str) -> set[str]:
        counted(namespace)
        return set(calls.counted.copy())

    counted("warm up")
    alone, functions = counted("first"), everything("second")
    heard = Heard()
    stops = [
        model.on_event(heard, namespace=name) for name in ("third", "fourth") for _ in range(25)
    ]
    assert counted("third") == alone
    assert everything("fourth") <= functions
    heard.until("reply.completed", 50)
    assert [name for name in calls.counted.copy() if name.startswith("conversation: ")] == []
    for stop in stops:
        stop()
