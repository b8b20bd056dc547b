"""What `wan-pipeline` imports when it starts, for the stand-by server."""

from __future__ import annotations

__all__ = ["modules_of_a_start"]


def modules_of_a_start() -> tuple[str, ...]:
    """Name the modules, each with all that it imports itself; nothing is imported here."""
    return (
        "torch",
        "safetensors.torch",
        "transformers.models.auto.tokenization_auto",
        "transformers.models.umt5.modeling_umt5",
        "diffusers.models.autoencoders.autoencoder_kl_wan",
        "diffusers.models.transformers.transformer_wan",
        "diffusers.pipelines.wan.pipeline_wan",
        "wan_loader.api",
        "wan_pipeline.commands.app",
        "wan_pipeline.pipeline",
        "wan_pipeline.startup",
    )
