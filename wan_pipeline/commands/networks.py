"""The answer to `wan-loader standby keep` about the directory of a whole model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from wan_loader import DtypePolicy
from wan_loader.dtypes import dtype_name
from wan_pipeline.hub.comfy_layout import comfy_parts
from wan_pipeline.hub.layouts import layout_of

if TYPE_CHECKING:
    from wan_loader import Checkpoint

__all__ = ["networks_of"]


def networks_of(directory: str, dtype: str | None) -> list[tuple[Checkpoint, DtypePolicy]] | None:
    """Return the networks of a pipeline with the dtypes that `WanT2V` loads them in; None for any other directory.

    Args:
        directory: The directory.
        dtype: The dtype of the experts; None is that of the presets.

    Raises:
        CheckpointError: The model is not complete.
    """
    root = Path(directory)
    if layout_of(root) is None and comfy_parts(root) is None:
        return None
    from wan_pipeline.fitting import network_dtype
    from wan_pipeline.presets import load_preset
    from wan_pipeline.start_options import StartOptions
    from wan_pipeline.wan_checkpoint import open_wan

    options = StartOptions(dtype=dtype)
    preset = load_preset("fastest").adapted(dtype=dtype)  # all presets have the same dtypes
    return [
        (one.facts, DtypePolicy(dtype_name(network_dtype(one, preset, options)), one.keep_fp32))
        for one in open_wan(root).components
    ]
