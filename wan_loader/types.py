"""Names for types that several modules share."""

from __future__ import annotations

import os
from typing import Literal, get_args

__all__ = ["IO_MODES", "IoMode", "StrPath"]

StrPath = str | os.PathLike[str]

IoMode = Literal["auto", "mapped", "direct", "buffered"]
IO_MODES: tuple[str, ...] = get_args(IoMode)
