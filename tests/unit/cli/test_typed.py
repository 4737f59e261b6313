"""What is being typed is handed on once, when the user pauses."""

import threading

from recollect.cli.repl import TypedText, typed_message

LONG_S = 3600.0
TIMEOUT_S = 60.0


class Receiver:
    """Takes what is handed on, and can wait for it."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.got_one = threading.Event()

    def __call__(self, text: str) -> None:
        self.texts.append(text)
        self.got_one.set()


def test_a_text_is_handed_on_after_a_pause() -> None:
    receiver = Receiver()
    typed = TypedText(receiver, pause_s=0)
    typed.changed("four words are enough")
    assert receiver.got_one.wait(TIMEOUT_S)
    typed.stop()
    assert receiver.texts == ["four words are enough"]


def test_a_few_words_are_not_worth_it() -> None:
    receiver = Receiver()
    typed = TypedText(receiver, pause_s=0)
    typed.changed("only three words")
    typed.stop()
    assert receiver.texts == []


def test_only_what_stands_there_at_last_is_handed_on() -> None:
    receiver = Receiver()
    typed = TypedText(receiver, pause_s=LONG_S)
    for text in ("what is the capital", "what is the capital of", ""):
        typed.changed(text)
    typed.stop()
    assert receiver.texts == []


def test_stopping_does_not_wait_for_the_pause_and_nothing_comes_after_it() -> None:
    receiver = Receiver()
    typed = TypedText(receiver, pause_s=LONG_S)
    typed.changed("one two three four")
    typed.stop()  # joins the thread, and so would hang here
    typed.stop()
    assert receiver.texts == []


def test_stopping_waits_for_what_is_being_handed_on() -> None:
    entered, leave = threading.Event(), threading.Event()

    def slow(_text: str) -> None:
        entered.set()
        assert leave.wait(TIMEOUT_S)

    typed = TypedText(slow)
    typed.begin()
    assert entered.wait(TIMEOUT_S)
    stopping = threading.Thread(target=typed.stop)
    stopping.start()
    assert stopping.is_alive()
    leave.set()
    stopping.join(TIMEOUT_S)
    assert not stopping.is_alive()


def test_stopping_waits_for_what_was_being_handed_on_when_more_was_typed() -> None:
    """Else the line is said while the session still takes in what stood there before."""
    entered, leave, ended = threading.Event(), threading.Event(), list[str]()

    def slow(text: str) -> None:
        entered.set()
        assert leave.wait(TIMEOUT_S)
        ended.append(text)

    typed = TypedText(slow, pause_s=LONG_S)
    typed.begin()
    assert entered.wait(TIMEOUT_S)
    for text in ("what is the capital", "what is the capital of"):
        typed.changed(text)
    stopping = threading.Thread(target=typed.stop)
    stopping.start()
    stopping.join(0.2)
    assert stopping.is_alive()
    leave.set()
    stopping.join(TIMEOUT_S)
    assert ended == [""]


def test_at_the_beginning_nothing_is_typed() -> None:
    receiver = Receiver()
    typed = TypedText(receiver)
    typed.begin()
    assert receiver.got_one.wait(TIMEOUT_S)
    typed.stop()
    assert receiver.texts == [""]


def test_the_quotes_around_a_block_are_not_part_of_the_message() -> None:
    assert typed_message('"""\nfirst\nsecond') == "first\nsecond"
    assert typed_message('"""\nfirst\n"""') == "first"
    assert typed_message("  plain ") == "plain"
