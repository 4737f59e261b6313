"""The figures in docs/benchmarks.md and in the README are those of the files that they name."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NAMES = ("recollect", "llama-server")
PAGE = (ROOT / "docs" / "benchmarks.md").read_text("utf-8")
README = (ROOT / "README.md").read_text("utf-8")
SERVER = json.loads(
    (
        ROOT / "benchmarks/results/intel-r-xeon-r-processor-2-cores/2026-11-28-server-fast.json"
    ).read_text("utf-8")
)
Result = dict[str, Any]
_ROW = re.compile(
    r"^\| (.+) \| \[[^]]+\]\(\.\./(benchmarks/results/[^)]+\.json)\) \|$", re.MULTILINE
)
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e-\d+)?")


def rows() -> list[tuple[str, str, Path]]:
    """Return what each row of the page says: what was measured, the figure, and the file."""
    found = []
    for cells, file in _ROW.findall(PAGE):
        what, figure = cells.rsplit(" | ", 1)
        found.append((what, figure, ROOT / file))
    return found


def ms(seconds: float) -> float:
    return seconds * 1e3


def of_bench(of: Callable[[Result], list[float]]) -> Callable[[Result], list[float]]:
    return lambda result: of(result["summary"])


def speeds(result: Result) -> list[float]:
    ratios = result["ratios_theirs_over_ours"]
    return [ratios["prefill_PA"], ratios["decode_PA"]]


def distances(name: str) -> Callable[[Result], list[float]]:
    def found(result: Result) -> list[float]:
        of = result["largest_difference_from_a_fresh_prefill"][name]
        return [of["ours"], of["bare"]]

    return found


def first_tokens(*ways: str) -> Callable[[Result], list[float]]:
    return lambda result: [result["ttft_s"][way]["median"] for way in ways]


def of_models(result: Result, what: str) -> list[float]:
    return [model[what] for model in result["models"].values()]


def beyond_passes(*turns: str) -> Callable[[Result], list[float]]:
    return lambda result: [result["agent"]["turns"][turn]["beyond_s"]["median"] for turn in turns]


def of_steps(what: str, factor: float = 1.0) -> Callable[[Result], list[float]]:
    return lambda result: [factor * result["steps"][count][what] for count in ("1", "4", "8")]


def least_ms(result: Result, way: str, rows: str) -> float:
    least: float = result["ways"][way]["minimum_ms"][rows]
    return least


def of_the_page(messages: str) -> Callable[[Result], list[float]]:
    names = ("first_paint_s", "tree_drawn_s", "tree_whole_s", "key_s", "elements")
    return lambda result: [result["messages"][messages][name]["median"] for name in names]


def total(result: Result, what: str) -> int:
    return sum(trace[what] for trace in result["traces"])


def beside_llama_server(result: Result, what: str) -> list[float]:
    ours, theirs = (result[what][name] for name in NAMES)
    return [ours / theirs, ours, theirs]


def of_servers(result: Result, what: str, *, restarted: bool) -> list[float]:
    """Return the sum of a figure over the traces, or that after a restart: ours, and llama-server's."""
    return [
        sum(
            trace[what]
            for trace in result["traces"]
            if trace["server"] == name and (trace["trace"] == "after a restart") is restarted
        )
        for name in NAMES
    ]


def beside_others_that_guess(*cases: str) -> Callable[[Result], list[float]]:
    """Of each case our speed, and the best of the ways of each rival."""

    def found(result: Result) -> list[float]:
        ways = [
            [speeds for way, speeds in result["rivals"].items() if way.startswith(rival)]
            for rival in ("llama-server", "openvino_genai")
        ]
        return [
            speed
            for case in cases
            for speed in (
                result["cases"][case]["guessed_tps"],
                *(max(one.get(case, 0.0) for one in each) for each in ways),
            )
        ]

    return found


def both_ways(result: Result) -> list[float]:
    """Return what each trace computed through the front, and for a client that resends text."""
    return [
        count
        for trace in result["traces"]
        for count in (
            trace["front_awaited_tokens"] + trace["front_ahead_tokens"],
            trace["alone_computed_tokens"],
        )
    ]


