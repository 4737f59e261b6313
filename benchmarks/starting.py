"""
How long a person waits at the terminal: for `recollect --help`, and for the prompt of a chat.

    python benchmarks/starting.py [--model M] [--profile P] [--rounds 7] [--save]

`help` is the process from its start to its end. `prompt` is `recollect chat` on a pseudo-terminal, from the
start of the process until it takes what is typed, with the model on this disk: `first` in a data folder
that has nothing but the models, `later` in one that has a conversation. Both also as processor seconds
of the process, which other programs on the machine disturb less.
"""

import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import pexpect

import recollect
from harness import Load, parser, report, say
from recollect import config
from recollect.models.prepare import prepare
from recollect.proof.bench import summarize

RECOLLECT = ["-m", "recollect"]
MOST_S = {"help": 0.3, "prompt, first": 3.0, "prompt, later": 3.0}
READY = "\x1b[?2004h"
"""The line editor announces by this that it takes what is pasted, and so whatever is typed."""
WAIT_S = 120
CTRL_D = "\x04"


def main() -> int:
    """Measure, and return 1 where a person waits longer than is promised."""
    options = parser(__doc__.partition("\n\n")[0], profile="fast")
    options.add_argument("--rounds", type=int, default=7, help="the first is discarded")
    args = options.parse_args()
    local = prepare(
        args.model, home=config.home()
    )  # so that it is there, whatever was there before
    assert local.folder is not None, "the reference model is no model to wait for"
    load = Load()
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in MOST_S}
    with tempfile.TemporaryDirectory() as folder:
        used = home_with_models(Path(folder) / "used", local.folder.parent)
        prompt_s(args, used, say_first="hello")
        for number in range(args.rounds):
            fresh = home_with_models(Path(folder) / f"fresh-{number}", local.folder.parent)
            samples["help"].append(help_s())
            samples["prompt, first"].append(prompt_s(args, fresh))
            samples["prompt, later"].append(prompt_s(args, used))
    result: dict[str, Any] = {}
    for name, all_times in samples.items():
        wall, processor = zip(*all_times[1:], strict=True)
        result[name] = {"s": asdict(summarize(wall)), "processor_s": asdict(summarize(processor))}
        say(
            f"{name}: {summarize(wall).median:.3f} s, of the processor {summarize(processor).median:.3f} s"
        )
    result["others_load"] = load.others()
    with recollect.load(args.model, profile=args.profile, kv_disk=0) as model:
        report(f"starting-{args.model}", model, result, save=args.save)
    return int(any(result[name]["s"]["median"] > most for name, most in MOST_S.items()))


def home_with_models(home: Path, models: Path) -> Path:
    """Return a new data folder that has the models alone."""
    home.mkdir()
    (home / "models").symlink_to(models)
    return home


def processor_s() -> float:
    """Return the processor seconds of all processes of ours that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def help_s() -> tuple[float, float]:
    """Return how long `recollect --help` takes."""
    begun, before = perf_counter(), processor_s()
    subprocess.run(  # noqa: S603 - our own command
        [sys.executable, *RECOLLECT, "--help"], check=True, stdout=subprocess.DEVNULL
    )
    return perf_counter() - begun, processor_s() - before


def prompt_s(args: Any, home: Path, *, say_first: str = "") -> tuple[float, float]:
    """
    Return how long a chat takes until it can be typed in.

    The processor seconds have the end of the process in them, too, which is short.
    """
    environment = os.environ | {"RECOLLECT_HOME": str(home), "TERM": "xterm-256color"}
    environment["PROMPT_TOOLKIT_NO_CPR"] = "1"
    chat = [*RECOLLECT, "chat", "--model", args.model, "--profile", args.profile, "-n", "4"]
    begun, before = perf_counter(), processor_s()
    child = pexpect.spawn(sys.executable, chat, env=environment, timeout=WAIT_S)
    child.expect_exact(READY)
    waited = perf_counter() - begun
    if say_first:
        child.send(say_first + "\r")
        child.expect_exact(READY)
    child.send(CTRL_D)
    child.expect(pexpect.EOF)
    child.close()
    return waited, processor_s() - before


if __name__ == "__main__":
    sys.exit(main())
