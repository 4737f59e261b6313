"""A server as it is run: started, stopped, started again."""

import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest

pytestmark = [pytest.mark.model, pytest.mark.slow]


def respond(url: str, **body: Any) -> Any:
    fields = {"max_output_tokens": 8, **body}
    answer = httpx.post(f"{url}/v1/responses", json=fields, timeout=60, trust_env=False)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_response_goes_on_after_a_restart_and_is_warm(start_server: Callable[..., Any]) -> None:
    text = " ".join(f"Boat {n} came in and left again." for n in range(30))
    before = start_server()
    first = respond(before.url, input=text)
    expected = respond(before.url, input="Go on", previous_response_id=first["id"], store=False)
    assert before.stop() == 0
    after = start_server()
    again = respond(after.url, input="Go on", previous_response_id=first["id"])
    assert again["output"][0]["content"] == expected["output"][0]["content"]
    own = again["usage"]["recollect"]
    assert own["tier"] == "disk"
    assert own["restored_tokens"] > 200
    assert own["computed_tokens"] < 80
    metrics = httpx.get(f"{after.url}/metrics", timeout=60, trust_env=False).text
    assert float(re.search(r"^recollect_disk_bytes (\S+)$", metrics, re.MULTILINE)[1]) > 10**6  # type: ignore[index]
    assert 'source="disk"} 0.0' not in metrics
    assert after.stop() == 0


def test_a_wrong_setting_ends_it_with_a_sentence(start_server: Callable[..., Any]) -> None:
    with pytest.raises(AssertionError, match=r"recollect: .* --api-key"):
        start_server("--host", "0.0.0.0")  # noqa: S104 - what it refuses without a key
