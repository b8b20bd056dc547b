"""Frames to an mp4 file: written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan_loader.errors import OutputError

if TYPE_CHECKING:
    import numpy as np

    from wan_loader.types import StrPath

__all__ = ["check_writable", "write_mp4"]

_QUALITY = 8


def check_writable(path: Path, *, force: bool) -> None:
    """`OutputError` now rather than after the work, if `path` cannot be written."""
    if path.exists() and not force:
        raise OutputError(f"{path} exists: choose another name, or overwrite it with --force")
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise OutputError(f"{path} cannot be written: {path.parent} is no directory that you may write to")


def write_mp4(path: StrPath, frames_THWC: np.ndarray, fps: int) -> None:
    """Write frames of floats from 0 to 1 as H.264. The same frames give the same file."""
    import imageio

    get_writer: Any = imageio.get_writer
    target = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{target.stem}.", suffix=".mp4", dir=target.parent)
    os.close(handle)
    try:
        with get_writer(
            name, format="FFMPEG", fps=fps, codec="libx264", quality=_QUALITY, macro_block_size=1
        ) as writer:
            for frame_HWC in frames_THWC:
                writer.append_data((frame_HWC * 255).astype("uint8"))
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, target)
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error}") from error
    finally:
        Path(name).unlink(missing_ok=True)


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value
