"""
`recollect bench`: what reuse saves on this machine.

Prints and writes what `proof/bench.py` and `proof/growth.py` measure.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from recollect.cli.options import (
    AllowNativeCodeOption,
    KvMemoryOption,
    LongContextOption,
    ModelOption,
    OfflineOption,
    ProfileOption,
    ProofKvDiskOption,
    open_model,
)

if TYPE_CHECKING:
    from recollect.conversation.model import Model
    from recollect.proof.bench import BenchConfig


def _option(*names: str, about: str, default: str | bool = True) -> Any:
    return typer.Option(*names, help=about, show_default=default)


def bench(
    *,
    model: ModelOption = "smollm2",
    profile: ProfileOption = "fast",
    kv_memory: KvMemoryOption = None,
    kv_disk: ProofKvDiskOption = "0",
    offline: OfflineOption = False,
    allow_native_code: AllowNativeCodeOption = None,
    long_context: LongContextOption = False,
    input_tokens: Annotated[int, _option("--input", about="Tokens of prompt 1.")] = 2048,
    output_tokens: Annotated[int, _option("--output", about="Tokens of response 1.")] = 256,
    input2_tokens: Annotated[int, _option("--input2", about="Tokens of prompt 2.")] = 256,
    output2_tokens: Annotated[int, _option("--output2", about="Tokens of response 2.")] = 128,
    iterations: Annotated[int, _option(about="The first is a warm-up and is discarded.")] = 10,
    turns: Annotated[int, _option(about="Turns of the growth curve; 0 leaves it out.")] = 12,
    text_file: Annotated[
        Path | None,
        _option("--text", about="Prompts are cut from it.", default="one in the package"),
    ] = None,
    json_file: Annotated[Path | None, _option("--json", about="Write all samples there.")] = None,
    plot_file: Annotated[
        Path | None, _option("--plot", about="Draw the growth curve there (.png, .svg, .pdf).")
    ] = None,
) -> None:
    """Measure the second turn of a conversation with and without reuse, and turns as they grow."""
    from recollect.proof.bench import BenchConfig, bench_text, check_room  # noqa: PLC0415 - see above
    from recollect.proof.report import require_plot, require_writable  # noqa: PLC0415

    config = BenchConfig(
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        input2_tokens=input2_tokens,
        output2_tokens=output2_tokens,
        iterations=iterations,
        growth_turns=turns,
    )
    text = bench_text(text_file)
    if json_file is not None:
        require_writable(json_file)
    if plot_file is not None:
        require_plot(plot_file)
    with open_model(
        model,
        profile=profile,
        kv_memory=kv_memory,
        kv_disk=kv_disk,
        allow_native_code=allow_native_code,
        long_context=long_context,
        offline=offline,
    ) as loaded:
        check_room(loaded, config)
        _run(loaded, config, text, json_file=json_file, plot_file=plot_file)


def _run(
    model: "Model",
    config: "BenchConfig",
    text: str,
    *,
    json_file: Path | None,
    plot_file: Path | None,
) -> None:
    from recollect.proof import report  # noqa: PLC0415 - see above
    from recollect.proof.bench import (  # noqa: PLC0415  # noqa: PLC0415  # noqa: PLC0415
        Unreadable,
        open_meter,
        run_growth,
        run_iterations,
        summarize_growth,
        summarize_iterations,
    )
    from recollect.proof.report import draw_growth, machine_card  # noqa: PLC0415

    console = Console(highlight=False)
    card = machine_card(model)
    opened = open_meter()
    unreadable = opened if isinstance(opened, Unreadable) else None
    meter = None if isinstance(opened, Unreadable) else opened
    console.print("\n".join(report.card_lines(card)), markup=False, soft_wrap=True)
    console.print()

    iterations = run_iterations(model, config, text, meter=meter, progress=_say)
    summary = summarize_iterations(iterations)
    console.print(report.responses_table(summary))
    lines = report.saving_lines(summary, iterations) + report.energy_lines(summary, unreadable)
    console.print("\n".join(lines), markup=False, soft_wrap=True)
    samples = run_growth(model, config, text, meter=meter, progress=_say)
    growth = summarize_growth(samples)
    if growth:
        console.print()
        console.print(report.growth_table(growth))
    if json_file is not None:
        report.write_json(
            json_file,
            machine=card,
            config=config,
            summary=summary,
            growth=growth,
            iterations=iterations,
            growth_samples=samples,
            energy_unreadable=None if unreadable is None else unreadable.reason,
        )
    if plot_file is not None:
        draw_growth(growth, card, plot_file)


def _say(what: str, done: int, total: int | None) -> None:
    """Write a line of progress to stderr: the work takes minutes."""
    typer.echo(f"{what} {done + 1} of {total} ...", err=True)
