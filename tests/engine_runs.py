"""A transfer from beginning to end, for tests of the engine."""

from wan_loader.engine import TransferState, transfer_blocks


def run_transfer(batches, reader, writer, settings, observer=None, cancel=None):
    """Do as `transfer_blocks` does, to the end; returns what was done."""
    state = TransferState()
    for _ in transfer_blocks(batches, reader, writer, settings, state, cancel=cancel, observer=observer):
        pass
    return state
