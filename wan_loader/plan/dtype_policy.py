"""The dtype of each tensor: a pure rule, the same as diffusers and transformers apply."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from wan_loader.dtypes import FLOATING
from wan_loader.errors import CheckpointError
from wan_loader.formats.scales import FLOAT8, find_scales
from wan_loader.sizes import format_count

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from wan_loader.formats.checkpoint_facts import Checkpoint, TensorFacts

__all__ = ["DtypePolicy", "has_part"]


def has_part(name: str, parts: Iterable[str]) -> bool:
    """Return whether a name has one of these as whole dotted parts: "blocks.0.norm2" has "norm2" and "blocks.0"."""
    dotted = f".{name}."
    return any(f".{part}." in dotted for part in parts)


def _scales_of(names: Sequence[str], scales: Mapping[str, str]) -> str:
    """Say what is to be known about quantised tensors, with one as an example."""
    weight, scale = names[0], scales[names[0]]
    verb = "is right" if len(names) == 1 else "are right"
    return f"{format_count(len(names), 'quantised tensor')} {verb} only with a scale, such as {weight!r} with {scale!r}"


@dataclass(frozen=True, slots=True)
class DtypePolicy:
    """The dtypes that tensors get: `dtype` for floating ones; None leaves every tensor as it is in the file."""

    dtype: str | None = None
    keep_fp32: tuple[str, ...] = ()
    """Parts of names (`has_part`): tensors that have one become float32 when a dtype is asked for, as diffusers'
    `_keep_in_fp32_modules`.
    """

    module_names: Mapping[str, str] = field(default_factory=dict)
    """The name of a tensor in the module, where that differs from the checkpoint."""

    exact: Mapping[str, str] = field(default_factory=dict)
    """The dtypes of single tensors by their names, which count more than all else."""

    @property
    def may_convert(self) -> bool:
        """Whether some tensor may get another dtype than it has in the file."""
        return self.dtype is not None or bool(self.exact)

    def target(self, name: str, source: str) -> str:
        """Return the dtype that a tensor of dtype `source` gets."""
        if name in self.exact:
            return self.exact[name]
        if self.dtype is None or source not in FLOATING:
            return source
        # by the name in the module, which is what diffusers' list speaks of
        if self.keep_fp32 and has_part(self.module_names.get(name, name), self.keep_fp32):
            return "float32"
        return self.dtype

    def check(self, checkpoint: Checkpoint, wanted: Sequence[TensorFacts]) -> list[str]:
        """Say what is to be known about quantised tensors among those that are wanted; usually nothing.

        Raises:
            CheckpointError: Some would be converted without the scale by which they are to be multiplied, or cannot be
                made into numbers.
        """
        if stays := [t.name for t in wanted if t == getattr(checkpoint.quantised.get(t.name), "raw", None)]:
            return self._check_raw(checkpoint, stays)
        scales = find_scales(checkpoint.tensors)
        quantised = [t for t in wanted if t.name in scales] if scales else []
        floats = [t.name for t in quantised if t.dtype in FLOAT8]
        if floats and self.dtype is not None:
            reason = f"{_scales_of(floats, scales)}; converting to {self.dtype} would leave scales out"
            remedy = "load the file without a dtype and apply them, or get a file that is not quantised"
            raise CheckpointError(
                f"{checkpoint.path}: {reason}: {remedy}",
                path=checkpoint.path,
                tensor=floats[0],
                reason=reason,
                remedy=remedy,
            )
        if floats:
            return [f"{_scales_of(floats, scales)}: loaded as they are in the file"]
        if quantised and self.dtype is not None:
            return [f"{_scales_of([t.name for t in quantised], scales)}: not converted, only their scales are"]
        return []

    def _check_raw(self, checkpoint: Checkpoint, names: Sequence[str]) -> list[str]:
        """Say what is to be known about tensors that stay quantised: raise if numbers were asked for."""
        quantised = [checkpoint.quantised[name] for name in names]
        bad = next((one for one in quantised if one.problem is not None), None)
        if self.dtype is not None and bad is not None:
            name, remedy = bad.raw.name, "load the file without a dtype, or get one that is not quantised so"
            raise CheckpointError(
                f"{checkpoint.path}: tensor {name!r} {bad.problem}: {remedy}",
                path=checkpoint.path,
                tensor=name,
                reason=bad.problem,
                remedy=remedy,
            )
        kinds = ", ".join(sorted({one.kind for one in quantised}))
        count = format_count(len(names), "quantised tensor")
        return [f"{count} ({kinds}): loaded as the blocks that the file holds; with a dtype, numbers are made of them"]

    def unused_parts(self, names: Collection[str]) -> list[str]:
        """Return the parts of `keep_fp32` that none of these names has."""
        return [part for part in self.keep_fp32 if not any(has_part(name, (part,)) for name in names)]
