"""
What happens before anything else is imported: the package imports this module first.

Ctrl-C ends the command `recollect` without a traceback while its imports run; in other programs
nothing changes. Libraries that would report to their makers are told not to. Imports none of them,
because they decide when they are loaded.
"""

import os
import signal
import sys
import threading
from itertools import pairwise
from pathlib import PurePath
from typing import Final

OFF_BY_VARIABLE: Final = ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY")
"""
Variables that libraries read when they are loaded, in this process and in those that it starts.

ONNX Runtime, and with it ONNX Runtime GenAI, keeps a device id and what it is about to report in
the user's cache folder from the moment that it is loaded, whatever is called afterwards.
huggingface_hub counts what programs do with it. Source: their binaries and sources, 1.32, 0.18, 2.4.
"""


def is_our_command() -> bool:
    """Return whether this process is the command `recollect`, or `python -m recollect`."""
    if PurePath(sys.argv[0] if sys.argv else "").stem == "recollect":
        return True
    given = sys.orig_argv
    return any(pair == ("-m", "recollect") for pair in pairwise(given))


def end_on_interrupt() -> None:
    """
    Let Ctrl-C end our command at once, while there is nothing to clean up: at its start and end.

    In any other program, and if interrupts are ignored, nothing changes.
    """
    if not is_our_command():
        return
    is_usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_usual and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def raise_on_interrupt() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again, as everywhere in Python."""
    is_ours = signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    if is_ours and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


def switch_off_telemetry() -> None:
    """
    Make OpenVINO, ONNX Runtime and huggingface_hub report nothing, here and in child processes.

    OpenVINO has no such variable. Importing it looks up a name and writes a client id into the
    user's home folder, unless its package for that is missing, which it then does without: to this
    process it is missing from now on. Where somebody has imported it before, it stays as it is.
    A variable that the user has set is the user's decision.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type] # "not to be found"
    for name in OFF_BY_VARIABLE:
        os.environ.setdefault(name, "1")


end_on_interrupt()
switch_off_telemetry()
