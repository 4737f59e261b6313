"""
Ctrl-C while the command `recollect` is being imported ends it, without a traceback.

Importing this module is what does it, so that the package can do so before it imports anything else;
in a program of somebody else's nothing happens.
"""

import signal
import sys
import threading
from itertools import pairwise
from pathlib import PurePath


def is_our_command() -> bool:
    """Return whether this process is the command `recollect`, or `python -m recollect`."""
    if PurePath(sys.argv[0] if sys.argv else "").stem == "recollect":
        return True
    given = sys.orig_argv
    return any(pair == ("-m", "recollect") for pair in pairwise(given))


def end_on_interrupt() -> None:
    """
    Let Ctrl-C end our command at once: there is nothing yet, or nothing more, to put in order.

    In any other program, and where interrupts are ignored, nothing changes.
    """
    if not is_our_command():
        return
    is_usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_usual and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def raise_on_interrupt() -> None:
    """Let Ctrl-C be an exception again, as everywhere in Python."""
    is_ours = signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    if is_ours and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


end_on_interrupt()
