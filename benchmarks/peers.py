"""
The two-turn benchmark by ONNX Runtime GenAI itself, by us on it, and by us on OpenVINO.

    recollect convert smollm2 --to onnx-genai INT8
    recollect convert smollm2 --to onnx-genai FP32 --precision fp32
    python benchmarks/peers.py --onnx INT8 --onnx-exact FP32 [--repeats 5] [--save]

Case 1 prefills prompt 1 + response 1 + prompt 2 anew, case 2 appends prompt 2. 2,048 tokens in, 256
out, 256 in, 128 out; greedy, end of sequence forbidden. The ways take turns within a round, and the
first round is discarded; ratios are of the medians and of the quickest, which a busy machine
disturbs least. The library's prefill is timed in fp32 too. Then the truth: the same operations on
the same fp32 folder through both modules, each against one prefill of the same tokens by the
library itself.
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

# First, because it switches off what the libraries below would report.
import recollect  # isort: skip

import numpy as np
import onnxruntime_genai

from harness import Load, parser, report, say
from recollect import og
from recollect.proof.bench import bench_text, cut_to_length, summarize, time_response
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
        exact_model = onnxruntime_genai.Model(str(arguments.onnx_exact))
        rounds, exact_prefills_s = [], []
        for number in range(1 + arguments.repeats):
            rounds.append(_round(ways, ids, number))
            exact_prefills_s.append(_bare_prefill_s(exact_model, ids[:INPUT]))
            say(f"round {number}, bare in fp32: prefill {exact_prefills_s[-1]:.2f} s")
        figures = {
            "of_medians": _figures(rounds[1:], exact_prefills_s[1:], statistics.median),
            "of_the_quickest": _figures(rounds[1:], exact_prefills_s[1:], min),
        }
        details = {
            "onnxruntime_genai": onnxruntime_genai.__version__,
            "precision_of_times": arguments.onnx.name,
            "cores_busy_with_other_things": load.others(),
            "figures": figures,
            "times": _summaries(rounds[1:]),
            "bare_prefill_in_fp32_s": asdict(summarize(exact_prefills_s[1:])),
            "largest_difference_from_a_fresh_prefill": differences,
            "rounds": [_as_dict(each) for each in rounds],
        }
        report("peers", openvino, details, save=arguments.save)
    for kind, values in figures.items():
        say(f"{kind}: {', '.join(f'{name} {value:.2f}' for name, value in values.items())}")
    for name, both in differences.items():
        say(f"{name}: bare {both['bare']:.1e}, ours {both['ours']:.1e}")
    is_right = all(both["ours"] <= EXACT_LIMIT for both in differences.values())
    best = figures["of_the_quickest"]
    is_quick = best["genai_over_bare"] <= MOST_OVERHEAD
    return 0 if is_right and is_quick and best["prefill_speedup"] >= LEAST_PREFILL_RATIO else 1


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


def _bare_prefill_s(model: Any, prompt: Sequence[int]) -> float:
    return _bare_response(_bare_generator(model), prompt, 1)[0]


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


def _summaries(rounds: Sequence[Round]) -> dict[str, dict[str, dict[str, object]]]:
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


def _figures(
    rounds: Sequence[Round], exact_prefills_s: Sequence[float], pick: Callable[[list[float]], float]
) -> dict[str, float]:
    """Return the ratios of one time for each way, which *pick* takes from the rounds."""

    def total_s(way: str) -> float:
        """Return the time of both cases, each picked by itself."""
        return sum(
            pick([each[way][case].first_s + each[way][case].second_s for each in rounds])
            for case in ("without", "reuse")
        )

    def prefill_s(way: str) -> float:
        return pick([case.first_ttft_s for each in rounds for case in each[way].values()])

    return {
        "genai_over_bare": total_s("genai") / total_s("bare"),
        "prefill_speedup": prefill_s("bare") / prefill_s("openvino"),
        "prefill_speedup_over_fp32": pick(list(exact_prefills_s)) / prefill_s("openvino"),
        "total_speedup": total_s("bare") / total_s("openvino"),
    }


def _differences(folder: Path) -> dict[str, dict[str, float]]:
    """Return for each operation how far the next logits are from those of a fresh prefill."""
    theirs = onnxruntime_genai.Model(str(folder))
    model = og.Model(folder, profile="exact")
    tokenizer = og.Tokenizer(model)
    question = '[{"role": "user", "content": "Name three rivers in Europe."}]'
    prompt = tokenizer.encode(tokenizer.apply_chat_template(question))
    more = tokenizer.encode("And the longest of them?")
    end = np.append(more, tokenizer.eos_token_ids[-1])
    found: dict[str, dict[str, float]] = {}
    for name, operate in _OPERATIONS.items():
        found[name] = {}
        for label, module, loaded in (("bare", onnxruntime_genai, theirs), ("ours", og, model)):
            generator = _exact_generator(module, loaded)
            operate(generator, prompt, more, end)
            sequence = generator.get_sequence(0)  # before the logits: asking for them can change it
            logits = generator.get_logits().reshape(-1)
            oracle = _exact_generator(onnxruntime_genai, theirs)
            oracle.append_tokens(sequence)
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
