"""
`recollect chat`: talk to a model, by hand or by pipe.

Decides which of the two it is; the work is done in `repl` and `batch`.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from recollect.cli import options
from recollect.config import DEFAULT_PROFILE
from recollect.models.catalog import DEFAULT_MODEL
from recollect.types import SamplingParams


def chat(
    *,
    model: options.ModelOption = DEFAULT_MODEL,
    profile: options.ProfileOption = DEFAULT_PROFILE,
    kv_memory: options.KvMemoryOption = None,
    system: options.SystemOption = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Say the lines of a file, blank ones skipped."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a turn, and nothing else.")
    ] = False,
    max_tokens: options.MaxTokensOption = None,
    temperature: options.TemperatureOption = 0.0,
    top_k: options.TopKOption = 0,
    top_p: options.TopPOption = 1.0,
    min_p: options.MinPOption = 0.0,
    seed: options.SeedOption = None,
    repetition_penalty: options.RepetitionPenaltyOption = 1.0,
    presence_penalty: options.PresencePenaltyOption = 0.0,
    frequency_penalty: options.FrequencyPenaltyOption = 0.0,
    stop: options.StopOption = None,
    ignore_eos: options.IgnoreEosOption = False,
) -> None:
    """
    Talk to a model.

    On a terminal: line editing, history, and commands such as /undo, /fork, /tree.
    /help lists them. From a pipe or a file: a line is a prompt, replies are plain text.
    """
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        stop=tuple(stop or ()),
        ignore_eos=ignore_eos,
    )
    by_hand = prompts is None and not as_json and sys.stdin.isatty() and sys.stdout.isatty()
    if by_hand:
        # Each imported where it is needed: a pipe has no use for line editing.
        from recollect.cli import repl  # noqa: PLC0415

        with options.open_model(model, profile=profile, kv_memory=kv_memory) as loaded:
            repl.talk(loaded, params, system)
        return
    from recollect.cli import batch  # noqa: PLC0415

    with (
        batch.open_prompts(prompts) as lines,
        options.open_model(model, profile=profile, kv_memory=kv_memory) as loaded,
        loaded.session(system, params=params) as session,
    ):
        batch.answer_all(session, lines, as_json=as_json)
