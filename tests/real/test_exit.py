"""A program that ends without closing its model ends like any other."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.model
MODEL = os.environ.get("RECOLLECT_TEST_MODEL", "smollm2")

PROGRAM = """
import sys
import recollect

session = recollect.load(sys.argv[1], kv_disk=0).session()
for _ in session.stream("Tell me a very long story."):
    break  # the engine is in a forward pass
session.respond("Go on.", params=recollect.SamplingParams(max_tokens=3))
reading = iter(session.stream("And on."))  # never read to its end
next(reading)
"""

# OpenVINO gives the thread that loads its CPU plugin a stack for signals, and takes it away again.
INTERRUPTED = """
import gc, signal, sys, threading
import recollect

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs behind it

def load(profile):
    return recollect.load(sys.argv[1], profile=profile, kv_disk=0)

models = [load("fast"), load("exact")]
while models:
    models.pop(0).close()
    gc.collect()
models.append(load("fast"))
other = threading.Thread(target=lambda: (models.pop().close(), gc.collect()))
other.start()
other.join()
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


def run(program: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(  # noqa: S603 - our own programs
        [sys.executable, "-c", program, MODEL],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_program_that_never_closes_its_model_ends_in_peace() -> None:
    ended = run(PROGRAM)
    assert ended.returncode == 0
    assert ended.stderr == ""


def test_ctrl_c_after_models_were_closed_is_an_interrupt() -> None:
    ended = run(INTERRUPTED)
    assert (ended.returncode, ended.stdout) == (0, "interrupted\n")
