"""Carries out plans: reads, registers, submits copies, and cleans up behind them."""

from wan_loader.engine.state import TransferState, TransferStats
from wan_loader.engine.transfer import Need, Steps, transfer_blocks

__all__ = ["Need", "Steps", "TransferState", "TransferStats", "transfer_blocks"]
