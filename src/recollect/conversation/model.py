"""
A loaded model: everything that its sessions share.

Here a runtime, a tokenizer, an engine and a journal are put together; `loading` finds them. A model
also reads texts in advance (`warm`): the KV of a system prompt, or of the beginning of a first message,
is computed once and pinned on disk, without the text.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Self

from recollect.conversation.conversation import Conversation
from recollect.conversation.formats import load_tokenizer
from recollect.conversation.matching import KnownMessages, MessageIndex, RememberedReplies
from recollect.conversation.prompt import PromptEncoder
from recollect.conversation.session import Session
from recollect.conversation.tools import NO_TOOLS, ToolChoice, Tools
from recollect.conversation.tree import Overflow, Tree
from recollect.encryption import Cipher
from recollect.engine.engine import Engine, pool_size
from recollect.engine.grammar import Grammars
from recollect.engine.pinning import PublicPrefixes, Published, pin_on_disk, require_tier
from recollect.errors import ConversationError, UnknownConversationError
from recollect.journal.checkpoints import Checkpoint, Checkpoints
from recollect.journal.journal import JOURNAL_NAME, Journal
from recollect.journal.records import DEFAULT_TIP, ConversationInfo, Page, require_name
from recollect.kv.blocks import chained_keys
from recollect.kv.disk import DiskStore
from recollect.kv.record import Pin
from recollect.models.catalog import LocalModel
from recollect.runtime.base import PagedRuntime
from recollect.text.template import ChatTemplate
from recollect.text.tokenizer import Tokenizer
from recollect.types import Message, Profile, Progress, SamplingParams, no_progress

KIND: Final = "warm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Warmed:
    """A text whose KV is kept on disk."""

    name: str
    tokens: int
    """With what the template puts before it."""
    computed_tokens: int
    """Of these, the ones that had to be read; 0: it was warm before."""
    seconds: float
    """That it took."""
    stored_bytes: int
    since: datetime


def warm(
    engine: Engine,
    prompts: PromptEncoder,
    text: str,
    *,
    system: str | None,
    name: str,
    progress: Progress = no_progress,
) -> Warmed:
    """
    Read a text and keep its KV on disk until the name is dropped; see `Model.warm`.

    Raises:
        NameTakenError: Something else is kept under that name. Nothing was changed.
    """
    ids = beginning(prompts, text, system=system)
    require_name(name, "warm text")
    store = require_tier(engine).store
    with engine.lock:
        root = engine.cache.root().key
    prefix = chained_keys(root, ids, engine.block_size, store.chain_secret)[-1].hex()
    for pin in store.pins():
        stored = store.size_of(pin)
        if pin.about.get("prefix") == prefix and stored.tokens >= pin.tokens:
            return _warmed(pin, pin.tokens, stored.stored_bytes)
    former = store.find_pin(name)
    is_older = former is not None and _is_older(former, engine)
    if is_older:
        store.drop_pin(name)
    try:
        made = pin_on_disk(
            engine, ids, "", name=name, about={"kind": KIND, "prefix": prefix}, progress=progress
        )
    except BaseException:
        if former is not None and is_older:
            store.add_pin(former)
        raise
    return _warmed(
        made.pin,
        len(ids),
        made.stored_bytes,
        computed_tokens=made.computed_tokens,
        seconds=made.seconds,
    )


def beginning(prompts: PromptEncoder, text: str, *, system: str | None) -> list[int]:
    """
    Return the token ids that a conversation begins with: its instructions, then a message's text.

    Raises:
        ConversationError: There is neither.
    """
    if not text and system is None:
        raise ConversationError("There is nothing to read: give a text or instructions.")
    tree = Tree()
    path = [] if system is None else [tree.add(tree.root, "system", system)]
    return prompts.encode_typed(path, text).token_ids


def _is_older(pin: Pin, engine: Engine) -> bool:
    """Return whether a pin is an earlier state of a text: of this model, under the same name."""
    identity = require_tier(engine).identity.digest().hex()
    return pin.about.get("kind") == KIND and pin.identity == identity


def _warmed(
    pin: Pin, tokens: int, stored_bytes: int, *, computed_tokens: int = 0, seconds: float = 0.0
) -> Warmed:
    return Warmed(
        name=pin.name,
        tokens=tokens,
        computed_tokens=computed_tokens,
        seconds=seconds,
        stored_bytes=stored_bytes,
        since=datetime.fromtimestamp(pin.created, UTC),
    )


class Model:
    """
    A model that is ready to talk.

    Owns the engine and with it all KV memory, and what finds messages again. Sessions of one model
    may be used from different threads; their forward passes are shared.
    """

    def __init__(
        self,
        local: LocalModel,
        runtime: PagedRuntime,
        *,
        profile: Profile,
        home: Path,
        kv_memory: int | None = None,
        store: DiskStore | None = None,
        cipher: Cipher | None = None,
    ) -> None:
        """
        Put together what was loaded; `load` is the usual way.

        Args:
            local: What the model is on disk.
            runtime: Runs it; owned by the model from now on.
            profile: That the runtime was made for.
            home: Where the journal is.
            kv_memory: As in `load`.
            store: Where KV is kept below memory, closed with the model; None: nowhere.
            cipher: Of an encrypted home; None: it is not encrypted.
        """
        self.name: Final = local.name
        self.local: Final = local
        """What it is on this disk."""
        self._home = home
        self._cipher = cipher
        self._lock = threading.RLock()
        self._opening = threading.Lock()  # of the journal, which others may hold
        self._journal: Journal | None = None
        self.known: Final = KnownMessages()
        """What was said, for messages that come as text to be found again."""
        self.profile: Final = profile
        self.tokenizer: Final[Tokenizer] = load_tokenizer(local)
        self.template: Final = ChatTemplate(
            local.chat_template,
            bos_token=local.bos_token,
            eos_token=local.eos_token,
            is_own=local.folder is None,
        )
        self.weights_fingerprint: Final = local.fingerprint
        self.prompts: Final = PromptEncoder(
            self.template, self.tokenizer, fingerprint=local.fingerprint
        )
        self.engine: Final = Engine(
            runtime,
            num_blocks=pool_size(runtime.info, kv_memory),
            eos_token_ids=local.eos_token_ids,
            fingerprint=local.fingerprint,
            store=store,
        )
        self.grammars: Final = Grammars(self.tokenizer, vocab_size=runtime.info.vocab_size)
        """Of which a `Generator` follows one, where its parameters name one."""
        self.public: Final = PublicPrefixes(self.engine)
        """What every namespace reuses; see `publish`."""
        self.fingerprint: Final = f"{local.fingerprint}/{runtime.info.name}"
        self.engine.start()

    @property
    def context_length(self) -> int:
        """Return the most tokens that one conversation may have."""
        return self.engine.info.context_length

    @property
    def journal(self) -> Journal:
        """Return the journal that named conversations are kept in; opened when first needed."""
        with self._opening:
            if self._journal is None:
                self._journal = Journal.open(self._home / JOURNAL_NAME, cipher=self._cipher)
            return self._journal

    @property
    def places(self) -> Checkpoints:
        """
        Return what keeps checkpoints.

        Raises:
            StoreError: No KV is kept on disk here, or the journal cannot be used.
        """
        return Checkpoints(require_tier(self.engine).store, self.journal)

    def session(
        self,
        system: str | None = None,
        *,
        params: SamplingParams | None = None,
        namespace: str = "",
        keep: bool = False,
        name: str | None = None,
        overflow: Overflow = "error",
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: ToolChoice = "auto",
        parallel_tool_calls: bool = True,
        template_options: Mapping[str, Any] | None = None,
    ) -> Session:
        """
        Begin a conversation.

        Args:
            system: Instructions before the first message; None: what the template says without.
            params: How replies are sampled unless a call says otherwise; None: greedy.
            namespace: KV is reused, and messages are found again, within it and never across.
            keep: Whether turns are kept in the journal, from the first on.
            name: Of the conversation in the journal, and then it is kept; None: the journal finds one.
            overflow: What happens when the context is full.
            tools: What replies may call, each as OpenAI's API describes one; needs the extra
                `recollect-llm[grammar]`.
            tool_choice: `none`, `auto`, `required`, or the name of the tool that is called; as OpenAI's
                API names one, where it is called like one of these.
            parallel_tool_calls: Whether one reply may have several calls.
            template_options: What the model's chat template can be told besides, by its own names, such
                as `{"enable_thinking": False}`.

        Raises:
            InvalidParameterError: A tool cannot be one, or the choice is none.
            NameTakenError: There is a conversation of that name.
            StoreError: The journal cannot be used.
        """
        offered = Tools.of(tools, tool_choice, parallel=parallel_tool_calls)
        conversation = self._conversation(namespace)
        if keep or name is not None:
            conversation.keep_in(self.journal, None if name is None else require_name(name))
        tip = conversation.tree.root
        if system is not None:
            tip = conversation.add_unkept(tip, {"role": "system", "content": system})
            conversation.set_tip(DEFAULT_TIP, tip)
        return Session(
            self,
            conversation,
            tip,
            params or SamplingParams(),
            namespace=namespace,
            name=DEFAULT_TIP,
            overflow=overflow,
            tools=offered,
            template_options=template_options,
        )

    def session_from(
        self,
        messages: Sequence[Message],
        *,
        params: SamplingParams | None = None,
        namespace: str = "",
        overflow: Overflow = "error",
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: ToolChoice = "auto",
        parallel_tool_calls: bool = True,
        template_options: Mapping[str, Any] | None = None,
    ) -> Session:
        """
        Return a session at the end of messages that came as text.

        What of them is known from an earlier session of the namespace is taken over as it was
        generated; what is said after them is not kept in the journal. `respond(None)` answers the
        last one, if it is a user's or a tool's, and goes on with it, if it is the assistant's.

        Args:
            messages: The whole conversation, from the first on.
            params, namespace, overflow, tools, tool_choice, parallel_tool_calls, template_options: As in
                `session`.

        Raises:
            ConversationError: There are no messages.
            InvalidParameterError: A message lacks something, a tool cannot be one, or the choice is
                none.
        """
        offered = NO_TOOLS
        if tools or tool_choice != "auto":
            offered = Tools.of(tools, tool_choice, parallel=parallel_tool_calls)
        if not messages:
            raise ConversationError("There are no messages: give at least one.")
        messages = self.template.with_thoughts(messages)
        index = self._index(namespace)
        found = index.find(messages)
        change = index.change(messages, found)
        # A conversation of its own, which goes when the session does: what is said in others stays
        # apart, and what comes as text is no part of a conversation that is kept.
        conversation = self._conversation(namespace)
        tip = conversation.tree.root if found is None else conversation.take_over(found)
        tip = conversation.add_unkept(tip, *messages[0 if found is None else found.messages :])
        return Session(
            self,
            conversation,
            tip,
            params or SamplingParams(),
            namespace=namespace,
            overflow=overflow,
            change=change,
            tools=offered,
            template_options=template_options,
            begun=tip if tip.role == "assistant" else None,
        )

    def sessions(self) -> list[ConversationInfo]:
        """Return what is kept, the last used first."""
        return self.journal.conversations()

    def resume(
        self,
        name: str | None = None,
        *,
        tip: str = DEFAULT_TIP,
        checkpoint: str | None = None,
        params: SamplingParams | None = None,
        overflow: Overflow = "error",
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: ToolChoice = "auto",
        parallel_tool_calls: bool = True,
        template_options: Mapping[str, Any] | None = None,
    ) -> Session:
        """
        Go on with a conversation that is kept.

        Args:
            name: None: that of the checkpoint, or the one used last.
            tip: At which of its named tips.
            checkpoint: To which the tip is moved then; None: it stays where it is.
            params, overflow, tools, tool_choice, parallel_tool_calls, template_options: As in
                `session`.

        Raises:
            InvalidParameterError: A tool cannot be one, or the choice is none.
            UnknownConversationError: There is none of that name, or none at all.
            ConversationError: It has no such tip.
            UnknownCheckpointError: There is no checkpoint of that name.
            UnknownNodeError: It is of another conversation than *name*.
        """
        offered = Tools.of(tools, tool_choice, parallel=parallel_tool_calls)
        if name is None and checkpoint is not None:
            name = self.places.find(checkpoint).conversation
        if name is None:
            kept = self.journal.conversations(page=Page(limit=1))
            if not kept:
                raise UnknownConversationError("No conversation is kept yet: start one first.")
            name = kept[0].name
        conversation = self.conversation(name)
        if tip not in conversation.tips:
            raise ConversationError(
                f"{name!r} has no branch {tip!r}: choose one of {', '.join(conversation.tips)}."
            )
        session = Session(
            self,
            conversation,
            conversation.tips[tip],
            params or SamplingParams(),
            name=tip,
            overflow=overflow,
            tools=offered,
            template_options=template_options,
        )
        if checkpoint is not None:
            session.return_to(checkpoint)
        return session

    def warm(
        self,
        text: str = "",
        *,
        system: str | None = None,
        name: str,
        progress: Progress = no_progress,
    ) -> Warmed:
        """
        Read a text once and keep its KV on disk, so that first messages which begin so start warm.

        Args:
            text: What they begin with; empty: only the instructions.
            system: Instructions before it.
            name: Of what is kept; a text that has changed takes the place of the one before.
            progress: Called with tokens while they are read.

        Raises:
            NameTakenError: Something else is kept under that name.
            StoreError: No KV is kept on disk here, or there is no room for it.
            ContextFullError: It does not fit the context.
        """
        return warm(self.engine, self.prompts, text, system=system, name=name, progress=progress)

    def publish(self, system: str | None = None, text: str = "") -> Published:
        """
        Read instructions, and what a first message begins with, for the sessions of all namespaces.

        Whatever begins so starts warm, until `unpublish` or `close`; what follows stays apart. Only
        for what everybody may know: who tries texts out can tell that this one is public.

        Raises:
            ConversationError: There is neither.
            MemoryLimitError: It does not fit the context, or half of the memory for KV.
        """
        return self.public.publish(beginning(self.prompts, text, system=system))

    def unpublish(self, system: str | None = None, text: str = "") -> bool:
        """Let no other namespace reuse what was published with these values; return whether it was."""
        return self.public.unpublish(beginning(self.prompts, text, system=system))

    def checkpoints(self) -> list[Checkpoint]:
        """
        Return the places that `Session.checkpoint` has kept, by name; also those of other models.

        Raises:
            StoreError: No KV is kept on disk here, or it cannot be read.
        """
        return self.places.all()

    def drop_checkpoint(self, name: str) -> None:
        """
        Let the KV of a checkpoint be evicted; the conversation stays as it is.

        Raises:
            UnknownCheckpointError: There is none of that name.
            StoreError: No KV is kept on disk here, or it cannot be written.
        """
        self.places.drop(name)

    def conversation(self, name_or_id: str | int, *, namespace: str = "") -> Conversation:
        """
        Return a conversation that is kept; its messages can be found again from now on.

        Raises:
            UnknownConversationError: There is none in that namespace.
        """
        conversation = self._conversation(namespace)
        stored = self.journal.load(name_or_id, namespace=namespace)
        conversation.load(self.journal, stored)
        return conversation

    def close(self) -> None:
        """Give all memory back; its sessions can still be read, not continued."""
        self.engine.close()
        with self._opening:
            if self._journal is not None:
                self._journal.close()
                self._journal = None

    def _conversation(self, namespace: str) -> Conversation:
        tier, fingerprint = self.engine.tier, self.weights_fingerprint
        return Conversation(
            model=self.name,
            fingerprint=fingerprint,
            index=self._index(namespace),
            remembered=None if tier is None else RememberedReplies(tier, fingerprint, namespace),
            namespace=namespace,
        )

    def _index(self, namespace: str) -> MessageIndex:
        return MessageIndex(self.known, namespace)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