FIGURES: dict[tuple[str, str], Callable[[Result], list[float]]] = {
    ("bench-fast", "second turn"): of_bench(
        lambda found: [found[way]["ttft_s"]["median"] for way in ("reuse_second", "without_second")]
    ),
    ("bench-fast", "the same, whole"): of_bench(
        lambda found: [
            *(found[way]["latency_s"]["median"] for way in ("reuse_second", "without_second")),
            100 * found["share_of_ideal"],
        ]
    ),
    ("fork-fast", "fork and rewind"): lambda result: [
        result["result"]["fork_s"]["median"] * 1e6,
        result["result"]["rewind_s"]["median"] * 1e6,
        result["result"]["forward_passes"],
    ],
    ("fork-fast", "100 forks"): lambda result: [result["result"]["fork_blocks"]],
    ("workloads-fast", "five traces"): lambda result: [
        total(result, "computed_tokens"),
        total(result, "recomputed_tokens"),
    ],
    ("batching-fast", "between the passes"): lambda result: [
        result["overhead"]["between_passes_ms"]
    ],
    ("batching-fast", "4 chats at once"): lambda result: [
        result["throughput"]["ratio"],
        result["throughput"]["forward_ratio"],
    ],
    ("batching-fast", "longest wait"): lambda result: [result["gap"]["ratio"]],
    ("step-smollm2-fast", "a step"): of_steps("step_ms"),
    ("step-smollm2-fast", "the inference"): of_steps("inference_ms"),
    ("step-smollm2-fast", "between two"): of_steps("between_ms"),
    ("step-smollm2-fast", "from the end"): of_steps("last_text_ms"),
    ("step-smollm2-fast", "the floor"): of_steps("floor_share", 100),
    ("drafts-smollm2-fast", "speed, in times"): lambda result: [
        case["ratio"] for case in result["cases"].values()
    ],
    ("drafts-smollm2-fast", "the same in percent"): lambda result: [
        100 * case["share_of_bound"] for case in result["cases"].values()
    ],
    ("drafts-smollm2-fast", "tokens per second, ours"): beside_others_that_guess(
        "edited question",
        "regenerated answer",
        "code with a change",
        "JSON of a schema",
        "free text",
    ),
    ("drafts-qwen2.5-coder-1.5b-fast", "qwen2.5-coder-1.5b: speed"): lambda result: [
        case["ratio"] for case in result["cases"].values()
    ],
    ("drafts-qwen2.5-coder-1.5b-fast", "its tokens per second"): beside_others_that_guess(
        "edited question", "regenerated answer", "code with a change", "JSON of a schema"
    ),
    ("eight-rows-fast", "OpenVINO's products"): lambda result: [
        least_ms(result, "as it is", "4"),
        least_ms(result, "as it is", "8"),
        least_ms(result, "f32, whole zero points, inputs quantized by 32", "8"),
    ],
    ("runtime-fast", "prefill and decode"): speeds,
    ("runtime-exact", "the same in `exact`"): speeds,
    ("runtime-small", "the same in `small`"): speeds,
    ("peers-fast", "two turns"): lambda result: [
        result["figures"]["of_medians"]["genai_over_bare"]
    ],
    ("peers-fast", "prefill on OpenVINO"): lambda result: [
        result["figures"]["of_medians"]["prefill_speedup"],
        result["figures"]["of_medians"]["prefill_speedup_over_fp32"],
    ],
    ("peers-fast", "append after"): distances("append after a reply that was cut off"),
    ("peers-fast", "rewind into"): distances("rewind into a reply"),
    ("weights-fast", "a GGUF file's"): lambda result: [
        result["speeds"][what] for what in ("decode 1", "decode 4", "decode 8", "prefill")
    ],
    ("sampling-exact", "choice of a token"): lambda result: [
        result["milliseconds"][ids]["temperature 0.8"]["median"] for ids in ("49152", "151936")
    ],
    ("grammar-fast", "a grammar's mask"): lambda result: [
        result["grammars"]["schema"]["mask_us"]["median"] / 1e3
    ],
    ("first-replies-fast", "forty first"): lambda result: [
        result["long_replies"],
        1200,
        result["ran_away"],
        result["median_tokens"],
    ],
    ("default-model-fast", "the same beside"): lambda result: [
        *of_models(result, "long_replies"),
        *of_models(result, "ran_away"),
    ],
    ("default-model-fast", "six scenarios"): lambda result: of_models(result, "passed"),
    ("default-model-fast", "from nothing"): lambda result: [
        sum(pair)
        for pair in zip(of_models(result, "fetch_s"), of_models(result, "ready_s"), strict=True)
    ],
    ("default-model-fast", "tokens per second"): lambda result: of_models(result, "tokens_per_s"),
    ("starting-smollm2-fast", "`recollect --help`"): lambda result: [
        result["help"]["s"]["median"]
    ],
    ("starting-smollm2-fast", "`recollect chat`"): lambda result: [
        result[prompt]["s"]["median"] for prompt in ("prompt, first", "prompt, later")
    ],
    ("first-byte-fast", "an agent's turn"): beyond_passes("after a restart"),
    ("first-byte-fast", "the two turns"): beyond_passes("second", "third"),
    ("first-byte-fast", "what ten tools"): lambda result: [result["tools"]["added_s"]],
    ("explore-fast", "8 branches"): lambda result: [
        result["decode_ratio"],
        result["whole_ratio"],
    ],
    ("explore-fast", "the same from"): lambda result: [
        result["counts"]["computed_tokens"],
        result["counts"]["most_blocks"],
    ],
    ("events-fast", "50 streams"): lambda result: [
        100 * result["share"],
        result["engine_calls_per_token_watched"],
        result["engine_calls_per_token_alone"],
    ],
    ("scale-fast", "the front's own"): lambda result: [result["front"]["cpu_ms_per_token"]],
    ("scale-fast", "10,000 conversations"): lambda result: [
        100 * result["fleet"][policy]["reused_share"]
        for policy in ("by conversation", "least loaded", "in turn")
    ],
    ("elsewhere-exact", "a conversation with"): both_ways,
    ("traces-vllm-exact", "traces of"): both_ways,
    ("elsewhere-exact", "the fleet's model"): lambda result: [
        100 * result["fleet"]["reused_share"][policy][kind]
        for policy in ("by conversation", "in turn")
        for kind in ("simulated", "real")
    ],
    ("vllm-exact", "reuse on vLLM"): lambda result: [
        result["verify"]["largest"],
        result["verify"]["different_replies"],
        result["verify"]["noise"],
    ],
    ("vllm-exact", "a second key"): lambda result: [
        result["reused_by_key"]["bob"][0],
        result["reused_by_key"]["alice"][1],
    ],
    ("draft-model-qwen2.5-coder-1.5b-fast", "with a smaller model"): lambda result: [
        result[kind]["times"] for kind in ("greedy", "sampled", "document")
    ],
    ("draft-model-qwen2.5-coder-1.5b-fast", "the same with guesses"): lambda result: [
        result[kind]["times_of_said"] for kind in ("greedy", "sampled", "document")
    ],
    ("draft-model-qwen2.5-coder-1.5b-fast", "first token in seconds"): lambda result: [
        result[kind]["first_token_s"][way]
        for kind in ("greedy", "document")
        for way in ("model", "plain")
    ],
    ("draft-model-qwen2.5-coder-1.5b-fast", "guesses of the smaller"): lambda result: [
        result["greedy"][what] for what in ("right", "fed", "tokens")
    ],
    ("draft-model-qwen2.5-coder-1.5b-fast", "the smaller model's"): lambda result: [
        result["small_memory_bytes"] / 1e9
    ],
    ("restart-smollm2-4000-fast", "next turn"): first_tokens("disk", "memory", "cold"),
    ("restart-smollm2-4000-fast", "the same the moment"): first_tokens("at once"),
    ("restart-smollm2-4000-fast", "20 branches"): lambda result: [
        result["branches"]["extra_blocks"],
        result["branches"]["before"]["blocks"],
    ],
    ("restart-smollm2-4000-fast", "`import recollect`"): lambda result: [
        result["start_s"][kind]["median"] for kind in ("import", "version", "help")
    ],
    ("restart-qwen2.5-coder-1.5b-2000-fast", "next turn"): first_tokens("disk", "memory", "cold"),
    ("graphics-card", "logits of a small model"): lambda result: [
        result["truth"][f"{profile} on CUDA, largest difference from numpy"]
        for profile in ("exact", "fast", "small")
    ],
    ("graphics-card", "first token behind"): lambda result: [
        result["restart"][way]["first token, ms"] for way in ("disk", "memory", "cold")
    ],
    ("web-reference", "2,000 messages"): of_the_page("2000"),
    ("web-reference", "10,000 messages"): of_the_page("10000"),
    ("web-reference", "the page's files"): lambda result: [result["bytes"]],
    ("server-llama-no-draft-fast", "without guesses"): lambda result: [
        beside_llama_server(result, "decode_per_second")[0],
        beside_llama_server(result, "tokens_per_second")[0],
        *beside_llama_server(result, "decode_per_second")[1:],
        *beside_llama_server(result, "tokens_per_second")[1:],
    ],
    ("server-llama-no-draft-fast", "the same five traces"): lambda result: [
        *of_servers(result, "computed_tokens", restarted=False),
        *of_servers(result, "ttft_s", restarted=False),
    ],
    ("server-llama-no-draft-fast", "after a restart"): lambda result: [
        of_servers(result, what, restarted=True)[place]
        for place in (0, 1)
        for what in ("computed_tokens", "ttft_s")
    ],
    ("fork-llama-fast", "fork and rewind"): lambda result: [
        result["result"]["fork_s"]["median"] * 1e6,
        result["result"]["rewind_s"]["median"] * 1e6,
        result["result"]["forward_passes"],
        result["result"]["fork_blocks"],
    ],
    ("restart-llama-smollm2-4000-fast", "next turn"): first_tokens("disk", "memory", "cold"),
    ("workloads-llama-fast", "the five traces of"): lambda result: [
        total(result, "computed_tokens"),
        total(result, "prompt_tokens"),
        total(result, "recomputed_tokens"),
    ],
}  # fmt: skip
"""Of each row, by the end of its file's name and its first words, how its numbers come out of the file."""


