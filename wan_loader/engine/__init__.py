"""The engine carries plans out: it reads, registers, submits copies, and cleans up behind them."""

from wan_loader.engine.transfer import Need, Steps, transfer_blocks
from wan_loader.engine.transfer_state import TransferState, TransferStats

__all__ = ["Need", "Steps", "TransferState", "TransferStats", "transfer_blocks"]
