"""Carries out plans: reads, registers, submits copies, and cleans up behind them."""

from wan_loader.engine.transfer import Carried, EngineSettings, Portion, carry_out

__all__ = ["Carried", "EngineSettings", "Portion", "carry_out"]
