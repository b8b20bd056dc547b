"""Names and shapes: taken from the classes of diffusers and transformers, built on the meta device.

The classes are the authority; nothing is listed by hand. Building even the largest takes about a second and no memory.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wan_pipeline.keymap import MapName, keymap

if TYPE_CHECKING:
    from wan_pipeline.synth.arch import Arch, DType, Stored, SynthName

__all__ = ["ITEMSIZE", "Q8_0", "SynthTensor", "component_tensors", "map_name", "meta_module", "native_tensors"]

ITEMSIZE: dict[Stored, int] = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1, "uint8": 1}
#: Elements and bytes of a block of Q8_0.
Q8_0 = (32, 34)


@dataclass(frozen=True, slots=True)
class SynthTensor:
    """One tensor of a checkpoint file that is to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: Stored
    seed_name: str
    """The name that the values depend on: component and diffusers name, so that the layouts hold the same values."""
    content: bytes | None = None
    """Its bytes, where they are not random."""

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The length of the data."""
        if self.dtype == "q8_0":
            return self.numel // Q8_0[0] * Q8_0[1]
        return self.numel * ITEMSIZE[self.dtype]

    @property
    def is_scale(self) -> bool:
        """True if it multiplies what a norm has normalised, so belongs near 1."""
        *_, owner, leaf = ("", *self.seed_name.split("."))
        return leaf == "gamma" or (leaf == "weight" and "norm" in owner)


def map_name(arch: Arch, component: SynthName) -> MapName:
    """Return the name of a component's key map."""
    return arch.network(component).map_name


def component_tensors(arch: Arch, component: SynthName, dtype: DType) -> tuple[SynthTensor, ...]:
    """List the tensors of one component under their diffusers names, in the order of the module; aliases left out."""
    name = map_name(arch, component)
    aliases = keymap(name).aliases
    state = meta_module(arch, name).state_dict()
    return tuple(
        SynthTensor(key, tuple(tensor.shape), dtype, f"{component}.{key}")
        for key, tensor in state.items()
        if key not in aliases
    )


def native_tensors(arch: Arch, component: SynthName, tensors: tuple[SynthTensor, ...]) -> tuple[SynthTensor, ...]:
    """Return the same tensors under their native names."""
    names = keymap(map_name(arch, component))
    return tuple(SynthTensor(names.to_native(t.name), t.shape, t.dtype, t.seed_name) for t in tensors)


@functools.lru_cache(maxsize=8)
def meta_module(arch: Arch, name: MapName) -> Any:
    """Build the module of one component on the meta device: `.config` and names, no weights."""
    import torch

    # imported outside of the mode, in which some versions of torch cannot import their compiler
    if name == "text_encoder":
        from transformers import UMT5Config, UMT5EncoderModel

        with torch.device("meta"):
            return UMT5EncoderModel(UMT5Config(**arch.text.transformers_config()))
    import diffusers

    cls: Any = diffusers.WanTransformer3DModel if name == "dit" else diffusers.AutoencoderKLWan
    config = (arch.dit if name == "dit" else arch.vae).diffusers_config()
    with torch.device("meta"):
        return cls(**config)
