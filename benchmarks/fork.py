"""
What forks and rewinds cost, in time, in forward passes and in blocks.

    python benchmarks/fork.py [--model M] [--profile P] [--runtime R] [--save]
"""

import sys

import recollect
from forking import measure_forks
from harness import parser, report, say
from recollect.proof.bench import bench_text, cut_to_length

MOST_SECONDS = 0.001
TRUNK_BLOCKS = 2048 // 32


def main() -> int:
    """Run, print, and return 1 where something costs more than it may."""
    arguments = parser(__doc__ or "", profile="fast", runtimes=True).parse_args()
    with recollect.load(
        arguments.model, profile=arguments.profile, runtime=arguments.runtime, kv_disk=0
    ) as model:
        say("prefilling 8,000 tokens ...")
        result = measure_forks(model, cut_to_length(model, bench_text(), 8000))
        name = "fork-llama" if arguments.runtime == "llama" else "fork"
        report(name, model, {"result": result.to_dict()}, save=arguments.save)
    most_blocks = TRUNK_BLOCKS + result.fork_count
    say(
        f"fork {result.fork_s.median * 1e6:.0f} us (slowest {result.fork_s.maximum * 1e6:.0f}), "
        f"rewind {result.rewind_s.median * 1e6:.0f} us (slowest "
        f"{result.rewind_s.maximum * 1e6:.0f}), forward passes {result.forward_passes}, "
        f"blocks {result.fork_blocks} of at most {most_blocks}"
    )
    holds = (
        max(result.fork_s.median, result.rewind_s.median) < MOST_SECONDS
        and result.forward_passes == 0
        and result.fork_blocks <= most_blocks
    )
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