def agrees(shown: str, value: float) -> bool:
    """Return whether a number is a value rounded to the places that it shows."""
    plain = shown.replace(",", "")
    if "e" in plain:
        return float(f"{value:.0e}") == float(plain)
    places = len(plain.partition(".")[2])
    return round(value, places) == float(plain) or f"{value:.{places}f}" == plain


@pytest.mark.parametrize(("what", "figure", "path"), rows(), ids=lambda each: str(each)[:40])
def test_a_figure_is_that_of_its_file(what: str, figure: str, path: Path) -> None:
    result = json.loads(path.read_text("utf-8"))
    (values,) = [
        of(result)
        for (name, words), of in FIGURES.items()
        if re.fullmatch(rf"\d{{4}}-\d\d-\d\d-{re.escape(name)}", path.stem)
        and what.startswith(words)
    ]
    shown = _NUMBER.findall(figure.replace("GenAI 0.18.0", "GenAI"))
    assert len(shown) == len(values)
    for number, value in zip(shown, values, strict=True):
        assert agrees(number, value), (number, value)


def test_every_figure_that_can_be_computed_is_shown() -> None:
    assert len(rows()) == len(FIGURES)


def test_every_kept_result_is_on_the_page() -> None:
    kept = {path.relative_to(ROOT) for path in (ROOT / "benchmarks/results").rglob("*.json")}
    shown = {
        Path(found) for found in re.findall(r"\(\.\./(benchmarks/results/[^)]+\.json)\)", PAGE)
    }
    assert kept - shown == set(), (
        "give each a row in docs/benchmarks.md, and its figures in FIGURES"
    )


