"""The engine carries plans out: it reads, registers, submits copies, and cleans up behind them."""

from wan_loader.engine.convert import convert_blocks
from wan_loader.engine.transfer import Need, Steps, transfer_blocks
from wan_loader.engine.transfer_state import TransferState, TransferStats

__all__ = ["Need", "Steps", "TransferState", "TransferStats", "convert_blocks", "transfer_blocks"]
