"""Carries out plans: reads, registers, submits copies, and cleans up behind them."""

from wan_loader.engine.transfer import Batch, TransferStats, run_transfer, transfer_blocks

__all__ = ["Batch", "TransferStats", "run_transfer", "transfer_blocks"]
