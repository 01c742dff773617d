"""A log that is rewritten from its own files, where a test has no store beside it."""

from __future__ import annotations

from imds.shard.aof import Aof
from imds.shard.examine import empty_store
from imds.shard.kernel import UnifiedStore
from imds.shard.manifest import Base
from imds.shard.rewrite import PIECE
from imds.storage import UntouchedStorage


def rewrite(aof: Aof) -> Base:
    """Do all steps at once; return the base, which is adopted."""
    store, sequence = read(aof)
    aof.prepare_switch()
    base = aof.new_base()
    for _ in store.save(base.log, PIECE):
        base.write(base.take())
    base.write(base.take())
    aof.switch()
    aof.settle()
    made = base.finish(sequence, aof.clock)
    aof.adopt(made)
    return made


def read(aof: Aof) -> tuple[UnifiedStore, int]:
    """Return the data of a log, which somebody has open, and the number of its next record."""
    store = empty_store()
    other = Aof(
        aof.directory, shard=aof.shard, generation=aof.generation, policy="no", storage=UntouchedStorage()
    )
    for _ in other.load(store.replay):
        pass
    other.close()
    return store, other.sequence
