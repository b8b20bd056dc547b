"""Carries out plans: the only threads of the package."""

from wan_loader.engine.carry import Carried, EngineSettings, carry_out

__all__ = ["Carried", "EngineSettings", "carry_out"]
