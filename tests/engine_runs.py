"""A transfer from beginning to end, for tests of the engine."""

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any, NamedTuple

from wan_loader.engine import Need, TransferState, transfer_blocks


class Batch(NamedTuple):
    """Some blocks, and what makes the memory that no earlier ones needed."""

    blocks: Sequence[Any]
    allocate: Callable[[], Sequence[Any]]


def run_transfer(batches, reader, writer, settings, observer=None, cancel=None):
    """Do as `transfer_blocks` does, to the end; returns what was done."""
    state, batches, batch, answer = TransferState(), iter(batches), None, None
    with closing(transfer_blocks(reader, writer, settings, state, cancel=cancel, observer=observer)) as steps:
        while True:
            try:
                step = steps.send(answer)
            except StopIteration:
                return state
            answer = None
            if step is Need.BLOCKS:
                batch = next(batches, None)
                answer = batch and batch.blocks
            elif step is Need.MEMORY:
                answer = batch.allocate()
