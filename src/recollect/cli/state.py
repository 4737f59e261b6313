"""
The state of a chat at the terminal: its sessions by name, the current one, and what replies cost.

`Chat` owns that state. This module also prints it: the end of a resumed conversation at the start,
how to go on at the end, the line under a reply, and `/stats`. It prints to the console that it is
given, does not read input, and knows no commands.
"""

import itertools
import shlex
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Final

import psutil
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from recollect.cli.display import count, format_bytes, format_duration, printable
from recollect.cli.live_reply import show_reply
from recollect.cli.markdown import make_writer
from recollect.conversation.model import Model
from recollect.conversation.session import ReplyStream, Session
from recollect.conversation.tree import Node
from recollect.conversation.turn import Reply, is_cut
from recollect.engine.engine import Engine
from recollect.errors import (
    ConversationError,
    InvalidParameterError,
    StoreError,
    UnknownNodeError,
)
from recollect.journal.records import DEFAULT_TIP, require_name
from recollect.types import SamplingParams, Usage

FIRST_SESSION: Final = DEFAULT_TIP
REGENERATE_TEMPERATURE: Final = 0.7
"""Least temperature of /regenerate: a greedy model would say the same again."""
LONG_PROMPT_TOKENS: Final = 128
"""Fewest computed tokens whose time says how fast prefill is: that of a few is mostly overhead."""
_NOTES: Final = {
    "cancelled": "stopped, /continue goes on",
    "length": "cut at the token limit, /continue goes on",
    "stop": "",
}


@dataclass(slots=True)
class Totals:
    """What the replies of this process have cost."""

    replies: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    best_prefill_tps: float | None = None
    """The fastest prefill of a long prompt; the fastest, so as not to overstate what was saved."""

    def add(self, usage: Usage) -> None:
        """Count a reply."""
        self.replies += 1
        self.reused_tokens += usage.reused_tokens
        self.generated_tokens += usage.generated_tokens
        if usage.prefill_tps is not None and usage.awaited_tokens >= LONG_PROMPT_TOKENS:
            self.best_prefill_tps = max(self.best_prefill_tps or 0.0, usage.prefill_tps)

    @property
    def saved_s(self) -> float | None:
        """Return how long prefill of the reused tokens would have taken, or None where unknown."""
        rate = self.best_prefill_tps
        return None if rate is None else self.reused_tokens / rate


