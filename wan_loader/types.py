"""Names for types that several modules share."""

from __future__ import annotations

import os
from typing import Literal, get_args

__all__ = ["IO_MODES", "IoMode", "Slices", "StrPath"]

StrPath = str | os.PathLike[str]

IoMode = Literal["auto", "mapped", "direct", "buffered"]
IO_MODES: tuple[str, ...] = get_args(IoMode)

#: A part of a tensor: rows, as a slice or as (start, stop); or a slice for each of its first dimensions.
Slices = slice | tuple[int, int] | tuple[slice, ...]
