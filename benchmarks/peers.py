"""
The two-turn benchmark by ONNX Runtime GenAI itself, by us on it, and by us on OpenVINO.

    recollect convert smollm2 --to onnx-genai INT8
    recollect convert smollm2 --to onnx-genai FP32 --precision fp32
    python benchmarks/peers.py --onnx INT8 --onnx-exact FP32 [--repeats 5] [--save]

Case 1 prefills prompt 1 + response 1 + prompt 2 anew, case 2 appends prompt 2. 2,048 tokens in, 256
out, 256 in, 128 out; greedy, end of sequence forbidden. The ways take turns within a round, and the
first round is discarded. Then the truth: the same operations on the same fp32 folder through both
modules, each against one prefill of the same tokens by the library itself.
"""

import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import onnxruntime_genai

import recollect
from harness import Load, parser, report, say
from recollect import og
from recollect.proof.bench import bench_text, cut_to_length
from recollect.proof.statistics import summarize
from recollect.proof.timing import time_response
from recollect.proof.verify import EXACT_LIMIT

INPUT, OUTPUT, INPUT2, OUTPUT2 = 2048, 256, 256, 128
LENGTH = INPUT + OUTPUT + INPUT2 + OUTPUT2
MOST_OVERHEAD = 1.05
LEAST_PREFILL_RATIO = 3.0


@dataclass(frozen=True)
class Case:
    """Both responses of one case, in seconds."""

    first_ttft_s: float
    first_s: float
    second_ttft_s: float
    second_s: float


Round = dict[str, dict[str, Case]]
"""By way, then by case."""
Way = Callable[[Sequence[int], Sequence[int], bool], Case]


def main() -> int:
    """Run, print what came out, and return 1 where it is less than what is wanted."""
    options = parser(__doc__ or "", profile="fast")
    options.add_argument("--onnx", type=Path, required=True, help="int8 folder, for the times")
    options.add_argument(
        "--onnx-exact", type=Path, required=True, help="fp32 folder, for the truth"
    )
    options.add_argument("--repeats", type=int, default=5, help="rounds that count")
    arguments = options.parse_args()
    differences = _differences(arguments.onnx_exact)
    bare_model = onnxruntime_genai.Model(str(arguments.onnx))
    with (
        recollect.load(arguments.model, profile=arguments.profile) as openvino,
        recollect.load(arguments.onnx) as genai,
    ):
        ids = cut_to_length(openvino, bench_text(), INPUT + INPUT2)
        ways: dict[str, Way] = {
            "bare": partial(bare, bare_model),
            "genai": partial(ours, genai),
            "openvino": partial(ours, openvino),
        }
        load = Load()
        rounds = [_round(ways, ids, number) for number in range(1 + arguments.repeats)]
        figures = _figures(rounds[1:])
        details = {
            "onnxruntime_genai": onnxruntime_genai.__version__,
            "precision_of_times": arguments.onnx.name,
            "cores_busy_with_other_things": load.others(),
            "figures": figures,
            "medians": _medians(rounds[1:]),
            "largest_difference_from_a_fresh_prefill": differences,
            "rounds": [_as_dict(each) for each in rounds],
        }
        report("peers", openvino, details, save=arguments.save)
    for name, value in figures.items():
        say(f"{name}: {value:.3f}")
    for name, both in differences.items():
        say(f"{name}: bare {both['bare']:.1e}, ours {both['ours']:.1e}")
    is_right = all(both["ours"] <= EXACT_LIMIT for both in differences.values())
    is_quick = figures["genai_over_bare"] <= MOST_OVERHEAD
    return 0 if is_right and is_quick and figures["prefill_speedup"] >= LEAST_PREFILL_RATIO else 1


def bare(model: Any, prompt: Sequence[int], prompt2: Sequence[int], reuse: bool) -> Case:
    """Run one case with the library itself, as its own examples do."""
    generator = _bare_generator(model)
    first = _bare_response(generator, prompt, OUTPUT)
    new: Sequence[int] = prompt2
    if not reuse:
        new = [*generator.get_sequence(0).tolist(), *prompt2]
        generator = _bare_generator(model)
    second = _bare_response(generator, new, OUTPUT2)
    return Case(*first, *second)


def _bare_generator(model: Any) -> Any:
    params = onnxruntime_genai.GeneratorParams(model)
    params.set_search_options(max_length=LENGTH, min_length=LENGTH)  # no end of sequence before it
    return onnxruntime_genai.Generator(model, params)


def _bare_response(generator: Any, new: Sequence[int], tokens: int) -> tuple[float, float]:
    """Return the time to the first token and to the last."""
    begun = perf_counter()
    generator.append_tokens(np.array(new, np.int32))
    generator.generate_next_token()
    first = perf_counter()
    for _ in range(tokens - 1):
        generator.generate_next_token()
    return first - begun, perf_counter() - begun


