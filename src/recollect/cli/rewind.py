"""
`recollect rewind-test`: does a rewound conversation answer as it did, and as a fresh one does?

Prints the verdict; the test itself is in `proof/rewind_test.py`.
"""

from typing import TYPE_CHECKING

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

if TYPE_CHECKING:  # imported by the command, so that `--help` does not wait for the runtime
    from recollect.proof.rewind_test import RewindResult


def rewind_test(
    model: ModelOption = "smollm2",
    profile: ProfileOption = "exact",
    kv_memory: KvMemoryOption = None,
    kv_disk: ProofKvDiskOption = "0",
    offline: OfflineOption = False,
    allow_native_code: AllowNativeCodeOption = None,
    long_context: LongContextOption = False,
) -> None:
    """Ask three questions, rewind to after the first answer, and ask the second one again."""
    with open_model(
        model,
        profile=profile,
        kv_memory=kv_memory,
        kv_disk=kv_disk,
        allow_native_code=allow_native_code,
        long_context=long_context,
        offline=offline,
    ) as loaded:
        from recollect.proof.rewind_test import run_rewind_test  # noqa: PLC0415

        result = run_rewind_test(loaded)
    typer.echo(
        f"rewound {result.history_tokens} to {result.length} tokens "
        f"({result.rewind_computed_tokens} computed), asked again "
        f"({result.again_computed_tokens} computed), {len(result.answer)} tokens of answer"
    )
    for line in differences(result):
        typer.echo(line)
    if result.rewind_differs_at is None and (result.fresh_differs_at is None or profile != "exact"):
        typer.echo("rewind test OK")
        return
    typer.echo("rewind test FAILED")
    raise typer.Exit(1)


def differences(result: "RewindResult") -> list[str]:
    """Return a line for each answer that is not A2, naming the first token that differs."""
    lines = []
    if (place := result.rewind_differs_at) is not None:
        lines.append(f"A2' differs from A2 at {_tokens(place, result.answer, result.after_rewind)}")
    if (place := result.fresh_differs_at) is not None:
        lines.append(
            f"a fresh prefill differs from A2 at {_tokens(place, result.answer, result.fresh)}; "
            "outside the profile exact, decode rounds otherwise than prefill, so near-ties flip"
        )
    return lines


def _tokens(place: int, first: tuple[int, ...], second: tuple[int, ...]) -> str:
    one, other = (
        str(answer[place]) if place < len(answer) else "the end" for answer in (first, second)
    )
    return f"token {place}: {other} instead of {one}"
