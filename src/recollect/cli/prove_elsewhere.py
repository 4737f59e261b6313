"""
`recollect verify --engine`: what was found of an engine elsewhere, for people and as JSON.

On its own because nothing of it is said of models that run here, which `prove` is about.
"""

import json
from pathlib import Path
from typing import NoReturn

import typer

from recollect.cli.display import count, progress_bar
from recollect.conversation.model import Model
from recollect.proof import report as output
from recollect.proof.elsewhere import ElsewhereReport, verify_elsewhere
from recollect.proof.scenarios import RewindResult


def prove_elsewhere(model: Model, operations: int, seed: int, json_file: Path | None) -> NoReturn:
    """Check the reuse of an engine elsewhere, print what was found, and exit, with 1 where it fails."""
    with progress_bar("Checking reuse") as progress:
        report = verify_elsewhere(
            model,
            operations=operations,
            seed=seed,
            progress=lambda done, worst: progress(
                f"largest difference {worst:.1e}", done, operations
            ),
        )
    for line in elsewhere_lines(report):
        typer.echo(line)
    if json_file is not None:
        with output.written_to(json_file):
            json_file.write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
    raise typer.Exit(0 if report.passed else 1)


def elsewhere_lines(report: ElsewhereReport) -> list[str]:
    """Return what a person reads of an engine's reuse, its verdict last."""
    left = f"  left out            {count(report.left_out, 'operation')} (likelihoods not told)"
    anew = (
        f"  reused all the same {count(report.found_anew, 'token')} that were to be computed anew"
    )
    return [
        f"{report.model} · {report.engine} · {count(report.operations, 'operation')} · seed {report.seed}",
        f"  prompts             {report.reused_tokens:,} tokens reused, {report.computed_tokens:,} computed",
        f"  other replies       {report.different_replies}",
        f"  largest difference  {report.largest:.1e}  (log probabilities of the 20 likeliest tokens)",
        f"  noise control       {report.noise:.1e}  (no reuse: tokens read one at a time, and at once)",
        f"  limit               {report.limit:.1e}",
        *([left] if report.left_out else []),
        *([anew] if report.found_anew else []),
        f"Reuse: {'PASS' if report.passed else 'FAIL'}",
    ]


def rounding_lines(result: RewindResult, *, is_rounding: bool) -> list[str]:
    """Return what a person reads of whether rounding explains another answer; nothing where there is none."""
    if result.rewind_differs_at is None and result.fresh_differs_at is None:
        return []
    if is_rounding:
        return ["computed anew, both tokens are about as likely there: rounding explains it"]
    return [
        "computed anew, one token is clearly likelier there, or nobody tells: rounding does not explain it"
    ]
