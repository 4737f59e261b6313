"""
The models of a server: loaded when first asked for, given up when others need their memory.

Belongs to the event loop; loading and closing happen on threads of their own.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Final

from recollect.conversation.model import Model
from recollect.errors import UnknownModelError
from recollect.server.errors import ApiError, stopping
from recollect.server.threads import on_thread

_log = logging.getLogger(__name__)

Loader = Callable[[str], Model]
"""Loads a model by the name that `recollect.load` takes; called on a thread."""


@dataclass(slots=True, eq=False)
class _Loaded:
    model: Model
    memory_bytes: int
    leases: int = 0
    last_used_s: float = field(default_factory=monotonic)


class Lease:
    """A model that stays loaded until the lease is given back."""

    def __init__(self, hub: "ModelHub", name: str, loaded: _Loaded) -> None:
        self._hub: ModelHub | None = hub
        self._loaded = loaded
        self.name: Final = name
        self.model: Final = loaded.model
        loaded.leases += 1
        loaded.last_used_s = monotonic()

    def release(self) -> None:
        """Let the model be given up again; calling it again does nothing."""
        hub, self._hub = self._hub, None
        if hub is not None:
            self._loaded.leases -= 1
            self._loaded.last_used_s = monotonic()


class ModelHub:
    """
    Models by name.

    What a client says chooses among the names that the operator gave; it is never a path, and
    never starts a download of anything else.

    Invariants:
        1. A model with a lease is loaded.
        2. The models loaded take at most the memory budget, or there is only one.
    """

    def __init__(
        self,
        load: Loader,
        names: Sequence[str],
        *,
        aliases: Mapping[str, str] | None = None,
        memory_bytes: int | None = None,
        weight_bytes: Callable[[str], int] = lambda _: 0,
        on_load: Callable[[Model], object] = lambda _: None,
    ) -> None:
        """
        Args:
            load: See `Loader`.
            names: What may be loaded; the first is the default.
            aliases: Other names for those.
            memory_bytes: For weights and KV of all models together; None: no limit.
            weight_bytes: Returns what a model takes on disk, which is about what its weights take.
            on_load: Called on the event loop with each model that was loaded; returns at once.
        """
        assert names, "a server has a model"
        self._load = load
        self.names: Final = tuple(dict.fromkeys(names))
        self._aliases = dict(aliases or {})
        self._memory_bytes = memory_bytes
        self.weight_bytes: Final = weight_bytes
        self._on_load = on_load
        self._loaded: Mapping[str, _Loaded] = {}  # replaced and never changed: threads look at it
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._one_at_a_time = asyncio.Lock()
        self._given_up = asyncio.Event()
        self._threads_loading = 0
        self.failure: Exception | None = None
        """Why the default model could not be loaded."""

    @property
    def default(self) -> str:
        """Return the model of requests that name none."""
        return self.names[0]

    @property
    def is_loading(self) -> bool:
        """Return whether a thread is loading a model, which may go on after `close`."""
        return self._threads_loading > 0

    @property
    def is_ready(self) -> bool:
        """Return whether some model can answer now."""
        return bool(self._loaded)

    def loaded(self) -> dict[str, Model]:
        """Return what is loaded now; may be called on any thread."""
        return {name: one.model for name, one in self._loaded.items()}

    def resolve(self, name: str | None) -> str:
        """
        Return which model a client means.

        Raises:
            UnknownModelError: None of those that it may ask for.
        """
        wanted = self._aliases.get(name or self.default, name or self.default)
        if wanted not in self.names:
            known = ", ".join(self.names)
            raise UnknownModelError(f"There is no model {name!r} here: choose one of {known}.")
        return wanted

    async def acquire(self, name: str | None) -> Lease:
        """
        Return a model, loaded if it was not; give the lease back.

        Raises:
            UnknownModelError: There is none of that name.
            ModelError: It cannot be loaded.
            ApiError: The models in use leave no memory for it, or all are given up.
        """
        wanted = self.resolve(name)
        if self._given_up.is_set():  # those that went before have ended, so that this has its turn
            raise stopping()
        while (loaded := self._loaded.get(wanted)) is None:
            task = self._loading.get(wanted)
            if task is None:
                task = asyncio.get_running_loop().create_task(self._bring(wanted))
                self._loading[wanted] = task
                task.add_done_callback(lambda _: self._loading.pop(wanted, None))
            await self._unless_given_up(task)
            if self._given_up.is_set():
                raise stopping()
            # A client that goes away does not take the model from the others who wait, and each of
            # them is told what it failed with.
            await asyncio.shield(task)
        return Lease(self, wanted, loaded)

    def give_up(self) -> None:
        """Wait for no model any more that is being loaded, and refuse whoever asks for one."""
        self._given_up.set()

    async def close(self) -> None:
        """Give up all models; replies that are still generated end as cancelled."""
        for task in list(self._loading.values()):
            await self._unless_given_up(task)
        for name in list(self._loaded):
            await self._unload(name)

    async def _unless_given_up(self, task: asyncio.Task[None]) -> None:
        """Wait for a task, which goes on where this is cancelled, or until all are given up."""
        given_up = asyncio.ensure_future(self._given_up.wait())
        try:
            await asyncio.wait({task, given_up}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            given_up.cancel()

    async def _bring(self, name: str) -> None:
        async with self._one_at_a_time:
            await self._make_room(name)
            begun = monotonic()
            model = await on_thread(lambda: self._load_counted(name))
            taken = self.weight_bytes(name) + _kv_bytes(model)
            self._loaded = {**self._loaded, name: _Loaded(model, taken)}
            self._on_load(model)
            _log.info("loaded %s in %.1f s", name, monotonic() - begun)
            if self._memory_bytes is not None and taken > self._memory_bytes:
                _log.warning(
                    "%s takes about %s bytes with its KV, and --memory allows %s: it "
                    "stays loaded alone; give less --kv-memory, or more --memory.",
                    name,
                    *(f"{size:,}" for size in (taken, self._memory_bytes)),
                )
            await self._give_up_idle(keep=name)

    def _load_counted(self, name: str) -> Model:
        self._threads_loading += 1  # one at a time
        try:
            return self._load(name)
        finally:
            self._threads_loading -= 1

    async def _make_room(self, name: str) -> None:
        """Give up what is not in use, the least recently used first, until the weights fit."""
        if self._memory_bytes is None:
            return
        room = self._memory_bytes - self.weight_bytes(name)
        while self._loaded and self._taken_bytes() > room:
            idle = self._idle()
            if not idle:
                raise ApiError(
                    f"The models in use leave no memory for {name}: ask again when they are done.",
                    status=503,
                    kind="server_error",
                    code="out_of_memory",
                    headers={"Retry-After": "10"},
                )
            await self._unload(idle[0])

    async def _give_up_idle(self, *, keep: str) -> None:
        """Stay within the budget now that it is known how much KV memory a model took."""
        while self._memory_bytes is not None and self._taken_bytes() > self._memory_bytes:
            idle = [name for name in self._idle() if name != keep]
            if not idle:
                break
            await self._unload(idle[0])

    def _taken_bytes(self) -> int:
        return sum(one.memory_bytes for one in self._loaded.values())

    def _idle(self) -> list[str]:
        """Return the models that nobody uses, the least recently used first."""
        idle = [(one.last_used_s, name) for name, one in self._loaded.items() if not one.leases]
        return [name for _, name in sorted(idle)]

    async def _unload(self, name: str) -> None:
        loaded = self._loaded[name]
        self._loaded = {other: one for other, one in self._loaded.items() if other != name}
        await asyncio.to_thread(loaded.model.close)
        _log.info("unloaded %s", name)


def _kv_bytes(model: Model) -> int:
    engine = model.engine
    return engine.pool.num_blocks * engine.info.bytes_per_block
