"""
`recollect verify`, `bench`, `scenarios` and `rewind-test`: what `proof/` finds, for people.

Prints the verdicts and the numbers and writes them as JSON; the checks themselves are in `proof/`.
"""

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.markup import escape

from recollect import config
from recollect.cli.display import count, progress_bar
from recollect.cli.options import JsonFileOption, ModelOption, ModelOptions, takes_model_options
from recollect.cli.prove_elsewhere import prove_elsewhere, rounding_lines
from recollect.conversation.model import Model
from recollect.errors import ConfigError
from recollect.models.catalog import DEFAULT_MODEL
from recollect.models.listing import Compared, stamps_of
from recollect.proof import report as output
from recollect.proof import verify as proof
from recollect.proof.bench import (
    BenchConfig,
    Unreadable,
    bench_text,
    check_room,
    meter_of,
    run_growth,
    run_iterations,
    summarize_growth,
    summarize_iterations,
)
from recollect.proof.elsewhere import rounding_explains
from recollect.proof.scenarios import (
    GradedReply,
    ScenarioResult,
    Turn,
    load_scenarios,
    play_all,
    run_rewind_test,
)
from recollect.proof.verify import FileReport, VerifyReport, compare_with_file

FAST: Final = ModelOptions(kv_disk="0")
"""Without a cache on disk, which would hide what is computed."""
EXACT: Final = ModelOptions(profile="exact", kv_disk="0")

app = typer.Typer()


@app.command()
@takes_model_options
def verify(
    model: ModelOption = DEFAULT_MODEL,
    loading: ModelOptions = EXACT,
    operations: Annotated[
        int,
        typer.Option(
            "--operations", "-n", metavar="N", min=1, help="How many operations on conversations."
        ),
    ] = 200,
    seed: Annotated[
        int, typer.Option(metavar="N", help="The same seed gives the same operations.")
    ] = 0,
    json_file: JsonFileOption = None,
    long: Annotated[
        bool,
        typer.Option(
            "--long", help="Check windows and the end of the context even if that takes long."
        ),
    ] = False,
    against_file: Annotated[
        bool,
        typer.Option(
            "--model-check/--no-model", help="Compare the model with its file, or do not."
        ),
    ] = True,
) -> None:
    """
    Check a model against its file, and reused KV against computed KV.

    First, its logits are compared with those that a second program computes from the file alone. Then
    random conversations are held, and each state is compared with a fresh prefill of the same tokens;
    with --kv-disk, KV is also evicted from memory and restored from disk.

    Takes about two minutes with the default model on two idle cores, and longer with larger ones; -n 20
    is a quick look. With --engine, replies of the engine with reuse are compared with replies without it. The
    exit status is 1 where either part fails. A model that the second program does not
    know is NOT COMPARED, which is no failure and no proof.
    """
    if json_file is not None:
        output.require_writable(json_file)
    with loading.load(model) as loaded:
        if loading.engine is not None:
            prove_elsewhere(loaded, operations, seed, json_file)
        compared = compare(loaded) if against_file else None
        for line in [] if compared is None else file_lines(loaded.name, loaded.profile, compared):
            typer.echo(line)
        try:
            typer.echo(f"Checking reuse with {count(operations, 'operation')} ...", err=True)
            with progress_bar("Checking reuse") as progress:
                report = proof.verify(
                    loaded,
                    operations=operations,
                    seed=seed,
                    boundary_s=math.inf if long else proof.BOUNDARY_S,
                    progress=lambda done, worst: progress(
                        f"largest difference {worst:.1e}", done, operations
                    ),
                )
        except BaseException:
            with suppress(ConfigError):  # why the rest was cut off matters more
                _write_verdict(json_file, loaded, compared, None)
            raise
        typer.echo("\n".join([*_lines(report), _verdict(compared, report)]))
        _write_verdict(json_file, loaded, compared, report)
    if _passed(compared, report) is False:
        raise typer.Exit(1)


def _passed(compared: FileReport | None, report: VerifyReport | None) -> bool | None:
    """Return the verdict on both parts; None: nothing failed, and the model could not be compared."""
    if report is None or not report.passed or (compared is not None and compared.outcome == "FAIL"):
        return False
    return None if compared is not None and compared.outcome == "NOT COMPARED" else True


