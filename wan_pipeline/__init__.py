"""Text to video with WAN2.2, started as fast as the hardware allows.

Importing this package imports neither torch nor diffusers; the first call that needs them does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wan_pipeline.keymap import key_map
    from wan_pipeline.pipeline import Video, WanT2V, load_diffusers
    from wan_pipeline.wan_checkpoint import WanCheckpoint, open_wan

_LAZY = {
    "Video": "wan_pipeline.pipeline",
    "WanCheckpoint": "wan_pipeline.wan_checkpoint",
    "WanT2V": "wan_pipeline.pipeline",
    "key_map": "wan_pipeline.keymap",
    "load_diffusers": "wan_pipeline.pipeline",
    "open_wan": "wan_pipeline.wan_checkpoint",
}

__all__ = ["Video", "WanCheckpoint", "WanT2V", "key_map", "load_diffusers", "open_wan"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
