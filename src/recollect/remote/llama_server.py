"""
llama-server, behind its `/completion`: ids in, ids out, and slots that each belong to one namespace.

llama-server has no salt: a slot reuses whatever was computed in it. So each slot belongs to a namespace, and
within it to one conversation at a time; a slot that changes hands is first computed anew. Slots are named
with every request, which also keeps llama-server from looking through the prompts of other slots. It must
have no other client. Source of fields: tools/server/README.md of b11549.
"""

import json
import threading
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

from recollect.engine.decoder import Likelihood
from recollect.errors import ConfigError, InvalidParameterError, MemoryLimitError
from recollect.remote.wire import (
    EngineFacts,
    Link,
    Lost,
    Order,
    Token,
    Told,
    events,
    get_json,
    read_all,
    whole,
)
from recollect.types import FinishReason, SamplingParams

_ORDER: Final = ("penalties", "temperature", "top_k", "top_p", "min_p")
"""How a token is chosen, in the order of `engine.sampling`."""
_MOST_SEED: Final = 2**32 - 1  # which means one at random
_FEW: Final = 16
"""Tokens in a request that is not streamed: those of a few characters."""
_ALLOWED_BIAS: Final = 1e4
"""What lifts a token above all that have none: logits stay far below."""
_ENDS: Final[Mapping[str, FinishReason]] = {"eos": "stop", "word": "stop", "limit": "length"}


@dataclass(slots=True)
class _Slot:
    number: int
    owner: str | None = None
    """The namespace whose KV is in it; None: nobody's that may be found again."""
    session: str = ""
    users: int = 0
    used: int = 0
    """When it was used last, as a count of uses."""


class Slots:
    """
    Which slot serves whom. Safe from any thread.

    Invariant: what a slot holds was computed for its owner, or is computed anew by the next request.
    """

    def __init__(self, count: int) -> None:
        self._slots = [_Slot(number) for number in range(count)]
        self._uses = 0
        self._lock = threading.Lock()

    def take(self, namespace: str | None, session: str) -> tuple[int, bool]:
        """
        Return the slot for a request, and whether it may reuse what is there; to be given back.

        A conversation finds its own slot again. A new one takes a slot of its namespace that nobody uses,
        or that is nobody's; a new namespace takes one from the namespace that has the most.

        Raises:
            MemoryLimitError: There are as many namespaces as slots already.
        """
        with self._lock:
            slot = self._best(namespace, session)
            may_reuse = namespace is not None and slot.owner == namespace
            self._uses += 1
            slot.owner, slot.session, slot.used = namespace, session, self._uses
            slot.users += 1
            return slot.number, may_reuse

    def give_back(self, number: int) -> None:
        """Take note that a request has ended."""
        with self._lock:
            self._slots[number].users -= 1

    def _best(self, namespace: str | None, session: str) -> _Slot:
        if namespace is None:
            return min(
                self._slots, key=lambda slot: (slot.users, slot.owner is not None, slot.used)
            )
        own = [slot for slot in self._slots if slot.owner == namespace]
        same = [slot for slot in own if slot.session == session]
        if same:
            return same[0]
        free = [slot for slot in self._slots if slot.owner is None and not slot.users]
        idle = [slot for slot in own if not slot.users]
        if free or idle:
            return min(free or idle, key=lambda slot: slot.used)
        if own:
            return min(own, key=lambda slot: (slot.users, slot.used))
        counts: dict[str | None, int] = {}
        for slot in self._slots:
            counts[slot.owner] = counts.get(slot.owner, 0) + 1
        spare = [slot for slot in self._slots if slot.owner is None or counts[slot.owner] > 1]
        if not spare:
            raise MemoryLimitError(
                f"llama-server has {len(self._slots)} slots, and as many keys use it: start it with more "
                "(--parallel N), or take vLLM, which tells keys apart by itself."
            )
        return min(spare, key=lambda slot: (slot.users, slot.used))


