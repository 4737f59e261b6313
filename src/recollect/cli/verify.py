"""
`recollect verify`: is what is reused right, on this machine and with this model?

Prints the verdict; the check itself is in `proof/verify.py`.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recollect.cli.options import (
    AllowNativeCodeOption,
    KvMemoryOption,
    ModelOption,
    OfflineOption,
    ProfileOption,
    ProofKvDiskOption,
    open_model,
)
from recollect.cli.progress import progress_bar

if TYPE_CHECKING:  # imported by the command, so that `--help` does not wait for the runtime
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
) -> None:
    """
    Hold random conversations, and compare each state with a fresh prefill of the same tokens.

    With --kv-disk they are also forgotten in memory and read back from disk.
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
        offline=offline,
    ) as loaded:
        from recollect.proof import verify as proof  # noqa: PLC0415

        with progress_bar("Verifying") as progress:
            report = proof.verify(
                loaded,
                operations=operations,
                seed=seed,
                progress=lambda done, worst: progress(
                    f"largest difference {worst:.1e}", done, operations
                ),
            )
    for line in _lines(report):
        typer.echo(line)
    if json_file is not None:
        with written_to(json_file):
            json_file.write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
    if not report.passed:
        raise typer.Exit(1)


def _lines(report: "VerifyReport") -> list[str]:
    """Return what a person reads: what was done, what came out, the verdict last."""
    counts = " · ".join(f"{name} {count}" for name, count in report.counts.items())
    largest = report.largest
    where = f"operation {largest.operation}, {largest.name}" if largest.name else "anywhere"
    return [
        f"{report.model} · {report.profile} · {report.operations} operations · seed {report.seed}",
        f"  {counts}",
        f"  largest difference  {largest.logits:.1e}  ({where}, {largest.tokens} tokens)",
        f"  noise control       {report.noise:.1e}  (token by token against one prefill)",
        f"  limit               {report.limit:.1e}",
        "PASS" if report.passed else "FAIL",
    ]
