"""The pool and its tables against a dictionary of lists, in any order of operations."""

from dataclasses import dataclass, field

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from recollect.engine.audit import check_pool
from recollect.engine.sequence import FeedPlan, Memory, Sequence
from recollect.errors import OutOfBlocksError
from recollect.kv.blocks import BlockPool, blocks_for
from recollect.kv.prefix import PrefixCache
from recollect.kv.record import Names
from recollect.runtime.base import RuntimeInfo

NUM_BLOCKS, SIZE = 12, 3


@dataclass
class Dumb:
    """A table as a list with the content of each slot, nothing shared and nothing saved."""

    table: Sequence
    slots: list[int] = field(default_factory=list)


class BlockMachine(RuleBasedStateMachine):
    """The memory is simulated: what is read through a table must be what was written through it."""

    tables = Bundle("tables")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, SIZE)
        info = RuntimeInfo("simulated", SIZE, SIZE, vocab_size=1, context_length=1000)
        self.shared = Memory(info, self.pool, PrefixCache(self.pool, Names("model")))
        self.memory = [[0] * SIZE for _ in range(NUM_BLOCKS)]
        self.alive: dict[int, Dumb] = {}
        self.written = 0

    @rule(target=tables)
    def new(self) -> Dumb:
        return self._born(Dumb(Sequence(self.shared, None)))

    @rule(dumb=tables, back=st.integers(0, 5), count=st.integers(1, 8))
    def write(self, dumb: Dumb, back: int, count: int) -> None:
        """Write from a little before the end, as a sequence does that gave up its last slots."""
        start = max(0, len(dumb.slots) - back)
        end = start + count
        before, free = list(dumb.table.blocks), self.pool.free_blocks
        planned = dumb.table.blocks_to_allocate(start, end)
        try:
            copies = dumb.table.prepare_write(start, end)
        except OutOfBlocksError as refused:
            assert (refused.needed, refused.free) == (planned, free)  # noqa: PT017
            assert planned > free
            assert list(dumb.table.blocks) == before
            return
        assert planned <= free
        for source, target in copies:
            self.memory[target] = self.memory[source][:]
        del dumb.slots[start:]
        for place in range(start, end):
            self.written += 1
            dumb.slots.append(self.written)
            self.memory[dumb.table.blocks[place // SIZE]][place % SIZE] = self.written
        dumb.table.written(FeedPlan(start, end), None)

    @rule(dumb=tables, length=st.integers(0, 20))
    def truncate(self, dumb: Dumb, length: int) -> None:
        dumb.table.truncate(min(length, len(dumb.slots)))
        del dumb.slots[length:]

    @rule(target=tables, dumb=tables, length=st.integers(0, 20))
    def fork(self, dumb: Dumb, length: int) -> Dumb:
        used = self.pool.used_blocks
        length = min(length, len(dumb.slots))
        other = self._born(Dumb(dumb.table.fork(), dumb.slots[:length]))
        other.table.truncate(length)
        assert self.pool.used_blocks == used
        return other

    @rule(dumb=consumes(tables))
    def drop(self, dumb: Dumb) -> None:
        dumb.table.release()
        del self.alive[id(dumb)]

    @invariant()
    def the_bookkeeping_is_right(self) -> None:
        tables = [dumb.table.blocks for dumb in self.alive.values()]
        check_pool(self.pool, tables)
        held = {block for table in tables for block in table}
        assert self.pool.used_blocks == len(held)
        assert self.pool.free_blocks == NUM_BLOCKS - len(held)

    @invariant()
    def every_table_reads_what_was_written_through_it(self) -> None:
        for dumb in self.alive.values():
            assert len(dumb.table.blocks) == blocks_for(len(dumb.slots), SIZE)
            read = [slot for block in dumb.table.blocks for slot in self.memory[block]]
            assert read[: len(dumb.slots)] == dumb.slots

    def _born(self, dumb: Dumb) -> Dumb:
        self.alive[id(dumb)] = dumb
        return dumb


TestBlocks = BlockMachine.TestCase
