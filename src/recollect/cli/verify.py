"""
`recollect verify`: is the model that runs the one in its file, and is what is reused right?

Prints the verdicts; the checks themselves are in `proof/against_file.py` and `proof/verify.py`.
"""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

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
from recollect.cli.progress import progress_bar

if TYPE_CHECKING:  # imported by the command, so that `--help` does not wait for the runtime
    from recollect.conversation.model import Model
    from recollect.proof.against_file import FileReport
    from recollect.proof.verify import VerifyReport


def verify(
    model: ModelOption = "smollm2",
    profile: ProfileOption = "exact",
    operations: Annotated[
        int, typer.Option("--operations", "-n", metavar="N", min=1, help="How many.")
    ] = 200,
    seed: Annotated[int, typer.Option(metavar="N", help="The same gives the same operations.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the result there too.")
    ] = None,
    kv_memory: KvMemoryOption = None,
    kv_disk: ProofKvDiskOption = "0",
    offline: OfflineOption = False,
    allow_native_code: AllowNativeCodeOption = None,
    long_context: LongContextOption = False,
    long: Annotated[
        bool,
        typer.Option(
            "--long",
            help="Look at windows and at the end of the context also where that takes long.",
        ),
    ] = False,
    against_file: Annotated[
        bool,
        typer.Option(
            "--model-check/--no-model", help="Whether the model is compared with its file."
        ),
    ] = True,
) -> None:
    """
    Compare a model with its file, then what is reused with what is computed anew.

    First the logits are compared with those that a second program computes from the file alone. Then
    random conversations are held, and each state is compared with a fresh prefill of the same tokens;
    with --kv-disk they are also forgotten in memory and read back from disk.
    """
    from recollect.proof.report import require_writable, written_to  # noqa: PLC0415 - see above

    if json_file is not None:
        require_writable(json_file)
    with open_model(
        model,
        profile=profile,
        kv_memory=kv_memory,
        kv_disk=kv_disk,
        allow_native_code=allow_native_code,
        long_context=long_context,
        offline=offline,
    ) as loaded:
        from recollect.proof import verify as proof  # noqa: PLC0415

        compared = compare(loaded) if against_file else None
        for line in [] if compared is None else file_lines(loaded.name, profile, compared):
            typer.echo(line)
        with progress_bar("Verifying") as progress:
            report = proof.verify(
                loaded,
                operations=operations,
                seed=seed,
                boundary_s=math.inf if long else proof.BOUNDARY_S,
                progress=lambda done, worst: progress(
                    f"largest difference {worst:.1e}", done, operations
                ),
            )
    for line in _lines(report):
        typer.echo(line)
    if json_file is not None:
        with written_to(json_file):
            result = report.to_dict() | {"file": None if compared is None else compared.to_dict()}
            json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if not report.passed or (compared is not None and compared.outcome == "FAIL"):
        raise typer.Exit(1)


def compare(loaded: "Model") -> "FileReport":
    """Compare a loaded model with its file, and note the outcome for `recollect models`."""
    from recollect import config  # noqa: PLC0415 - see above
    from recollect.models.listing import Compared  # noqa: PLC0415
    from recollect.proof.against_file import compare_with_file  # noqa: PLC0415

    with progress_bar("Comparing with the file") as progress:
        report = compare_with_file(
            loaded, progress=lambda done, of: progress(f"layer {done} of {of}", done, of)
        )
    if report.outcome != "NOT COMPARED":
        noted = Compared(
            outcome=report.outcome,
            profile=loaded.profile,
            largest=report.largest,
            reason=report.reason,
        )
        try:
            noted.write(config.home(), loaded.local.fingerprint)
        except OSError as cause:
            typer.echo(f"The outcome could not be noted ({cause.strerror or cause}).", err=True)
    return report


def file_lines(name: str, profile: str, report: "FileReport") -> list[str]:
    """Return what a person reads of the first part, the verdict last."""
    if report.outcome == "NOT COMPARED":
        return [f"{name} · against its file", f"NOT COMPARED: {report.reason}", ""]
    types = " · ".join(f"{kind} {count:,}" for kind, count in (report.tensor_types or {}).items())
    verdict = report.outcome if not report.reason else f"{report.outcome}: {report.reason}"
    return [
        f"{name} · {profile} · against {report.file} ({report.architecture})",
        f"  weights             {types}",
        f"  largest difference  {report.largest:.1e}  ({report.places} places of "
        f"{report.tokens} tokens, every logit)",
        f"  limit               {report.limit:.1e}",
        f"  likeliest token     the same in {report.agreement:.1%}",
        f"  perplexity          {report.perplexity:.4f}  (by the file {report.reference_perplexity:.4f})",
        f"{verdict}",
        "",
    ]


def _lines(report: "VerifyReport") -> list[str]:
    """Return what a person reads: what was done, what came out, the verdict last."""
    counts = " · ".join(f"{name} {count}" for name, count in report.counts.items())
    largest = report.largest
    where = f"operation {largest.operation}, {largest.name}" if largest.name else "anywhere"
    return [
        f"{report.model} · {report.profile} · {report.operations} operations · seed {report.seed}",
        f"  {counts}",
        f"  largest difference  {largest.logits:.1e}  ({where}, {largest.tokens} tokens)",
        *(
            f"  around {found.tokens:>8,}     "
            + (f"{found.difference:.1e}" if found.difference is not None else found.left_out)
            for found in report.boundaries
        ),
        f"  noise control       {report.noise:.1e}  (token by token against one prefill)",
        f"  limit               {report.limit:.1e}",
        "PASS" if report.passed else "FAIL",
    ]
