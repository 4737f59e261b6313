"""
A loaded model, and warm texts.

`Model` owns a runtime, a tokenizer, an engine and a journal, which its sessions share; `loading` makes
one. `warm` computes the KV of a system prompt, or of the beginning of a first message, and pins it on disk
without the text.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from recollect.conversation.conversation import Conversation
from recollect.conversation.costs import Costs, GoingOn
from recollect.conversation.feed import Feed, Hook
from recollect.conversation.formats import load_tokenizer
from recollect.conversation.matching import KnownMessages, MessageIndex, RememberedReplies
from recollect.conversation.prompt import PromptEncoder
from recollect.conversation.session import Session
from recollect.conversation.tools import NO_TOOLS, ToolChoice, Tools
from recollect.conversation.tree import Node, Overflow, Tree
from recollect.encryption import Cipher
from recollect.engine.budget import pool_size
from recollect.engine.decoder import Decoder
from recollect.engine.draft_model import DraftModel, SmallModel
from recollect.engine.engine import Engine
from recollect.engine.grammar import GrammarNotes, Grammars
from recollect.engine.pinning import PublicPrefixes, Published, pin_on_disk, require_tier
from recollect.engine.tier import DiskTier
from recollect.errors import ConversationError, UnknownConversationError
from recollect.journal.conversation_files import path_from_json
from recollect.journal.home import Checkpoint, Checkpoints
from recollect.journal.journal import JOURNAL_NAME, Journal
from recollect.journal.records import DEFAULT_TIP, ConversationInfo, Hit, Page, require_name
from recollect.kv.disk import DiskStore
from recollect.kv.record import Pin, StoredReply, chained_keys
from recollect.models.catalog import LocalModel
from recollect.runtime.base import PagedRuntime
from recollect.text import tool_formats
from recollect.text.template import ChatTemplate
from recollect.text.tokenizer import Tokenizer
from recollect.types import Message, Profile, Progress, SamplingParams, no_progress

if TYPE_CHECKING:
    from recollect.remote.replicas import Replica  # loads HTTP, which few need

KIND: Final = "warm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Warmed:
    """A warm text: its KV is pinned on disk."""

    name: str
    tokens: int
    """Of the text, and of what the template puts before it."""
    computed_tokens: int
    """Those of `tokens` that had to be computed; 0: the text was warm before."""
    seconds: float
    """How long computing and writing took."""
    stored_bytes: int
    """Size of its blocks on disk, those that it shares with others included."""
    since: datetime
    """When it was pinned."""


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
    Compute the KV of a text and pin it on disk until the name is unpinned; see `Model.warm`.

    Raises:
        NameTakenError: A checkpoint, or a warm text of another model, has that name. Nothing was
            changed.
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
        ConversationError: Both are empty.
    """
    if not text and system is None:
        raise ConversationError("There is nothing to read: give a text or instructions.")
    tree = Tree()
    path = [] if system is None else [tree.add(tree.root, "system", system)]
    return prompts.encode_typed(path, text).token_ids


def _is_older(pin: Pin, engine: Engine) -> bool:
    """Return whether a pin is a warm text of this model, which a new text of its name replaces."""
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


class _Notes(GrammarNotes):
    """The grammars that were used last with a model, in the KV store: as secret as replies there."""

    def __init__(self, tier: DiskTier, fingerprint: str) -> None:
        self._tier = tier
        self._name = tier.store.reply_name(fingerprint, "", b"grammars")

    def read(self) -> str | None:
        """Return what was noted last; None where nothing was."""
        noted = self._tier.find_reply(self._name)
        return None if noted is None else noted.text

    def write(self, text: str) -> None:
        """Note a text in the place of the one before."""
        self._tier.writer.note_reply(self._name, StoredReply(text, ()))


