"""`recollect explain`: what it prints of the requests that a server has noted."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from recollect.cli.main import app
from recollect.journal.requests import RequestLog
from recollect.types import Usage


def explained(*options: str) -> list[str]:
    result = CliRunner().invoke(app, ["explain", *options], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout.splitlines()


@pytest.fixture
def clients(home: Path) -> list[str]:
    """Return the names of 25 clients, the first of which has computed most."""
    names = [f"agent-{number:02}" for number in range(25)]
    log = RequestLog(home, None)
    for number, name in enumerate(names):
        usage = Usage(
            prompt_tokens=1_000,
            reused_tokens=100 + number,
            computed_tokens=900 - number,
            generated_tokens=1,
            ttft_s=0.1,
            prefill_tps=None,
            decode_tps=None,
        )
        log.note("reference", name, usage, None)
    log.close()
    return names


def test_the_clients_that_computed_most_come_first_and_the_others_are_counted(
    clients: list[str],
) -> None:
    *lines, last = explained()
    named = [line.partition(":")[0] for line in lines if not line.startswith(" ")]
    assert named == clients[:20]
    assert last == ("5 more clients have lost or computed less: --client shows those with a name.")


def test_one_client_is_chosen_by_its_name(clients: list[str]) -> None:
    head, finding = explained("--client", clients[24])
    assert head == "agent-24: 1 request, 1,000 tokens of prompts, 876 computed"
    assert finding == "  Nothing that was read before was read again."


@pytest.mark.usefixtures("clients")
def test_an_unknown_client_is_told_which_there_are() -> None:
    (line,) = explained("--client", "opencode")
    assert line.startswith(
        "No request of a client named 'opencode' is known: there are those of agent-00, agent-01, "
    )
    assert line.endswith("agent-19.")


def test_where_nothing_was_noted_it_says_what_notes(home: Path) -> None:
    assert not home.exists()
    assert explained("--client", "opencode") == [
        "No request is known: `recollect serve` notes each that it answers."
    ]
