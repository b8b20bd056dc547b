"""Which dtype each tensor gets: a pure rule, the same as diffusers and transformers apply."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from wan_loader.dtypes import FLOATING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

__all__ = ["DtypeRule", "has_part"]


def has_part(name: str, parts: Iterable[str]) -> bool:
    """Whether a name contains one of these as whole dotted parts: "blocks.0.norm2" has "norm2" and "blocks.0"."""
    dotted = f".{name}."
    return any(f".{part}." in dotted for part in parts)


@dataclass(frozen=True, slots=True)
class DtypeRule:
    """`dtype` applies to floating tensors; None leaves every tensor as it is in the file."""

    dtype: str | None = None
    keep_fp32: tuple[str, ...] = ()
    """Tensors whose name has one of these parts (`has_part`) become float32 when a dtype is asked for, as diffusers'
    `_keep_in_fp32_modules`."""

    module_names: Mapping[str, str] = field(default_factory=dict)
    """What a tensor is called in the module, where that differs from the checkpoint."""

    def target(self, name: str, source: str) -> str:
        """The dtype that a tensor of dtype `source` gets."""
        if self.dtype is None or source not in FLOATING:
            return source
        if self.keep_fp32 and has_part(self.module_names.get(name, name), self.keep_fp32):
            return "float32"
        return self.dtype

    def unused_parts(self, names: Collection[str]) -> list[str]:
        """Those of `keep_fp32` that none of these names has."""
        return [part for part in self.keep_fp32 if not any(has_part(name, (part,)) for name in names)]
