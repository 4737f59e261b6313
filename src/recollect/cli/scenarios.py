"""
`recollect scenarios`: six conversations, and what reuse changes apart from the model's mistakes.

Prints what `proof/scenarios.py` finds.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

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
from recollect.types import Profile

if TYPE_CHECKING:  # imported by the command, so that `--help` does not wait for the runtime
    from recollect.proof.scenarios import GradedReply, ScenarioResult, Turn


def scenarios(
    model: ModelOption = "smollm2",
    profile: ProfileOption = "fast",
    kv_memory: KvMemoryOption = None,
    kv_disk: ProofKvDiskOption = "0",
    offline: OfflineOption = False,
    allow_native_code: AllowNativeCodeOption = None,
    long_context: LongContextOption = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write everything there, too.")
    ] = None,
) -> None:
    """Play six conversations with reuse, with a full prefill every turn, and rewound."""
    from recollect.proof.report import require_writable, write_json  # noqa: PLC0415 - see above

    if json_file is not None:
        require_writable(json_file)
    console = Console(highlight=False)
    with open_model(
        model,
        profile=profile,
        kv_memory=kv_memory,
        kv_disk=kv_disk,
        allow_native_code=allow_native_code,
        long_context=long_context,
        offline=offline,
    ) as loaded:
        from recollect.proof.machine import machine_card  # noqa: PLC0415
        from recollect.proof.scenarios import load_scenarios, play_all  # noqa: PLC0415

        card = machine_card(loaded)
        console.print(f"[dim]{card.model}, profile {profile}, {card.cpu}[/]")
        results = []
        for result in play_all(loaded, load_scenarios()):
            results.append(result)
            _print_scenario(console, result)
    changed = _print_verdict(console, results, profile)
    if json_file is not None:
        write_json(json_file, machine=card, scenarios=results, summary=summary(results))
    if changed and profile == "exact":
        raise typer.Exit(1)


def summary(results: "list[ScenarioResult]") -> dict[str, object]:
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


def _print_scenario(console: Console, result: "ScenarioResult") -> None:
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


def _print_verdict(console: Console, results: "list[ScenarioResult]", profile: Profile) -> bool:
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
    if changed and profile != "exact":
        console.print(
            "[dim]In this profile decode and prefill use kernels that round differently, and a "
            "near-tie between two tokens may flip; `--profile exact` shows what reuse does.[/]"
        )
    return changed > 0


def _shorten(text: str) -> str:
    """Return the text on one line; all of it is in the JSON file."""
    line = "".join(c if c.isprintable() else "·" for c in " ".join(text.split()))
    return line if len(line) <= 160 else line[:159] + "…"


def _facts(reply: "GradedReply") -> str:
    marks = [
        f"[green]✓ {escape(fact.what)}[/]" if fact.recalled else f"[red]✗ {escape(fact.what)}[/]"
        for fact in reply.facts
    ]
    return "  ".join(marks) + ("  " if marks else "")


def _costs(turn: "Turn") -> str:
    """Return the cost in each mode: reused + computed tokens, and the first-token time."""
    modes = {"reuse": turn.reuse, "full": turn.full, "rewound": turn.rewound}
    return " · ".join(
        f"{mode} {reply.usage.reused_tokens}+{reply.usage.computed_tokens} "
        f"{reply.usage.ttft_s * 1000:.0f} ms"
        for mode, reply in modes.items()
        if reply is not None
    )