def test_the_lengths_of_the_traces_are_those_of_the_file() -> None:
    (what,) = [what for what, _, _ in rows() if what.startswith("five traces")]
    path = next(path for each, _, path in rows() if each == what)
    result = json.loads(path.read_text("utf-8"))
    assert what == (
        f"five traces, {total(result, 'requests')} requests, "
        f"{total(result, 'prompt_tokens'):,} prompt tokens"
    )


TRACES = {
    "next turn after a restart": "after a restart",
    "8 chats at once on one system prompt": "8 on one system prompt",
    "an agent that forks 16 ways": "agent, 16 forks",
    "a chat of 20 turns": "long chat",
    "regenerate, edit and undo": "regenerate and edit",
    "12 conversations in random order": "12 interleaved",
    "all of these": None,
}
"""What a row is called, and what its trace is called in the file; None: all together."""


def measured(trace: str | None, server: str) -> tuple[float, float]:
    """Return the tokens computed and the seconds to all first tokens."""
    of = [
        found
        for found in SERVER["traces"]
        if found["server"] == server and trace in {None, found["trace"]}
    ]
    # One round; of several, the median would be shown.
    assert len(of) == (1 if trace else len({found["trace"] for found in SERVER["traces"]}))
    return (
        sum(found["computed_tokens"] for found in of),
        sum(found["ttft_s"] for found in of),
    )