class Chat:
    """
    The state of `recollect chat`.

    Owns the sessions that are open, by name: one for each branch of the conversation, and those of
    other conversations that were begun or loaded since. Used from the main thread, which is where
    Ctrl-C arrives.

    Invariants:
        1. `current` is a key of `sessions`.
    """

    def __init__(
        self,
        model: Model,
        console: Console,
        session: Session,
        *,
        load_model: Callable[[str], Model] | None = None,
        chosen: Collection[str] = (),
        plain: bool = False,
    ) -> None:
        self.model = model
        self.load_model: Final = load_model
        """Loads a model by its name, for `/model`; None: this chat stays with its model."""
        self.chosen = set(chosen)
        """The sampling parameters that somebody asked for; the others are those of the model's makers."""
        self.plain: Final = plain
        """Whether replies are shown as the text that they are, and not as Markdown."""
        self.console: Final = console
        self.params = session.params
        self.current = session.name or FIRST_SESSION
        self.sessions: dict[str, Session] = {self.current: session}
        for name in session.conversation.tips:
            if name != self.current:
                self.sessions[name] = session.branch(name)
        self._names = {key: made.name for key, made in self.sessions.items()}
        self.totals = Totals()
        self.draft = ""
        """What the next prompt begins with, for the user to go on from."""
        self.leaving = False
        self.shows_reasoning = True
        """Whether what the model thinks is shown, and not only that it does."""

    @property
    def session(self) -> Session:
        """Return the current session."""
        return self.sessions[self.current]

    def note(self, text: str) -> None:
        """Print a dim line that is not the model's."""
        self.console.print(printable(text), style="dim", markup=False, highlight=False)

    def tips(self) -> dict[str, Node]:
        """Return the tips of the current conversation's branches, the closed ones too, by name."""
        conversation = self.session.conversation
        here = {
            session.name: name
            for name, session in self.sessions.items()
            if session.conversation is conversation
        }
        tips = {here.get(tip, tip): node for tip, node in conversation.tips.items()}
        return {self.current: self.session.tip} | tips

    def follow_tips(self) -> None:
        """Tell of branches that another program has moved: ours goes on in a branch of its own."""
        for key, session in list(self.sessions.items()):
            was, now = self._names.setdefault(key, session.name), session.name
            if now == was or now is None:
                continue
            self.note(
                f"Another program has moved the branch {was!r}: this chat goes on in the new branch "
                f"{now!r}."
            )
            kept = session.conversation.name
            if kept is not None:
                there = "" if was == FIRST_SESSION else f", then /switch {was}"
                resume = f"recollect chat --resume {shlex.quote(kept)}"
                self.note(f"To go on where the other program is: {resume}{there}")
            name = now if key == was and now not in self.sessions else key
            self.sessions = {name if one is session else k: one for k, one in self.sessions.items()}
            self._names[name] = now
            if self.current == key:
                self.current = name

    def say(self, text: str | None, params: SamplingParams | None = None) -> Reply | None:
        """
        Say something, or have the tip answered, and print the reply.

        Returns:
            The reply; None where it was stopped before anything was said.

        Raises:
            RecollectError: As `Session.stream` does.
        """
        session = self.session
        writer = make_writer(self.console, plain=self.plain)
        reply = show_reply(
            self._starter(session, text, params),
            self.console,
            writer,
            shows_reasoning=self.shows_reasoning,
        )
        if reply is None:
            self.note("The reply was stopped before it began; the conversation is as it was.")
            return None
        self.totals.add(reply.usage)
        cost = Text(printable(usage_line(reply)), "dim")
        self.console.print(Padding(cost, (0, 0, 0, 2), expand=False), highlight=False)
        if reply.ended == "repetition":
            self.note("The reply repeated itself and was ended: /continue goes on.")
        if _is_full(self, reply):
            self.note(f"The context is full. {ways_out(self)}")
        self.console.print()
        return reply

    def say_at(self, node: Node, text: str | None, params: SamplingParams | None = None) -> None:
        """
        Go to a node and say something there; if nothing comes of it, go back.

        Raises:
            RecollectError: As `Session.stream` does. The session is where it was.
        """
        session, before = self.session, self.session.tip
        session.rewind(node)
        try:
            self.say(text, params)
        finally:
            if session.tip is node:
                session.rewind(before)

    def varied_params(self) -> SamplingParams:
        """Return the parameters of a second try: never greedy, and with a new seed."""
        temperature = max(self.params.temperature, REGENERATE_TEMPERATURE)
        return replace(self.params, temperature=temperature, seed=None)

    def add_session(self, name: str, make: Callable[[], Session]) -> None:
        """
        Open a session under a new name and go to it.

        Raises:
            ConversationError: A session of that name is open.
            InvalidParameterError: The name is empty, or has a space or another forbidden character.
        """
        if not name or " " in name:
            raise InvalidParameterError("A branch needs a name without spaces, such as `idea`.")
        require_name(name, "branch")
        if name in self.sessions:
            raise ConversationError(
                f"{name!r} is open in this chat already: take another name, or go there with "
                f"/switch {name}."
            )
        self.sessions[name] = make()
        self.current = name

    def require_session(self, name: str) -> Session:
        """
        Return the open session of that name.

        Raises:
            ConversationError: None has that name.
        """
        if name not in self.sessions:
            wrong = f"There is no branch {name!r}: give" if name else "Give"
            raise ConversationError(f"{wrong} one of {', '.join(self.sessions)}.")
        return self.sessions[name]

    def reopen(self, name: str) -> Session:
        """
        Return the session of that name; if the branch of that name is closed, open it.

        Raises:
            ConversationError: No open session and no branch has that name.
        """
        if name not in self.sessions and name in self.tips():
            self.sessions[name] = self.session.branch(name)
        return self.require_session(name)

    def checkpoint_names(self) -> list[str]:
        """Return what can be loaded; nothing where that cannot be known."""
        try:
            return [made.name for made in self.model.checkpoints()]
        except StoreError:
            return []

    def load(self, checkpoint: str) -> None:
        """
        Go to a checkpoint; that of another conversation is opened beside, under its name.

        Raises:
            UnknownCheckpointError: There is none of that name.
        """
        try:
            self.session.return_to(checkpoint)
        except UnknownNodeError:
            name = "-".join(checkpoint.split())
            name = self._numbered(name) if name in self.sessions else name
            self.add_session(name, lambda: self._resumed(checkpoint))

    def go_on_with(self, model: Model, sessions: dict[str, Session]) -> None:
        """Have another model reply, in sessions of its own under the names of those that are open."""
        assert sessions.keys() == self.sessions.keys(), "each goes on"
        former, self.model = self.sessions, model
        self.sessions = sessions
        self._names = {key: made.name for key, made in sessions.items()}
        for session in former.values():
            session.close()

    def start_anew(self, system: str | None) -> str | None:
        """
        Begin another conversation under the current name.

        Returns:
            The name under which the former one stays open; None if nothing had been said in it.
        """
        name, former = self.current, self.session
        fresh = self.model.session(
            system,
            params=self.params,
            keep=former.conversation.is_saved,
            overflow=former.overflow,
        )
        self.sessions[name] = fresh
        if not former.tip.turns:
            former.close()
            return None
        other = self._numbered(name)
        self.sessions[other] = former
        return other

    def _numbered(self, name: str) -> str:
        """Return the name with the first number that no open session has."""
        numbered = (f"{name}-{number}" for number in itertools.count(1))
        return next(one for one in numbered if one not in self.sessions)

    def _resumed(self, checkpoint: str) -> Session:
        overflow = self.session.overflow
        return self.model.resume(checkpoint=checkpoint, params=self.params, overflow=overflow)

    def _starter(
        self, session: Session, text: str | None, params: SamplingParams | None
    ) -> Callable[[], ReplyStream]:
        return lambda: session.stream(text, params=params)


