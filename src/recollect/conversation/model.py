"""
A loaded model: everything that its sessions share.

The one place where a model on disk, a runtime, a pool and a tokenizer are put together.
"""

from pathlib import Path
from typing import Final, Self

from recollect import config
from recollect.conversation.prompt import PromptEncoder
from recollect.conversation.session import Session
from recollect.conversation.tree import Tree
from recollect.engine.engine import Engine
from recollect.errors import ConfigError
from recollect.models.local import LocalModel
from recollect.models.prepare import prepare
from recollect.models.template import ChatTemplate
from recollect.models.tokenizer import Tokenizer, load_tokenizer
from recollect.runtime.base import PagedRuntime, RuntimeInfo
from recollect.runtime.reference import ReferenceRuntime
from recollect.types import Profile, Progress, SamplingParams, no_progress

DEFAULT_MODEL: Final = "smollm2"
CONTEXTS_IN_POOL: Final = 4
"""By default the pool holds at most this many full contexts: one conversation, and room for its
branches and for others. Pages that are never written take no memory."""


class Model:
    """
    A model that is ready to talk.

    Owns the engine and with it all KV memory. Sessions of one model may be used from different
    threads; their forward passes take turns.
    """

    def __init__(
        self, local: LocalModel, runtime: PagedRuntime, *, profile: Profile, kv_memory: int | None
    ) -> None:
        self.name: Final = local.name
        self.profile: Final = profile
        self.tokenizer: Final[Tokenizer] = load_tokenizer(local)
        self.template: Final = ChatTemplate(
            local.chat_template, bos_token=local.bos_token, eos_token=local.eos_token
        )
        self.prompts: Final = PromptEncoder(self.template, self.tokenizer)
        self.engine: Final = Engine(
            runtime,
            num_blocks=pool_size(runtime.info, kv_memory),
            eos_token_ids=local.eos_token_ids,
        )
        self.fingerprint: Final = f"{local.fingerprint}/{runtime.info.name}"

    @property
    def context_length(self) -> int:
        """Return the most tokens that one conversation may have."""
        return self.engine.info.context_length

    def session(
        self, system: str | None = None, *, params: SamplingParams | None = None
    ) -> Session:
        """
        Begin a conversation.

        Args:
            system: Instructions before the first message; None: what the template says without.
            params: How replies are sampled unless a call says otherwise; None: greedy.
        """
        tree = Tree()
        tip = tree.root if system is None else tree.add(tree.root, "system", system)
        return Session(self, tree, tip, self.engine.new_sequence(), params or SamplingParams())

    def close(self) -> None:
        """Give all memory back; its sessions can still be read, not continued."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def load(
    model: str | Path = DEFAULT_MODEL,
    *,
    profile: Profile = config.DEFAULT_PROFILE,
    kv_memory: int | None = None,
    home: Path | None = None,
    progress: Progress = no_progress,
) -> Model:
    """
    Return a model that is ready to talk, after fetching and converting it where that is needed.

    Args:
        model: A name in the catalog, a `.gguf` file, an OpenVINO folder, `org/repo:file` on the
            hub, or `reference`, which needs no weights and talks nonsense.
        profile: `exact`, `fast` or `small`; see DESIGN in ARCHITECTURE.md.
        kv_memory: Most bytes of KV; None: a quarter of the free memory, at most what
            `CONTEXTS_IN_POOL` full contexts need.
        home: Where models are kept; None: `RECOLLECT_HOME` or the user's data folder.
        progress: Called while fetching and converting.

    Raises:
        ModelError: It cannot be had or read; the subclass says which.
        ConfigError: `kv_memory` holds no block, or there is no such profile.
    """
    config.parse_profile(profile)
    local = prepare(str(model), home=home or config.home(), progress=progress)
    return Model(local, _runtime(local, profile), profile=profile, kv_memory=kv_memory)


def pool_size(info: RuntimeInfo, kv_memory: int | None) -> int:
    """
    Return how many blocks a memory budget in bytes holds.

    Raises:
        ConfigError: Not even one.
    """
    if kv_memory is None:
        blocks_of_contexts = CONTEXTS_IN_POOL * -(-info.context_length // info.block_size)
        budget = config.default_kv_memory_bytes()
        return max(1, min(budget // info.bytes_per_block, blocks_of_contexts))
    blocks = kv_memory // info.bytes_per_block
    if blocks < 1:
        raise ConfigError(
            f"{kv_memory:,} bytes hold no KV block: give at least {info.bytes_per_block:,}."
        )
    return blocks


def _runtime(local: LocalModel, profile: Profile) -> PagedRuntime:
    if local.folder is None:
        return ReferenceRuntime(
            vocab_size=load_tokenizer(local).vocab_size, context_length=local.context_length
        )
    # Here and not above: it takes half a second, which `recollect --help` need not wait for.
    from recollect.runtime.openvino import OpenVinoRuntime  # noqa: PLC0415

    xml = local.folder / "openvino_model.xml"
    return OpenVinoRuntime(xml, profile=profile, context_length=local.context_length)
