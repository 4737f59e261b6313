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


def test_a_program_that_never_closes_its_model_ends_in_peace() -> None:
    ended = subprocess.run(  # noqa: S603 - our own program
        [sys.executable, "-c", PROGRAM, MODEL],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0
    assert ended.stderr == ""
