"""The architectures: every number that the synthetic checkpoints are made from, in one place.

`ARCHS` holds one `Arch` for each model and size; the functions below turn it into the configurations that the layouts
keep in files. "full" is what is published, "tiny" has the same parts, names and depth of nesting, and runs on a CPU
within a second. No torch, no diffusers: shapes come from `synth_tensors.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from wan_loader import OptionError
from wan_pipeline.families import FAMILIES, Task
from wan_pipeline.model_family import Layout, ModelFamily, Network, SynthName

__all__ = ["ARCHS", "Arch", "DType", "Dit", "Form", "Layout", "Size", "Stored", "SynthName", "Task", "Text", "Vae"]

Size = Literal["tiny", "full"]
DType = Literal["fp32", "bf16", "fp16"]
#: How files are stored: as they are published, or as ComfyUI has them (plain, or quantised in one of two ways).
Form = Literal["published", "comfy", "fp8-scaled", "gguf"]
#: What a tensor of a file may be: "fp8" is to be multiplied by a scale, "q8_0" is GGUF's, "uint8" is a file in a file.
Stored = Literal["fp32", "bf16", "fp16", "fp8", "q8_0", "uint8"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dit:
    """A WAN diffusion transformer."""

    heads: int
    head_dim: int
    ffn_dim: int
    layers: int
    channels: int
    """The number of latent channels, in and out."""
    text_dim: int = 4096
    freq_dim: int = 256

    def diffusers_config(self) -> dict[str, Any]:
        """Return the configuration as diffusers keeps it."""
        return {
            "added_kv_proj_dim": None,
            "attention_head_dim": self.head_dim,
            "cross_attn_norm": True,
            "eps": 1e-06,
            "ffn_dim": self.ffn_dim,
            "freq_dim": self.freq_dim,
            "image_dim": None,
            "in_channels": self.channels,
            "num_attention_heads": self.heads,
            "num_layers": self.layers,
            "out_channels": self.channels,
            "patch_size": [1, 2, 2],
            "pos_embed_seq_len": None,
            "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": 1024,
            "text_dim": self.text_dim,
        }

    def native_config(self, model_type: str) -> dict[str, Any]:
        """Return the published keys and no others: `text_dim` is not among them."""
        return {
            "_class_name": "WanModel",
            "dim": self.heads * self.head_dim,
            "eps": 1e-06,
            "ffn_dim": self.ffn_dim,
            "freq_dim": self.freq_dim,
            "in_dim": self.channels,
            "model_type": model_type,
            "num_heads": self.heads,
            "num_layers": self.layers,
            "out_dim": self.channels,
            "text_len": 512,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A umT5 encoder."""

    vocab: int
    d_model: int
    d_kv: int
    heads: int
    d_ff: int
    layers: int

    def transformers_config(self) -> dict[str, Any]:
        """Return the configuration as transformers keeps it."""
        return {
            "d_ff": self.d_ff,
            "d_kv": self.d_kv,
            "d_model": self.d_model,
            "dropout_rate": 0.1,
            "feed_forward_proj": "gated-gelu",
            "num_heads": self.heads,
            "num_layers": self.layers,
            "relative_attention_max_distance": 128,
            "relative_attention_num_buckets": 32,
            "vocab_size": self.vocab,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Vae:
    """A WAN VAE: 2.1, or 2.2 where `decoder_base` is given."""

    base: int
    z: int
    decoder_base: int | None = None

    def diffusers_config(self) -> dict[str, Any]:
        """Return the configuration as diffusers keeps it."""
        config: dict[str, Any] = {
            "attn_scales": [],
            "base_dim": self.base,
            "dim_mult": [1, 2, 4, 4],
            "dropout": 0.0,
            "num_res_blocks": 2,
            "temperal_downsample": [False, True, True],
            "z_dim": self.z,
        }
        if self.decoder_base is not None:
            # the published statistics of the latents belong to the published weights; random ones have none
            config |= {
                "decoder_base_dim": self.decoder_base,
                "in_channels": 12,
                "is_residual": True,
                "latents_mean": [0.0] * self.z,
                "latents_std": [1.0] * self.z,
                "out_channels": 12,
                "patch_size": 2,
                "scale_factor_spatial": 16,
            }
        return config


@dataclass(frozen=True, slots=True, kw_only=True)
class Arch:
    """The architecture of one model at one size."""

    family: ModelFamily
    size: Size
    dit: Dit
    text: Text
    vae: Vae
    std: float
    """The standard deviation of the weights: small against 1/sqrt(fan-in), nothing overflows; large, all saturates."""
    pool_elements: int
    """The number of random values; every tensor is a window of them. Odd, so that no repeat falls on a page border."""

    @property
    def task(self) -> str:
        """The model's name in `--task`."""
        return self.family.task

    @property
    def model_type(self) -> str:
        """What the native configuration of its experts says it is."""
        return self.task.partition("-")[0]

    @property
    def components(self) -> tuple[SynthName, ...]:
        """The networks, in the order of first use."""
        return tuple(network.synth_name for network in self.family.networks)

    @property
    def experts(self) -> tuple[SynthName, ...]:
        """The diffusion transformers, in the order in which they run."""
        return tuple(network.synth_name for network in self.family.experts)

    def network(self, component: SynthName) -> Network:
        """Return what the family says of a network."""
        return next(network for network in self.family.networks if network.synth_name == component)

    def with_blocks(self, blocks: int | None) -> Arch:
        """Return the same with only the first `blocks` blocks of each diffusion transformer.

        Raises:
            OptionError: There are not so many.
        """
        if blocks is None:
            return self
        if not 1 <= blocks <= self.dit.layers:
            raise OptionError.because(
                f"--blocks {blocks}", f"{self.task} in size {self.size} has 1 to {self.dit.layers}"
            )
        return replace(self, dit=replace(self.dit, layers=blocks))


_TEXT = Text(vocab=256384, d_model=4096, d_kv=64, heads=64, d_ff=10240, layers=24)
_TINY_TEXT = Text(vocab=512, d_model=32, d_kv=8, heads=4, d_ff=64, layers=2)
_FULL_POOL, _TINY_POOL = (1 << 24) - 3, (1 << 18) - 5


def _full(family: ModelFamily) -> Arch:
    sizes = family.sizes
    return Arch(
        family=family,
        size="full",
        dit=Dit(
            heads=sizes.heads,
            head_dim=sizes.head_dim,
            ffn_dim=sizes.ffn_dim,
            layers=sizes.layers,
            channels=sizes.channels,
        ),
        text=_TEXT,
        vae=Vae(base=sizes.vae_base, decoder_base=sizes.vae_decoder_base, z=sizes.channels),
        std=0.02,
        pool_elements=_FULL_POOL,
    )


def _tiny(family: ModelFamily) -> Arch:
    """Make the same with as few numbers as the classes allow; channels stay, by which models are told apart."""
    channels = family.sizes.channels
    return Arch(
        family=family,
        size="tiny",
        dit=Dit(heads=8, head_dim=12, ffn_dim=192, layers=4, channels=channels, text_dim=32, freq_dim=64),
        text=_TINY_TEXT,
        vae=Vae(base=4, decoder_base=None if family.sizes.vae_decoder_base is None else 4, z=channels),
        std=0.05,
        pool_elements=_TINY_POOL,
    )


ARCHS: dict[tuple[str, Size], Arch] = {
    (arch.task, arch.size): arch for family in FAMILIES for arch in (_full(family), _tiny(family))
}