class Model:
    """
    A loaded model, on which sessions begin.

    Owns the engine, and with it all memory for KV, the journal, and the index that finds known
    messages. Sessions of one model may be used from different threads; forward passes batch them.
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
        tool_format: str | None = None,
        tokenizer: Tokenizer | None = None,
        engine: Engine | None = None,
        draft: bool = False,
        small: SmallModel | None = None,
    ) -> None:
        """
        Make a model from its loaded parts; `load` is the usual way.

        Args:
            local: The model's files and what they say.
            runtime: The runtime; the model owns it from now on.
            profile: The profile that the runtime was made for; with an engine elsewhere it has no effect.
            home: The data folder, which has the journal.
            kv_memory: As in `load`.
            store: The KV store, closed with the model; None: KV is in memory only.
            cipher: The cipher of an encrypted data folder; None: it is not encrypted.
            tool_format: As in `load`.
            tokenizer: Of the model, where it is loaded already.
            engine: What computes, with *runtime*; the model owns it from now on. None: one is made.
            draft: As in `load`, for the engine that is made.
            small: What guesses for it, where *draft* is; None: nothing but what was said.

        Raises:
            ConfigError: As in `load`.
        """
        self.name: Final = local.name
        self.local: Final = local
        """The model's files and what they say."""
        self.sampling: Final = SamplingParams().with_recommended(local.sampling, ())
        """How replies are sampled unless somebody says otherwise: as the model's makers recommend."""
        self._home = home
        self._cipher = cipher
        self._lock = threading.RLock()
        self._opening = threading.Lock()  # held while the journal is opened, which can take long
        self._journal: Journal | None = None
        self.known: Final = KnownMessages()
        """The index of known messages, in which messages that come as text are found."""
        self.profile: Final = profile
        self.tokenizer: Final[Tokenizer] = tokenizer or load_tokenizer(local)
        self.template: Final = ChatTemplate(
            local.chat_template,
            bos_token=local.bos_token,
            eos_token=local.eos_token,
            is_own=local.folder is None,
            tool_format=tool_formats.named(tool_format),
        )
        self.weights_fingerprint: Final = local.fingerprint
        self.prompts: Final = PromptEncoder(
            self.template, self.tokenizer, fingerprint=local.fingerprint
        )
        self.engine: Final = engine or Engine(
            runtime,
            num_blocks=pool_size(
                runtime.info, kv_memory, beside=None if small is None else small.runtime.info
            ),
            eos_token_ids=local.eos_token_ids,
            fingerprint=local.fingerprint,
            store=store,
            draft=draft,
        )
        self.draft_model: Final = None if small is None else small.name
        """The name of the model that guesses for this one; None: there is none."""
        self.kv_bytes = self.engine.info.kv_bytes(self.engine.pool.num_blocks)
        """How much memory KV takes at most, that of the draft model included."""
        if small is not None:
            assert self.engine.drafts is not None, "guesses are wanted, and the runtime takes them"
            self.engine.drafts.guesser = guesser = DraftModel.beside(self.engine, small)
            self.engine.drafts.tasks = self.engine.tasks
            self.kv_bytes += guesser.kv_bytes
        self.grammars: Final = Grammars(
            self.tokenizer,
            vocab_size=runtime.info.vocab_size,
            home=None if local.folder is None else home,
            fingerprint=local.fingerprint,
            notes=None if self.engine.tier is None else _Notes(self.engine.tier, local.fingerprint),
        )
        """Compiled grammars, for the `Generator`s whose parameters have one."""
        self.public: Final = PublicPrefixes(self.engine)
        """Prefixes that every namespace reuses; see `publish`."""
        self._own_feed: Final = Feed(home, cipher)
        self.feed = self._own_feed
        """What tells of its replies; a server has one for all its models."""
        self.feed.attach(self.name, self.engine)
        self.fingerprint: Final = f"{local.fingerprint}/{runtime.info.name}"
        self.engine.start()

    @property
    def context_length(self) -> int:
        """Return the most tokens that a prompt may have together with its reply."""
        return self.engine.info.context_length

    @property
    def elsewhere(self) -> str | None:
        """Return the engine elsewhere that computes, with its version; None: the model runs here."""
        return self.engine.info.name if isinstance(self.engine, Decoder) else None

    def replicas(self) -> "Sequence[Replica]":
        """Return the replicas of the engine elsewhere that computes; none where the model runs here."""
        if not isinstance(self.engine, Decoder):
            return ()
        from recollect.remote.remote_engine import RemoteEngine  # noqa: PLC0415 - loads HTTP

        assert isinstance(self.engine, RemoteEngine), "there is no other of its kind"
        return self.engine.replicas.all

    @property
    def journal(self) -> Journal:
        """Return the journal of saved conversations; opened when first needed."""
        with self._opening:
            if self._journal is None:
                self._journal = Journal.open(self._home / JOURNAL_NAME, cipher=self._cipher)
            return self._journal

    @property
    def checkpoint_store(self) -> Checkpoints:
        """
        Return the checkpoints of this data folder, to find, add and drop.

        Raises:
            StoreError: There is no KV store on disk, or the journal cannot be used.
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
            system: Instructions before the first message; None: those of the template, if it has any.
            params: How replies are sampled unless a call says otherwise; None: as the model's makers
                recommend, and greedily where they say nothing.
            namespace: KV is reused, and messages are found, within a namespace and never across.
            keep: Whether the conversation is saved in the journal, from its first turn on.
            name: The name under which it is saved; None: with *keep*, the journal chooses one.
            overflow: What happens when the context is full.
            tools: What replies may call, each as OpenAI's API describes one; needs the extra
                `recollect-llm[grammar]`.
            tool_choice: `none`, `auto`, `required`, or the name of the tool that is called; as OpenAI's
                API names one, where it is called like one of these.
            parallel_tool_calls: Whether one reply may have several calls.
            template_options: What the model's chat template can be told besides, by its own names, such
                as `{"enable_thinking": False}`.

        Raises:
            InvalidParameterError: A description of a tool, or `tool_choice`, cannot be used.
            NameTakenError: There is a conversation of that name.
            StoreError: The journal cannot be used.
        """
        offered = Tools.of(tools, tool_choice, parallel=parallel_tool_calls)
        if offered.schemas:
            self.grammars.prepare_later()  # while the first question is thought of
        conversation = self._conversation(namespace)
        if keep or name is not None:
            conversation.save_in(self.journal, None if name is None else require_name(name))
        tip = conversation.tree.root
        if system is not None:
            tip = conversation.add_unsaved(tip, {"role": "system", "content": system})
            conversation.set_tip(DEFAULT_TIP, tip)
        return Session(
            self,
            conversation,
            tip,
            params or self.sampling,
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
        Return a session whose tip is the last of messages that came as text.

        What of them is known from an earlier session of the namespace is taken over as it was
        generated; what is said after them is not kept in the journal. `respond(None)` answers the
        last one, if it is a user's or a tool's, and goes on with it, if it is the assistant's.

        Args:
            messages: The whole conversation, from the first on.
            params, namespace, overflow, tools, tool_choice, parallel_tool_calls, template_options: As in
                `session`.

        Raises:
            ConversationError: There are no messages.
            InvalidParameterError: A message lacks a part, or a description of a tool, or
                `tool_choice`, cannot be used.
        """
        offered = NO_TOOLS
        if tools or tool_choice != "auto":
            offered = Tools.of(tools, tool_choice, parallel=parallel_tool_calls)
        if not messages:
            raise ConversationError("There are no messages: give at least one.")
        messages = self.template.with_thoughts(messages)
        index = MessageIndex(self.known, namespace)
        found = index.find(messages)
        change = index.change(messages, found)
        # A conversation of its own, which lasts as long as the session: a client may change any of
        # these messages with its next request, and no saved conversation must change with them.
        conversation = self._conversation(namespace)
        tip = conversation.tree.root if found is None else conversation.take_over(found)
        tip = conversation.add_unsaved(tip, *messages[0 if found is None else found.messages :])
        return Session(
            self,
            conversation,
            tip,
            params or self.sampling,
            namespace=namespace,
            overflow=overflow,
            change=change,
            tools=offered,
            template_options=template_options,
            begun=tip if tip.role == "assistant" else None,
        )

    def session_from_json(self, text: str, **more: Any) -> Session:
        """
        Return a session in a conversation of its own, which begins with what `Session.to_json` returned.

        Replies have the token ids that they were generated as, if by this model, and the KV of these is
        found; another model reads their text. Nothing can tell whether token ids belong to the text:
        take it only from whom you trust. Of a file with several branches, `main` is taken.

        Args:
            text: What `Session.to_json` returned, or a file that `recollect conversations export` wrote.
            more: The arguments of `session` but for *system*. Where it is kept, the messages are saved
                at once; the name in the JSON is not taken.

        Raises:
            ConversationFileError: It is not such a text.
            InvalidParameterError: A description of a tool cannot be used.
            NameTakenError: There is a conversation of that name.
            StoreError: The journal cannot be used.
        """
        path = path_from_json(text, self.weights_fingerprint, self.engine.info.vocab_size)
        session = self.session(None, **more)
        if path:
            conversation = session.conversation
            session.rewind(conversation.add(conversation.tree.root, path, tip=DEFAULT_TIP))
        return session

    def sessions(
        self, *, limit: int | None = None, after: int | None = None
    ) -> list[ConversationInfo]:
        """
        Return the saved conversations, the one used last first.

        Args:
            limit: Most of them to return, at least 1; None: all, read without their texts.
            after: The `id` of the last one of the page before; None: this is the first page.

        Raises:
            InvalidParameterError: There is no such limit.
            UnknownConversationError: There is no conversation *after*.
            StoreError: The journal cannot be read.
        """
        page = Page(limit=-1 if limit is None else limit, after=after)
        return self.journal.conversations(page=page)

    def search(self, words: str, *, limit: int = 20, after: int | None = None) -> list[Hit]:
        """
        Return the messages of saved conversations that have all of some words; see `Journal.search`.

        Raises:
            InvalidParameterError: There is no word in it, or it is too long; there is no such limit.
            StoreError: The journal cannot be read.
        """
        return self.journal.search(words, limit=limit, after=after)

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
        Return a session in a saved conversation.

        Args:
            name: None: that of the checkpoint, or the one used last.
            tip: At which of its named tips.
            checkpoint: To which the tip is moved then; None: it stays where it is.
            params, overflow, tools, tool_choice, parallel_tool_calls, template_options: As in
                `session`.

        Raises:
            InvalidParameterError: A description of a tool, or `tool_choice`, cannot be used.
            UnknownConversationError: There is none of that name, or none at all.
            ConversationError: It has no branch of that name.
            UnknownCheckpointError: There is no checkpoint of that name.
            UnknownNodeError: The checkpoint is in another conversation than *name*.
        """
        offered = Tools.of(tools, tool_choice, parallel=parallel_tool_calls)
        if name is None and checkpoint is not None:
            name = self.checkpoint_store.find(checkpoint).conversation
        if name is None:
            last_used = self.journal.conversations(page=Page(limit=1))
            if not last_used:
                raise UnknownConversationError(
                    "No conversation is saved yet: begin one with a name."
                )
            name = last_used[0].name
        conversation = self.conversation(name)
        if tip not in conversation.tips:
            raise ConversationError(
                f"{name!r} has no branch {tip!r}: give one of {', '.join(conversation.tips)}."
            )
        session = Session(
            self,
            conversation,
            conversation.tips[tip],
            params or self.sampling,
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
        Compute the KV of a text and pin it on disk, for conversations that begin with the text.

        Args:
            text: The beginning of a first message; empty: only the instructions.
            system: The instructions before it; None: none.
            name: The name of the warm text; another text of the same name is replaced.
            progress: Called with the number of tokens while they are computed.

        Raises:
            NameTakenError: A checkpoint, or a warm text of another model, has that name.
            StoreError: There is no KV store on disk, or it has no room for this.
            ContextFullError: The text does not fit the context.
        """
        return warm(self.engine, self.prompts, text, system=system, name=name, progress=progress)

    def publish(self, system: str | None = None, text: str = "") -> Published:
        """
        Make a prefix public: instructions, and the beginning of a first message, for all namespaces.

        Every conversation that begins with it reuses its KV, until `unpublish` or `close`. What
        follows it stays within each namespace. Publish only what everybody may know: a client that
        tries texts out can tell from the time that this one is public.

        Raises:
            ConversationError: Both are empty.
            MemoryLimitError: It does not fit the context, or takes over half of the memory for KV.
        """
        return self.public.publish(beginning(self.prompts, text, system=system))

    def unpublish(self, system: str | None = None, text: str = "") -> bool:
        """Undo `publish` with the same values; return whether the prefix was public."""
        return self.public.unpublish(beginning(self.prompts, text, system=system))

    def checkpoints(
        self, *, limit: int | None = None, after: str | None = None
    ) -> list[Checkpoint]:
        """
        Return the checkpoints that `Session.checkpoint` has saved, sorted by name, of all models.

        Args:
            limit: Most of them to return, at least 1; None: all.
            after: Only those whose names sort behind this one, such as the last of the page before.

        Raises:
            InvalidParameterError: There is no such limit.
            StoreError: There is no KV store on disk, or it cannot be read.
        """
        return self.checkpoint_store.all(limit=limit, after=after)

    def drop_checkpoint(self, name: str) -> None:
        """
        Drop a checkpoint: its KV can be evicted, and its conversation stays as it is.

        Raises:
            UnknownCheckpointError: There is no checkpoint of that name.
            StoreError: There is no KV store on disk, or it cannot be written.
        """
        self.checkpoint_store.drop(name)

    def conversation(self, name_or_id: str | int, *, namespace: str = "") -> Conversation:
        """
        Return a saved conversation, and add its messages to the index of known messages.

        Raises:
            UnknownConversationError: The namespace has none of that name or id.
        """
        conversation = self._conversation(namespace)
        stored = self.journal.load(name_or_id, namespace=namespace)
        conversation.load(self.journal, stored)
        if self.engine.drafts is not None:
            self.engine.drafts.learn(
                namespace, [node.token_ids for node in stored.nodes if node.token_ids]
            )
        return conversation

    def on_event(self, hook: Hook, *, namespace: str = "") -> Callable[[], None]:
        """
        Have a function called with each event of a namespace; return a function that ends that.

        Events tell of conversations, whichever process changes them, of replies, and of KV: see
        `conversation.feed.Event`. The function is called on a thread of the feed's, about 50 ms after
        what it tells of; what it raises is logged and harms nothing.
        """
        return self.feed.on_event(hook, namespace)

    def costs(self, session: Session, nodes: Sequence[Node] | None = None) -> dict[Node, GoingOn]:
        """
        Return what going on from nodes of a session's tree would cost, by this engine's measurements.

        Nothing is computed. The template renders a few paths, however many nodes there are.

        Args:
            session: Its namespace and its tools count.
            nodes: Of its tree; None: all of them.
        """
        wanted = list(session.tree.nodes()) if nodes is None else nodes
        costs = Costs(self, namespace=session.namespace, tools=session.tools.schemas)
        return costs.of(wanted, first=[session.tip, *session.conversation.tips.values()])

    def close(self) -> None:
        """Free all memory. Its conversations can still be read; nothing more can be generated."""
        self._own_feed.close()
        self.grammars.close()
        self.engine.close()
        with self._opening:
            if self._journal is not None:
                self._journal.close()
                self._journal = None

    def _conversation(self, namespace: str) -> Conversation:
        tier, own, form = self.engine.tier, self.weights_fingerprint, self.prompts.tool_format
        return Conversation(
            model=self.name,
            fingerprint=own,
            index=MessageIndex(self.known, namespace),
            remembered=RememberedReplies(tier, own, namespace, form) if tier else None,
            namespace=namespace,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
