"""
vLLM, behind its `/v1/completions`: ids in, ids out, and a salt for each namespace.

The salt is a keyed hash of the namespace: vLLM reuses KV among requests with the same salt alone, and who
reads its log or its traffic learns no namespace. Cached tokens come with the last event of a request, so a
request that is cut off tells none. Stop strings are found here; vLLM gets them too, so that it ends by
itself where we would cut it off, and tells. Source of fields: vllm/entrypoints/openai/completion of 0.32.
"""

import json
import secrets
from collections.abc import Generator, Mapping
from hashlib import blake2b
from typing import Any, Final

from recollect.engine.decoder import Likelihood
from recollect.errors import ConfigError, InvalidParameterError
from recollect.remote.wire import (
    EngineFacts,
    Link,
    Lost,
    Order,
    RefusedError,
    Token,
    Told,
    events,
    get_json,
    read_all,
)
from recollect.types import Grammar, SamplingParams

OLDEST: Final = (0, 11)
"""The first release whose `/v1/completions` takes `cache_salt` and `return_token_ids`."""
_IDLE_PRIORITY: Final = 1
"""vLLM takes lower numbers first; 0 is usual."""
_UNITS: Final = {496: 16, 480: 32, 448: 64, 384: 128, 256: 256, 504: 8, 511: 1}
"""How many of 511 tokens are found again, and the block size that tells."""
_DIALECT: Final = "%llguidance {}\n"
"""
Begins a grammar that llguidance is to follow, as here. vLLM asks xgrammar first, which takes most grammars of
forced calls, and means them otherwise: it does not know how JSON is to be written in them.
Source: vllm/sampling_params.py of 0.32 with xgrammar 0.2.8 and llguidance 1.7.6.
"""
_STRONGEST_BIAS: Final = 100.0
"""vLLM takes no stronger one; with -100 a token is as good as banned."""


class Vllm:
    """One address of vLLM, or of a router in front of several; an `Api`."""

    def __init__(self, url: str, *, secret: bytes) -> None:
        """
        Args:
            url: Of the server, without `/v1`.
            secret: What namespaces are hashed with, at least 16 bytes; another one finds nothing again.
        """
        self.url: Final = url.rstrip("/").removesuffix("/v1")
        self._secret = secret
        self._model: str | None = None
        self._takes_priority = False

    def salt(self, namespace: str | None) -> str:
        """Return what vLLM tells namespaces apart by; None gets one that is never used again."""
        if namespace is None:
            return secrets.token_hex(32)
        return blake2b(namespace.encode(), key=self._secret, digest_size=32).hexdigest()

    def probe(self, token_ids: list[int]) -> EngineFacts:
        """Check version, context, that ids come back, cached tokens are told, and the salt is respected."""
        version = get_json(self.url, "/version")
        version = str(version.get("version", "")) if isinstance(version, Mapping) else ""
        _require_version(version, self.url)
        listed = get_json(self.url, "/v1/models")
        models = listed.get("data") if isinstance(listed, Mapping) else None
        if not models or not isinstance(models[0], Mapping):
            raise ConfigError(
                f"{self.url} offers no model at /v1/models: start `vllm serve MODEL` there."
            )
        self._model = str(models[0].get("id"))
        length = models[0].get("max_model_len")
        if not isinstance(length, int):
            raise ConfigError(f"{self.url} does not say how long its context is: it is no vLLM.")
        ids = token_ids[: min(512, length - 2)]
        one, other = secrets.token_hex(8), secrets.token_hex(8)
        self._told(ids, one)
        again, elsewhere = self._told(ids, one), self._told(ids, other)
        if again is None or elsewhere is None:
            raise ConfigError(
                f"{self.url} does not tell how many tokens it reused: start vLLM with "
                "--enable-prompt-tokens-details."
            )
        if elsewhere:
            raise ConfigError(
                f"{self.url} reused {elsewhere} tokens under another salt: keys would share what they "
                "said; take a vLLM that respects cache_salt."
            )
        if not again:
            raise ConfigError(
                f"{self.url} reused nothing of the same prompt: start vLLM with "
                "--enable-prefix-caching, and its router with a sticky policy."
            )
        self._takes_priority = self._can_wait(ids)
        unit = _UNITS.get(again, 16) if len(ids) == 512 else 16
        return EngineFacts(version=version, context_length=length, unit=unit)

    def require(self, params: SamplingParams) -> None:
        """Refuse what vLLM has no field for."""
        if params.logprobs is not None and params.reasoning_budget is not None:
            raise InvalidParameterError(
                "An engine elsewhere does not tell how likely the tokens are that end reasoning: leave "
                "reasoning_budget or logprobs out.",
                param="logprobs",
            )

    def stream(self, order: Order, told: Told, link: Link) -> Generator[Token, None, None]:
        """
        Have an order carried out; see `Api.stream`.

        Raises:
            InvalidParameterError: It is refused, and has a grammar: others do not fail there.
        """
        try:
            yield from self._stream(order, told, link)
        except RefusedError as refusal:
            if order.grammar is None:
                raise
            raise InvalidParameterError(
                f"{refusal} Its grammar may be what vLLM cannot follow: make that simpler, leave it out, or "
                "start vLLM with --structured-outputs-config.backend=guidance.",
                param="grammar",
            ) from refusal

    def _stream(self, order: Order, told: Told, link: Link) -> Generator[Token, None, None]:
        headers = {"x-session-id": order.session} if order.session else {}
        held: list[Token] = []  # those of the last event, until all is told
        for event in events(link, "/v1/completions", self.body(order), headers):
            if isinstance(usage := event.get("usage"), Mapping):
                told.prompt_tokens = usage.get("prompt_tokens")
                details = usage.get("prompt_tokens_details")
                told.reused_tokens = details.get("cached_tokens") if details else None
            for choice in event.get("choices") or ():
                finish = choice.get("finish_reason")
                if finish is not None:
                    if finish not in ("stop", "length"):
                        raise Lost(f"it ended the reply with {finish!r}")
                    told.finish = finish
                    held += _tokens(choice, order.params.logprobs)
                else:
                    yield from _tokens(choice, order.params.logprobs)
        if told.finish is None:
            raise Lost("it broke off")
        yield from held

    def body(self, order: Order) -> dict[str, Any]:
        """Return an order in vLLM's words."""
        params = order.params
        body: dict[str, Any] = {
            "prompt": order.token_ids,
            "max_tokens": max(1, order.most_tokens),
            "temperature": params.temperature,
            "seed": order.seed & (2**63 - 1),
            "top_k": params.top_k,
            "top_p": params.top_p,
            "min_p": params.min_p,
            "repetition_penalty": params.repetition_penalty,
            "presence_penalty": params.presence_penalty,
            "frequency_penalty": params.frequency_penalty,
            "ignore_eos": params.ignore_eos,
            "skip_special_tokens": False,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "cache_salt": self.salt(order.namespace),
        }
        if self._model is not None:
            body["model"] = self._model
        if params.stop:
            body |= {"stop": list(params.stop), "include_stop_str_in_output": True}
        if params.logit_bias:
            body["logit_bias"] = {
                str(token): min(max(bias, -_STRONGEST_BIAS), _STRONGEST_BIAS)
                for token, bias in params.logit_bias.items()
            }
        if params.logprobs is not None:
            body["logprobs"] = params.logprobs
        if order.grammar is not None:
            body["structured_outputs"] = _structured(order.grammar)
        if order.allowed is not None:
            body["allowed_token_ids"] = list(order.allowed)
        if order.is_idle and self._takes_priority:
            body["priority"] = _IDLE_PRIORITY
        return body

    def _told(self, token_ids: list[int], namespace: str, *, is_idle: bool = False) -> int | None:
        """Return how many tokens of a prompt were reused; None: it does not tell."""
        order = Order(
            token_ids=token_ids,
            params=SamplingParams(),
            seed=0,
            most_tokens=1,
            namespace=f"probe {namespace}",
            session=f"probe-{namespace}",
            is_idle=is_idle,
        )
        tokens, told = read_all(self, order)
        if not tokens:
            raise ConfigError(
                f"{self.url} gives no token ids back: take vLLM {_name(OLDEST)} or later."
            )
        return told.reused_tokens

    def _can_wait(self, token_ids: list[int]) -> bool:
        """Return whether it schedules by priority; without, it refuses any."""
        self._takes_priority = True
        try:
            self._told(token_ids[:8], secrets.token_hex(8), is_idle=True)
        except Exception:  # noqa: BLE001 - refused, or answered with any error: then it does not
            return False
        return True


