"""The answer to `wan-loader cache build` about the directory of a whole model."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from wan_loader import OptionError
from wan_pipeline.hub.comfy_layout import comfy_parts
from wan_pipeline.hub.layouts import layout_of

if TYPE_CHECKING:
    from wan_loader.cache import Outline

__all__ = ["outline_model"]


def outline_model(directory: str, dtype: str) -> Outline | None:
    """Describe the cache entry of a whole pipeline, with its experts as `dtype`; None for any other directory.

    Raises:
        OptionError: The pipeline extra is not installed.
        CheckpointError: The model is not complete.
    """
    root = Path(directory)
    if layout_of(root) is None and comfy_parts(root) is None:
        return None
    if find_spec("diffusers") is None:
        reason = "the entry of a whole pipeline needs the pipeline extra"
        raise OptionError.because(reason, "pip install 'wan-loader[pipeline]'")
    from wan_pipeline.pipeline_cache import outline_wan
    from wan_pipeline.wan_checkpoint import open_wan

    return outline_wan(open_wan(directory), dtype)
