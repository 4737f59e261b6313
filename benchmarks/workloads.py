"""
Seeded traces of conversations: what is computed, and whether anything is computed twice.

    python benchmarks/workloads.py [--model smollm2|reference] [--runtime R] [--save]

The traces and the count are `benchmarks/traces.py`; see there. `--model reference` takes two
seconds and counts the same things without weights.
"""

from dataclasses import asdict

import recollect
from harness import Load, parser, report, say
from traces import TRACES, run_trace


def main() -> None:
    options = parser(
        "Seeded traces: computed, reused and recomputed tokens.", profile="fast", runtimes=True
    )
    options.add_argument("--seed", type=int, default=0)
    args = options.parse_args()
    load = Load()
    with recollect.load(args.model, profile=args.profile, runtime=args.runtime, kv_disk=0) as model:
        say(
            f"{'trace':24} {'requests':>8} {'prompts':>8} {'computed':>8} {'twice':>6} {'ttft s':>8}"
        )
        results = []
        for trace in TRACES:
            result = run_trace(model, trace, seed=args.seed)
            model.engine.check()
            results.append(asdict(result))
            say(
                f"{result.name:24} {result.requests:8} {result.prompt_tokens:8,} "
                f"{result.computed_tokens:8,} {result.recomputed_tokens:6} {result.ttft_s:8.2f}"
            )
        evicted = model.engine.cache.evicted_blocks
        counted: dict[str, object] = {
            "traces": results,
            "evicted_blocks": evicted,
            "others_load": load.others(),
        }
        name = "workloads-llama" if args.runtime == "llama" else "workloads"
        report(name, model, counted, save=args.save)


if __name__ == "__main__":
    main()