def _verdict(compared: FileReport | None, report: VerifyReport) -> str:
    """Return the last line: the verdict on both parts, then that of each."""
    whole = {True: "PASS", False: "FAIL", None: "NOT COMPARED"}[_passed(compared, report)]
    model = "left out" if compared is None else compared.outcome
    reuse = "PASS" if report.passed else "FAIL"
    return f"{whole}  (model against its file: {model}; reuse: {reuse})"


def _write_verdict(
    path: Path | None, model: Model, compared: FileReport | None, report: VerifyReport | None
) -> None:
    """Write what is known of both parts as JSON; numbers that are not finite are null."""
    if path is None:
        return
    result = {
        "model": model.name,
        "profile": model.profile,
        "passed": _passed(compared, report),
        "file": None if compared is None else compared.to_dict(),
        "reuse": None if report is None else report.to_dict(),
    }
    plain = json.loads(json.dumps(result), parse_constant=lambda _: None)
    with output.written_to(path):
        path.write_text(json.dumps(plain, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def compare(loaded: Model) -> FileReport:
    """Compare a loaded model with its file, and note the outcome for `recollect models`."""
    # Before, of what was loaded; a GGUF file that runs as it is has the digest of its bytes.
    local, stamps = loaded.local, {}
    if local.folder is not None and local.format != "gguf":
        stamps = stamps_of(local.folder)
    with progress_bar("Comparing with the file") as progress:
        report = compare_with_file(
            loaded, progress=lambda done, of: progress(f"layer {done} of {of}", done, of)
        )
    if report.outcome != "NOT COMPARED":
        noted = Compared(
            outcome=report.outcome,
            profile=loaded.profile,
            largest=report.largest if math.isfinite(report.largest) else None,
            reason=report.reason,
            files=stamps,
        )
        try:
            noted.write(config.home(), local.fingerprint)
        except OSError as cause:
            typer.echo(f"The outcome could not be noted ({cause.strerror or cause}).", err=True)
    return report


def file_lines(name: str, profile: str, report: FileReport) -> list[str]:
    """Return what a person reads of the first part, its verdict last."""
    verdict = f"Model against its file: {report.outcome}" + f": {report.reason}" * bool(
        report.reason
    )
    if report.outcome == "NOT COMPARED":
        return [f"{name} · against its file", verdict, ""]
    types = " · ".join(f"{kind} {number:,}" for kind, number in (report.tensor_types or {}).items())
    measured = [
        f"  largest difference  {report.largest:.1e}  ({report.places} places of "
        f"{report.tokens} tokens, every logit)",
        f"  limit               {report.limit:.1e}  (logits deviate by {report.deviation:.3g}; "
        f"rounding alone moves one by {report.noise:.1e})",
        f"  likeliest token     the same in {report.agreement:.1%}",
        f"  perplexity          {report.perplexity:.6g}  (by the file {report.reference_perplexity:.6g})",
    ]
    return [
        f"{name} · {profile} · against {report.file} ({report.architecture})",
        f"  weights             {types}",
        *(measured if report.limit else []),
        verdict,
        "",
    ]


def _lines(report: VerifyReport) -> list[str]:
    """Return what a person reads of the second part: what was done, what came out, its verdict."""
    counts = " · ".join(f"{name} {times}" for name, times in report.counts.items())
    largest = report.largest
    where = f"operation {largest.operation}, {largest.name}, {count(largest.tokens, 'token')}"
    return [
        f"{report.model} · {report.profile} · {count(report.operations, 'operation')} · seed {report.seed}",
        f"  {counts}",
        f"  largest difference  {largest.logits:.1e}  ({where if largest.name else 'no operation differed'})",
        *(
            f"  around {found.tokens:>8,}     "
            + (f"{found.difference:.1e}" if found.difference is not None else found.left_out)
            for found in report.boundaries
        ),
        f"  noise control       {report.noise:.1e}  (token by token against one prefill)",
        f"  limit               {report.limit:.1e}",
        f"Reuse: {'PASS' if report.passed else 'FAIL'}",
    ]


_FLIPS: Final = "outside the profile exact, decode rounds otherwise than prefill, so near-ties flip"


@app.command("rewind-test")
@takes_model_options
def rewind_test(
    model: ModelOption = DEFAULT_MODEL,
    loading: ModelOptions = EXACT,
) -> None:
    """
    Check that a rewound conversation answers as it did before.

    Asks three questions, rewinds to after the first answer, and asks the second one again. With --engine,
    another answer passes only where rounding explains it: both tokens are about as likely where it parts from
    the first.
    """
    with loading.load(model) as loaded:
        result = run_rewind_test(loaded)
        is_elsewhere = loading.engine is not None
        is_rounding = is_elsewhere and rounding_explains(loaded, result)
    typer.echo(
        f"rewound {result.history_tokens} to {result.length} tokens "
        f"({result.rewind_computed_tokens} computed), asked again "
        f"({result.again_computed_tokens} computed), {len(result.answer)} tokens of answer"
    )
    found = output.rewind_lines(result)
    if is_elsewhere:
        is_right = is_rounding
        found += rounding_lines(result, is_rounding=is_rounding)
    else:
        differs = result.fresh_differs_at is not None
        is_right = result.rewind_differs_at is None and (not differs or loading.profile != "exact")
        found += [_FLIPS] * differs
    typer.echo("".join(f"{line}\n" for line in found), nl=False)
    if is_right:
        typer.echo("rewind test OK")
        return
    typer.echo("rewind test FAILED")
    raise typer.Exit(1)


@app.command()
@takes_model_options
def scenarios(
    model: ModelOption = DEFAULT_MODEL,
    loading: ModelOptions = FAST,
    json_file: JsonFileOption = None,
) -> None:
    """Play six conversations with reuse, without it, and rewound."""
    if json_file is not None:
        output.require_writable(json_file)
    console = Console(highlight=False)
    with loading.load(model) as loaded:
        card = output.machine_card(loaded)
        console.print(f"[dim]{escape(card.title)}[/]")
        results = []
        for result in play_all(loaded, load_scenarios()):
            results.append(result)
            _print_scenario(console, result)
    profile = None if loading.engine is not None else loading.profile
    changed = _print_verdict(console, results, profile)
    if json_file is not None:
        output.write_json(json_file, machine=card, scenarios=results, summary=summary(results))
    if changed and profile == "exact":
        raise typer.Exit(1)


def summary(results: list[ScenarioResult]) -> dict[str, object]:
    """Return the counts of the verdict: facts, the model's mistakes, and what reuse changed."""
    turns = [
        (result.name, number, turn)
        for result in results
        for number, turn in enumerate(result.turns)
    ]
    return {
        "facts": sum(len(turn.full.facts) for _, _, turn in turns),
        "model_wrong": [
            {"scenario": name, "turn": number, "fact": fact}
            for name, number, turn in turns
            for fact in turn.model_wrong
        ],
        "changed_by_reuse": [
            {
                "scenario": name,
                "turn": number,
                "mode": mode,
                "first_different_token": turn.first_difference(mode),
            }
            for name, number, turn in turns
            for mode in turn.changed_by_reuse
        ],
        "prompt_tokens": sum(turn.full.usage.prompt_tokens for _, _, turn in turns),
        "computed_tokens_with_reuse": sum(turn.reuse.usage.computed_tokens for _, _, turn in turns),
        "computed_tokens_full": sum(turn.full.usage.computed_tokens for _, _, turn in turns),
    }


def _print_scenario(console: Console, result: ScenarioResult) -> None:
    console.print(f"\n[bold]{result.name}[/]")
    for number, turn in enumerate(result.turns):
        console.print(f"  [cyan]{number}>[/] {escape(_shorten(turn.prompt))}")
        console.print(f"     {escape(_shorten(turn.full.text))}")
        console.print(f"     {_facts(turn.full)}[dim]{_costs(turn)}[/]")
        for mode in turn.changed_by_reuse:
            reply = turn.rewound if mode == "rewound" else turn.reuse
            assert reply is not None, "a mode that changed something has a reply"
            console.print(
                f"     [yellow]{mode} differs at token {turn.first_difference(mode)}:[/] "
                f"{escape(_shorten(reply.text))} {_facts(reply)}"
            )


def _print_verdict(console: Console, results: list[ScenarioResult], profile: str | None) -> bool:
    """Print what the model got wrong and what reuse changed; return whether it changed anything."""
    turns = [turn for result in results for turn in result.turns]
    facts = sum(len(turn.full.facts) for turn in turns)
    wrong = sum(len(turn.model_wrong) for turn in turns)
    replies = sum(1 if turn.rewound is None else 2 for turn in turns)
    changed = sum(len(turn.changed_by_reuse) for turn in turns)
    console.print(
        f"\nThe model got {wrong} of {facts} facts wrong, with a full prefill every turn too."
    )
    colour = "yellow" if changed else "green"
    console.print(
        f"Reuse changed [{colour}]{changed} of {replies}[/] replies, compared token by token with "
        "a full prefill of the same history."
    )
    if changed and profile is None:
        console.print(
            "[dim]An engine elsewhere may round otherwise in passes of other lengths, and a near-tie between "
            "two tokens may flip; `recollect verify` with the same --engine compares how likely they are.[/]"
        )
    elif changed and profile != "exact":
        console.print(
            "[dim]In this profile decode and prefill use kernels that round differently, and a "
            "near-tie between two tokens may flip; `--profile exact` shows what reuse does.[/]"
        )
    return changed > 0


def _shorten(text: str) -> str:
    """Return the text on one line; all of it is in the JSON file."""
    line = "".join(c if c.isprintable() else "·" for c in " ".join(text.split()))
    return line if len(line) <= 160 else line[:159] + "…"


def _facts(reply: GradedReply) -> str:
    marks = [
        f"[green]✓ {escape(fact.what)}[/]" if fact.recalled else f"[red]✗ {escape(fact.what)}[/]"
        for fact in reply.facts
    ]
    return "  ".join(marks) + ("  " if marks else "")


def _costs(turn: Turn) -> str:
    """Return the cost in each mode: reused + computed tokens, and the first-token time."""
    modes = {"reuse": turn.reuse, "full": turn.full, "rewound": turn.rewound}
    return " · ".join(
        f"{mode} {reply.usage.reused_tokens}+{reply.usage.computed_tokens} "
        f"{reply.usage.ttft_s * 1000:.0f} ms"
        for mode, reply in modes.items()
        if reply is not None
    )


def _option(*names: str, about: str, default: str | bool = True) -> Any:
    return typer.Option(*names, help=about, show_default=default)


@app.command()
@takes_model_options
def bench(
    *,
    model: ModelOption = DEFAULT_MODEL,
    loading: ModelOptions = FAST,
    input_tokens: Annotated[int, _option("--input", about="Tokens of prompt 1.")] = 2048,
    output_tokens: Annotated[int, _option("--output", about="Tokens of response 1.")] = 256,
    input2_tokens: Annotated[int, _option("--input2", about="Tokens of prompt 2.")] = 256,
    output2_tokens: Annotated[int, _option("--output2", about="Tokens of response 2.")] = 128,
    iterations: Annotated[
        int, _option(about="Repetitions; the first is a warm-up and is discarded.")
    ] = 10,
    turns: Annotated[int, _option(about="Turns of the conversation that grows; 0 skips it.")] = 12,
    text_file: Annotated[
        Path | None,
        _option("--text", about="A text to cut prompts from.", default="one in the package"),
    ] = None,
    json_file: JsonFileOption = None,
    plot_file: Annotated[
        Path | None, _option("--plot", about="Draw the growth curve there (.png, .svg, .pdf).")
    ] = None,
) -> None:
    """
    Measure what reuse saves on this machine.

    Measures the second turn of a conversation with and without reuse, and the turns of one that grows. With
    --engine, tokens are those that the engine tells, times those of its answers as they come here, and energy
    is left out.
    """

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
        output.require_writable(json_file)
    if plot_file is not None:
        output.require_plot(plot_file)
    with loading.load(model) as loaded:
        check_room(loaded, config)
        _run(loaded, config, text, json_file=json_file, plot_file=plot_file)


def _run(
    model: Model,
    config: BenchConfig,
    text: str,
    *,
    json_file: Path | None,
    plot_file: Path | None,
) -> None:
    console = Console(highlight=False)
    card = output.machine_card(model)
    opened = meter_of(model)
    unreadable = opened if isinstance(opened, Unreadable) else None
    meter = None if isinstance(opened, Unreadable) else opened
    console.print("\n".join(output.card_lines(card)), markup=False, soft_wrap=True)
    console.print()

    iterations = run_iterations(model, config, text, meter=meter, progress=_say)
    summary = summarize_iterations(iterations)
    console.print(output.responses_table(summary))
    lines = output.saving_lines(summary, iterations) + output.energy_lines(summary, unreadable)
    console.print("\n".join(lines), markup=False, soft_wrap=True)
    samples = run_growth(model, config, text, meter=meter, progress=_say)
    growth = summarize_growth(samples)
    if growth:
        console.print()
        console.print(output.growth_table(growth))
    if json_file is not None:
        output.write_json(
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
        output.draw_growth(growth, card, plot_file)


def _say(what: str, done: int, total: int | None) -> None:
    """Write a line of progress to stderr: the work takes minutes."""
    typer.echo(f"{what} {done + 1} of {total} ...", err=True)
