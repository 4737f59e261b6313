"""
Load a model by its name, and move KV between models and portable files.

`load` fetches and converts a model if that is needed, and opens its KV store. `collect` returns the KV of
a branch for a portable file, `why_not` says why a model cannot use the KV of a file, and `bring_in` writes
that KV to a model's store. `journal.portable` reads and checks the files themselves.
"""

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from recollect import config, encryption, files
from recollect.conversation.formats import RunOptions, load_runtime, load_tokenizer
from recollect.conversation.model import Model
from recollect.conversation.session import Session
from recollect.encryption import KV_PURPOSE, Cipher
from recollect.engine.draft_model import SmallModel
from recollect.engine.drafts import Drafts
from recollect.engine.pinning import in_memory, require_tier
from recollect.errors import ConfigError, DraftModelError, StoreError, UnsupportedModelError
from recollect.journal.portable import Branch, BranchHead, CarriedBlock, PortableFile
from recollect.kv.disk import STORE_FOLDER, DiskStore, NewBlock, is_there, open_existing
from recollect.kv.environment import translated
from recollect.kv.record import Key, chained_key
from recollect.models.catalog import DEFAULT_MODEL, LocalModel
from recollect.models.prepare import Llama, prepare
from recollect.models.tokenizer_folder import prepare_tokenizer
from recollect.runtime.base import PagedRuntime
from recollect.text import tool_formats
from recollect.text.tokenizer import Tokenizer
from recollect.types import Profile, Progress, RuntimeChoice, no_progress

_log = logging.getLogger(__name__)


