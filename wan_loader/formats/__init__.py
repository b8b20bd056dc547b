"""Checkpoint formats: bytes -> facts (name, dtype, shape, file, offset). Reads headers only, never weights."""

from wan_loader.formats.checkpoint import open_checkpoint
from wan_loader.formats.facts import Checkpoint, FileFacts, StorageFacts, TensorFacts

__all__ = ["Checkpoint", "FileFacts", "StorageFacts", "TensorFacts", "open_checkpoint"]