def ours(
    model: recollect.Model, prompt: Sequence[int], prompt2: Sequence[int], reuse: bool
) -> Case:
    """Run one case with our engine, in sequences that share nothing."""
    with closing(recollect.Generator(model.engine, namespace=None)) as generator:
        first = time_response(generator, prompt, OUTPUT)
        if reuse:
            second = time_response(generator, prompt2, OUTPUT2)
            assert second.computed_tokens == INPUT2 + 1, "only what is new, and the last token"
            return Case(first.ttft_s, first.latency_s, second.ttft_s, second.latency_s)
        history = generator.get_sequence()
    with closing(recollect.Generator(model.engine, namespace=None)) as generator:
        second = time_response(generator, [*history, *prompt2], OUTPUT2)
    return Case(first.ttft_s, first.latency_s, second.ttft_s, second.latency_s)


def _round(ways: dict[str, Way], ids: Sequence[int], number: int) -> Round:
    """Run both cases in every way, in an order that turns from round to round."""
    names = list(ways)
    first = number % len(names)
    done: Round = {}
    for name in names[first:] + names[:first]:
        cases = {
            case: ways[name](ids[:INPUT], ids[INPUT:], case == "reuse")
            for case in ("without", "reuse")
        }
        done[name] = cases
        second = {case: f"{found.second_s:.2f} s" for case, found in cases.items()}
        say(f"round {number}, {name}: prefill {cases['without'].first_ttft_s:.2f} s, {second}")
    return done


def _medians(rounds: Sequence[Round]) -> dict[str, dict[str, dict[str, object]]]:
    return {
        name: {
            case: {
                field: asdict(summarize([getattr(each[name][case], field) for each in rounds]))
                for field in Case.__dataclass_fields__
            }
            for case in cases
        }
        for name, cases in rounds[0].items()
    }


def _figures(rounds: Sequence[Round]) -> dict[str, float]:
    """Return what is promised: medians over the rounds of ratios within each."""

    def total_s(cases: dict[str, Case]) -> float:
        return sum(case.first_s + case.second_s for case in cases.values())

    def prefill_s(cases: dict[str, Case]) -> float:
        return sum(case.first_ttft_s for case in cases.values())

    def median(ratio: Callable[[Round], float]) -> float:
        return statistics.median([ratio(each) for each in rounds])

    return {
        "genai_over_bare": median(lambda each: total_s(each["genai"]) / total_s(each["bare"])),
        "prefill_speedup": median(
            lambda each: prefill_s(each["bare"]) / prefill_s(each["openvino"])
        ),
        "total_speedup": median(lambda each: total_s(each["bare"]) / total_s(each["openvino"])),
    }


def _differences(folder: Path) -> dict[str, dict[str, float]]:
    """Return for each operation how far the next logits are from those of a fresh prefill."""
    theirs = onnxruntime_genai.Model(str(folder))
    model = og.Model(folder, profile="exact")
    tokenizer = og.Tokenizer(model)
    prompt = tokenizer.encode("<|im_start|>user\nName three rivers in Europe.<|im_end|>\n")
    more = tokenizer.encode("And the longest of them?")
    end = np.append(more, tokenizer.eos_token_ids[-1])
    found: dict[str, dict[str, float]] = {}
    for name, operate in _OPERATIONS.items():
        found[name] = {}
        for label, module, loaded in (("bare", onnxruntime_genai, theirs), ("ours", og, model)):
            generator = _exact_generator(module, loaded)
            operate(generator, prompt, more, end)
            logits = generator.get_logits().reshape(-1)
            oracle = _exact_generator(onnxruntime_genai, theirs)
            oracle.append_tokens(generator.get_sequence(0))
            fresh = oracle.get_output("logits")[0, -1]
            found[name][label] = float(np.abs(logits - fresh).max())
    model.close()
    return found


def _exact_generator(module: Any, model: Any) -> Any:
    params = module.GeneratorParams(model)
    params.set_search_options(max_length=512, min_length=512)
    return module.Generator(model, params)


def _append(generator: Any, prompt: Any, more: Any, _end: Any) -> None:
    generator.append_tokens(prompt)
    generator.append_tokens(more)


def _cut(generator: Any, prompt: Any, more: Any, _end: Any) -> None:
    generator.append_tokens(prompt)
    for _ in range(5):
        generator.generate_next_token()
    generator.append_tokens(more)


def _rewind(generator: Any, prompt: Any, _more: Any, _end: Any) -> None:
    generator.append_tokens(prompt)
    for _ in range(5):
        generator.generate_next_token()
    generator.rewind_to(len(prompt) + 2)


def _rewind_and_append(generator: Any, prompt: Any, more: Any, _end: Any) -> None:
    _rewind(generator, prompt, more, _end)
    generator.append_tokens(more)


def _end_of_turn(generator: Any, prompt: Any, _more: Any, end: Any) -> None:
    generator.append_tokens(prompt)
    generator.append_tokens(end)


_OPERATIONS: dict[str, Callable[[Any, Any, Any, Any], None]] = {
    "append twice": _append,
    "append after a reply that was cut off": _cut,
    "rewind into a reply": _rewind,
    "rewind into a reply and append": _rewind_and_append,
    "append a text that ends a turn": _end_of_turn,
}


def _as_dict(done: Round) -> dict[str, dict[str, dict[str, float]]]:
    return {
        name: {case: asdict(found) for case, found in cases.items()} for name, cases in done.items()
    }


if __name__ == "__main__":
    sys.exit(main())