def load(
    model: str | os.PathLike[str] = DEFAULT_MODEL,
    *,
    profile: Profile = config.DEFAULT_PROFILE,
    kv_memory: int | None = None,
    kv_disk: int | None = None,
    store: DiskStore | None = None,
    home: str | os.PathLike[str] | None = None,
    cipher: Cipher | None = None,
    allow_native_code: str | None = None,
    long_context: bool = False,
    runtime: RuntimeChoice = "auto",
    device: str | None = None,
    gpu_layers: int | None = None,
    kv_type: str | None = None,
    progress: Progress = no_progress,
    offline: bool | None = None,
    tool_format: str | None = None,
    engine: str | None = None,
    draft: bool = True,
    draft_model: str | os.PathLike[str] | None = None,
) -> Model:
    """
    Return a loaded model, after fetching and converting it if that is needed.

    Args:
        model: A name in the catalog, a `.gguf` file, an OpenVINO or ONNX GenAI folder,
            `org/repo:file` on the hub or in its cache, a model that another program keeps, such as
            `ollama:llama3.2` (`recollect models` lists them), or `reference`, which has no weights
            and replies nonsense.
        profile: `exact`, `fast` or `small`; see ARCHITECTURE.md. An ONNX GenAI folder computes in
            the precision that it was converted with, whatever the profile.
        kv_memory: Most bytes of KV in memory; None: a quarter of the free memory, and at most what
            four full contexts need.
        kv_disk: Most bytes of KV on disk, shared by all models of the data folder; 0: no KV on disk.
            None: 10 GB or a tenth of the free disk, whichever is smaller.
        store: An open KV store to use instead of the data folder's; closed with the model.
        home: The data folder, with models, journal and KV; None: `RECOLLECT_HOME` or the user's own.
        cipher: The cipher of an encrypted data folder; None: the key comes from the keyring or from
            `RECOLLECT_PASSPHRASE`.
        allow_native_code: The one native library that an ONNX GenAI folder may load, which can then
            do anything that you can: the name of a file in the folder, or a path to one that
            belongs to the vendor's software. None: folders that need one are refused.
        long_context: Whether a model with LongRoPE (Phi-3 128k, Phi-3.5, Phi-4-mini) uses the factors
            for its long context, with which it reads short texts a little worse. If not, it has the
            context that it was trained on first.
        runtime: What runs a GGUF file: `openvino`, which it is converted for; `llama`, which is llama.cpp;
            or `auto`: OpenVINO if it reads the file exactly, unless llama.cpp has a graphics card.
        device: What computes, such as `CPU` or `CUDA0`; `recollect doctor` lists what there is. None: the
            runtime's choice, which is a graphics card for llama.cpp where there is one.
        gpu_layers: For llama.cpp, layers in the memory of graphics cards; None: as many as fit.
        kv_type: For llama.cpp, the type of keys and values; None: as the profile says.
        progress: Called while the model is fetched and converted.
        offline: Whether to refuse a model that is not on this disk, and not fetch it; None: as
            `RECOLLECT_OFFLINE` says, and no if that is not set.
        tool_format: The name of the format in which the model writes calls of tools, such as `hermes`;
            see `docs/models.md`. None: the one that the model's chat template shows.
        engine: An engine elsewhere that computes, as `vllm=URL[,URL...]` or `llama=URL`; see
            `docs/scale.md`. *model* then gives the tokenizer and the chat template, and may be a Hugging
            Face folder; no weights are loaded, and what is about KV here cannot be given. None: the model
            runs here.
        draft: Whether replies that repeat what was said may take several tokens from one pass, where the
            runtime can; see `docs/drafts.md`. An engine elsewhere decides that itself.
        draft_model: A smaller model with the same vocabulary, named as *model* is, that guesses what comes
            next where nothing that was said tells; see `docs/drafts.md`. It takes memory of its own, and its
            KV is part of `kv_memory`. None: none is asked.

    Raises:
        EngineUnavailableError: No engine answers.
        ModelError: The model cannot be fetched or read; the subclass says which.
        DraftModelError: The draft model has another vocabulary, or the runtime cannot use its guesses.
        ConfigError: `kv_memory` or `kv_disk` is less than a block, there is no such profile or format of
            calls, the model has no long context, or the data folder is encrypted with another key.
        StoreError: The KV store cannot be opened.
    """
    config.parse_profile(profile)
    tool_formats.named(tool_format)
    home = config.data_folder(home)
    if cipher is None:
        cipher = encryption.unlock(home)
    else:
        encryption.require(home, cipher)
    _warn_of_writers(home)
    if engine is not None:
        given = {
            "kv_memory": kv_memory,
            "kv_disk": kv_disk,
            "device": device,
            "gpu_layers": gpu_layers,
            "kv_type": kv_type,
            "allow_native_code": allow_native_code,
            "long_context": long_context or None,
            "runtime": None if runtime == "auto" else runtime,
            "store": store,
            "draft_model": draft_model,
        }
        _require_none_of(given)
        return _with_engine(
            engine, str(model), home, profile, cipher, tool_format, progress, offline=offline
        )
    require_guesses(draft_model, profile, draft=draft)
    found = partial(
        prepare,
        home=home,
        allow_native_code=allow_native_code,
        progress=progress,
        offline=offline,
        runtime=runtime,
        llama=partial(which_llama, device),
        llama_build=llama_build,
    )
    local = found(str(model))
    if long_context:
        local = local.for_long_context()
    options = RunOptions(
        profile=profile, home=home, device=device, gpu_layers=gpu_layers, kv_type=kv_type
    )
    tokenizer = None
    if draft_model is not None:
        tokenizer, smaller = load_tokenizer(local), found(str(draft_model))
        _require_one_vocabulary(local, tokenizer, smaller)
    loaded = load_runtime(local, options)
    small = None
    if draft_model is not None:
        small = _small_model(
            smaller, loaded, replace(options, profile="fast", kv_type=None, gpu_layers=None)
        )
    store = store or _store(home, kv_disk, cipher, loaded)
    try:
        return Model(
            local,
            loaded,
            profile=profile,
            home=home,
            kv_memory=kv_memory,
            store=store,
            cipher=cipher,
            tool_format=tool_format,
            tokenizer=tokenizer,
            draft=draft,
            small=small,
        )
    except BaseException:
        if store is not None:
            store.close()
        raise


def require_guesses(
    draft_model: str | os.PathLike[str] | None, profile: Profile, *, draft: bool
) -> None:
    """
    Check that a draft model is given only where guesses can be used.

    Raises:
        ConfigError: One is, and guesses are turned off, or the profile has none.
    """
    if draft_model is None:
        return
    if not draft:
        raise ConfigError(
            "A draft model is of no use where guesses are turned off (--no-draft, draft=False): leave one of "
            "both out."
        )
    if profile == "small":
        raise ConfigError(
            "A draft model is of no use in the profile small, which cannot take a wrong guess back: leave it "
            "out, or give another profile."
        )


