"""
What it costs that chat templates are rendered in a process of their own.

Needs no model: `python benchmarks/templates.py [FOLDER]` times the usual template, and every `.jinja`
file in the folder, there and in this process. Says where the two texts differ, and then returns 1.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter

from recollect.errors import TemplateError
from recollect.text.template import ChatTemplate
from recollect.types import Message

_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_NOW = datetime(2026, 1, 1, tzinfo=UTC)


def _conversation(turns: int) -> list[Message]:
    said: list[Message] = []
    for _ in range(turns):
        said += [
            {"role": "user", "content": "word " * 100},
            {"role": "assistant", "content": "word " * 100},
        ]
    return [*said, {"role": "user", "content": "More?"}]


def _median_ms(act: Callable[[], object], rounds: int = 30) -> float:
    times = []
    for _ in range(rounds + 1):
        begun = perf_counter()
        act()
        times.append((perf_counter() - begun) * 1000)
    return statistics.median(times[1:])  # the first is a warm-up


def _compare(source: str, turns: int) -> tuple[float, float, bool]:
    """Return the time in the process, the time here, and whether both texts are the same."""
    said = _conversation(turns)
    foreign, own = (ChatTemplate(source, now=_NOW, is_own=is_own) for is_own in (False, True))
    texts = [one.render(said, add_generation_prompt=True) for one in (foreign, own)]
    there, here = (
        _median_ms(lambda one=one: one.render(said, add_generation_prompt=True))  # type: ignore[misc]  # bound now
        for one in (foreign, own)
    )
    return there, here, texts[0] == texts[1]


def main() -> int:
    """Print a table, then one JSON line."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("folder", type=Path, nargs="?")
    folder: Path | None = options.parse_args().folder
    begun = perf_counter()
    ChatTemplate(_CHATML)
    start_ms = (perf_counter() - begun) * 1000
    found: dict[str, dict[str, float | bool]] = {}
    sources = {f"ChatML, {turns} turns": (_CHATML, turns) for turns in (1, 10, 100, 500)}
    for file in sorted(folder.glob("*.jinja")) if folder else ():
        sources[file.stem] = (file.read_text("utf-8"), 50)
    for name, (source, turns) in sources.items():
        try:
            there, here, is_same = _compare(source, turns)
        except TemplateError as refusal:
            print(f"{name:60} {refusal}")
            continue
        found[name] = {"process_ms": there, "here_ms": here, "same": is_same}
        print(f"{name:60} {there:7.3f} ms, here {here:7.3f} ms{'' if is_same else ', DIFFERENT'}")
    print(json.dumps({"start_ms": start_ms, "templates": found}))
    return 0 if all(one["same"] for one in found.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
