"""
Best of n on a coding question: n programs are written in one batch, tests run them, and the best is kept.

    python examples/best_of_n.py [--model qwen2.5-coder-1.5b] [--n 4]

The model is 1.1 GB, fetched when it is first used; `--model smollm2` is small, and passes hardly a test.
What a model writes is run here, in a process of its own with limits of time and memory and without this
program's variables, but with your rights: have the example run where a wrong program can do no harm.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import recollect
from recollect.types import SamplingParams

QUESTION = (
    "Write a Python function `roman(number: int) -> str` that returns a number from 1 to 3999 as a Roman "
    "numeral. Answer with the code alone."
)
TESTS = {
    1: "I",
    4: "IV",
    9: "IX",
    40: "XL",
    90: "XC",
    400: "CD",
    1994: "MCMXCIV",
    3999: "MMMCMXCIX",
}
LIMITS = "import resource as r; r.setrlimit(r.RLIMIT_AS, (2**30, 2**30)); r.setrlimit(r.RLIMIT_CPU, (5, 5))"
FENCE = re.compile(r"```(?:python)?\n(.*?)(?:```|$)", re.DOTALL)


def code_of(text: str) -> str:
    """Return the program in a reply: what is in the first fence, or all of it."""
    found = FENCE.search(text)
    return found[1] if found else text


def passed(code: str) -> int:
    """Return how many tests a program passes."""
    checks = "\n".join(
        f"try: passed += roman({number}) == {roman!r}\nexcept Exception: pass"
        for number, roman in TESTS.items()
    )
    limits = LIMITS if sys.platform != "win32" else ""
    program = f"{limits}\n{code}\npassed = 0\n{checks}\nprint('\\npassed', passed)\n"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "program.py"
        file.write_text(program, "utf-8")
        try:
            done = subprocess.run(  # noqa: S603 - see above
                [sys.executable, "-I", str(file)],
                cwd=folder,
                env={},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=10,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return 0
    last = done.stdout.strip().rpartition("\n")[2]
    return int(last.removeprefix("passed ")) if last.startswith("passed ") else 0


def main() -> None:
    """Ask n times, keep the best, and say what sharing has saved."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0].strip())
    parser.add_argument("--model", default="qwen2.5-coder-1.5b", help="what recollect loads")
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=220)
    chosen = parser.parse_args()
    params = SamplingParams(max_tokens=chosen.max_tokens, temperature=0.8, seed=1)

    def score(branch: recollect.Branch) -> float:
        return passed(code_of(branch.text))

    with recollect.load(chosen.model) as model:
        session = model.session("You are a careful Python programmer.", params=params)
        print(f"{chosen.n} programs are being written ...", flush=True)
        found = session.explore([QUESTION] * chosen.n, score=score)
        for branch in found:  # as they end
            passes = f"{branch.score or 0:.0f} of {len(TESTS)} tests"
            print(f"program {branch.index + 1}: {passes}", flush=True)
        usage, best = found.usage, found.best
    print(f"\nThe best one:\n{code_of(best.text).strip()}\n")
    saved = usage.prompt_tokens - usage.computed_tokens
    print(
        f"{chosen.n} programs in one batch, {usage.decode_tps or 0:.0f} tokens/s together. The question "
        f"was read once: {saved:,} of {usage.prompt_tokens:,} prompt tokens saved."
    )


if __name__ == "__main__":
    main()