def ways_out(chat: Chat) -> str:
    """Return what can be done where the context is full."""
    drop = "/set overflow drop-oldest leaves out the oldest turns, "
    can_drop = chat.session.overflow == "error"
    return (
        f"Ways out: {drop if can_drop else ''}/undo and /rewind N go back, /edit N changes a message, "
        "and /new begins a new conversation."
    )


def _is_full(chat: Chat, reply: Reply) -> bool:
    """Return whether a reply has ended because the context was full, and the next cannot begin."""
    tokens = reply.usage.prompt_tokens + reply.usage.generated_tokens
    is_cut = reply.finish_reason == "length" and tokens >= chat.model.context_length
    return is_cut and chat.session.overflow == "error"


def usage_line(reply: Reply) -> str:
    """Return what a reply cost, as the line under it."""
    usage = reply.usage
    note = "" if reply.ended == "repetition" else _NOTES[reply.finish_reason]
    parts = [note, f"{usage.awaited_tokens:,} new"]
    if usage.read_ahead_tokens:
        parts.append(f"{usage.read_ahead_tokens:,} read ahead")
    if usage.reused_tokens:
        parts.append(f"{usage.reused_tokens:,} reused ({_whence(usage)})")
    parts.append(f"first token {format_duration(usage.ttft_s)}")
    if usage.reasoning_tokens:
        parts.append(f"{usage.reasoning_tokens:,} thought")
    if usage.decode_tps is not None:
        guessed = f" ({usage.accepted_tokens:,} guessed right)" if usage.accepted_tokens else ""
        parts.append(f"{usage.decode_tps:,.0f} tok/s{guessed}")
    if usage.difference is not None:
        parts.append(usage.difference.rstrip("."))
    if reply.dropped_turns:
        turns = "turn is" if reply.dropped_turns == 1 else f"{reply.dropped_turns} turns are"
        parts.append(f"the oldest {turns} left out, the context is full")
    return " · ".join(part for part in parts if part)


def _whence(usage: Usage) -> str:
    """Return where the KV of the reused tokens came from."""
    from_memory = usage.reused_tokens - usage.restored_tokens
    if not usage.restored_tokens:
        return "memory"
    return f"{from_memory:,} memory, {usage.restored_tokens:,} disk" if from_memory else "disk"