def tokens(value: float) -> str:
    return f"{value + 1e-9:,.0f}"


def seconds(value: float) -> str:
    return (
        f"{value:.2f} s"
        if value < 0.995
        else f"{value:.1f} s"
        if value < 9.95
        else f"{value:.0f} s"
    )


@pytest.mark.parametrize(("row", "trace"), TRACES.items())
def test_the_figures_beside_llama_servers_are_those_of_the_file(
    row: str, trace: str | None
) -> None:
    both = [measured(trace, name) for name in NAMES]
    (found,) = re.findall(
        rf"^\| {row}[^|\n]*: tokens computed \| (.+) \| (.+) \|\n\| [^|\n]+ \| (.+) \| (.+) \|$",
        PAGE,
        re.MULTILINE,
    )
    assert found == (
        tokens(both[0][0]),
        tokens(both[1][0]),
        seconds(both[0][1]),
        seconds(both[1][1]),
    )


def test_what_else_is_said_of_the_two_servers_is_in_the_file() -> None:
    speed = SERVER["tokens_per_second"]
    ours, theirs = (f"{speed[name]:.0f}" for name in NAMES)
    assert f"| 4 clients at once: tokens per second | {ours} | {theirs} |" in PAGE
    ours, theirs = (f"{SERVER['decode_per_second'][name]:.0f}" for name in NAMES)
    assert f"came with {ours} tokens per second of ours" in PAGE
    assert f"and {theirs} of llama-server's" in PAGE
    added = ms(SERVER["first_text_s"]["added"])
    assert f"| what HTTP adds to the first token | {added:.0f} ms | |" in PAGE


def test_the_numbers_of_the_readme_are_those_of_the_file() -> None:
    """Its three rows, and the two cases in which both cost the same."""
    for row, trace in list(TRACES.items())[:3]:
        (ours, ours_s), (theirs, theirs_s) = [measured(trace, name) for name in NAMES]
        cells = f"{tokens(ours)}, {seconds(ours_s)} | {tokens(theirs)}, {seconds(theirs_s)} |"
        (line,) = [line for line in README.splitlines() if line.startswith(f"| {row}")]
        assert line.endswith(f"| {cells}")
    for trace in ("long chat", "regenerate and edit"):
        counts = [tokens(measured(trace, name)[0]) for name in NAMES]
        assert f"({counts[0]} and {counts[1]})" in README


def test_what_the_readme_says_of_new_text_is_in_a_file() -> None:
    (path,) = (ROOT / "benchmarks/results").rglob("*-drafts-smollm2-fast.json")
    ours, theirs, _ = beside_others_that_guess("free text")(json.loads(path.read_text("utf-8")))
    assert f"({theirs:.0f} tokens per second, ours {ours:.0f})" in README.replace(
        "SmolLM2-135M: ", ""
    )


def test_the_machine_of_the_readme_is_that_of_the_file() -> None:
    machine = SERVER["machine"]
    assert machine["cpu"] == "Intel(R) Xeon(R) Processor"
    assert f"{machine['physical_cores']} cores of an Intel Xeon with AMX" in README
    assert (machine["model"], machine["profile"]) == ("smollm2", "fast")
    assert "amx_bf16" in machine["cpu_features"]
    assert "with SmolLM2-135M" in README
