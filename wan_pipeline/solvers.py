"""Schedulers as the official code sets them up: UniPC or DPM++ for flow matching, on the official grid of noise levels.

The official grid begins at 0.999, diffusers' at 1; with otherwise equal settings the videos differ visibly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
import torch

from wan_loader import OptionError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from wan_pipeline.video_request import Grid, Solver

__all__ = ["make_scheduler"]

_Unipc: Any = diffusers.UniPCMultistepScheduler
_Dpm: Any = diffusers.DPMSolverMultistepScheduler


def _set_official_grid(scheduler: Any, n_steps: int, device: Any) -> None:
    """Put the official noise levels, shifted, in the place of those that diffusers has just set."""
    shift = scheduler.config.flow_shift
    sigmas = np.linspace(0.999, 0.0, n_steps + 1)[:-1]  # the highest first
    sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    scheduler.sigmas = torch.from_numpy(np.append(sigmas, 0.0).astype(np.float32))
    scheduler.timesteps = torch.from_numpy(sigmas * scheduler.config.num_train_timesteps).to(device, torch.int64)


class OfficialUniPC(_Unipc):  # type: ignore[misc]
    """UniPC on the official grid."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """Set the steps as diffusers does, on the official grid."""
        super().set_timesteps(num_inference_steps, device=device)
        _set_official_grid(self, num_inference_steps, device)


class OfficialDpm(_Dpm):  # type: ignore[misc]
    """DPM++ on the official grid."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """Set the steps as diffusers does, on the official grid."""
        super().set_timesteps(num_inference_steps, device=device)
        _set_official_grid(self, num_inference_steps, device)


def make_scheduler(config: Mapping[str, Any], *, solver: Solver, shift: float, grid: Grid = "official") -> Any:
    """Make a scheduler from a checkpoint's scheduler configuration, with another solver, shift and grid.

    Raises:
        OptionError: There is no such solver or grid.
    """
    classes = {
        ("unipc", "official"): OfficialUniPC,
        ("unipc", "diffusers"): _Unipc,
        ("dpm++", "official"): OfficialDpm,
        ("dpm++", "diffusers"): _Dpm,
    }
    if (solver, grid) not in classes:
        raise OptionError.because(f"solver {solver!r} with grid {grid!r}", "use unipc or dpm++, official or diffusers")
    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    if solver == "dpm++":
        settings = {
            "algorithm_type": "dpmsolver++",
            "num_train_timesteps": settings.get("num_train_timesteps", 1000),
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
        }
    return classes[solver, grid](**{**settings, "flow_shift": shift})