class LlamaServer:
    """One llama-server; an `Api`."""

    def __init__(self, url: str) -> None:
        self.url: Final = url.rstrip("/").removesuffix("/v1")
        self.slots = Slots(1)

    def probe(self, token_ids: list[int]) -> EngineFacts:
        """Check that it has slots, gives ids back, and finds a prompt again."""
        said = get_json(self.url, "/props")
        settings = said.get("default_generation_settings") if isinstance(said, Mapping) else None
        count = said.get("total_slots") if isinstance(said, Mapping) else None
        length = settings.get("n_ctx") if isinstance(settings, Mapping) else None
        if not isinstance(count, int) or not isinstance(length, int):
            raise ConfigError(
                f"{self.url} says nothing of its slots at /props: it is no llama-server."
            )
        self.slots = Slots(count)
        params, ids = SamplingParams(), token_ids[: min(64, length - 2)]
        order = Order(
            token_ids=ids, params=params, seed=0, most_tokens=1, namespace="probe", session="probe"
        )
        for _ in range(2):
            tokens, told = read_all(self, order)
        if not tokens and told.finish != "stop":
            raise ConfigError(f"{self.url} gives no token ids back: take a newer llama-server.")
        if not told.reused_tokens:
            raise ConfigError(
                f"{self.url} reused nothing of the same prompt: start it without --no-cache-prompt."
            )
        self.slots = Slots(count)  # what the probe left behind is computed over
        version = str(said.get("build_info", ""))
        return EngineFacts(version=version, context_length=length, unit=1)

    def require(self, params: SamplingParams) -> None:
        """Refuse what llama-server does otherwise than we mean it."""
        if params.grammar is not None and params.grammar.kind != "json_schema":
            raise InvalidParameterError(
                "llama-server follows JSON schemas, and no other grammar as we write them: leave the "
                "grammar out, or take vLLM.",
                param="grammar",
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if getattr(params, name):
                raise InvalidParameterError(
                    f"llama-server counts the prompt for {name}, and not the reply alone: leave it out, "
                    "or take vLLM.",
                    param=name,
                )

    def stream(self, order: Order, told: Told, link: Link) -> Generator[Token, None, None]:
        """Have an order carried out in a slot; see `Api.stream`."""
        number, may_reuse = self.slots.take(order.namespace, order.session)
        try:
            yield from self._generate(order, number, told, link, may_reuse=may_reuse)
        finally:
            self.slots.give_back(number)

    def _generate(
        self, order: Order, slot: int, told: Told, link: Link, *, may_reuse: bool
    ) -> Generator[Token, None, None]:
        """
        Yield what is generated, in as many requests as it takes.

        A stream tells only the last token of a character that takes several. Where it leaves some out, the
        request is ended, and a short one that is not streamed tells all of them, from the same place on.
        """
        body = self._body(order, slot, may_reuse=may_reuse)
        first, is_whole, left = told, False, order.most_tokens
        while True:
            here = Told()
            part = self._whole(body, here, link) if is_whole else self._stream(body, here, link)
            for token in islice(part, max(1, left)):
                if first is told and here.reused_tokens is not None:
                    told.prompt_tokens, told.reused_tokens = here.prompt_tokens, here.reused_tokens
                    first = here
                body["prompt"].append(token[0])
                yield token
            left = len(order.token_ids) + order.most_tokens - len(body["prompt"])
            if told.reused_tokens is None:
                told.prompt_tokens, told.reused_tokens = here.prompt_tokens, here.reused_tokens
            if left <= 0 or here.finish == "stop":
                told.finish = "length" if left <= 0 else "stop"
                return
            is_whole = here.finish is None
            body |= {
                "n_predict": min(left, _FEW) if is_whole else left,
                "stream": not is_whole,
                "seed": (order.seed + len(body["prompt"])) % _MOST_SEED,
                "cache_prompt": True,  # of what this reply has computed itself
            }

    def _stream(
        self, body: Mapping[str, Any], told: Told, link: Link
    ) -> Generator[Token, None, None]:
        """Yield tokens until one is left out, or the end; `told.finish` says which."""
        given, finish = 0, None
        for event in events(link, "/completion", body):
            _note(told, event)
            ids = event.get("tokens") or []
            generated = event.get("tokens_predicted", given + len(ids))
            if event.get("stop"):
                finish = _ENDS.get(str(event.get("stop_type")))
                if finish is None:
                    raise Lost(f"it ended the reply with {event.get('stop_type')!r}")
                end = 1 if event.get("stop_type") == "eos" else 0  # which is not told
                if generated <= given + len(ids) + end:
                    told.finish = finish
            elif generated != given + len(ids):
                return
            given += len(ids)
            yield from _tokens(ids, event.get("completion_probabilities"), body.get("n_probs"))
        if finish is None:
            raise Lost("it broke off")

    def _whole(
        self, body: Mapping[str, Any], told: Told, link: Link
    ) -> Generator[Token, None, None]:
        """Yield the tokens of a request that is not streamed."""
        said = whole(link, "/completion", body)
        _note(told, said)
        told.finish = _ENDS.get(str(said.get("stop_type")))
        ids, likely = said.get("tokens") or [], said.get("completion_probabilities")
        if not ids and told.finish != "stop":
            raise Lost("it generated nothing")
        yield from _tokens(ids, likely, body.get("n_probs"))

    def _body(self, order: Order, slot: int, *, may_reuse: bool) -> dict[str, Any]:
        params = order.params
        body: dict[str, Any] = {
            "prompt": list(order.token_ids),
            "n_predict": order.most_tokens,
            "temperature": params.temperature,
            "seed": order.seed % _MOST_SEED,
            "top_k": params.top_k,
            "top_p": params.top_p,
            "min_p": params.min_p,
            "repeat_penalty": params.repetition_penalty,
            "repeat_last_n": len(order.token_ids) + order.most_tokens,
            "samplers": list(_ORDER),
            "ignore_eos": params.ignore_eos,
            "stream": True,
            "return_tokens": True,
            "timings_per_token": True,
            "cache_prompt": may_reuse,
            "id_slot": slot,
        }
        biases = dict(params.logit_bias)
        if order.allowed is not None:  # llama-server has no other way to say so
            biases |= {token: biases.get(token, 0.0) + _ALLOWED_BIAS for token in order.allowed}
        biases |= dict.fromkeys(order.banned, -float("inf"))
        if biases:
            body["logit_bias"] = [
                [token, False if bias == -float("inf") else bias] for token, bias in biases.items()
            ]
        if params.logprobs is not None:
            body["n_probs"] = max(1, params.logprobs)
        if order.grammar is not None:
            body["json_schema"] = json.loads(order.grammar.source)
        return body


def _note(told: Told, event: Mapping[str, Any]) -> None:
    if isinstance(timings := event.get("timings"), Mapping):
        told.reused_tokens = timings.get("cache_n")
        told.prompt_tokens = timings.get("cache_n", 0) + timings.get("prompt_n", 0)


def _tokens(ids: list[int], said: Any, alternatives: int | None) -> list[Token]:
    """
    Return tokens with how likely they were, where that was asked for.

    Raises:
        InvalidParameterError: It is not told: of the tokens of an unfinished character nothing is.
    """
    if alternatives is None:
        return [(token, None) for token in ids]
    told = said if isinstance(said, list) else []
    if len(told) < len(ids) or any(
        one["id"] != token for token, one in zip(ids, told, strict=False)
    ):
        raise InvalidParameterError(
            "llama-server does not tell how likely the tokens are that make one character together: leave "
            "logprobs out, or take vLLM.",
            param="logprobs",
        )
    return [
        (token, _likelihood(token, one, alternatives))
        for token, one in zip(ids, told, strict=False)
    ]


def _likelihood(token: int, said: Mapping[str, Any], alternatives: int) -> Likelihood:
    top = tuple((one["id"], one["logprob"]) for one in said.get("top_logprobs") or ())
    return Likelihood(token, said["logprob"], top[:alternatives])
