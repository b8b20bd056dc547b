"""All that is particular to a model: a frozen value, which other code asks instead of comparing names of models.

`families.py` holds the values. A new model is a value there, as long as its networks are of the kinds that `configs`
and `keymap` know. Nothing here opens a file or imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from wan_pipeline.keymap import MapName

__all__ = [
    "EXPERTS",
    "Arrangement",
    "ComponentName",
    "Defaults",
    "Layout",
    "ModelFamily",
    "Network",
    "Sizes",
    "SynthName",
]

#: native: as the official code reads it; diffusers: a directory for each component.
Layout = Literal["native", "diffusers"]
#: All that a checkpoint may come in. comfy: a file for each network, in ComfyUI's folders; files: named one by one.
Arrangement = Literal["native", "diffusers", "comfy", "files"]
#: What diffusers' pipelines call their networks.
ComponentName = Literal["text_encoder", "transformer", "transformer_2", "vae"]
#: What `synth` calls them.
SynthName = Literal["text_encoder", "high_noise", "low_noise", "transformer", "vae"]
#: The networks that denoise, whichever of them a model has.
EXPERTS: tuple[ComponentName, ...] = ("transformer", "transformer_2")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Network:
    """One network of a model: its names, the place where the layouts keep it, and how its module is made."""

    name: ComponentName
    """The name in diffusers' pipelines; also its directory in the diffusers layout."""
    kind: Literal["text_encoder", "dit", "vae"]
    title: str
    """The name in messages."""
    synth_name: SynthName
    map_name: MapName
    """The table of `keymap` for its tensors."""
    module: tuple[str, str]
    """Library and class."""
    native: str
    """Its file in the native layout, or the directory of its shards; "" is the checkpoint's own directory."""
    native_word: str = ""
    """A word in the names of its file, whoever has saved it again."""
    native_mark: str = ""
    """A pattern in such names that other models' do not have."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the class that the native layout says nowhere and that do not follow from shapes."""
    blocks: str = ""
    """The dotted name of the list of its repeated blocks, which can be streamed; "" if it has none."""
    keep_fp32: tuple[str, ...] = ()
    """Parts of names of tensors that stay fp32 when the network is converted, in the words of both layouts."""
    encodes_only: tuple[str, ...] = ()
    """Beginnings of names, in both layouts, of what making a video from text never uses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """Settings of a video of which nothing else was said, as the official program has them."""

    size: tuple[int, int]
    """Width and height in pixels."""
    frame_num: int
    steps: int
    shift: float
    guide_scale: tuple[float, float]
    """Guidance of the low-noise and of the high-noise expert."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The published numbers; they tell models of one structure apart, and `synth` makes weights in these shapes."""

    heads: int
    head_dim: int = 128
    ffn_dim: int
    layers: int
    channels: int
    """Latent channels: what a denoising network takes and gives, and what the VAE has."""
    vae_base: int
    vae_decoder_base: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModelFamily:
    """A model: compared by identity, there is one value of each."""

    task: str
    """Its name in `--task`."""
    title: str
    repositories: Mapping[Layout, str]
    """The repository in which each layout is published."""
    networks: tuple[Network, ...]
    """The networks in the order of first use."""
    tokenizer: Mapping[Layout, str]
    """The tokenizer's directory."""
    scheduler: Mapping[str, Any]
    """The scheduler's configuration, as published for diffusers."""
    boundary_ratio: float | None
    """The share of the noise schedule from which on the high-noise expert runs; None where there is one transformer."""
    expand_timesteps: bool
    """True if diffusers' pipeline gives each token a timestep of its own."""
    defaults: Defaults
    fps: int
    """Frames per second of its videos."""
    sizes: Sizes
    comfy: Mapping[SynthName, str]
    """What ComfyUI's files of its networks are called, without what tells how they are stored."""
    marks: Mapping[SynthName, tuple[str, ...]]
    """What the names of such files have in common, whoever made them: words, to be looked for among letters and digits
    alone.
    """

    @property
    def experts(self) -> tuple[Network, ...]:
        """The networks that denoise, in the order in which they run."""
        return tuple(network for network in self.networks if network.kind == "dit")

    def __getitem__(self, name: str) -> Network:
        return next(network for network in self.networks if network.name == name)
