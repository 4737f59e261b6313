"""
From what `--engine` says to an engine that was tried out: `vllm=URL[,URL…]` or `llama=URL`.

A probe refuses what would go wrong later: an engine that is too old, has another tokenizer, tells no cached
tokens, or does not respect the salt. Each refusal says what to change.
"""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from recollect import files
from recollect.errors import ConfigError
from recollect.models.catalog import LocalModel
from recollect.remote.llama_server import LlamaServer
from recollect.remote.remote_engine import RemoteEngine
from recollect.remote.vllm import Vllm
from recollect.remote.wire import Api, EngineFacts, checked_url, get_json, post_json
from recollect.text.tokenizer import Tokenizer

KINDS: Final = ("vllm", "llama")
SECRET_NAME: Final = "engine-secret"  # noqa: S105 - a file, and no password
"""The file in the data folder with what namespaces are hashed with for engines elsewhere."""
_SECRET_BYTES: Final = 32
PROBE_TOKENS: Final = 512
_TEXTS: Final = (
    "The quick brown fox jumps over 13 lazy dogs.",
    "def f(x):\n    return x ** 2  # ünïcode\n",
    "図書館はどこですか。 ¿Dónde está? 🎉👩🏽‍💻",
    "  two  spaces\t\ttabs\r\n\r\n",
)
"""What both tokenizers have to take for the same tokens."""


def parsed(said: str) -> tuple[str, list[str]]:
    """
    Return the kind and the addresses that `--engine` names.

    Raises:
        ConfigError: It names none.
    """
    kind, _, addresses = said.partition("=")
    urls = list(dict.fromkeys(one.strip() for one in addresses.split(",") if one.strip()))
    if kind not in KINDS or not urls:
        raise ConfigError(
            f"--engine is {said!r}: give vllm=URL, vllm=URL,URL or llama=URL, such as "
            "vllm=http://127.0.0.1:8000."
        )
    for url in urls:
        checked_url(url)
    if kind == "llama" and len(urls) > 1:
        raise ConfigError(
            "--engine names several llama-servers, and their slots belong to one front: give one, or use "
            "vLLM behind vllm-router."
        )
    return kind, urls


def require_there(said: str) -> None:
    """
    Check that the engines which `--engine` names answer at all, before anything is loaded for them.

    Raises:
        ConfigError: As `parsed`; or one asks for a key, or sends on to another address.
        EngineUnavailableError: One does not answer, or is not ready.
    """
    for url in parsed(said)[1]:
        get_json(url.rstrip("/").removesuffix("/v1"), "/health")


def connect(said: str, model: LocalModel, tokenizer: Tokenizer, home: Path) -> RemoteEngine:
    """
    Return the engine that `--engine` names, probed.

    Args:
        said: As `parsed` takes it.
        model: What it computes.
        tokenizer: Of the model, to be compared with the engine's.
        home: The data folder, which has the secret for salts.

    Raises:
        ConfigError: It cannot be used; the message says what to change.
        EngineUnavailableError: It does not answer.
    """
    kind, urls = parsed(said)
    make: Callable[[str], Api] = LlamaServer
    if kind == "vllm":
        secret = secret_of(home)

        def make(url: str) -> Api:
            return Vllm(url, secret=secret)

    apis = [make(url) for url in urls]
    ids = _probe_ids(tokenizer)
    facts = _together([api.probe(ids) for api in apis])
    for api in apis:
        _require_same_tokens(kind, api.url, tokenizer)
    return RemoteEngine(
        apis,
        facts,
        name=f"{kind} {facts.version}".strip(),
        vocab_size=tokenizer.vocab_size,
        context_length=model.context_length,
        eos_token_ids=model.eos_token_ids,
        fingerprint=model.fingerprint,
    )


def secret_of(home: Path) -> bytes:
    """
    Return what namespaces are hashed with for engines elsewhere, made on first use.

    Raises:
        ConfigError: The file is damaged.
    """
    path = home / SECRET_NAME
    try:
        secret = files.read_bytes(path, most_bytes=_SECRET_BYTES + 1)
    except FileNotFoundError:
        files.make_private(home, home)
        secret = secrets.token_bytes(_SECRET_BYTES)
        temporary = path.with_suffix(f".{secrets.token_hex(8)}")
        temporary.touch(mode=0o600)
        temporary.write_bytes(secret)
        temporary.replace(path)
    if len(secret) != _SECRET_BYTES:
        raise ConfigError(
            f"{path} is damaged: delete it; the engines then compute prompts anew once."
        )
    return secret


def _probe_ids(tokenizer: Tokenizer) -> list[int]:
    """Return some ids that stand for text, `PROBE_TOKENS` of them."""
    ids = tokenizer.encode_text(" ".join(_TEXTS[:1] * PROBE_TOKENS))
    return (ids * PROBE_TOKENS)[:PROBE_TOKENS]


def _together(facts: Sequence[EngineFacts]) -> EngineFacts:
    """Return what holds for all replicas."""
    first = facts[0]
    return replace(
        first,
        context_length=min(one.context_length for one in facts),
        unit=max(one.unit for one in facts),
    )


def _require_same_tokens(kind: str, url: str, tokenizer: Tokenizer) -> None:
    for text in _TEXTS:
        if kind == "vllm":
            body: dict[str, Any] = {"prompt": text, "add_special_tokens": False}
        else:
            body = {"content": text, "add_special": False, "parse_special": True}
        said = post_json(url, "/tokenize", body)
        if said is None:
            raise ConfigError(
                f"{url} does not answer at /tokenize, so that nobody knows whether its tokens are the "
                "model's: let the address lead there."
            )
        theirs, ours = said.get("tokens"), tokenizer.encode(text)
        if theirs != ours:
            raise ConfigError(
                f"{url} has another tokenizer than the model that was named: it takes {text!r} for "
                f"{str(theirs)[:60]}, and here it is {str(ours)[:60]}. Name the model that it serves."
            )
