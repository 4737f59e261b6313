"""The page at `/`: who gets it, what a browser may do with it, and how large it is."""

import base64
import hashlib
import json
import re
from collections.abc import Callable

import httpx
import pytest

from recollect.server.page import page_files

BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
MOST_BYTES = 400_000
MOST_LINES = 400
"""Of code in a module, as in one of Python."""


@pytest.mark.few(3)
@pytest.mark.parametrize("accept", [None, "*/*", "application/json"])
def test_clients_that_look_for_a_server_are_told_as_before(
    client: httpx.Client, accept: str | None
) -> None:
    answer = client.get("/", headers={} if accept is None else {"Accept": accept})
    assert answer.json()["name"] == "recollect"
    assert answer.headers["vary"] == "Accept"
    assert client.head("/").status_code == 200


def test_a_browser_gets_the_page(client: httpx.Client) -> None:
    answer = client.get("/", headers=BROWSER)
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert '<div id="app">' in answer.text


def test_only_files_of_the_page_and_its_import_map_may_run(client: httpx.Client) -> None:
    answer = client.get("/", headers=BROWSER)
    policy = dict(
        rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; ")
    )
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", answer.text, re.DOTALL)
    import_map = next(one for one in scripts if one.strip())
    digest = base64.b64encode(hashlib.sha256(import_map.encode()).digest()).decode()
    assert [one for one in scripts if one.strip()] == [import_map]
    assert policy["script-src"] == f"'self' 'sha256-{digest}'"
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == policy["style-src"] == "'self'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert not re.search(r"""\sstyle=|\son[a-z]+=|https?://""", answer.text)


@pytest.mark.slow
def test_every_file_that_the_page_names_is_there(client: httpx.Client) -> None:
    text = client.get("/", headers=BROWSER).text
    named = set(re.findall(r'"(/web/[^"]+\.[a-z]+)"', text))
    imports = json.loads(re.findall(r'<script type="importmap">(.*?)</script>', text, re.DOTALL)[0])
    named |= set(imports["imports"].values())
    for name, file in page_files().items():
        if name.endswith("js") and "vendor" not in name:
            relative = re.findall(r'from "\./([^"]+)"', file.content.decode())
            named |= {f"/web/{one}" for one in relative}
    assert len(named) > 20
    answers = {name: client.get(name) for name in named}
    assert {name for name, answer in answers.items() if answer.status_code != 200} == set()
    types = {name: answer.headers["content-type"] for name, answer in answers.items()}
    assert {kind for name, kind in types.items() if name.endswith("js")} == {
        "text/javascript; charset=utf-8"
    }


def test_files_that_a_browser_has_are_not_sent_again(client: httpx.Client) -> None:
    first = client.get("/web/main.js")
    again = client.get("/web/main.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.few(3)
@pytest.mark.parametrize(
    "path", ["/web/", "/web/none.js", "/web/index.html", "/web/vendor/README.md", "/web/types.d.ts"]
)
def test_nothing_else_of_the_package_is_sent(client: httpx.Client, path: str) -> None:
    assert client.get(path).status_code == 404


@pytest.mark.few(3)
@pytest.mark.parametrize("path", ["/web/../v1/models", "/web/%2e%2e/v1/models", "/webx", "/web"])
def test_the_addresses_of_files_lead_nowhere_else_without_a_key(
    start: Callable[..., httpx.Client], path: str
) -> None:
    client = start(keys=["right"])
    del client.headers["Authorization"]
    assert client.get("/web/main.js").status_code == 200
    assert client.get("/", headers=BROWSER).status_code == 200
    assert client.get(path).status_code in {401, 404}


def test_the_page_is_small() -> None:
    assert sum(len(file.content) for file in page_files().values()) < MOST_BYTES


def test_no_module_of_the_page_is_long() -> None:
    own = {name: one for name, one in page_files().items() if name.endswith(".js")}
    lengths = {
        name: sum(
            bool(line.strip()) and not line.lstrip().startswith("//")
            for line in re.sub(
                r"/\*.*?\*/", "", file.content.decode(), flags=re.DOTALL
            ).splitlines()
        )
        for name, file in own.items()
        if "vendor" not in name
    }
    assert len(lengths) > 15
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES} == {}
