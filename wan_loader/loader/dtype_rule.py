"""Which dtype each tensor gets: a pure rule, the same as diffusers and transformers apply."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from wan_loader.dtypes import FLOATING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["DtypeRule"]


@dataclass(frozen=True, slots=True)
class DtypeRule:
    """`dtype` applies to floating tensors; None leaves every tensor as it is in the file."""

    dtype: str | None = None
    keep_fp32: tuple[str, ...] = ()
    """Tensors whose name contains one of these as whole dotted parts ("norm2", "blocks.0.norm2") become float32
    when a dtype is asked for, as diffusers' `_keep_in_fp32_modules`."""

    module_names: Mapping[str, str] = field(default_factory=dict)
    """What a tensor is called in the module, where that differs from the checkpoint."""

    def target(self, name: str, source: str) -> str:
        """The dtype that a tensor of dtype `source` gets."""
        if self.dtype is None or source not in FLOATING:
            return source
        if self.keep_fp32:
            dotted = f".{self.module_names.get(name, name)}."
            if any(f".{part}." in dotted for part in self.keep_fp32):
                return "float32"
        return self.dtype

    def unused_parts(self, names: Iterable[str]) -> list[str]:
        """Those of `keep_fp32` that none of these names contains."""
        dotted = [f".{name}." for name in names]
        return [part for part in self.keep_fp32 if not any(f".{part}." in name for name in dotted)]
