"""Events in a program: who is called with what, and what a slow or a failing reader costs."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest

from recollect.conversation import event_log, feed
from recollect.conversation.event_log import LOST, Event, EventLog
from recollect.conversation.feed import Feed
from recollect.conversation.model import Model
from recollect.encryption import Cipher
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
    stop()
    heard.events.clear()
    others = Heard()
    model.on_event(others)
    session.respond("And then?")
    others.until("reply.completed")
    assert heard.events == []


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
    from recollect.journal.journal import JOURNAL_NAME, Journal
    from recollect.journal.records import Entry, NewNode

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


def test_nothing_is_kept_where_nobody_watches(
    make_model: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "LINGER_S", 0.0)
    model, heard = make_model(), Heard()
    stop = model.on_event(heard)
    assert model.feed.is_watched("")
    assert not model.feed.is_watched("another")
    stop()
    deadline = time.monotonic() + 60
    while model.feed.is_watched(""):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert "recollect-events" not in {thread.name for thread in threading.enumerate()}
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
        return {name: count for name, count in calls.counted.items() if "generate" in name}

    def everything(namespace: str) -> set[str]:
        counted(namespace)
        return set(calls.counted)

    counted("warm up")
    alone, functions = counted("first"), everything("second")
    heard = Heard()
    stops = [
        model.on_event(heard, namespace=name) for name in ("third", "fourth") for _ in range(25)
    ]
    assert counted("third") == alone
    assert everything("fourth") <= functions
    heard.until("reply.completed", 50)
    assert [name for name in calls.counted if name.startswith("conversation: ")] == []
    for stop in stops:
        stop()