def statistics(chat: Chat) -> list[tuple[str, str]]:
    """Return names and values, in the order in which they are shown."""
    engine, totals = chat.model.engine, chat.totals
    with engine.lock:  # one moment for all counters
        computed, passes = engine.computed_tokens, engine.forward_passes
        memory, pressure = _memory(engine), _pressure(engine)
    how = chat.model.elsewhere or f"profile {chat.model.profile}"
    turns = sum(node.role == "assistant" for node in chat.session.tree.nodes())
    usage = chat.session.tip.usage
    history = 0 if usage is None else usage["prompt_tokens"] + usage["generated_tokens"]
    return [
        ("model", f"{chat.model.name}, {how}"),
        *([] if chat.model.draft_model is None else [("guessed by", chat.model.draft_model)]),
        ("runtime", engine.info.name),
        ("saved as", _saved_as(chat)),
        (
            "conversation",
            f"{count(turns, 'turn')} in all branches; open: {', '.join(chat.sessions)}",
        ),
        ("context", f"{history:,} of {chat.model.context_length:,} tokens in {chat.current}"),
        ("sampling", _sampling(chat)),
        ("computed", f"{count(computed, 'token')} in {count(passes, 'pass', 'passes')}"),
        (
            "reused",
            f"{totals.reused_tokens:,} tokens in {count(totals.replies, 'reply', 'replies')}",
        ),
        ("time saved", _time_saved(chat)),
        ("KV memory", memory),
        ("KV pressure", pressure),
        *_disk(engine),
        ("process memory", format_bytes(psutil.Process().memory_info().rss)),
    ]


def _sampling(chat: Chat) -> str:
    """Return how the last reply of the branch was sampled; where there is none, how the next will be."""
    usage = chat.session.tip.usage
    used = chat.params.told(chat.params.seed or 0) if usage is None else usage.get("sampling")
    if not isinstance(used, dict) or not used:  # a file that was imported may say anything
        return "greedy"
    shown = ", ".join(f"{name} {value}" for name, value in used.items() if name != "seed")
    if "seed" not in used:
        return printable(f"greedy, {shown}")
    seed = f"; --seed {used['seed']} gives the last reply again" if usage is not None else ""
    return printable(shown + seed)


def _saved_as(chat: Chat) -> str:
    conversation = chat.session.conversation
    if not conversation.is_saved:
        return "not saved"
    return printable(conversation.name or "the date, from the first turn on")


def _memory(engine: Engine) -> str:
    """Return how the blocks are used: by sequences and pins, only by the cache, or not at all."""
    pool, block_bytes = engine.pool, engine.info.bytes_per_block
    with engine.lock:
        cached, used, free = engine.cache.evictable_blocks, pool.used_blocks, pool.free_blocks
    return (
        f"{used - cached:,} blocks in use, {cached:,} cached, {free:,} "
        f"free ({format_bytes(used * block_bytes)} of "
        f"{format_bytes(pool.num_blocks * block_bytes)} filled)"
    )


def _pressure(engine: Engine) -> str:
    with engine.lock:
        pinned = sum(cached.pins > 0 for cached in engine.cache.blocks())
    return (
        f"{engine.cache.evicted_blocks:,} blocks evicted, {engine.preemptions:,} preemptions, "
        f"{pinned:,} blocks pinned"
    )


def _disk(engine: Engine) -> list[tuple[str, str]]:
    """Return what the tier below memory has done, and why it does nothing where that is so."""
    if engine.tier is None:
        why = "--kv-disk 0" if engine.info.reuse.as_bytes else "this runtime keeps KV to itself"
        return [("KV on disk", f"none ({why})")]
    tier = engine.tier.statistics()
    work = (
        f"{tier.restored_tokens:,} tokens restored in {format_duration(tier.restore_s)}, "
        f"{tier.written_blocks:,} blocks written ({format_bytes(tier.written_bytes)}), "
        f"{tier.evicted_blocks:,} evicted"
    )
    misses = ", ".join(f"{count:,} {reason}" for reason, count in tier.misses.items())
    return [
        ("KV on disk", work if tier.error is None else f"off. {printable(tier.error)}"),
        *([("KV refused", f"{misses}: computed instead")] if misses else []),
    ]