def _require_one_vocabulary(local: LocalModel, tokenizer: Tokenizer, smaller: LocalModel) -> None:
    """
    Check that the ids that two models both have stand for the same, and that marks of turns are among them.

    Raises:
        DraftModelError: They do not, or are not.
    """
    vocabulary = tokenizer.vocabulary
    one, other = vocabulary.token_bytes, load_tokenizer(smaller).vocabulary.token_bytes
    shared = min(len(one), len(other))  # models of one family differ in how they pad it
    template = (local.chat_template or "").encode()
    marks = (id_ for id_ in vocabulary.special_token_ids if id_ >= shared)
    if one[:shared] != other[:shared] or any(one[id_] and one[id_] in template for id_ in marks):
        raise DraftModelError(
            f"{smaller.name} cannot guess for {local.name}, because it has other tokens: give a smaller "
            "model of the same family."
        )
    if (size := _weights(smaller)) and size >= _weights(local):
        _log.warning(
            "%s is no smaller than %s, so that its guesses cost what they save: give a smaller model.",
            smaller.name,
            local.name,
        )


def _weights(local: LocalModel) -> int:
    """Return the size of a model's weights on disk in bytes; 0: it has none of its own."""
    if local.folder is None:
        return 0
    graph = local.folder / local.graph
    return sum(one.stat().st_size for one in (graph, graph.with_suffix(".bin")) if one.is_file())


def _small_model(smaller: LocalModel, large: PagedRuntime, options: RunOptions) -> SmallModel:
    """
    Return a model that guesses, loaded. In `fast`, since no reply depends on its numbers.

    Raises:
        DraftModelError: The larger model's runtime cannot take back what was guessed wrong.
    """
    if Drafts.over(large.info) is None:
        large.close()
        raise DraftModelError(
            f"{smaller.name} cannot guess here, because {large.info.name} cannot take a wrong guess back "
            "(docs/drafts.md says where that works): leave the draft model out."
        )
    return SmallModel(smaller.name, smaller.fingerprint, load_runtime(smaller, options))


def _require_none_of(given: Mapping[str, object]) -> None:
    """
    Check that nothing was said about KV or computing here.

    Raises:
        ConfigError: Something was. No KV on disk, 0, is what an engine elsewhere has.
    """
    said = [name for name, value in given.items() if value not in (None, 0)]
    if said:
        raise ConfigError(
            f"{', '.join(said)} cannot go with an engine elsewhere, which has the KV and the weights: leave "
            "it out, and tell the engine."
        )


def _with_engine(
    said: str,
    name: str,
    home: Path,
    profile: Profile,
    cipher: Cipher | None,
    tool_format: str | None,
    progress: Progress,
    *,
    offline: bool | None,
) -> Model:
    """Return a model that an engine elsewhere computes."""
    from recollect.remote.probe import (  # noqa: PLC0415 - loads HTTP, which few need
        connect,
        require_there,
    )

    require_there(said)  # before anything is fetched
    local = prepare_tokenizer(
        name,
        home=home,
        has_llama=lambda: which_llama() != "missing",
        progress=progress,
        offline=offline,
    )
    tokenizer = load_tokenizer(local)
    engine = connect(said, local, tokenizer, home)
    return Model(
        local,
        engine.runtime,
        profile=profile,
        home=home,
        cipher=cipher,
        tool_format=tool_format,
        tokenizer=tokenizer,
        engine=engine,
    )


def which_llama(device: str | None = None) -> Llama:
    """
    Return whether llama.cpp is here, and whether it is the quicker one since it has a graphics card.

    Args:
        device: The one that was asked for; with the processor no card counts.
    """
    from recollect.runtime.llama_library import is_there, library  # noqa: PLC0415 - part of an extra

    try:
        if not is_there():
            return "missing"
        uses_cards = device is None or device.upper() != "CPU"
        is_quicker = uses_cards and any(one.is_graphics for one in library().devices())
    except UnsupportedModelError as error:  # models that OpenVINO runs do without it
        _log.warning("%s", error)
        return "missing"
    return "quicker" if is_quicker else "there"


def llama_build() -> str:
    """Return which build of llama.cpp runs models here; empty: there is none."""
    from recollect.runtime.llama_library import chosen  # noqa: PLC0415 - part of an extra

    found = chosen()
    return "" if found is None else found.build


def _warn_of_writers(home: Path) -> None:
    """Log one warning if other users can change the data folder."""
    who = files.others_may_write(home) if home.exists() else None
    if who is not None:
        _log.warning(
            "The data folder %s can be changed by others (%s): they can change models and what was "
            "said; `chmod 700` it, or set RECOLLECT_HOME to a folder of yours.",
            home,
            who,
        )