def _require_version(version: str, url: str) -> None:
    """
    Check that a release is new enough. A router has no version, nor does one built from a branch.

    Raises:
        ConfigError: It is older.
    """
    numbers = version.split("+", maxsplit=1)[0].split(".")[:2]
    if len(numbers) == 2 and all(number.isdecimal() for number in numbers):
        found = int(numbers[0]), int(numbers[1])
        if found < OLDEST and found != (0, 1):  # 0.1.dev: built from a branch
            raise ConfigError(
                f"{url} is vLLM {version}, and {_name(OLDEST)} is the oldest that can be used: update it."
            )


def _name(release: tuple[int, int]) -> str:
    return ".".join(map(str, release))


def _structured(grammar: Grammar) -> dict[str, Any]:
    if grammar.kind == "json_schema":
        return {"json": json.loads(grammar.source), "disable_any_whitespace": True}
    if grammar.kind == "regex":
        return {"regex": grammar.source}
    is_named = grammar.source.lstrip().startswith(_DIALECT.split()[0])
    return {"grammar": grammar.source if is_named else _DIALECT + grammar.source}


def _tokens(choice: Mapping[str, Any], alternatives: int | None) -> list[Token]:
    ids = choice.get("token_ids") or []
    if alternatives is None:
        return [(token, None) for token in ids]
    said = choice.get("logprobs") or {}
    chosen, tops = said.get("token_logprobs") or [], said.get("top_logprobs") or []
    if len(chosen) != len(ids):
        raise Lost("it did not tell how likely the tokens are")
    tops = tops if len(tops) == len(ids) else [None] * len(ids)
    return [
        (token, Likelihood(token, logprob, _top(top, alternatives)))
        for token, logprob, top in zip(ids, chosen, tops, strict=True)
    ]


def _top(said: Mapping[str, float] | None, alternatives: int) -> tuple[tuple[int, float], ...]:
    """Return the likeliest tokens, without the chosen one where that is not among them."""
    named = {int(name.rpartition(":")[2]): logprob for name, logprob in (said or {}).items()}
    order = sorted(named.items(), key=lambda one: (-one[1], one[0]))
    return tuple(order[:alternatives])