def _time_saved(chat: Chat) -> str:
    saved_s, rate = chat.totals.saved_s, chat.totals.best_prefill_tps
    if saved_s is None or rate is None:
        return (
            f"unknown until a prompt of {LONG_PROMPT_TOKENS} new tokens shows how fast prefill is"
        )
    return (
        f"about {format_duration(saved_s)}: the reused tokens at {rate:,.0f} tok/s, the fastest "
        "long prompt of this chat"
    )


_TURNS_SHOWN: Final = 2
_MOST_CHARACTERS: Final = 600
"""Of a message that is shown again: its beginning and its end."""


def welcome(chat: Chat) -> None:
    """Say what is spoken to, and show the end of what was said before."""
    model = chat.model
    guessed = "" if model.draft_model is None else f", guessed by {model.draft_model}"
    where = model.elsewhere or model.profile
    chat.note(f"{model.name}{guessed} · {where} · {model.context_length:,} tokens of context")
    chat.note("? lists commands and keys, Ctrl-D leaves")
    if not chat.session.conversation.is_saved:
        chat.note("Nothing of this chat is saved (--no-save).")
    was_said = any(node.role != "system" for node in chat.session.tree.nodes())
    if was_said and chat.session.conversation.name is not None:
        _show_where_it_stands(chat)


def farewell(chat: Chat) -> None:
    """Say how to go on with the conversation, if it is saved."""
    conversation = chat.session.conversation
    has_turns = any(node.role == "assistant" for node in conversation.tree.nodes())
    if not conversation.is_saved or conversation.journal_id is None or not has_turns:
        return
    try:
        name = conversation.current_name()  # somebody may have renamed it since
    except StoreError:
        name = conversation.name
    if name is None:
        chat.note("Another program has deleted this conversation: nothing of it is saved.")
    else:
        chat.note(f"Saved. To go on: recollect chat --resume {shlex.quote(name)}")


def branches(chat: Chat) -> str:
    """Return the named tips of the conversation with their turns, for one line."""
    parts = []
    for name, tip in chat.tips().items():
        is_open = name in chat.sessions
        state = " (here)" if name == chat.current else "" if is_open else " (closed)"
        parts.append(f"{name} {count(tip.turns, 'turn')}{state}")
    return " · ".join(parts)


def _show_where_it_stands(chat: Chat) -> None:
    conversation = chat.session.conversation
    chat.note(f"Resumed {conversation.name!r}: {branches(chat)}")
    own = chat.model.weights_fingerprint
    foreign = sum(node.fingerprint not in {None, own} for node in chat.session.path())
    if foreign:
        # A file that was replaced under the same name is another model too.
        name = conversation.other_model
        writer = "another model" if name in {None, chat.model.name} else name
        chat.note(
            f"{count(foreign, 'reply', 'replies')} of this branch came from {writer}: "
            f"{chat.model.name} reads the text once before it goes on."
        )
    _show_last_turns(chat)


def _show_last_turns(chat: Chat) -> None:
    path = [node for node in chat.session.path() if node.role != "system"]
    asked = [index for index, node in enumerate(path) if node.role == "user"]
    if not asked:
        return
    first = asked[-_TURNS_SHOWN:][0]
    if first:
        chat.note("…")
    for node in path[first:]:
        said = _shorten(printable(node.content).strip())
        line = f"you: {said}" if node.role == "user" else said
        chat.console.print(Text(line, "dim"), highlight=False)
    if path[-1].role == "user":
        chat.note(
            "This message has no reply yet: /regenerate generates one, and another message "
            "replaces it."
        )
    elif is_cut(path[-1]):
        how = "stopped" if path[-1].finish_reason == "cancelled" else "cut"
        chat.note(f"The last reply was {how}: /continue goes on with it.")


def _shorten(text: str) -> str:
    if len(text) <= _MOST_CHARACTERS:
        return text
    half = _MOST_CHARACTERS // 2
    return f"{text[:half].rstrip()} … {text[-half:].lstrip()}"