def _store(
    home: Path, kv_disk: int | None, cipher: Cipher | None, runtime: PagedRuntime
) -> DiskStore | None:
    if not runtime.info.reuse.as_bytes:
        if kv_disk:
            _log.warning(
                "%s does not give its KV out, so none is written to disk: run the model on OpenVINO "
                "for that.",
                runtime.info.name,
            )
        return None
    folder = home / STORE_FOLDER
    sealer = None if cipher is None else cipher.for_purpose(KV_PURPOSE)
    with translated(folder):
        budget = (
            config.default_kv_disk_bytes(folder)
            if kv_disk is None
            else config.require_disk_size(kv_disk)
        )
    if kv_disk is None and not budget and is_there(folder):
        return open_existing(folder, sealer)  # the disk is full, but what is stored can be read
    return DiskStore(folder, budget_bytes=budget, sealer=sealer) if budget else None


_PADDING: Final = 0
"""The token id that pads the last block of a branch; every vocabulary has it."""
_BATCH_BYTES: Final = 16 << 20


def collect(model: Model, session: Session, *, progress: Progress = no_progress) -> Branch | None:
    """
    Return the KV of a session's branch up to its tip; KV that is missing is computed first.

    The last block is padded with tokens, because its free slots could hold KV of another conversation.

    Args:
        model: The session's model, which has a KV store on disk.
        session: A session on a branch.
        progress: Called while tokens are computed.

    Returns:
        None if the branch has less than one block, and the runtime cannot reuse a part of a block.

    Raises:
        StoreError: The model has no KV store on disk.
        ContextFullError: The branch does not fit the context.
    """
    engine = model.engine
    tier, size = require_tier(engine), engine.block_size
    ids = session.typed_ids()
    padded = [*ids, *[_PADDING] * (-len(ids) % size)]
    if not engine.info.reuse.inside_blocks or len(padded) > engine.info.context_length:
        ids = padded = ids[: len(ids) // size * size]
    if not ids:
        return None
    blocks = np.empty((len(padded) // size, engine.info.bytes_per_block), np.uint8)
    with in_memory(engine, padded, session.namespace, progress=progress) as held:
        for number, cached in enumerate(held.blocks):
            tier.read_block(cached, memoryview(blocks[number]))
    head = BranchHead(session.name or "", tier.identity, model.profile, size)
    return Branch(head, ids, blocks)


def why_not(model: Model, file: PortableFile) -> str | None:
    """Return the reason why a model cannot use the KV in a file; None: it can."""
    if file.head is None:
        return "the file has none"
    if not model.engine.info.reuse.as_bytes:
        return "this model's runtime does not take KV in"
    if model.engine.tier is None:
        return "there is no cache on disk here (--kv-disk)"
    here, there, info = model.engine.tier.identity, file.head.identity, model.engine.info
    reasons = {
        f"it is of another model than {model.name}": there.fingerprint != here.fingerprint,
        f"{there.runtime} computed it, and here is {here.runtime}": there.runtime != here.runtime,
        "it is in another precision than here": there.kv_format != here.kv_format,
        "its blocks have another size than here": (file.head.block_size, file.bytes_per_block)
        != (info.block_size, info.bytes_per_block),
        "it has tokens that the model does not know": max(file.token_ids) >= info.vocab_size,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def bring_in(model: Model, file: PortableFile) -> int:
    """
    Write the KV in a file to the model's store; return the number of its tokens.

    Blocks that are stored already are not written again. `why_not` must have returned None.

    Raises:
        StoreError: The store cannot be written, or has no room for all blocks.
        ConversationFileError: The file has changed since it was opened.
    """
    tier = require_tier(model.engine)
    with model.engine.lock:
        root = model.engine.cache.root().key
    keeps = model.engine.info.reuse.whole_tails
    keys: list[Key] = []
    batch: list[NewBlock] = []
    batch_bytes = 0
    for block in _named(root, file.blocks(), tier.store.chain_secret):
        keys.append(block.key)
        batch.append(block)
        batch_bytes += file.bytes_per_block
        if batch_bytes >= _BATCH_BYTES:
            tier.store.write(tier.identity, batch, keep_parts=keeps)
            batch, batch_bytes = [], 0
    tier.store.write(tier.identity, batch, keep_parts=keeps)
    if not tier.store.has_blocks(keys):
        raise StoreError("There is no room for its KV on disk: give the cache more (--kv-disk).")
    return len(file.token_ids)


def _named(root: Key, blocks: Iterable[CarriedBlock], secret: bytes) -> Iterator[NewBlock]:
    """Yield blocks with the keys that they have in a store with this root and secret."""
    parent = root
    for block in blocks:
        key = chained_key(parent, block.token_ids, secret)
        yield NewBlock(key, parent, parent == root, tuple(block.token_ids), block.payload.data)
        parent = key
